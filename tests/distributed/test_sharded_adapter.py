"""``adapter`` with the vocabulary in shards: each rank has its rows of both weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import workers
from torch import Tensor
from workers import Member

import logitless
from implementations import KEEP_ALL
from problems import generator

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

TOKENS, HIDDEN, VOCABULARY, RANK = 12, 8, 50, 3


@dataclass(frozen=True)
class Adapted:
    """Loss and gradients; the first rank has ``cut`` rows, the second the rest. Called alone, one has all."""

    cut: int
    gradient: str | logitless.Sampled

    def __call__(self, member: Member | None) -> dict[str, Tensor]:
        random = generator(0)
        sizes = ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (TOKENS, RANK), (VOCABULARY, RANK))
        hidden, weight, low, appended = (torch.randn(*size, generator=random) for size in sizes)
        target = torch.randint(VOCABULARY, (TOKENS,), generator=random)
        rows = slice(None) if member is None else (slice(0, self.cut), slice(self.cut, None))[member.rank]
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, low, appended[rows])]
        loss = logitless.linear_cross_entropy(
            leaves[0],
            weight[rows],
            target,
            adapter=(leaves[1], leaves[2]),
            gradient=self.gradient,
            group=None if member is None else member.group,
        )
        loss.backward()
        names = ("hidden", "low", "appended")
        return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}}


CASES = {
    f"{gradient}, {cut} rows": Adapted(cut, gradient)
    for gradient in ("exact", logitless.Sampled(KEEP_ALL))
    for cut in (20, 0)
}


def test_results_of_one_process(tmp_path: Path):
    """To a few roundings of another order of additions."""
    for name, outcomes in workers.run(CASES, 2, tmp_path, 60).items():
        expected, (first, second) = CASES[name](None), workers.values(outcomes)
        assert torch.equal(first["loss"], second["loss"])
        found = {**first, "appended": torch.cat((first["appended"], second["appended"]))}
        for which, value in expected.items():
            torch.testing.assert_close(found[which], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {which}")
