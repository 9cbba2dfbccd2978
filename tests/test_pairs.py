"""The kernels of the sampled gradient: those that choose pairs, bit for bit against integers of Python; the products.

Masses are powers of two, so that a probability is exact whatever computes its exponential.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from torch import Tensor

import logitless
from kernels import DEVICE, DTYPES, Head, counting, fp32_precision, random_coefficients
from logitless.backends import triton as backend
from logitless.backends.contract import Coefficients, Problem, Schedule
from logitless.backends.triton import selection, tiles
from logitless.backends.triton.dense import new_statistics
from logitless.backends.triton.launch import Tables, table_rows
from logitless.backends.triton.pairs import list_tiles_kernel, start_tiles_kernel
from logitless.backends.triton.rows import order_rows
from logitless.backends.triton.selection import ROWS_PER_WORD, Selection, saved_forms
from logitless.options import BLOCK, Scan
from logitless.sampling import block_count, kept_pairs_bound, most_sampled
from problems import generator, random_problem
from tolerance import loss_and_gradients

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, VOCABULARY = 70, BLOCK * 90 + 5
BLOCKS = block_count(VOCABULARY)
LOG2 = math.log(2)


def exponents(kind: str) -> Tensor:
    """[B, N] log2 of each block's mass, an integer or -inf; each row's masses add up to one."""
    random = generator(3)
    columns = []
    for _ in range(ROWS):
        if kind == "flat":
            masses = [7] * 128
        else:
            masses = [0]
            while len(masses) < BLOCKS - 3:  # split one of the masses, the largest or any
                at = int(torch.randint(len(masses), (1,), generator=random)) if kind == "steep" else 0
                smaller = masses.pop(at) + 1
                masses += [smaller, smaller]
        column = torch.full((BLOCKS,), -math.inf)
        order = torch.randperm(BLOCKS, generator=random)
        masses = masses[:BLOCKS]
        column[order[: len(masses)]] = -torch.tensor(masses, dtype=torch.float32)
        columns.append(column)
    return torch.stack(columns, 1)


KINDS = ("flat", "even", "steep")


def uniforms_of(seed: int = 0) -> Tensor:
    return torch.rand(ROWS, generator=generator(seed), dtype=torch.float64)


def problem_of(threshold: float, valid_mask: str = "all", uniforms: Tensor | None = None) -> Problem:
    problem = Head("selection", valid_mask=valid_mask).problem(ROWS, 8, VOCABULARY, frozenset())
    shape = replace(problem.shape, threshold=threshold)
    return replace(problem, shape=shape, uniforms=(uniforms_of() if uniforms is None else uniforms).to(DEVICE))


def select(
    problem: Problem, log_masses: Tensor, shift: float = 0.0, chunks: Sequence[int] = (ROWS,)
) -> tuple[list[list[tuple[int, bool]]], tuple[Tensor, ...]]:
    """By block its pairs' rows, and whether each is listed for its target alone; and what the kernels left.

    Log-sums are ``shift`` too small, which makes masses of that many octaves too large.
    """
    rows = order_rows(problem.target, problem.valid_mask)
    statistics = replace(
        new_statistics(problem), log_sum=torch.full((ROWS,), -shift * LOG2, dtype=torch.float32, device=DEVICE)
    )
    selected, start = Selection(problem, rows), 0
    packed = log_masses.to(DEVICE)[:, rows.order.long()]
    for size in chunks:
        sums = torch.zeros(2, BLOCKS, table_rows(size), device=DEVICE)
        sums[1, :, :size] = packed[:, start : start + size]
        selected.add(Tables(sums), start, size, statistics)
        start += size
    left = selected.listed()
    pairs, starts = (tensor.cpu() for tensor in left)
    coded = [pairs[first:end].tolist() for first, end in itertools.pairwise(starts)]
    return [[(code & 0x7FFFFFFF, code < 0) for code in block] for block in coded], left


def expected(problem: Problem, log_masses: Tensor, shift: int = 0) -> list[list[tuple[int, bool]]]:
    """The same by the definition, in integers."""
    one, threshold = 1 << 44, problem.shape.threshold
    assert threshold is not None
    assert problem.uniforms is not None
    valid_mask = torch.ones(ROWS, dtype=torch.bool) if problem.valid_mask is None else problem.valid_mask.cpu()
    most = most_sampled(VOCABULARY, threshold)
    result: list[list[tuple[int, bool]]] = [[] for _ in range(BLOCKS)]
    for row in range(ROWS):
        if not valid_mask[row]:
            continue
        passed, own = int(problem.uniforms[row].item() * one), int(problem.target[row]) // BLOCK
        for block in range(BLOCKS):
            mass = 2.0 ** (log_masses[block, row].item() + shift)
            after = passed + int(min(1.0, mass / threshold) * one)
            kept = after // one > passed // one and after // one <= most
            if kept or block == own:
                result[block].append((row, not kept))
            passed = after
    return result


@pytest.mark.parametrize("threshold", [1 / 4, 1 / 64, 1.0, 2.0**-40])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_those_of_the_definition(kind, threshold):
    problem, log_masses = problem_of(threshold), exponents(kind)
    given, (_, starts) = select(problem, log_masses)
    assert given == expected(problem, log_masses)
    assert [starts[0], starts[-1]] == [0, sum(map(len, given))]


def test_tiles_of_a_block():
    """Each is of one block, and all but a block's last are full."""
    starts = torch.tensor([0, 0, 16, 49, 49, 50], dtype=torch.int32, device=DEVICE)
    tile_starts, tile_blocks = torch.empty_like(starts), torch.full((6,), -1, dtype=torch.int32, device=DEVICE)
    start_tiles_kernel[(1,)](starts, tile_starts, 5, TILE=16, STEP=4)
    list_tiles_kernel[(5,)](tile_starts, tile_blocks, STEP=2)
    assert tile_starts.tolist() == [0, 0, 1, 4, 4, 5]
    assert tile_blocks.tolist() == [1, 2, 2, 2, 4, -1]


