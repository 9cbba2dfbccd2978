"""Results on the GPU: against eager PyTorch in the same dtype, both against fp64, and against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless
from logitless.options import TOKEN_OUTPUTS
from logitless.schedules import force_strategy
from on_gpu import (
    ANY_UPSTREAM,
    DEVICE,
    IGNORED,
    NEEDS_GPU,
    busy_options,
    check,
    each_any_upstream,
    each_strategy,
    eager_results,
    float32_products,
    forced,
    make_inputs,
)
from problems import Problem
from tolerance import FACTOR, loss_and_gradients, loss_baseline

pytestmark = NEEDS_GPU

# Exact in every dtype, but no power of two: a product with it must be rounded.
UPSTREAM = 0.3125


# --- errors -----------------------------------------------------------------------------------------------------------


@each_strategy
@pytest.mark.parametrize("upstream", [1.0, UPSTREAM])
def test_error_in_bf16(strategy, upstream):
    inputs = make_inputs(2048, 1024, 32_000)
    with forced(strategy):
        check(inputs.results(upstream, backend="triton"), inputs, upstream)


@each_any_upstream
def test_error_of_each_token(strategy):
    inputs = make_inputs(2048, 512, 8192)
    upstream = (torch.arange(len(inputs.target), device=DEVICE) % 9 - 4) / 4
    with forced(strategy):
        results = inputs.results(upstream, backend="triton", reduction="none")
        check(results, inputs, upstream, reduction="none")


def test_long_sums_are_not_rounded_in_parts():
    """The library cuts the product of 4096 tokens into parts for so few entries, and PyTorch lets it round each.

    What is off is then little more than one rounding of the result.
    """
    inputs = make_inputs(4096, 1024, 4681, ignored=0)
    exact = eager_results(inputs.map(Tensor.double))["weight"]
    with forced("stored"):
        ours = inputs.results(backend="triton")["weight"]
    assert (ours.double() - exact).norm() <= FACTOR * (exact.to(ours.dtype).double() - exact).norm()


@each_strategy
@pytest.mark.parametrize("tf32", [False, True])
def test_error_in_fp32(strategy, tf32):
    """With operands rounded to tf32 as well, where the library's products do that.

    The upstream gradient is a power of two: a coefficient formed before it is known then has the digits of one formed
    after, and so the error of being rounded, which is that of every target's entry.
    """
    inputs = make_inputs(1000, 256, 5000, torch.float32)
    with float32_products("high" if tf32 else "highest"):
        with forced(strategy):
            ours = inputs.results(0.25, backend="triton")
        check(ours, inputs, 0.25)


@each_strategy
@pytest.mark.parametrize("size", [(1, 64, 1000), (2, 64, 129), (17, 136, 515), (150, 64, 24)], ids=str)
def test_error_of_ragged_sizes(strategy, size):
    inputs = make_inputs(*size, ignored=0)
    with forced(strategy):
        check(inputs.results(UPSTREAM, backend="triton", reduction="sum"), inputs, UPSTREAM, reduction="sum")


@each_strategy
@pytest.mark.parametrize(
    ("dtype", "upstream"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**16), (torch.float16, 3 * 2.0**11)], ids=str
)
def test_autocast(strategy, dtype, upstream):
    """fp32 weights under autocast; in fp16 with the upstream gradient of a gradient scaler, which starts at 2**16.

    A gradient that is rounded before it is scaled would vanish: with a mean over 2048 tokens and 8192 entries most
    entries are below fp16's smallest number.
    """
    inputs = make_inputs(2048, 256, 8192, torch.float32)
    if dtype == torch.float16 and strategy not in ANY_UPSTREAM:
        with (
            forced(strategy),
            torch.autocast(DEVICE, dtype),
            pytest.raises(ValueError, match="products that are not in fp16"),
        ):
            inputs.loss(backend="triton")
        return
    with forced(strategy), torch.autocast(DEVICE, dtype):
        loss = inputs.loss(backend="triton")
        assert loss.dtype == torch.float32
    results = dict(
        zip(
            inputs.leaves,
            torch.autograd.grad(loss, list(inputs.leaves.values()), torch.full_like(loss, upstream)),
            strict=True,
        )
    )
    assert all(gradient.dtype == torch.float32 for gradient in results.values())
    check({"loss": loss.detach(), **results}, inputs, upstream, lambda: torch.autocast(DEVICE, dtype))


@each_strategy
def test_all_options(strategy):
    """Held to the tolerance of the conformance suite, at a size of many tiles."""
    inputs = make_inputs(1024, 256, 4096, bias=True)
    options = {**busy_options(inputs), "linear_bias": inputs.bias}
    problem = Problem(inputs.hidden, inputs.weight, inputs.target, options)
    with forced(strategy):
        ours = loss_and_gradients(logitless.linear_cross_entropy, problem, backend="triton")
    loss_baseline(problem).check(ours)


# --- ignored rows, targets out of range -------------------------------------------------------------------------------


@each_strategy
def test_half_ignored(strategy):
    """As near to exact as the packed problem, whatever the ignored rows hold; their gradients are zero."""
    inputs = make_inputs(2048, 512, 8192, ignored=0.5)
    counts = inputs.target != IGNORED
    with torch.no_grad():
        spoilt = replace(inputs, hidden=inputs.hidden.masked_fill(~counts[:, None], torch.nan).requires_grad_())
    with forced(strategy):
        ours = spoilt.results(backend="triton")
    packed = replace(inputs, hidden=inputs.hidden[counts].detach().requires_grad_(), target=inputs.target[counts])
    assert not ours["hidden"][~counts].any()
    check({**ours, "hidden": ours["hidden"][counts]}, packed)


@each_any_upstream
def test_tokens_are_alone(strategy):
    """A token's loss and the gradient of its hidden state are the same bits, whichever others are ignored."""
    inputs = make_inputs(1000, 256, 4096, ignored=0)
    with forced(strategy):
        all_count = inputs.results(backend="triton", reduction="none")
        half = replace(inputs, target=inputs.target.clone())
        half.target[::2] = IGNORED
        ours = half.results(backend="triton", reduction="none")
    assert torch.equal(ours["loss"][1::2], all_count["loss"][1::2])


