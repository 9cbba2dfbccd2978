"""Problems that live on the GPU, every strategy by name, and how near to exact a result must be there."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless
from logitless.schedules import force_strategy
from tolerance import FACTOR, floor

DEVICE = "cuda"
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

IGNORED = -100

# By name, what ``force_strategy`` takes; windows of a few tiles, chunks of uneven size.
STRATEGIES: dict[str, dict] = {
    "prepared": {"strategy": "stored", "prepared": True},
    "stored": {"strategy": "stored"},
    "chunked": {"strategy": "chunked", "rows": 300},
    "windowed": {"strategy": "windowed", "window": 512, "aliased": 0},
    "aliased": {"strategy": "windowed", "window": 512},
    "kept": {"strategy": "windowed", "window": 512, "aliased": 0, "kept": 2},
}
ANY_UPSTREAM = ("stored", "windowed", "aliased", "kept")
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
each_any_upstream = pytest.mark.parametrize("strategy", ANY_UPSTREAM)


def forced(strategy: str) -> contextlib.AbstractContextManager:
    return force_strategy(**STRATEGIES[strategy])


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call. What is differentiated is what requires a gradient."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    bias: Tensor | None = None  # [V]

    @property
    def leaves(self) -> dict[str, Tensor]:
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Every floating-point tensor changed, its need of a gradient kept."""
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        changed = {
            name: None if tensor is None else change(tensor.detach()).requires_grad_(tensor.requires_grad)
            for name, tensor in tensors.items()
        }
        return replace(self, **changed)

    def loss(self, **options) -> Tensor:
        return logitless.linear_cross_entropy(self.hidden, self.weight, self.target, linear_bias=self.bias, **options)

    def results(self, upstream: Tensor | float = 1.0, **options) -> dict[str, Tensor]:
        """Loss and gradients by name."""
        return differentiated(self.loss(**options), self, upstream)


def differentiated(loss: Tensor, inputs: Inputs, upstream: Tensor | float = 1.0) -> dict[str, Tensor]:
    if not isinstance(upstream, Tensor):
        upstream = torch.full_like(loss, upstream)
    given = torch.autograd.grad(loss, list(inputs.leaves.values()), upstream.to(loss.dtype))
    return {"loss": loss.detach(), **dict(zip(inputs.leaves, given, strict=True))}


def make_inputs(
    tokens: int = 2048,
    hidden: int = 256,
    vocabulary: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    *,
    weight_dtype: torch.dtype | None = None,
    ignored: float = 0.25,
    bias: bool = False,
    frozen: tuple[str, ...] = (),
    seed: int = 0,
) -> Inputs:
    """Normal logits with a standard deviation of two; a share of the tokens ignored."""
    random = generator(seed)
    target = torch.randint(vocabulary, (tokens,), generator=random, device=DEVICE)
    left_out = torch.rand(tokens, generator=random, device=DEVICE) < ignored
    weight = torch.randn(vocabulary, hidden, generator=random, device=DEVICE) * (2 / hidden**0.5)
    inputs = Inputs(
        hidden=torch.randn(tokens, hidden, generator=random, device=DEVICE).to(dtype),
        weight=weight.to(weight_dtype or dtype),
        target=target.masked_fill(left_out, IGNORED),
        bias=torch.randn(vocabulary, generator=random, device=DEVICE).to(dtype) if bias else None,
    )
    for name in ("hidden", "weight", "bias"):
        tensor = getattr(inputs, name)
        if tensor is not None:
            tensor.requires_grad_(name not in frozen)
    return inputs


def busy_options(inputs: Inputs) -> dict[str, object]:
    """All options that change the arithmetic."""
    random = generator(1)
    vocabulary = inputs.weight.shape[0]
    return {
        "weight": torch.rand(vocabulary, generator=random, device=DEVICE) + 0.5,
        "token_weight": torch.rand(inputs.target.shape, generator=random, device=DEVICE) * 2 - 0.5,
        "label_smoothing": 0.125,
        "z_loss": 2.0**-7,
        "softcap": 20.0,
        "logit_scale": 0.75,
    }


