"""Tensors whose collective may still run: kernels get the memory they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

from implementations import TRITON_STORED, WITH_TRITON
from logitless.dtensors import wait_tensor
from problems import generator

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_its_memory(group):
    tensor = all_reduce(torch.arange(3.0), "sum", group)
    assert isinstance(tensor, AsyncCollectiveTensor)
    assert tensor.data_ptr() == 0
    plain = wait_tensor(tensor)
    assert type(plain) is torch.Tensor
    assert plain.tolist() == [0, 1, 2]


@pytest.mark.skipif(not WITH_TRITON or torch.cuda.is_available(), reason="for Triton's interpreter")
def test_kernels_get_it(group):
    hidden = torch.randn(5, 16, generator=generator(1))
    weight = torch.randn(40, 16, generator=generator(2)).requires_grad_()
    target = torch.arange(5)
    losses = [
        TRITON_STORED.linear_cross_entropy(given, weight, target)
        for given in (hidden, all_reduce(hidden, "sum", group))
    ]
    assert torch.equal(*losses)
    first, second = (torch.autograd.grad(loss, weight)[0] for loss in losses)
    assert torch.equal(first, second)
