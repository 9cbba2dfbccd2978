"""What the triton backend allocates above inputs and gradients, and how long a schedule takes: the planner's sources.

Bytes are a sum of the allocations that ``dense`` and ``launch`` make, term by term. Seconds are a model of the device's
measured rates, good enough to rank schedules; their absolute value is not promised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from logitless.backends.contract import Schedule, Shape, ceil_div
from logitless.backends.triton import sampled, selection, tiles
from logitless.backends.triton.dense import padded, runs
from logitless.backends.triton.fp8_quantize import SUMMED_SEGMENTS, operand_width
from logitless.backends.triton.launch import table_block, table_rows
from logitless.options import BLOCK

# Vectors of 4 bytes a row: order, target, statistics, coefficients and what forms them.
VECTORS = 24
# Small tensors that do not depend on the problem's size, and the allocator's rounding of every other to 512 bytes.
SLACK = 1 << 16


def blocks(shape: Shape) -> int:
    """Rows of the table of block sums."""
    return ceil_div(shape.vocabulary, table_block(shape, index_of(shape)))


def window_multiple(shape: Shape) -> int:
    """Columns of a tile, which windows are multiples of."""
    return tiles.tile("scan", shape.compute_dtype.itemsize, index_of(shape)).columns


def index_of(shape: Shape) -> int | None:
    """Index of the CUDA device that a problem is on, None for the interpreter's."""
    return torch.cuda.current_device() if shape.device_type == "cuda" and torch.cuda.is_available() else None


def workspace(shape: Shape, schedule: Schedule) -> int:
    """Upper bound of the bytes held under a schedule."""
    bias = 8 * shape.vocabulary if shape.bias_gradient else 0
    fixed = _weight_copy(shape) + 4 * VECTORS * shape.tokens + bias + SLACK
    if shape.compacted:  # strided hidden states, made contiguous
        fixed += shape.tokens * shape.hidden * shape.hidden_dtype.itemsize
    if schedule.strategy == "loss_only":
        return fixed + _tables(shape, schedule.rows) + _hidden(shape, schedule.rows)
    if schedule.strategy == "chunked":
        return fixed + _chunked(shape, schedule)
    if schedule.prepared:
        return fixed + _prepared(shape)
    if schedule.strategy == "sampled":
        return fixed + _sampled(shape, schedule)
    aliased, recomputed, kept = runs(shape, schedule)
    item = shape.compute_dtype.itemsize
    keeps = aliased.stop > 0 or kept.stop > kept.start
    left = shape.tokens * padded(kept.stop - kept.start) * item + (_table(shape, shape.tokens) if keeps else 0)
    # The weight gradient lives during the forward pass where windows are aliased with it, else not yet.
    early = 0 if aliased.stop else -_weight_gradient(shape)
    forward = left + _tables(shape, shape.tokens) - (_table(shape, shape.tokens) if keeps else 0) + early
    forward += _hidden(shape, shape.tokens) - _hidden_gradient(shape)
    width = recomputed.stop - recomputed.start
    if shape.functional:
        width = max(width, kept.stop - kept.start)
    width = min(schedule.backward_window, width)
    accumulator = _hidden_accumulator(shape, _pieces(shape, schedule) == 1)
    multiplying = _hidden(shape, shape.tokens) + shape.tokens * padded(width) * item
    multiplying += _wide_product(shape, max(width, kept.stop - kept.start))
    scattered = accumulator if shape.sharded else _hidden_gradient(shape)  # in fp32, to be summed over ranks
    backward = left + accumulator + max(scattered, multiplying) - _hidden_gradient(shape)
    return fixed + max(forward, backward)


def _pieces(shape: Shape, schedule: Schedule) -> int:
    aliased, recomputed, kept = runs(shape, schedule)
    windows = ceil_div((recomputed.stop - recomputed.start), max(1, schedule.backward_window))
    cached_width = kept.stop - kept.start
    cached_pieces = ceil_div(cached_width, schedule.backward_window) if shape.functional else cached_width > 0
    return windows + (schedule.aliased_windows if aliased.stop else 0) + cached_pieces


def _weight_copy(shape: Shape) -> int:
    copied = shape.weight_dtype != shape.compute_dtype or shape.weight_layout != "rows"
    return shape.vocabulary * shape.hidden * shape.compute_dtype.itemsize if copied else 0