# --- waiting, and graphs ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Within, an operation for which the host would wait raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def inputs_with_strays(**changes) -> Inputs:
    """Ignored tokens, and targets out of range."""
    inputs = make_inputs(**changes)
    inputs.target[5], inputs.target[70] = inputs.weight.shape[0], -7
    return inputs


def captured(call: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """The call as a graph, and the tensors that hold its results after each replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def take_data_of(inputs: Inputs, other: Inputs) -> None:
    with torch.no_grad():
        for name in ("hidden", "weight", "target"):
            getattr(inputs, name).copy_(getattr(other, name))


# --- how near ---------------------------------------------------------------------------------------------------------


def eager(inputs: Inputs, reduction: str = "mean") -> Tensor:
    """The two-stage pipeline."""
    return F.cross_entropy(F.linear(inputs.hidden, inputs.weight, inputs.bias), inputs.target, reduction=reduction)


def eager_results(
    inputs: Inputs, upstream: Tensor | float = 1.0, reduction: str = "mean", rows: int | None = None
) -> dict[str, Tensor]:
    """Loss and gradients of the two-stage pipeline, ``rows`` at a time where its logits are too many; then in fp64."""
    rows = rows or inputs.hidden.shape[0]
    if rows >= inputs.hidden.shape[0]:
        return differentiated(eager(inputs, reduction), inputs, upstream)
    assert reduction == "mean"
    count, hidden = (inputs.target != IGNORED).sum(), []
    sums: dict[str, Tensor] = {}
    for first in range(0, inputs.hidden.shape[0], rows):
        some = slice(first, first + rows)
        part = replace(
            inputs,
            hidden=inputs.hidden[some].detach().requires_grad_(inputs.hidden.requires_grad),
            target=inputs.target[some],
        )
        share = (part.target != IGNORED).sum().double() / count
        result = {name: share * value.double() for name, value in differentiated(eager(part), part, upstream).items()}
        hidden.append(result.pop("hidden"))
        sums = {name: sums.get(name, 0) + value for name, value in result.items()}
    return {**sums, "hidden": torch.cat(hidden)}


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Products of fp32 with operands of all digits (``"highest"``) or rounded to tf32 (``"high"``)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check(
    ours: dict[str, Tensor], inputs: Inputs, upstream: Tensor | float = 1.0, context=contextlib.nullcontext, **options
) -> None:
    """Assert that results are as near to the exact ones as those of eager PyTorch in the same dtype.

    The tolerance is that of the conformance suite. ``context`` surrounds eager PyTorch in its own dtype. The error of a
    reduced loss is bounded by its tokens' mean error: that of their sum may cancel by luck.
    """
    with context():
        plain = eager_results(inputs, upstream, **options)
        tokens = eager(inputs, "none").detach() if "rows" not in options else None
    exact_inputs = inputs.map(torch.Tensor.double)
    exact = eager_results(exact_inputs, upstream, **options)
    with float32_products("highest"):
        accumulated = eager_results(inputs.map(torch.Tensor.float), upstream, **options)
    assert ours.keys() == exact.keys()
    failures = []
    for name, value in ours.items():
        error = (value.double() - exact[name]).norm().item()
        plain_error = (plain[name].double() - exact[name]).norm().item()
        if name == "loss" and value.ndim == 0:
            if tokens is not None:
                difference = tokens.double() - eager(exact_inputs, "none").detach()
                count = int((inputs.target != IGNORED).sum()) if options.get("reduction", "mean") == "mean" else 1
                plain_error = difference.abs().sum().item() / max(1, count)
            else:
                plain_error = max(plain_error, torch.finfo(inputs.hidden.dtype).eps * exact[name].abs().item())
        allowed = FACTOR * plain_error + floor(exact[name], accumulated[name].to(torch.float32), value)
        if not error <= allowed:
            failures.append(f"{name}: error {error:.3e}, allowed {allowed:.3e}, size {exact[name].norm():.3e}")
    assert not failures, "; ".join(failures)
