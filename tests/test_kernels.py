"""Every kernel on its own, against plain operations. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from torch import Tensor

import logitless
from kernels import (
    DEVICE,
    DTYPES,
    FP32_PRECISIONS,
    STATISTICS,
    Head,
    check,
    counting,
    exact_statistics,
    fp32_precision,
    gathered,
    logits,
    logits_gradient,
    only_counting,
    random_coefficients,
    statistic,
)
from logitless.backends import triton as backend
from logitless.backends.contract import AffineCoefficients, Coefficients, Gradients, Problem, Schedule, Statistics
from logitless.backends.triton import rowwise
from logitless.backends.triton.dense import new_statistics, padded
from logitless.backends.triton.launch import COMBINED_BLOCKS, Launcher, Tables, input_precision
from logitless.backends.triton.primitives import LEAST_SLOPE, logits_and_slope, nearest_tf32, slope_at_capped, tanh
from logitless.backends.triton.rows import RowOrder, gather_rows, order_rows, scatter_rows
from logitless.backends.triton.rowwise import gradient_in_place, scale_rows
from logitless.backends.triton.softmax_gradient import sum_columns
from problems import coarse, generator

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = float("nan")


# --- the order of rows ------------------------------------------------------------------------------------------------


def random_mask(rows: int, share: float) -> Tensor:
    return (torch.rand(rows, generator=generator(rows)) < share).to(DEVICE)


MASKS = {
    "absent": lambda rows: None,
    "all": lambda rows: torch.ones(rows, dtype=torch.bool, device=DEVICE),
    "none": lambda rows: torch.zeros(rows, dtype=torch.bool, device=DEVICE),
    "half": lambda rows: random_mask(rows, 0.5),
    "few": lambda rows: random_mask(rows, 0.01),
    "most": lambda rows: random_mask(rows, 0.99),
    "last": lambda rows: torch.arange(rows, device=DEVICE) == rows - 1,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rows", [0, 1, 2, 17, 4095, 4096, 4097, 9001])
def test_order_of_rows(rows, mask):
    """Rows that count come first, each kind in its order; the kernel walks 4096 at a time."""
    valid_mask = MASKS[mask](rows)
    target = torch.randint(50_000, (rows,), generator=generator(1)).to(DEVICE)
    given = order_rows(target, valid_mask)
    counts = torch.ones(rows, dtype=torch.bool, device=DEVICE) if valid_mask is None else valid_mask
    expected = torch.cat([counts.nonzero()[:, 0], (~counts).nonzero()[:, 0]])
    assert given.order.dtype == given.target.dtype == given.count.dtype == torch.int32
    assert torch.equal(given.order.long(), expected)
    assert torch.equal(given.target.long(), target[expected])
    assert given.count.tolist() == [int(counts.sum())]


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def values(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=generator(seed)).to(DEVICE, dtype)


def in_order(order: Tensor) -> RowOrder:
    """An order in which every row counts."""
    order = order.to(DEVICE, torch.int32)
    return RowOrder(order, torch.zeros_like(order), torch.full((1,), order.numel(), dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("columns", [1, 24, 1023, 1024, 1025, 2050])
@pytest.mark.parametrize("rows", [0, 1, 8, 13])
def test_gathered_rows(rows, columns):
    source = values(20, columns)
    order = in_order(torch.randperm(20, generator=generator(2)))
    result = torch.full((rows, columns), NAN, device=DEVICE)
    assert torch.equal(gather_rows(source, order, 5, result), source[order.order[5 : 5 + rows].long()])


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("of", FLOATS, ids=str)
def test_gathered_rows_are_cast(of, to):
    source = values(20, 72, dtype=of)
    given = gather_rows(source, in_order(torch.arange(20).flip(0)), 0, torch.empty(20, 72, dtype=to, device=DEVICE))
    assert torch.equal(given, source.flip(0).to(to))


@pytest.mark.parametrize("count", [0, 6, 7, 20])
def test_gathered_rows_past_the_count_are_zero(count):
    """Whatever they hold: zero times NaN would reach the weight's gradient."""
    source = values(20, 72)
    order = replace(in_order(torch.arange(20)), count=torch.tensor([count], dtype=torch.int32, device=DEVICE))
    expected = source.clone()
    expected[count:], source[count:] = 0, NAN
    result = torch.full_like(source, NAN)
    for first in (0, 3, 6, 15):
        gather_rows(source, order, first, result[first:])
    assert torch.equal(result, expected)


def test_gathered_rows_of_a_wider_matrix():
    source = values(9, 40)
    given = gather_rows(source[:, 8:32], in_order(torch.tensor([3, 0, 8])), 0, torch.empty(3, 24, device=DEVICE))
    assert torch.equal(given, source[[3, 0, 8], 8:32])


@pytest.mark.parametrize("columns", [1, 24, 1025])
@pytest.mark.parametrize("mask", MASKS)
def test_scattered_rows(mask, columns):
    """Back where they came from, by chunks; rows that do not count give zeros, whatever their chunk holds."""
    rows, chunk = 37, 10
    valid_mask = MASKS[mask](rows)
    order = order_rows(torch.zeros(rows, dtype=torch.int64, device=DEVICE), valid_mask)
    source = values(rows, columns)
    packed = gather_rows(source, order, 0, torch.empty_like(source))
    packed[int(order.count) :] = NAN
    result = torch.full_like(source, NAN)
    for first in range(0, rows, chunk):
        scatter_rows(packed[first : first + chunk], order, first, result)
    counts = torch.ones(rows, dtype=torch.bool, device=DEVICE) if valid_mask is None else valid_mask
    assert torch.equal(result, source.masked_fill(~counts[:, None], 0))


def test_scattering_leaves_other_chunks_alone():
    order = order_rows(torch.zeros(20, dtype=torch.int64, device=DEVICE), random_mask(20, 0.5))
    result = torch.full((20, 8), NAN, device=DEVICE)
    scatter_rows(torch.ones(5, 8, device=DEVICE), order, 5, result)
    written = ~result.isnan().any(1)
    assert set(written.nonzero()[:, 0].tolist()) == set(order.order[5:10].tolist())


@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_scattered_rows_are_cast(to):
    order = order_rows(torch.zeros(11, dtype=torch.int64, device=DEVICE), None)
    source = values(11, 24)
    result = torch.empty(11, 24, dtype=to, device=DEVICE)
    assert torch.equal(scatter_rows(source, order, 0, result), source.to(to))


# --- elementwise functions --------------------------------------------------------------------------------------------