def _weight_gradient(shape: Shape) -> int:
    wanted = shape.weight_gradient and not shape.main_grad
    return math.prod(shape.weight_gradient_size) * shape.weight_dtype.itemsize if wanted else 0


def _hidden_gradient(shape: Shape) -> int:
    return shape.tokens * shape.hidden * shape.hidden_dtype.itemsize if shape.hidden_gradient else 0


def _wide_product(shape: Shape, columns: int) -> int:
    """Rows of the weight's gradient in fp32, where the library cannot round its sums to the weight's dtype."""
    narrower = _weight_gradient(shape) > 0 and shape.weight_dtype not in (shape.compute_dtype, torch.float32)
    return 4 * columns * shape.hidden if narrower else 0


def _hidden(shape: Shape, rows: int) -> int:
    """Rows in packed order."""
    return min(rows, shape.tokens) * shape.hidden * shape.compute_dtype.itemsize


def _hidden_accumulator(shape: Shape, single: bool) -> int:
    if not shape.hidden_gradient:
        return 0
    narrow = single and shape.hidden_dtype == shape.compute_dtype and not shape.sharded
    return shape.tokens * shape.hidden * (shape.compute_dtype.itemsize if narrow else 4)


def _table(shape: Shape, rows: int) -> int:
    """Peaks and log-sums of blocks of columns."""
    return 8 * blocks(shape) * table_rows(min(rows, shape.tokens))


def _tables(shape: Shape, rows: int) -> int:
    wanted = shape.statistics
    others = ("mean_gap" in wanted) + ("smooth_logit" in wanted) + 2 * ("prediction" in wanted)
    smoothing_of_blocks = 4 * (shape.vocabulary + 2 * blocks(shape)) if "smooth_logit" in wanted else 0
    return (2 + others) * _table(shape, rows) // 2 + smoothing_of_blocks


def _hidden_cast(shape: Shape) -> int:
    """A copy of the hidden states in the compute dtype."""
    return _hidden(shape, shape.tokens) if shape.hidden_dtype != shape.compute_dtype else 0


def _prepared(shape: Shape) -> int:
    """Logits; hidden states times the upstream gradient, gone before the hidden gradient comes."""
    left = shape.tokens * padded(shape.vocabulary) * shape.compute_dtype.itemsize
    rows = _hidden(shape, shape.tokens) if shape.weight_gradient else 0
    rows += _wide_product(shape, shape.vocabulary)
    wide = 0
    if shape.hidden_gradient and shape.hidden_dtype not in (shape.compute_dtype, torch.float32):
        wide = 4 * shape.tokens * shape.hidden
    forward = _hidden_cast(shape) - _hidden_gradient(shape) - _weight_gradient(shape)
    return left + max(0, forward, _hidden_cast(shape) + rows - _hidden_gradient(shape), _hidden_cast(shape) + wide)


def _sampled(shape: Shape, schedule: Schedule) -> int:
    """Pairs; forward, tables and a bit for each pair there could be; backward, the gradient of the pairs' logits."""
    saved = selection.saved_forms(shape)
    left = sum(math.prod(size) * dtype.itemsize for size, dtype in saved)
    (pairs, _), (starts, _) = saved[:2]
    rows = sampled.rows_at_a_time(shape, schedule)
    smooth = 0
    if "smooth_logit" in shape.statistics:
        smooth = 4 * (sampled.SEGMENTS + 2) * shape.hidden
        if selection.mixed(shape):  # the smoothing in fp64, its magnitude and its sums over blocks
            smooth += 20 * shape.vocabulary
    forward = _tables(shape, rows) + _hidden(shape, rows) + selection.workspace(shape, rows)
    tile = tiles.tile("pairs", shape.compute_dtype.itemsize, index_of(shape)).rows
    tile_lists = 4 * (starts[0] + sampled.most_tiles(shape, pairs[0], tile)) + _hidden_cast(shape)
    if shape.estimated:
        slots = shape.tokens * selection.slots(shape)
        correcting = selection.workspace(shape, rows) + 16 * slots + tile_lists
        rounded = (shape.vocabulary + rows) * (operand_width(shape.hidden) + 4) + 4 * SUMMED_SEGMENTS * shape.hidden
        forward = max(forward + 12 * slots + rounded, correcting)
    pair_gradient = pairs[0] * BLOCK * shape.compute_dtype.itemsize + tile_lists
    accumulator = 4 * shape.tokens * shape.hidden if shape.hidden_gradient else 0
    multiplying = pair_gradient + accumulator - _hidden_gradient(shape)
    rounding = 0 if shape.hidden_dtype == torch.float32 else accumulator
    return left + smooth + max(forward - _hidden_gradient(shape) - _weight_gradient(shape), multiplying, rounding)