@pytest.mark.parametrize("valid_mask", ["some", "one", "none"])
def test_rows_that_do_not_count_list_nothing(valid_mask):
    problem, log_masses = problem_of(1 / 16, valid_mask), exponents("steep")
    assert select(problem, log_masses)[0] == expected(problem, log_masses)


@pytest.mark.parametrize("chunks", [(32, 38), (64, 6), (32, 32, 6)], ids=str)
def test_chunks_do_not_matter(chunks):
    problem, log_masses = problem_of(1 / 16, "some"), exponents("steep")
    assert select(problem, log_masses, chunks=chunks)[0] == expected(problem, log_masses)


def test_steps_do_not_matter(monkeypatch):
    """However many blocks and rows the kernels take at a time."""
    sizes = {
        **{"SELECTED_BLOCKS": 16, "SELECTED_SEGMENTS": 2, "COUNTED_GROUPS": 1, "COUNTED_BLOCKS": 8},
        **{"COUNTED_SEGMENTS": 2, "LISTED_GROUPS": 2, "STARTED_BLOCKS": 16},
    }
    for name, size in sizes.items():
        monkeypatch.setattr(selection, name, size)
    problem, log_masses = problem_of(1 / 16, "some"), exponents("steep")
    assert select(problem, log_masses)[0] == expected(problem, log_masses)


@pytest.mark.parametrize("threshold", [1 / 4, 1 / 32])
def test_masses_that_are_too_large_keep_no_more_than_there_is_room_for(threshold):
    """As a rounded log-sum-exp gives them, here by far."""
    problem, log_masses = problem_of(threshold), exponents("even")
    given, (pairs, starts) = select(problem, log_masses, shift=6)
    assert given == expected(problem, log_masses, shift=6)
    by_row = [sum(row == pair for block in given for pair, _ in block) for row in range(ROWS)]
    assert max(by_row) == most_sampled(VOCABULARY, threshold) + 1  # and the target's
    assert starts[-1] <= pairs.shape[0] == kept_pairs_bound(ROWS, VOCABULARY, threshold)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_masses_that_are_no_numbers(value):
    """A row of NaN, or of logits that are all infinite, lists its target's block, alone or not; others are as ever."""
    problem, log_masses = problem_of(1 / 16), exponents("steep")
    spoilt = log_masses.clone()
    spoilt[:, 5] = value
    given = select(problem, spoilt)[0]
    own = int(problem.target[5]) // BLOCK
    of_row = [block for block, pairs in enumerate(given) if any(row == 5 for row, _ in pairs)]
    assert own in of_row
    if value != math.inf:
        assert of_row == [own]
    others = [[pair for pair in block if pair[0] != 5] for block in given]
    assert others == [[pair for pair in block if pair[0] != 5] for block in expected(problem, log_masses)]


@pytest.mark.parametrize("offset", [0.0, 1 - 2.0**-53])
def test_offsets_at_the_ends(offset):
    problem, log_masses = (
        problem_of(1 / 16, uniforms=torch.full((ROWS,), offset, dtype=torch.float64)),
        exponents("even"),
    )
    assert select(problem, log_masses)[0] == expected(problem, log_masses)


def test_small_blocks_are_not_lost_beside_large_ones():
    """A block of probability 2^-30 after others that add up to 60 is kept by the uniforms that the definition names."""
    log_masses = torch.full((BLOCKS, ROWS), -math.inf)
    log_masses[:60] = -6.0
    log_masses[70] = -36.0
    just_below = 1 - 2.0**-30 - 2.0**-40  # the small block does not pass the integer; a step more, and it does
    uniforms = torch.full((ROWS,), just_below, dtype=torch.float64)
    uniforms[::2] = 1 - 2.0**-30
    problem = problem_of(1 / 64, uniforms=uniforms)
    own = problem.target.cpu() // BLOCK
    kept = [row for row, alone in select(problem, log_masses)[0][70] if not alone]
    assert kept == [row for row in range(ROWS) if row % 2 == 0]
    assert (own[kept] == 70).sum() < len(kept)