@triton.jit
def tanh_kernel(source, result, count, block: tl.constexpr):
    """The device function over [count] values. Grid: blocks of ``block``."""
    place = tl.program_id(0) * block + tl.arange(0, block)
    u = tl.load(source + place, mask=place < count, other=0.0)
    tl.store(result + place, tanh(u), mask=place < count)


def test_hyperbolic_tangent():
    """Within 4 ulp everywhere, odd, exactly 1 far out and never beyond.

    The largest error is where the quotient takes over, at 0.55: 1 - q with q = 0.5, whose exponential, sum, reciprocal
    and difference are off by half an ulp to an ulp of 0.5 each.
    """
    magnitudes = torch.cat(
        [
            torch.logspace(-37, 2, 20_000, dtype=torch.float64),
            torch.linspace(0, 12, 50_000, dtype=torch.float64),
            torch.linspace(0.54, 0.56, 20_000, dtype=torch.float64),
            torch.tensor([0.0, 1e4, 3e38, torch.inf], dtype=torch.float64),
        ]
    ).float()
    source = torch.cat([magnitudes, -magnitudes]).to(DEVICE)
    given = torch.full_like(source, NAN)
    tanh_kernel[(triton.cdiv(source.numel(), 4096),)](source, given, source.numel(), 4096)
    exact = torch.tensor([math.tanh(u) for u in source.tolist()], dtype=torch.float64)
    one_ulp = torch.tensor(
        [math.ldexp(1, max(-149, math.frexp(value)[1] - 24)) for value in exact.tolist()], dtype=torch.float64
    )
    assert ((given.cpu().double() - exact).abs() / one_ulp).max() <= 4
    half = source.numel() // 2
    assert torch.equal(given[:half], -given[half:])
    assert given.abs().max() == 1
    assert torch.equal(
        given[magnitudes.to(DEVICE).argsort()].diff() < -4 * 2.0**-24, torch.zeros(half - 1).to(given) > 0
    )


@triton.jit
def slopes_kernel(source, slope, at_capped, cap, count, block: tl.constexpr):
    """The cap's derivative at [count] logits, and the same from the capped ones. Grid: blocks of ``block``."""
    place = tl.program_id(0) * block + tl.arange(0, block)
    z = tl.load(source + place, mask=place < count, other=0.0)
    capped, given = logits_and_slope(z, source, 0, count, 1.0, cap, False, True)
    tl.store(slope + place, given, mask=place < count)
    tl.store(at_capped + place, slope_at_capped(capped, cap, LEAST_SLOPE), mask=place < count)


@pytest.mark.parametrize("cap", [1.0, 5.0, 30.0, 1 / 3])
def test_derivative_of_the_cap(cap):
    """Relative to itself, and to 2^-20 where only the capped logit is known; at the cap it is 0, NaN stays NaN.

    The exponent of its exponential, 24 at most, is off by four roundings.
    """
    ratios = torch.cat([torch.linspace(-12, 12, 5001), torch.tensor([torch.inf, -torch.inf, 1e30, NAN])])
    source = (ratios * cap).to(DEVICE)
    slope, at_capped = torch.empty_like(source), torch.empty_like(source)
    slopes_kernel[(triton.cdiv(source.numel(), 1024),)](source, slope, at_capped, cap, source.numel(), 1024)
    exact = (source[:5001].double() / cap).cosh().pow(-2)
    assert ((slope[:5001] - exact).abs() / exact).max() <= 24 * 4 * 2.0**-24
    assert (at_capped[:5001] - exact).abs().max() <= 2.0**-20
    assert (at_capped[:5001][ratios[:5001].abs() > 9.5] == 0).all()
    for given in (slope, at_capped):
        assert given[5001:-1].tolist() == [0, 0, 0]
        assert given[-1].isnan()


# --- statistics -------------------------------------------------------------------------------------------------------

SIZES = [(1, 8, 1), (15, 24, 127), (16, 16, 128), (17, 40, 129), (50, 24, 300), (33, 24, 515)]

HEADS = [
    Head("plain"),
    Head("bias", bias=True, vector=True),
    Head("scale", scale=0.75, bias=True),
    Head("softcap", softcap=5.0, vector=True),
    Head("everything", bias=True, scale=0.75, softcap=5.0, vector=True, valid_mask="some"),
    Head("masked tiles", masked=(0, 1, 4)),
    Head("masked", masked=(0, 1, 2, 3, 4), valid_mask="some"),
    # Sums of exponentials out of fp32's range, in some tiles or in all: none may be taken without a maximum.
    Head("far apart", span=4096.0, vector=True),
    Head("very small", bias=True, shift=-1e4),
    Head("very large", bias=True, shift=1e4, valid_mask="some"),
    Head("one row", valid_mask="one", bias=True),
    Head("no row", valid_mask="none", bias=True),
]
HEADS += [replace(head, dtype=dtype) for dtype in DTYPES[1:] for head in HEADS[:6]]

each_head = pytest.mark.parametrize("head", HEADS, ids=str)


def scanned(problem: Problem, columns: tuple[slice, ...] = (), rows: int = 0) -> tuple[Launcher, Tables, Statistics]:
    """Statistics by the two kernels, and the last rows' tables; in several launches where slices are given."""
    launcher, statistics = Launcher(problem), new_statistics(problem)
    tokens = problem.shape.tokens
    target_logit = launcher.empty(tokens).fill_(NAN)
    rank = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    tables = launcher.tables(0)
    rows = rows or max(1, tokens)
    for first in range(0, tokens, rows):
        some = slice(first, min(first + rows, tokens))
        count = some.stop - some.start
        tables = launcher.tables(count)
        hidden = gathered(launcher, some)
        for part in columns or (slice(0, problem.shape.vocabulary),):
            launcher.scan(hidden, first, part, tables, target_logit)
        launcher.combine(tables, target_logit, first, count, statistics)
        above = statistics.target_logit.index_select(0, launcher.rows.order)
        launcher.scan(hidden, first, slice(0, problem.shape.vocabulary), tables, above, rank=rank)
    assert statistics.target_rank is not None
    statistics.target_rank.index_copy_(0, launcher.rows.order.long(), rank.long())
    return launcher, tables, statistics


def check_statistics(problem: Problem, statistics: Statistics, narrow: torch.dtype | None = None) -> None:
    """Those of rows that count are right, all others 0; ``narrow``: as near as those of logits rounded to it."""
    counts, alone = counting(problem), only_counting(problem)
    for name, given in vars(statistics).items():
        if name == "saved" or given is None:
            continue
        assert not given[~counts].any(), name
        if given.is_floating_point():
            plain = statistic(alone, name, torch.float32, narrow)
            check(name, given[counts], lambda dtype, name=name: statistic(alone, name, dtype), plain)
    check_integers(alone, *(None if t is None else t[counts] for t in (statistics.prediction, statistics.target_rank)))