@each_strategy
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_target_out_of_range(strategy, reduction):
    """Such a token's loss is NaN, as are its gradient and a mean or sum over it; other tokens' losses stay."""
    if reduction == "none" and strategy in ("chunked", "prepared"):
        pytest.skip("this strategy needs a reduced loss")
    inputs = make_inputs(300, 256, 4096)
    stray = replace(inputs, target=inputs.target.clone())
    strays = torch.tensor([3, 130, -1], device=DEVICE)
    stray.target[strays] = torch.tensor([4096, -1, 2**40], device=DEVICE)
    others = torch.ones_like(stray.target, dtype=torch.bool)
    others[strays] = False
    with forced(strategy):
        results = stray.results(backend="triton", reduction=reduction)
        expected = inputs.results(backend="triton", reduction=reduction)
    assert results["weight"].isnan().any()
    assert results["hidden"][strays].isnan().all()
    if reduction == "none":
        assert results["loss"][strays].isnan().all()
        assert torch.equal(results["loss"][others], expected["loss"][others])
    else:
        assert results["loss"].isnan()
    if reduction != "mean":  # which divides by a number of tokens that is not known
        assert results["hidden"][others].isfinite().all()


def test_statistics_of_a_target_out_of_range():
    inputs = make_inputs(300, 256, 4096, ignored=0)
    inputs.target[7] = 4096
    statistics = logitless.token_statistics(inputs.hidden, inputs.weight, inputs.target, outputs=TOKEN_OUTPUTS)
    for name in ("nll", "logsumexp", "entropy"):
        assert getattr(statistics, name).isnan().nonzero().tolist() == [[7]]


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["loss_only", "stored", "windowed", "kept"])
@pytest.mark.parametrize("head", ["plain", "busy"])
def test_rank_of_the_prediction_is_zero(strategy, head):
    """Logits of both passes are the same bits: no entry is above the largest, in any strategy."""
    inputs = make_inputs(600, 256, 8192, bias=head == "busy", ignored=0)
    options = {"linear_bias": inputs.bias, "backend": "triton", "outputs": TOKEN_OUTPUTS}
    if head == "busy":
        options |= {"softcap": 20.0, "logit_scale": 0.75}
    context = forced(strategy) if strategy != "loss_only" else force_strategy("loss_only", rows=300)
    with context, torch.set_grad_enabled(strategy != "loss_only"):
        first = logitless.token_statistics(inputs.hidden, inputs.weight, inputs.target, **options)
        again = logitless.token_statistics(inputs.hidden, inputs.weight, first.prediction, **options)
    assert torch.equal(first.prediction, again.prediction)
    assert not again.target_rank.any()
    exact = F.linear(
        inputs.hidden.double(), inputs.weight.double(), None if inputs.bias is None else inputs.bias.double() / 0.75
    )
    assert (first.prediction == exact.argmax(1)).float().mean() > 0.99


