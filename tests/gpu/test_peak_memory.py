"""Measured memory on the GPU: never above what was planned, and planned no more than needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch

import logitless
from logitless import planning
from logitless.options import FLOAT_OUTPUTS, TOKEN_OUTPUTS, Scan
from on_gpu import DEVICE, NEEDS_GPU, Inputs, busy_options, forced, make_inputs

pytestmark = NEEDS_GPU

MEBIBYTE = 1 << 20
# What a plan may be above the measured peak.
LOOSE = 0.05


def peak_bytes(call) -> int:
    """Most bytes a call asks for above what is held before; it has run before, so that lasting buffers exist.

    What the allocator gives may be more: it leaves up to 1 MiB unused in each large block, as its history has it.
    """
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    del result
    return peak


@dataclass(frozen=True)
class Scenario:
    """A call whose peak is measured: sizes, and what differs from plain training in bf16."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    workspace: str | None = None
    reduction: str = "mean"
    weight_dtype: torch.dtype | None = None
    frozen: tuple[str, ...] = ()
    bias: bool = False
    busy: bool = False
    strategy: str | None = None
    layout: str = "rows"
    main_grad: bool = False
    threshold: float | None = None
    scan: Scan = "input"

    @property
    def gradient(self) -> Literal["exact"] | logitless.Sampled:
        return "exact" if self.threshold is None else logitless.Sampled(self.threshold, scan=self.scan)

    def __str__(self) -> str:
        changed = [
            f"{name}={str(value).removeprefix('torch.')}"
            for name, value in vars(self).items()
            if value != self.__dataclass_fields__[name].default
        ]
        return ",".join(changed).replace(" ", "")

    def inputs(self) -> Inputs:
        inputs = make_inputs(
            self.tokens,
            self.hidden,
            self.vocabulary,
            self.dtype,
            weight_dtype=self.weight_dtype,
            bias=self.bias,
            frozen=self.frozen,
        )
        if self.layout == "columns":
            weight = inputs.weight.detach().T.contiguous().T.requires_grad_("weight" not in self.frozen)
            inputs = Inputs(inputs.hidden, weight, inputs.target, inputs.bias)
        return inputs


@pytest.fixture
def plans(monkeypatch) -> list[planning.Plan]:
    """The plans of calls made in the test."""
    made: list[planning.Plan] = []
    choose = planning.choose

    def recording(*args, **options):
        made.append(choose(*args, **options))
        return made[-1]

    monkeypatch.setattr(planning, "choose", recording)
    return made


def check_peak(measured: int, plan: planning.Plan) -> None:
    share = f"measured {measured / MEBIBYTE:.1f} MiB of {plan.peak / MEBIBYTE:.1f} MiB planned: {plan}"
    assert plan.peak >= 128 * MEBIBYTE, f"too small to tell: {share}"
    assert measured <= plan.peak, share
    assert measured >= (1 - LOOSE) * plan.peak, share