def check_integers(problem: Problem, prediction: Tensor | None, rank: Tensor | None) -> None:
    """The prediction has the largest logit and the rank counts the larger ones, up to rounding of two logits."""
    z = logits(problem, torch.float64)
    rounding = (logits(problem, torch.float32).double() - z).abs().nan_to_num(0)
    slack = 4 * (rounding.amax(1) + torch.finfo(torch.float32).eps * z.abs().nan_to_num(0, 0, 0).amax(1))
    at_target = z.gather(1, problem.target[:, None]).squeeze(1)
    if prediction is not None:
        assert (z.gather(1, prediction[:, None]).squeeze(1) >= z.amax(1) - slack).all()
    if rank is not None:
        assert ((z > (at_target + slack)[:, None]).sum(1) <= rank).all()
        assert (rank <= (z > (at_target - slack)[:, None]).sum(1)).all()


@each_head
def test_statistics(head):
    problem = head.problem(*SIZES[-1])
    check_statistics(problem, scanned(problem)[2])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("head", [HEADS[0], HEADS[4]], ids=str)
def test_statistics_of_ragged_sizes(head, size):
    problem = head.problem(*size)
    check_statistics(problem, scanned(problem)[2])


@pytest.mark.parametrize("head", [HEADS[4], Head("ties", coarse=True)], ids=str)
def test_statistics_of_many_tiles(head):
    """More tiles than the table is read at a time; of equal largest logits far apart the first is predicted."""
    block = Launcher(head.problem(1, 8, 1)).block
    problem = head.problem(13, 8, block * (COMBINED_BLOCKS + 1) + 100)
    weight = problem.weight.clone()
    weight[[-1, 3]] = weight[-block] = weight.abs().amax() * 2
    hidden = problem.hidden.clone()
    hidden[::2] = hidden[::2].abs()
    problem = replace(problem, hidden=hidden, weight=weight)
    statistics = scanned(problem)[2]
    check_statistics(problem, statistics)
    if head.coarse:
        assert (statistics.prediction[::2] == 3).all()


def test_statistics_of_no_rows():
    problem = HEADS[4].problem(0, 24, 300)
    statistics = scanned(problem)[2]
    assert statistics.peak.shape == statistics.log_sum.shape == (0,)


@pytest.mark.parametrize("head", [HEADS[4], HEADS[7]], ids=str)
def test_statistics_by_parts(head):
    """Several launches, for rows and for columns, give the bits of one."""
    problem = head.problem(50, 24, 600)
    block = Launcher(problem).block
    whole = scanned(problem)[2]
    parts = scanned(problem, columns=(slice(0, block), slice(block, 600)), rows=16)[2]
    for name, value in vars(whole).items():
        if name != "saved":
            assert torch.equal(value, getattr(parts, name)), name


def test_statistics_not_asked_for_are_not_computed():
    problem = HEADS[0].problem(17, 24, 300, statistics=frozenset())
    launcher = Launcher(problem)
    tables, target_logit = launcher.tables(17), launcher.empty(17)
    launcher.scan(gathered(launcher, slice(0, 17)), 0, slice(0, 300), tables, target_logit)
    launcher.combine(tables, target_logit, 0, 17, statistics := new_statistics(problem))
    assert [tables.gap, tables.smooth, tables.largest, statistics.mean_gap, statistics.prediction] == [None] * 5
    for name in ("peak", "log_sum"):
        check(name, getattr(statistics, name), lambda dtype, name=name: statistic(problem, name, dtype))


@pytest.mark.parametrize(
    "head", [Head("ties", coarse=True), Head("ties", DTYPES[1], coarse=True, scale=0.5, valid_mask="some")], ids=str
)
def test_prediction_and_rank_of_equal_logits(head):
    """The first of the largest logits is predicted, within a tile and across tiles; equal logits are not above."""
    problem = head.problem(40, 8, 600)
    weight = problem.weight.clone()
    weight[[130, 131, 290, 599]] = weight.abs().amax() * 2
    hidden = problem.hidden.clone()
    hidden[::3], hidden[1::3] = 1, -1  # four equal logits are largest, or least
    weight[7] = weight[300] = -weight[130]
    problem = replace(problem, hidden=hidden, weight=weight)
    statistics, counts, alone = scanned(problem)[2], counting(problem), only_counting(problem)
    for name in ("prediction", "target_rank"):
        assert torch.equal(getattr(statistics, name)[counts].long(), statistic(alone, name, torch.float64).long()), name
    assert {130, 7} <= set(statistics.prediction[counts].tolist())


@pytest.mark.parametrize("spoilt", [(), (5,), (300, 5), (514, 511), (128, 300)], ids=str)
@pytest.mark.parametrize("infinite", [(), (3, 400)], ids=str)
def test_prediction_of_what_is_not_finite(spoilt, infinite):
    """The first NaN, else the first infinity, as of ``torch.argmax``; never an index beyond the vocabulary."""
    problem = Head("bias", bias=True).problem(20, 8, 515)
    assert problem.bias is not None
    bias = problem.bias.clone()
    bias[list(infinite)], bias[list(spoilt)] = torch.inf, NAN
    problem = replace(problem, bias=bias)
    expected = logits(problem, torch.float32).argmax(1)
    assert torch.equal(scanned(problem)[2].prediction, expected)