# --- determinism ------------------------------------------------------------------------------------------------------


@each_strategy
@pytest.mark.parametrize("busy", [False, True], ids=["plain", "busy"])
def test_two_runs_give_the_same_bits(strategy, busy):
    inputs = make_inputs(2048, 512, 8192, bias=busy)
    options = busy_options(inputs) if busy else {}
    with forced(strategy):
        first = inputs.results(UPSTREAM, backend="triton", **options)
        second = inputs.results(UPSTREAM, backend="triton", **options)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@each_strategy
@pytest.mark.parametrize("busy", [False, True], ids=["plain", "busy"])
def test_no_memory_is_read_before_it_is_written(strategy, busy, request):
    """PyTorch fills new memory with NaN where it is asked to be deterministic."""
    inputs = make_inputs(300, 256, 5001, bias=busy)
    options = busy_options(inputs) if busy else {}
    with forced(strategy):
        expected = inputs.results(UPSTREAM, backend="triton", **options)
        request.getfixturevalue("deterministic")
        assert torch.empty(1, device=DEVICE).isnan()
        ours = inputs.results(UPSTREAM, backend="triton", **options)
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


# --- layouts ----------------------------------------------------------------------------------------------------------


def unaligned(matrix: Tensor) -> Tensor:
    """Rows one after the other, from an address that is no multiple of 16 bytes."""
    flat = torch.empty(matrix.numel() + 1, dtype=matrix.dtype, device=matrix.device)[1:]
    return flat.view(matrix.shape).copy_(matrix)


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "unaligned": unaligned,
    "odd rows": lambda t: F.pad(t, (0, 3))[:, :-3],
    "wide rows": lambda t: F.pad(t, (0, 8))[:, :-8],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["weight", "hidden"])
@pytest.mark.parametrize("strategy", ["prepared", "chunked", "aliased"])
def test_layouts(layout, which, strategy):
    inputs = make_inputs(600, 256, 4096)
    tensor = getattr(inputs, which)
    laid_out = replace(inputs, **{which: LAYOUTS[layout](tensor.detach()).requires_grad_()})
    assert torch.equal(getattr(laid_out, which), tensor)
    with forced(strategy):
        check(laid_out.results(backend="triton"), inputs)


@pytest.mark.parametrize("hidden", [100, 1, 7])
def test_hidden_size_that_the_copy_engine_cannot_read(hidden):
    """A named backend says why it cannot; ``"auto"`` takes another."""
    inputs = make_inputs(300, hidden, 1000)
    with pytest.raises(ValueError, match=f"multiple of 8.*{hidden}"):
        inputs.loss(backend="triton")
    check(inputs.results(), inputs)


def test_auto_takes_the_kernels():
    """On a GPU, for a problem they serve."""
    assert logitless.plan(tokens=8, hidden=64, vocabulary=1000, device=DEVICE).backend == "triton"


# --- many logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["prepared", "stored", "kept"])
def test_more_logits_than_32_bits_can_count(strategy):
    inputs = make_inputs(20_480, 64, 131_072, ignored=0.05)
    assert inputs.hidden.shape[0] * inputs.weight.shape[0] > 2**31
    # One kept run of columns holds the logits of all but the first windows.
    context = force_strategy("windowed", window=8192, aliased=0, kept=14) if strategy == "kept" else forced(strategy)
    with context:
        ours = inputs.results(backend="triton")
    check(ours, inputs, rows=1024)