TRAINING = [
    Scenario(8192, 2048, 32_768),
    Scenario(8192, 2048, 32_768, workspace="100MiB"),
    Scenario(8192, 2048, 32_768, workspace="8GiB"),
    Scenario(8192, 2048, 32_768, torch.float16),
    Scenario(4096, 1024, 50_000, torch.float32),
    Scenario(4096, 1024, 50_000, torch.float32, workspace="2GiB"),
    Scenario(8192, 2048, 32_768, reduction="none"),
    Scenario(8192, 2048, 32_768, reduction="none", workspace="8GiB"),
    Scenario(8192, 2048, 32_768, torch.float16, reduction="none", workspace="600MiB"),
    Scenario(4096, 1024, 50_000, torch.float32, reduction="none"),
    Scenario(1024, 4096, 128_256),
    Scenario(32_768, 1024, 16_384),
    Scenario(16_384, 2048, 65_536, frozen=("weight",)),
    Scenario(16_384, 2048, 65_536, frozen=("weight",), reduction="none"),
    Scenario(8192, 2048, 32_768, frozen=("hidden",)),
    Scenario(8192, 2048, 32_768, frozen=("hidden",), reduction="none"),
    Scenario(8192, 2048, 32_768, torch.float32, weight_dtype=torch.bfloat16),
    Scenario(8192, 2048, 32_768, weight_dtype=torch.float32),
    Scenario(8192, 2048, 32_768, weight_dtype=torch.float32, reduction="none"),
    Scenario(16_384, 2048, 65_536, main_grad=True),
    Scenario(16_384, 2048, 65_536, main_grad=True, reduction="none"),
    Scenario(8192, 2048, 65_536, threshold=1 / 64),
    Scenario(8192, 2048, 65_536, threshold=1 / 16, reduction="none"),
    Scenario(8192, 2048, 65_536, torch.float32, threshold=1 / 64),
    Scenario(8192, 2048, 65_536, threshold=1 / 64, weight_dtype=torch.float32),
    Scenario(65_536, 512, 32_768, threshold=1 / 64, frozen=("weight",)),
    Scenario(8192, 2048, 65_536, threshold=1 / 64, frozen=("hidden",)),
    Scenario(65_536, 1024, 65_536, threshold=1 / 64, main_grad=True),
    Scenario(8192, 2048, 65_536, threshold=1 / 64, scan="fp8"),
    Scenario(8192, 2048, 65_536, torch.float32, threshold=1 / 16, scan="fp8", reduction="none"),
    Scenario(65_536, 512, 32_768, threshold=1 / 64, scan="fp8", frozen=("weight",)),
    Scenario(4096, 2048, 131_072, threshold=1 / 64, scan="fp8", frozen=("hidden",)),
]

# What ``plan`` has no argument for; the plan is the call's own.
OTHERS = [
    Scenario(8192, 2048, 32_768, bias=True),
    Scenario(8192, 2048, 32_768, bias=True, busy=True),
    Scenario(8192, 2048, 32_768, bias=True, busy=True, reduction="none"),
    Scenario(8192, 2048, 65_536, bias=True, busy=True, threshold=1 / 64),
    Scenario(8192, 2048, 32_768, layout="columns"),
    Scenario(8192, 2048, 32_768, layout="columns", weight_dtype=torch.float32),
    *(Scenario(8192, 2048, 32_768, strategy=name) for name in ("stored", "chunked", "windowed", "aliased", "kept")),
    *(Scenario(16_384, 2048, 65_536, strategy=name, main_grad=True) for name in ("prepared", "windowed")),
]


def peak_of(scenario: Scenario) -> int:
    inputs = scenario.inputs()
    options: dict = busy_options(inputs) if scenario.busy else {}
    options |= {"workspace": scenario.workspace, "reduction": scenario.reduction, "backend": "triton"}
    options["gradient"] = scenario.gradient
    if scenario.main_grad:
        options["main_grad"] = torch.zeros(inputs.weight.shape, device=DEVICE)
    upstream = torch.ones(scenario.tokens if scenario.reduction == "none" else (), device=DEVICE)
    leaves = [leaf for name, leaf in inputs.leaves.items() if name != "weight" or not scenario.main_grad]

    def call():
        loss = inputs.loss(**options)
        return loss, torch.autograd.grad(loss, leaves, upstream)

    if scenario.strategy is None:
        return peak_bytes(call)
    with forced(scenario.strategy):
        return peak_bytes(call)


@pytest.mark.parametrize("scenario", TRAINING, ids=str)
def test_peak_of_a_step(scenario, plans):
    """Forward and backward pass together; ``plan`` says it before."""
    measured = peak_of(scenario)
    plan = logitless.plan(
        tokens=scenario.tokens,
        hidden=scenario.hidden,
        vocabulary=scenario.vocabulary,
        dtype=scenario.dtype,
        device=DEVICE,
        reduction=scenario.reduction,
        weight_dtype=scenario.weight_dtype,
        frozen_weight="weight" in scenario.frozen,
        frozen_input="hidden" in scenario.frozen,
        workspace=scenario.workspace,
        main_grad=scenario.main_grad,
        gradient=scenario.gradient,
    )
    assert plan == plans[0], "the call was planned otherwise"
    check_peak(measured, plan)