@pytest.mark.parametrize("head", [HEADS[0], HEADS[5], HEADS[6], HEADS[7], HEADS[8], HEADS[9], *HEADS[-6:-5]], ids=str)
def test_table(head):
    """For each row that counts and tile its largest logit, 0 for a masked tile, and log2 of the sum relative to it."""
    problem = head.problem(33, 24, 515)
    launcher, tables, _ = scanned(problem)
    alone, count = only_counting(problem), int(counting(problem).sum())

    def formula(dtype: torch.dtype) -> Tensor:
        return sums_in_tiles(logits(alone, dtype), launcher.block)

    assert tables.sums.shape[:2] == (2, -(-515 // launcher.block))
    check("tables", tables.sums[:, :, :count], formula)


@each_head
def test_kept_softmax(head):
    """A storing scan leaves the softmax of each tile, or its logits, in the compute dtype, and the same statistics."""
    problem = head.problem(33, 24, 2 * 515)
    launcher, statistics = Launcher(problem), new_statistics(problem)
    tables, target_logit = launcher.tables(33), launcher.empty(33).fill_(NAN)
    window = 2 * launcher.block
    first = torch.full((1, 33, window), NAN, dtype=head.dtype, device=DEVICE)
    rest = torch.full((1, 33, 1088), NAN, dtype=head.dtype, device=DEVICE)[:, :, : 2 * 515 - window]
    hidden = gathered(launcher, slice(0, 33))
    launcher.scan(hidden, 0, slice(0, window), tables, target_logit, first)
    launcher.scan(hidden, 0, slice(window, 2 * 515), tables, target_logit, rest)
    launcher.combine(tables, target_logit, 0, 33, statistics)
    alone, count = only_counting(problem), int(counting(problem).sum())

    def formula(dtype: torch.dtype) -> Tensor:
        if launcher.keeps_logits:
            return logits(alone, dtype)
        tiles = [z.softmax(1).nan_to_num(0) for z in logits(alone, dtype).split(launcher.block, 1)]
        return torch.cat(tiles, 1)

    given = torch.cat([first[0], rest[0]], 1)[:count]
    check("softmax", given, formula)
    check_statistics(problem, replace(statistics, target_rank=None))


def test_kept_softmax_of_several_windows():
    """Windows that lie apart in memory, as in the buffer of the weight gradient."""
    problem = Head("windows", torch.float16).problem(17, 24, 1100)
    launcher, target_logit = Launcher(problem), torch.full((17,), NAN, device=DEVICE)
    window = launcher.block
    memory = torch.full((4 * 17 * window + 3 * 64,), NAN, dtype=torch.float16, device=DEVICE)
    apart = memory.as_strided((3, 17, window), (17 * window + 64, window, 1), 128)
    tables = launcher.tables(17)
    launcher.scan(gathered(launcher, slice(0, 17)), 0, slice(0, 3 * window), tables, target_logit, apart)
    for number, z in enumerate(logits(problem, torch.float32).split(window, 1)[:3]):
        torch.testing.assert_close(apart[number].float(), z.softmax(1), rtol=2**-10, atol=2**-24)
    apart.fill_(0)
    assert memory.isnan().sum() == memory.numel() - apart.numel()


def test_order_of_rows_does_not_matter():
    """Statistics of a row are the same bits wherever it stands and whatever stands beside it.

    But for sums of products on a GPU, where multiplying and adding are one instruction here and two there. The
    interpreter's products are NumPy's, which on some processors depend on a row's place: there operands are coarse, so
    that products are exact in whatever order they are added up.
    """
    problem = replace(HEADS[4], coarse=DEVICE == "cpu").problem(50, 24, 515)
    turn = torch.randperm(50, generator=generator(8)).to(DEVICE)
    assert problem.valid_mask is not None
    turned = replace(
        problem, hidden=problem.hidden[turn], target=problem.target[turn], valid_mask=problem.valid_mask[turn]
    )
    first, second = scanned(problem)[2], scanned(turned)[2]
    for name, value in vars(first).items():
        if name in ("mean_gap", "smooth_logit") and DEVICE == "cuda":
            torch.testing.assert_close(getattr(second, name), value[turn], rtol=1e-5, atol=1e-5)
        elif name != "saved":
            assert torch.equal(value[turn], getattr(second, name)), name


# --- the gradient of the logits ---------------------------------------------------------------------------------------

GRADIENT_HEADS = [
    Head("plain"),
    Head("bias", bias=True, vector=True, scale=0.75),
    Head("softcap", softcap=5.0),
    Head("everything", bias=True, scale=0.75, softcap=5.0, vector=True, valid_mask="some"),
    Head("wide softcap", softcap=30.0, span=32.0),
    Head("masked tiles", masked=(0, 1, 4)),
    Head("far apart", span=64.0, vector=True),
    Head("very large", bias=True, shift=1e4, valid_mask="some"),
    Head("very small", bias=True, shift=-1e4),
    Head("one row", valid_mask="one", vector=True),
    Head("no row", valid_mask="none"),
]
GRADIENT_HEADS += [replace(head, dtype=dtype) for dtype in DTYPES[1:] for head in GRADIENT_HEADS[:7]]
# A logsumexp of some hundred is coarser, when it is rounded to fp32, than the probabilities of plain fp32.
GRADIENT_HEADS_BETWEEN_PASSES = [head for head in GRADIENT_HEADS if str(head) != "far apart-float32"]


def unkept(head: Head) -> bool:
    """Whether too many probabilities are zero in fp16 to tell the logits that label smoothing needs under a cap."""
    return head.dtype == torch.float16 and head.softcap == 30


COEFFICIENTS = {"a b c d": {}, "a c": {"b": False, "d": False}, "a b c": {"d": False}, "a c d": {"b": False}}
each_gradient_case = pytest.mark.parametrize(
    ("head", "given"),
    [
        *((head, "a b c" if unkept(head) else "a b c d") for head in GRADIENT_HEADS_BETWEEN_PASSES),
        *((head, given) for head in (GRADIENT_HEADS[0], GRADIENT_HEADS[3]) for given in list(COEFFICIENTS)[1:]),
    ],
    ids=str,
)

# Two tiles of rows, and columns for four windows of a tile of any device.
TOKENS, VOCABULARY = (20 if DEVICE == "cpu" else 150), 3 * 256 + 6
# Two windows of 256 columns fit in the weight's gradient, from its second window on.
HIDDEN = 40 if DEVICE == "cpu" else 152
# Starts at a tile's edge, as every window does, and ends within a tile.
WINDOW = slice(256, 2 * 256 + 7)


def spoil_others(coefficients: Coefficients, counts: Tensor) -> Coefficients:
    """NaN for rows that do not count: nothing may read those."""
    return Coefficients(
        **{name: None if c is None else c.masked_fill(~counts, NAN) for name, c in vars(coefficients).items()}
    )


def check_logits_gradient(problem: Problem, coefficients: Coefficients, gradient: Tensor, columns: slice) -> None:
    """[R, U] in packed order; the targets' entries, which dominate their rows, are held to their own error."""
    counts, alone = counting(problem), only_counting(problem)
    count, of_alone = int(counts.sum()), coefficients.rows(counts)
    assert not gradient[count:].any()
    narrow = problem.shape.compute_dtype if problem.shape.compute_dtype != torch.float32 else None
    at_target = torch.zeros(count, problem.shape.vocabulary, dtype=torch.bool, device=DEVICE)
    at_target.scatter_(1, alone.target[:, None], True)
    at_target = at_target[:, columns]
    for name, where in (("targets", at_target), ("others", ~at_target)):
        check(
            name,
            gradient[:count][where],
            lambda dtype, where=where: logits_gradient(alone, of_alone, dtype)[:, columns][where],
            None if narrow is None else logits_gradient(alone, of_alone, torch.float32, narrow)[:, columns][where],
        )


def kept_tiles(launcher: Launcher, problem: Problem) -> tuple[Tensor, Tensor]:
    """[N, V] what a storing scan keeps and [2, T, N] the tiles' sums, packed; NaN in rows that do not count."""
    z = logits(problem, torch.float64)[launcher.rows.order.long()]
    z[int(launcher.rows.count) :] = NAN
    tiles = z.split(launcher.block, 1)
    softmax = torch.cat([torch.where(tile == -torch.inf, 0, tile.softmax(1)) for tile in tiles], 1)
    return z if launcher.keeps_logits else softmax, sums_in_tiles(z, launcher.block).float()


def sums_in_tiles(z: Tensor, block: int) -> Tensor:
    """[2, T, N] peaks of the tiles of logits [N, V], and log2 of their sums of exponentials relative to them."""
    peaks, sums = [], []
    for tile in z.split(block, 1):
        peak = tile.amax(1)
        peaks.append(torch.where(peak == -torch.inf, 0, peak))
        sums.append((tile - peaks[-1][:, None]).exp().sum(1).log2())
    return torch.stack([torch.stack(peaks), torch.stack(sums)])


@each_gradient_case
def test_gradient_from_kept_softmax(head, given):
    """In place, or beside the softmax, with the same bits."""
    if head.dtype == torch.float16 and head.softcap and "d" in given:
        pytest.skip("in fp16 nothing is kept of capped logits whose labels are smoothed")
    problem = head.problem(TOKENS, 24, VOCABULARY)
    launcher, counts = Launcher(problem), counting(problem)
    coefficients = random_coefficients(TOKENS, **COEFFICIENTS[given])
    tiles, table = kept_tiles(launcher, problem)
    kept = torch.full((TOKENS, 320), 7.0, dtype=head.dtype, device=DEVICE)
    width = WINDOW.stop - WINDOW.start
    kept[:, :width] = tiles[:, WINDOW]
    spoilt, statistics = spoil_others(coefficients, counts), exact_statistics(problem)
    beside = torch.full((TOKENS, width + 3), 7.0, dtype=head.dtype, device=DEVICE)
    for gradient in (beside, kept):
        launcher.stored_gradient(kept[:, :width], gradient[:, :width], table, 0, WINDOW, statistics, spoilt)
        assert (gradient[:, width:] == 7).all()
    assert torch.equal(beside[:, :width], kept[:, :width])
    check_logits_gradient(problem, coefficients, kept[:, :width], WINDOW)


def test_gradient_from_kept_softmax_of_a_chunk():
    """A chunk's rows are those from ``first_row`` on in the packed order; its table starts with them."""
    problem = GRADIENT_HEADS[3].problem(TOKENS, 24, VOCABULARY)
    launcher, counts = Launcher(problem), counting(problem)
    coefficients = random_coefficients(TOKENS)
    tiles, table = kept_tiles(launcher, problem)
    gradient = tiles.float()
    for first in range(0, TOKENS, 7):
        rows = slice(first, min(first + 7, TOKENS))
        launcher.stored_gradient(
            gradient[rows],
            gradient[rows],
            table[:, :, rows].contiguous(),
            first,
            slice(0, VOCABULARY),
            exact_statistics(problem),
            spoil_others(coefficients, counts),
        )
    check_logits_gradient(problem, coefficients, gradient, slice(0, VOCABULARY))


@each_gradient_case
def test_gradient_of_a_recomputed_window(head, given):
    problem = head.problem(TOKENS, 24, VOCABULARY)
    launcher, counts = Launcher(problem), counting(problem)
    coefficients = random_coefficients(TOKENS, **COEFFICIENTS[given])
    width = WINDOW.stop - WINDOW.start
    buffer = torch.full((TOKENS, 320), 7.0, dtype=head.dtype, device=DEVICE)
    gradient = buffer[:, :width]
    gradient.fill_(NAN)
    hidden = gathered(launcher, slice(0, TOKENS))
    spoilt = spoil_others(coefficients, counts)
    launcher.window_gradient(hidden, gradient, WINDOW, exact_statistics(problem), spoilt)
    assert (buffer[:, padded(width) :] == 7).all()  # TMA may write to the end of 16 bytes
    check_logits_gradient(problem, coefficients, gradient, WINDOW)


@pytest.mark.parametrize("how", ["kept", "recomputed"])
def test_target_is_subtracted_before_rounding(how):
    """Where the target is almost certain, ``p - 1`` keeps the relative accuracy that fp16's ``p`` has lost."""
    problem = Head("certain", torch.float16).problem(TOKENS, 24, VOCABULARY)
    weight = problem.weight / 16
    weight[problem.target[0]] = problem.hidden[0] / problem.hidden[0].float().square().sum() * 12
    target = torch.full_like(problem.target, int(problem.target[0]))
    problem = replace(problem, weight=weight, target=target, hidden=problem.hidden[:1].expand(TOKENS, -1).contiguous())
    p = logits(problem, torch.float64).softmax(1)[0, target[0]].item()
    assert 0 < 1 - p < torch.finfo(torch.float16).eps * 8
    launcher, one = Launcher(problem), torch.ones(TOKENS, device=DEVICE)
    coefficients = Coefficients(a=one, b=None, c=one, d=None)
    gradient = torch.empty(TOKENS, 832, dtype=torch.float16, device=DEVICE)[:, :VOCABULARY]
    if how == "kept":
        tiles, table = kept_tiles(launcher, problem)
        gradient.copy_(tiles)
        everything = slice(0, VOCABULARY)
        launcher.stored_gradient(gradient, gradient, table, 0, everything, exact_statistics(problem), coefficients)
    else:
        hidden = gathered(launcher, slice(0, TOKENS))
        launcher.window_gradient(hidden, gradient, slice(0, VOCABULARY), exact_statistics(problem), coefficients)

    def formula(dtype: torch.dtype) -> Tensor:
        return logits_gradient(problem, coefficients, dtype)[:, target[0]]

    check("target", gradient[:, target[0]], formula)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 64, 150])