def _chunked(shape: Shape, schedule: Schedule) -> int:
    rows = min(schedule.rows, shape.tokens)
    # A chunk's hidden states too, with zeros for rows that do not count.
    total = rows * padded(shape.vocabulary) * shape.compute_dtype.itemsize + _hidden(shape, rows) + _hidden_cast(shape)
    hidden = weight = 0
    if shape.hidden_gradient:
        hidden = 4 * shape.tokens * shape.hidden
    if shape.weight_gradient:
        weight = 4 * math.prod(shape.weight_gradient_size)
    # In fp32 while chunks come; then rounded one after the other, the hidden states' first, unless fp32 is wanted.
    multiplying = total + hidden + weight - _hidden_gradient(shape) - _weight_gradient(shape)
    in_place = torch.float32 if not shape.functional else None
    rounding = weight - _weight_gradient(shape) + (0 if shape.hidden_dtype == in_place else hidden)
    return max(multiplying, rounding, 0 if shape.weight_dtype == in_place else weight)


@dataclass(frozen=True)
class Rates:
    """Of a device, for ranking schedules.

    Attributes:
        products: floating-point operations a second, by bytes of the operands.
        memory: bytes a second.
        step: seconds that a window or a chunk costs besides.
    """

    products: dict[int, float]
    memory: float
    step: float


RATES = {
    "sm90": Rates({2: 6.8e14, 4: 3.0e13}, 3.5e12, 4e-5),
    **dict.fromkeys(("sm80", "sm100"), Rates({2: 2.0e14, 4: 1.5e13}, 1.5e12, 4e-5)),  # not measured
    "interpreter": Rates({2: 1e12, 4: 1e12}, 1e12, 1e-6),
}


def cost(shape: Shape, schedule: Schedule) -> float:
    """Seconds that a schedule takes, roughly."""
    rates = RATES[tiles.architecture(index_of(shape))]
    tile = tiles.tile("scan", shape.compute_dtype.itemsize, index_of(shape))
    num_sms = tiles.num_sms(index_of(shape))
    n, d, v = shape.tokens, shape.hidden, shape.vocabulary
    column = 2 * n * d / rates.products[shape.compute_dtype.itemsize]  # one column of logits

    def whole_waves(rows: int, columns: int) -> float:
        """Time of a product over its ideal, from the last wave of tiles that is not full."""
        count = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)
        return ceil_div(count, num_sms) * num_sms / max(1, count)

    chunks = ceil_div(n, max(1, schedule.rows))
    seconds = column * v * whole_waves(min(schedule.rows, max(1, n)), v) + chunks * rates.step
    if schedule.strategy in ("loss_only", "sampled"):  # sampled ones differ in their forward pass alone
        return seconds
    seconds += column * v * (shape.hidden_gradient + shape.weight_gradient)
    item = shape.compute_dtype.itemsize
    row_wise = 5 * n * v * item / 2  # two reads, of which L2 serves half of one, and a write
    if schedule.strategy == "chunked":
        traffic, pieces = (8 * chunks + 6) * v * d * shape.weight_gradient + row_wise, chunks
    elif schedule.prepared:
        traffic, pieces = row_wise, 1
    else:
        aliased, recomputed, _ = runs(shape, schedule)
        width = recomputed.stop - recomputed.start
        pieces = _pieces(shape, schedule)
        window = min(schedule.backward_window, max(1, width))
        seconds += column * width * whole_waves(n, window)
        if aliased.stop:
            seconds += column * aliased.stop * (whole_waves(n, aliased.stop) - 1)
        # Storing holds up the product's epilogue by about the time of writing twice; then a read and a write.
        traffic = 4 * n * (v - width) * item
        if pieces > 1:
            traffic += 8 * pieces * n * d * shape.hidden_gradient
    return seconds + traffic / rates.memory + pieces * rates.step