@pytest.mark.parametrize("scenario", OTHERS, ids=str)
def test_peak_of_other_calls(scenario, plans):
    measured = peak_of(scenario)
    check_peak(measured, plans[0])


@pytest.mark.parametrize("strategy", ["stored", "windowed", "kept"])
def test_peak_of_statistics(strategy, plans):
    inputs = make_inputs(8192, 2048, 32_768)

    def call():
        statistics = logitless.token_statistics(
            inputs.hidden, inputs.weight, inputs.target, outputs=TOKEN_OUTPUTS, backend="triton"
        )
        total = sum(getattr(statistics, name).sum() for name in FLOAT_OUTPUTS)
        return torch.autograd.grad(total, [inputs.hidden, inputs.weight])

    with forced(strategy):
        measured = peak_bytes(call)
    check_peak(measured, plans[0])


@pytest.mark.parametrize("outputs", [None, TOKEN_OUTPUTS], ids=["loss", "statistics"])
def test_peak_without_gradients(outputs, plans):
    inputs = make_inputs(131_072, 2048, 32_768)

    @torch.no_grad()
    def call():
        if outputs is None:
            return inputs.loss(backend="triton", workspace="8GiB")
        return logitless.token_statistics(
            inputs.hidden, inputs.weight, inputs.target, outputs=outputs, backend="triton", workspace="8GiB"
        )

    measured = peak_bytes(call)
    check_peak(measured, plans[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_main_grad_needs_no_other_tensor_of_its_size(reduction):
    """The gradient of a weight of 512 MiB is added to the caller's buffer without one more of even half its size."""
    inputs = make_inputs(512, 4096, 65_536)
    main_grad = torch.zeros(inputs.weight.shape, device=DEVICE)
    upstream = torch.ones(512 if reduction == "none" else (), device=DEVICE)

    def call():
        loss = inputs.loss(main_grad=main_grad, reduction=reduction, backend="triton")
        loss.backward(upstream)

    call()  # after which the gradient of the hidden states is there, to be added to
    assert peak_bytes(call) < inputs.weight.numel() * inputs.weight.element_size() / 2
    assert inputs.weight.grad is None
    assert main_grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_smallest_workspace_is_kept_to(reduction):
    """The number that the error for a workspace too small names is one that works, and is kept to."""
    inputs = make_inputs(8192, 2048, 32_768)
    with pytest.raises(ValueError, match=r"at least \d+ bytes") as error:
        inputs.loss(workspace=1, reduction=reduction, backend="triton")
    smallest = int(str(error.value).split("at least ")[1].split()[0])
    upstream = torch.ones(8192 if reduction == "none" else (), device=DEVICE)

    def call():
        loss = inputs.loss(workspace=smallest, reduction=reduction, backend="triton")
        return torch.autograd.grad(loss, [inputs.hidden, inputs.weight], upstream)

    gradients = sum(leaf.numel() * leaf.element_size() for leaf in inputs.leaves.values())
    assert peak_bytes(call) <= smallest + gradients


def test_a_million_tokens_fit_80_gb(record_property):
    """The sampled gradient of 1,048,576 tokens in one call, inputs and gradients included; the loss is right."""
    first = make_inputs(8192, 2304, 262_144)
    hidden = first.hidden.detach().repeat(128, 1).requires_grad_()
    inputs = replace(first, hidden=hidden, target=first.target.repeat(128))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    loss = inputs.loss(backend="triton", gradient=logitless.Sampled())
    gradients = torch.autograd.grad(loss, [inputs.hidden, inputs.weight])
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    record_property("peak bytes", peak)
    print(f"peak: {peak / 1e9:.1f} GB with inputs and gradients")
    assert peak < 80e9
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(loss, first.loss(backend="triton"), rtol=1e-6, atol=0)