def test_column_sums(dtype, rows):
    """Added to what is there; columns beside are left alone."""
    gradient, start = values(rows, 131, dtype=dtype), values(131, seed=1)
    sums = start.clone()
    sum_columns(gradient[:, :130], sums[:130])
    assert sums[130] == start[130]

    def formula(dtype: torch.dtype) -> Tensor:
        return start[:130].to(dtype) + gradient[:, :130].to(dtype).sum(0)

    check("sums", sums[:130], formula)


@pytest.mark.parametrize("valid_mask", ["all", "some", "none"])
def test_rows_past_the_count_are_cleared(valid_mask):
    """A window's rows that do not count come out as zeros, even those in tiles without a row that counts."""
    problem = replace(HEADS[0], valid_mask=valid_mask).problem(150, 8, 128)
    launcher, count = Launcher(problem), int(counting(problem).sum())
    gradient = torch.full((150, 128), NAN, device=DEVICE)
    coefficients = random_coefficients(150)
    launcher.window_gradient(
        gathered(launcher, slice(0, 150)), gradient, slice(0, 128), exact_statistics(problem), coefficients
    )
    assert not gradient[count:].any()
    assert not gradient[:count].isnan().any()


# --- rows of logits ---------------------------------------------------------------------------------------------------


def ahead_of(coefficients: Coefficients, slope: bool = False) -> AffineCoefficients:
    """The same coefficients, for outputs whose gradient is prepared; with a slope in the logsumexp as well."""
    slopes = coarse(coefficients.a.shape[0], low=-2, high=2, seed=9).to(coefficients.a) / 16
    return AffineCoefficients(a=coefficients.a, slope=slopes if slope else None, c=coefficients.c, d=coefficients.d)