def test_room_is_that_of_the_plan():
    problem = problem_of(1 / 16)
    _, left = select(problem, exponents("flat"))
    assert [(tuple(t.shape), t.dtype) for t in left] == saved_forms(problem.shape)
    assert ROWS % ROWS_PER_WORD  # the last group is not full


# --- the products over pairs ------------------------------------------------------------------------------------------


def sampled_gradients(
    frozen: str | None = None, dtype: torch.dtype = torch.float32, scan: Scan = "input", **options
) -> dict[str, Tensor]:
    """Loss and gradients of a problem whose blocks have many pairs, few and none; two slices of the hidden size."""
    problem = random_problem(90, 40, BLOCK * 5 + 60).to(dtype).with_options(reduction="sum", **options)
    problem.target[::9] = -100
    if frozen is not None:
        problem = replace(problem, **{frozen: getattr(problem, frozen).detach()})
    problem = replace(problem.map(lambda tensor: tensor.to(DEVICE)), target=problem.target.to(DEVICE))
    return loss_and_gradients(
        logitless.linear_cross_entropy,
        problem,
        backend="triton",
        gradient=logitless.Sampled(1 / 2, scan=scan, generator=generator(2)),
    )


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.25}], ids=["bare", "smoothed"])
def test_order_of_additions_hardly_matters(options, request):
    """The deterministic kernel adds up what the fast one does, but for the rounding of fp32."""
    fast = sampled_gradients(**options)
    request.getfixturevalue("deterministic")
    in_order, again = sampled_gradients(**options), sampled_gradients(**options)
    for name, value in in_order.items():
        assert torch.equal(value, again[name]), name
        assert (fast[name] - value).norm() <= 4 * torch.finfo(torch.float32).eps * value.norm(), name
    assert torch.equal(fast["linear_weight"], in_order["linear_weight"])


def test_tiles_of_pairs_do_not_matter(monkeypatch):
    """Whether tiles are of so many pairs or of twice as many."""
    tile_of, expected = tiles.tile, sampled_gradients()

    def twice(kind: tiles.Kind, itemsize: int, index: int | None) -> tiles.Tile:
        tile = tile_of(kind, itemsize, index)
        return replace(tile, rows=2 * tile.rows) if kind == "pairs" else tile

    monkeypatch.setattr(tiles, "tile", twice)
    for name, value in sampled_gradients().items():
        assert (value - expected[name]).norm() <= 8 * torch.finfo(torch.float32).eps * expected[name].norm(), name


@pytest.mark.parametrize("frozen", ["input", "linear_weight"])
def test_gradients_wanted_alone(frozen):
    """With one input frozen the other's gradient is the same."""
    together, alone = sampled_gradients(), sampled_gradients(frozen)
    assert alone.keys() == together.keys() - {frozen}
    for name, value in alone.items():
        torch.testing.assert_close(value, together[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", ["input", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp32_precision_reaches_fp32_alone(dtype, scan, deterministic):
    """Under "high" 16 bits and a scan in eight are as they were; fp32 gradients are those of products in TF32."""
    expected = sampled_gradients(dtype=dtype, scan=scan, label_smoothing=0.25)
    with fp32_precision("high"):
        given = sampled_gradients(dtype=dtype, scan=scan, label_smoothing=0.25)
    for name, value in expected.items():
        if dtype == torch.float32:
            assert 0 < (given[name] - value).norm() <= 2.0**-8 * value.norm(), name
        else:
            assert torch.equal(given[name], value), name


@pytest.mark.parametrize("spoiler", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_coefficients_of_rows_that_do_not_count_may_be_anything(softcap, spoiler):
    """Those of label smoothing too, whose part of rank one is a sum over rows."""
    head = Head("busy", bias=True, softcap=softcap, vector=True, valid_mask="some")
    problem = head.problem(ROWS, 24, BLOCK * 3 + 5, frozenset({"smooth_logit"}))
    problem = replace(problem, shape=replace(problem.shape, threshold=1 / 4), uniforms=uniforms_of().to(DEVICE))
    schedule = Schedule("sampled", ROWS, BLOCK * 3 + 5)
    statistics = backend.forward(problem, schedule, None)
    coefficients = random_coefficients(ROWS, b=False)
    hidden = problem.hidden.clone()
    hidden[~counting(problem)] = spoiler
    spoilt = Coefficients(
        **{
            name: None if value is None else value.masked_fill(~counting(problem), spoiler)
            for name, value in vars(coefficients).items()
        }
    )
    expected = backend.backward(problem, schedule, statistics, coefficients)
    given = backend.backward(replace(problem, hidden=hidden), schedule, statistics, spoilt)
    assert not given.hidden[~counting(problem)].any()
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(getattr(given, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