def of_products(problem: Problem) -> Problem:
    """The problem whose products are those of another rounded to the compute dtype, as the library leaves them."""
    products = (problem.hidden.double() @ problem.weight.double().T).to(problem.shape.compute_dtype)
    identity = torch.eye(problem.shape.vocabulary, device=DEVICE, dtype=problem.shape.compute_dtype)
    shape = replace(problem.shape, hidden=problem.shape.vocabulary)
    return replace(problem, shape=shape, hidden=products, weight=identity)


AHEAD = {"a c": {"d": False}, "a slope c d": {"slope": True}}


@pytest.mark.parametrize(
    ("head", "given", "block"),
    [
        *((head, "a slope c d", rowwise.LEAST_BLOCK) for head in GRADIENT_HEADS),
        *((head, "a c", rowwise.BLOCK) for head in (GRADIENT_HEADS[0], GRADIENT_HEADS[3])),
    ],
    ids=str,
)
def test_gradient_of_rows(head, given, block, monkeypatch):
    """Statistics and, in place of the logits, their gradient: in one step a row and in several."""
    monkeypatch.setattr(rowwise, "BLOCK", block)
    vocabulary, rows = rowwise.LEAST_BLOCK + 8, 21
    problem = of_products(head.problem(rows, 24, vocabulary, frozenset({"smooth_logit"})))
    counts, alone = counting(problem), only_counting(problem)
    coefficients = random_coefficients(rows, b=False, d="d" in given)
    ahead = ahead_of(spoil_others(coefficients, counts), slope="slope" in given)
    statistics = new_statistics(problem)
    for name in ("peak", "log_sum", "target_logit", "smooth_logit"):
        getattr(statistics, name).fill_(NAN)
    buffer = torch.full((rows, vocabulary + 56), 7.0, dtype=head.dtype, device=DEVICE)
    buffer[:, :vocabulary] = problem.hidden
    buffer[:, :vocabulary][~counts] = NAN
    for some in (slice(0, 10), slice(10, rows)):
        gradient_in_place(problem, buffer[some, :vocabulary], some.start, ahead, statistics)
    assert (buffer[:, vocabulary:] == 7).all()
    assert not buffer[:, :vocabulary][~counts].any()
    if "d" not in given:
        statistics = replace(statistics, smooth_logit=None)
    check_statistics(problem, statistics)
    exact = ahead_of(coefficients, slope="slope" in given)

    def formula(dtype: torch.dtype) -> Tensor:
        lse = logits(problem, dtype).logsumexp(1)
        a = exact.a if exact.slope is None else exact.a.to(dtype) + exact.slope.to(dtype) * lse
        return logits_gradient(alone, replace(coefficients, a=a).rows(counts), dtype)

    check("gradient", buffer[:, :vocabulary][counts], formula)


def test_statistics_of_a_row_without_finite_logits():
    """Its log-sum is -inf, as is its smoothed logit."""
    problem = of_products(Head("masked", masked=tuple(range(5))).problem(3, 24, 520, frozenset({"smooth_logit"})))
    statistics = new_statistics(problem)
    gradient_in_place(problem, problem.hidden.clone(), 0, ahead_of(random_coefficients(3, b=False)), statistics)
    check_statistics(problem, statistics)


@pytest.mark.parametrize("factor", [None, 0.3, -2.0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("columns", [1, 24, 1025])
def test_scaled_rows(factor, mask, columns):
    """Zero where they do not count, whatever they hold, even for a factor that is not finite."""
    valid_mask, source = MASKS[mask](37), values(37, columns)
    counts = torch.ones(37, dtype=torch.bool, device=DEVICE) if valid_mask is None else valid_mask
    expected = (source if factor is None else source * factor).masked_fill(~counts[:, None], 0)
    source[~counts] = NAN
    scale = None if factor is None else torch.tensor(factor, device=DEVICE)
    result = torch.full_like(source, NAN)
    assert torch.equal(scale_rows(source, valid_mask, scale, result), expected)
    if scale is not None:
        scale_rows(source, valid_mask, torch.full_like(scale, torch.inf), result)
        assert not result[~counts].any()


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("of", FLOATS, ids=str)
def test_scaled_rows_are_rounded_once(of, to):
    source, factor = values(9, 72, dtype=of), torch.tensor(0.3, device=DEVICE)
    result = torch.empty(9, 72, dtype=to, device=DEVICE)
    assert torch.equal(scale_rows(source, None, factor, result), (source.float() * factor).to(to))


# --- rows that do not count, through the backend ----------------------------------------------------------------------

SCHEDULES = {
    "stored": Schedule("stored", TOKENS, VOCABULARY, cached_windows=1, backward_window=VOCABULARY),
    "windowed": Schedule("windowed", TOKENS, 256, backward_window=256),
    "kept": Schedule("windowed", TOKENS, 256, cached_windows=1, backward_window=512),
    "aliased": Schedule("windowed", TOKENS, 256, cached_windows=1, aliased_windows=2, backward_window=256),
    "prepared": Schedule("stored", TOKENS, VOCABULARY, cached_windows=1, backward_window=VOCABULARY, prepared=True),
    "chunked": Schedule("chunked", TOKENS // 2 - 1, VOCABULARY, backward_window=256),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
COUNTED = ["all", "some", "one", "none"]


def library_products(schedule: str) -> bool:
    """Whether logits are products of the library's, for scalar outputs alone, and rounded as those are."""
    return schedule in ("prepared", "chunked")


def schedule_statistics(schedule: str) -> frozenset:
    return frozenset({"smooth_logit"}) if library_products(schedule) else STATISTICS


def schedule_coefficients(schedule: str, tokens: int = TOKENS) -> Coefficients:
    return random_coefficients(tokens, b=not library_products(schedule))


def evaluated(
    problem: Problem, schedule: str, coefficients: Coefficients, upstream: float = 1.0
) -> tuple[Statistics, Gradients]:
    chosen, shape = SCHEDULES[schedule], problem.shape
    if chosen.aliased_windows and shape.product_dtype.itemsize > shape.weight_dtype.itemsize:
        pytest.skip("the planner aliases nothing where products are wider than the weight")
    if shape.tokens < TOKENS:
        chosen = replace(chosen, rows=max(1, min(chosen.rows, shape.tokens)))
    factor = torch.tensor(upstream, device=DEVICE)
    if chosen.strategy == "chunked":
        statistics, gradients = backend.forward_with_gradients(problem, chosen, ahead_of(coefficients))
        scaled = {name: None if g is None else g * factor for name, g in vars(gradients).items()}
        return statistics, Gradients(**scaled)
    statistics = backend.forward(problem, chosen, ahead_of(coefficients) if chosen.prepared else None)
    if chosen.prepared:
        return statistics, backend.finish(problem, chosen, statistics, factor)
    return statistics, backend.backward(problem, chosen, statistics, coefficients)


def check_gradients(problem: Problem, coefficients: Coefficients, gradients: Gradients) -> None:
    counts, alone = counting(problem), only_counting(problem)
    of_alone, scale = coefficients.rows(counts), problem.head.logit_scale
    narrow = None if problem.shape.compute_dtype == torch.float32 else problem.shape.compute_dtype

    def formulas(dtype: torch.dtype, narrow: torch.dtype | None) -> dict[str, Tensor]:
        dz = logits_gradient(alone, of_alone, dtype, narrow).to(dtype)
        return {
            "hidden": scale * (dz @ alone.weight.to(dtype)),
            "weight": scale * (dz.T @ alone.hidden.to(dtype)),
            "bias": dz.sum(0),
        }

    plain = formulas(torch.float32, narrow)
    given = {"hidden": gradients.hidden, "weight": gradients.weight, "bias": gradients.bias}
    assert not given["hidden"][~counts].any()
    given["hidden"] = given["hidden"][counts]
    for name, value in given.items():
        if value is not None:
            check(name, value, lambda dtype, name=name: formulas(dtype, None)[name], plain[name])


@each_schedule
@pytest.mark.parametrize(
    ("dtype", "valid_mask"),
    [*itertools.product(DTYPES[:1], COUNTED), *itertools.product(DTYPES[1:], COUNTED[:2])],
    ids=str,
)
def test_rows_that_do_not_count(schedule, valid_mask, dtype):
    """Their statistics and gradients are zero, the others' are right."""
    head = Head("busy", dtype, bias=True, scale=0.75, softcap=5.0, vector=True, valid_mask=valid_mask)
    problem = head.problem(TOKENS, HIDDEN, VOCABULARY, schedule_statistics(schedule))
    coefficients = schedule_coefficients(schedule)
    spoilt = spoil_others(coefficients, counting(problem))
    statistics, gradients = evaluated(problem, schedule, spoilt)
    check_statistics(problem, statistics, dtype if library_products(schedule) else None)
    check_gradients(problem, coefficients, gradients)


@pytest.mark.parametrize("schedule", ["prepared", "chunked"])
@pytest.mark.parametrize("upstream", [0.3, 2.0**16])
def test_upstream_gradient_of_a_scalar_output(schedule, upstream):
    """Not in fp16, where no gradient is formed before the upstream one, a loss scale maybe, is known."""
    problem = Head("mean", bias=True).problem(TOKENS, HIDDEN, VOCABULARY, schedule_statistics(schedule))
    mean = {name: None if c is None else c / 2**13 for name, c in vars(schedule_coefficients(schedule)).items()}
    coefficients = Coefficients(**mean)
    _, gradients = evaluated(problem, schedule, coefficients, upstream)
    scaled = {name: None if c is None else c * upstream for name, c in mean.items()}
    check_gradients(problem, Coefficients(**scaled), gradients)


@each_schedule
@pytest.mark.parametrize("valid_mask", COUNTED[1:])
@pytest.mark.parametrize("spoiler", [torch.nan, torch.inf], ids=str)
def test_rows_that_do_not_count_may_hold_anything(schedule, valid_mask, spoiler):
    """Hidden states that are not finite there reach nothing: ``0 * nan`` would be NaN in the gradient of the weight."""
    head = Head("busy", bias=True, valid_mask=valid_mask)
    problem = head.problem(TOKENS, HIDDEN, VOCABULARY, schedule_statistics(schedule))
    hidden = problem.hidden.clone()
    hidden[~counting(problem)] = spoiler
    spoilt = replace(problem, hidden=hidden)
    coefficients = schedule_coefficients(schedule)
    statistics, gradients = evaluated(spoilt, schedule, coefficients)
    check_statistics(problem, statistics)
    check_gradients(problem, coefficients, gradients)


@pytest.mark.parametrize("schedule", ["stored", "windowed", "aliased"])
def test_ignored_rows_give_the_bits_of_the_packed_problem(schedule):
    problem = replace(GRADIENT_HEADS[3], dtype=DTYPES[schedule != "aliased"]).problem(TOKENS, HIDDEN, VOCABULARY)
    counts = counting(problem)
    coefficients = schedule_coefficients(schedule)
    statistics, _ = evaluated(problem, schedule, coefficients)
    alone, _ = evaluated(only_counting(problem), schedule, coefficients.rows(counts))
    for name in ("peak", "log_sum", "target_logit", "mean_gap", "smooth_logit", "prediction"):
        assert torch.equal(getattr(statistics, name)[counts], getattr(alone, name)), name


@pytest.mark.parametrize("schedule", ["windowed", "aliased", "prepared", "chunked"])
def test_gradients_wanted_alone(schedule):
    """Each of the three without the others, with the bits it has beside them."""
    problem = GRADIENT_HEADS[3].problem(TOKENS, HIDDEN, VOCABULARY, schedule_statistics(schedule))
    coefficients = schedule_coefficients(schedule)
    _, together = evaluated(problem, schedule, coefficients)
    for only in ("hidden", "weight", "bias"):
        if schedule == "aliased" and only != "weight":
            continue  # windows are aliased in the weight's gradient
        wants = {f"{name}_gradient": name == only for name in ("hidden", "weight", "bias")}
        alone = replace(problem, shape=replace(problem.shape, **wants))
        _, gradients = evaluated(alone, schedule, coefficients)
        for name in ("hidden", "weight", "bias"):
            given = getattr(gradients, name)
            assert (given is not None) == (name == only)
            assert given is None or torch.equal(given, getattr(together, name)), name


@each_schedule
def test_workspace_counts_residuals(schedule):
    """The tensors a forward pass leaves are those that planning knows of."""
    if schedule == "chunked":
        pytest.skip("leaves nothing")
    problem = GRADIENT_HEADS[3].problem(TOKENS, HIDDEN, VOCABULARY, schedule_statistics(schedule))
    chosen = SCHEDULES[schedule]
    ahead = ahead_of(schedule_coefficients(schedule)) if chosen.prepared else None
    left = backend.forward(problem, chosen, ahead).saved
    forms = backend.saved_forms(problem.shape, chosen)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in left] == [(tuple(size), dtype) for size, dtype in forms]


@pytest.mark.parametrize("workspace", [None, "1KiB", "8GiB"])
def test_nothing_is_formed_ahead_in_fp16(workspace):
    """A loss scale, which comes with the upstream gradient, must reach small entries before they are rounded."""
    sizes = {"tokens": 64, "hidden": 64, "vocabulary": 2000, "device": DEVICE, "backend": "triton"}
    if workspace == "1KiB":  # the schedule that holds least
        with pytest.raises(ValueError, match="at least") as error:
            logitless.plan(**sizes, dtype="float16", workspace=workspace)
        workspace = int(str(error.value).split("at least ")[1].split()[0])
    plan = logitless.plan(**sizes, dtype="float16", workspace=workspace)
    assert plan.strategy != "chunked"
    assert not plan.schedule.prepared
    assert logitless.plan(**sizes, dtype="float32", workspace="8GiB").schedule.prepared


@pytest.mark.parametrize("setting", FP32_PRECISIONS)
def test_operands_are_rounded_to_the_nearest_tf32_where_pytorch_does_so(setting):
    """By either interface: PyTorch refuses to say ``allow_tf32`` after ``fp32_precision`` was set."""
    problem = HEADS[0].problem(17, 24, 300)
    operands = torch.cat([problem.hidden, problem.weight]).double()
    step = 2.0 ** (torch.frexp(operands).exponent - 11)
    rounded = ((operands / step).round() * step).float()
    nearest = replace(problem, hidden=rounded[:17], weight=rounded[17:])
    exact, approximate = (scanned(which)[2].log_sum for which in (problem, nearest))
    assert not torch.equal(exact, approximate)
    with fp32_precision(setting):
        given = scanned(problem)[2].log_sum
    assert torch.equal(given, approximate if FP32_PRECISIONS[setting][1] else exact)


@pytest.mark.parametrize("setting", FP32_PRECISIONS)
def test_precision_of_fp32_products_is_pytorchs(setting):
    """Which its own products follow: it is read from where they read it."""
    with fp32_precision(setting):
        assert (input_precision(torch.float32) == "tf32") == FP32_PRECISIONS[setting][1]
        for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
            assert input_precision(dtype) == "ieee"


@triton.jit
def nearest_tf32_kernel(source, result, block: tl.constexpr):
    """The device function over one block."""
    place = tl.arange(0, block)
    tl.store(result + place, nearest_tf32(tl.load(source + place)))


def test_nearest_tf32():
    """Ten bits after the first, halves away from zero; infinities and every NaN stay what they are."""
    values = torch.tensor([1, 1 + 2**-11, 1 + 3 * 2**-12, -(1 + 2**-11), 2 - 2**-12, 1 + 2**-12, torch.inf, -torch.inf])
    expected = torch.tensor([1, 1 + 2**-10, 1 + 2**-10, -(1 + 2**-10), 2, 1, torch.inf, -torch.inf])
    canonical = torch.tensor([2**31 - 1] * 8, dtype=torch.int32).view(torch.float32)  # what a GPU's arithmetic gives
    source = torch.cat([values, canonical]).to(DEVICE)
    result = torch.empty_like(source)
    nearest_tf32_kernel[(1,)](source, result, 16)
    assert torch.equal(result[:8].cpu(), expected)
    assert result[8:].isnan().all()


@each_schedule
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp32_precision_does_not_reach_16_bits(schedule, dtype):
    """The bits of every kernel are those without the setting: to round a bf16 operand to TF32 does not even compile."""
    head = Head("busy", dtype, bias=True, scale=0.75, softcap=5.0, vector=True, valid_mask="some")
    problem = head.problem(TOKENS, HIDDEN, VOCABULARY, schedule_statistics(schedule))
    coefficients = schedule_coefficients(schedule)
    expected, given = {}, {}
    for results, setting in ((expected, "highest"), (given, "high")):
        with fp32_precision(setting):
            statistics, gradients = evaluated(problem, schedule, coefficients)
        results.update({**vars(statistics), **vars(gradients)})
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, given[name]), name


# --- compilation ------------------------------------------------------------------------------------------------------


def offline(*arguments: str) -> subprocess.CompletedProcess:
    """A run of Python in which Triton compiles, and does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_every_variant_that_calls_ask_for_compiles():
    """The interpreter runs what the compiler refuses: branches of two types, bitcasts, methods of constants."""
    run = offline(str(Path(__file__).with_name("compile_kernels.py")))
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


NEW_VARIANT = """
from unittest import mock
from compile_kernels import compile_variant, unknown
from launches import PURE, Call, losses, recorded
from logitless.backends.triton import launch

hopper, bf16 = (9, 0), PURE[0]
known, _ = recorded(hopper, losses(bf16, strategies=("stored",)))
assert known and not unknown(recorded(hopper, [Call(bf16, "stored", sizes=(7, 24, 515), softcap=True)])[0], known)
with mock.patch.object(launch, "input_precision", return_value="tf32"):
    new = unknown(recorded(hopper, [Call(bf16, "stored")])[0], known)
assert [variant.kernel for variant in new] == ["scan_kernel"], new
assert compile_variant(hopper, known[0], machine_code=False) is None
assert "bitcast" in compile_variant(hopper, new[0], machine_code=False)
"""


def test_a_variant_that_is_not_compiled_is_found():
    """One that a change begins to ask for, here TF32 of 16-bit operands, which the compiler refuses."""
    run = offline("-c", NEW_VARIANT)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
