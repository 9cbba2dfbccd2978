"""What the torch backend allocates above inputs and gradients: the planner's only source.

Every term is an allocation that the named module makes. Gradients themselves do not count, accumulators do where their
dtype is not the gradient's. Bounds, in bytes; the larger of forward and backward pass.
"""

from __future__ import annotations

import math

from logitless.backends.contract import Schedule, Shape
from logitless.backends.torch.dense import ADDED_ROWS, PARTIAL, TARGET_ROWS
from logitless.backends.torch.estimated import ROUNDED_ROWS
from logitless.backends.torch.pairs import GROUP_ROWS
from logitless.backends.torch.tiles import scratch_elements
from logitless.fp8 import MAX_OUTLIERS
from logitless.options import BLOCK
from logitless.sampling import block_count, kept_pairs_bound

# Vectors of 8 bytes a row that live at the same time, statistics and what forms them; counted high.
VECTORS = 24
# Small tensors that do not depend on the problem's size. On an accelerator also what its libraries take for a product
# or a sort, and what its allocator rounds up to: 1.2 MB at most were seen on an H100.
SLACK, SLACK_ELSEWHERE = 1 << 14, 3 << 19


def workspace(shape: Shape, schedule: Schedule) -> int:
    """Upper bound of the bytes held under a schedule."""
    # And each window's peak and log-sum.
    vectors = VECTORS * 8 + 2 * shape.statistics_dtype.itemsize * math.ceil(shape.vocabulary / schedule.window)
    fixed = _unpacked_gradient(shape) + vectors * shape.tokens
    fixed += SLACK if shape.device_type == "cpu" else SLACK_ELSEWHERE
    # The bias in fp32, its gradient in fp64, and the temporary sum of a tile's columns.
    vocabulary_vectors = (2 * shape.statistics_dtype.itemsize + 8) * shape.vocabulary
    if schedule.strategy == "chunked":
        passes = [_chunked(shape, schedule)]
    elif schedule.strategy == "sampled":
        passes = [_sampled_forward(shape, schedule), _sampled_backward(shape)]
    else:
        passes = [_dense_forward(shape, schedule)]
        if shape.any_gradient and schedule.strategy != "loss_only":
            passes.append(_dense_backward(shape, schedule))
    return fixed + vocabulary_vectors + max(passes)


def _unpacked_gradient(shape: Shape) -> int:
    """The gradient of the rows that count, while it is put among the others."""
    return shape.tokens * shape.hidden * shape.hidden_dtype.itemsize if shape.compacted and shape.hidden_gradient else 0


def _hidden_rows(shape: Shape, rows: int) -> int:
    """Copies of some rows: gathered, cleared where they do not count but stay in place, in the product dtype."""
    stay = shape.functional or shape.device_type != "cpu"
    copies = shape.hidden_dtype.itemsize * (shape.compacted + stay)
    if shape.product_dtype != shape.hidden_dtype:
        copies += shape.product_dtype.itemsize
    return min(rows, shape.tokens) * shape.hidden * copies


def _scratch(shape: Shape, rows: int, columns: int, *, gradient: bool) -> int:
    """The buffers of ``tiles.Scratch`` in use, and a rank's comparison mask."""
    gap = "mean_gap" in shape.statistics
    buffers = 1 + gap + (gradient and shape.softcapped)
    mask = scratch_elements(shape, rows, columns) if "target_rank" in shape.statistics else 0
    return buffers * shape.statistics_dtype.itemsize * scratch_elements(shape, rows, columns) + mask


def _weight_copy(shape: Shape, columns: int) -> int:
    """A window of the weight in the product dtype."""
    if shape.product_dtype == shape.weight_dtype and shape.weight_layout != "strided":
        return 0
    return columns * shape.hidden * shape.product_dtype.itemsize


def _narrow(shape: Shape) -> bool:
    return shape.product_dtype != shape.statistics_dtype


def _product_scratch(shape: Shape, tile_bytes: int) -> int:
    """What the CPU's library packs operands into, or after that the wide copy of a narrow product's part that is added.

    Bounds what was measured with torch 2.13 over products of 1 to 4096 rows, 128 to 50304 columns and D up to 4096.
    """
    if not _narrow(shape):
        return 0
    packing = (1 << 19) + min(7 << 19, tile_bytes) if shape.device_type == "cpu" else 0
    return max(packing, ADDED_ROWS * shape.hidden * shape.statistics_dtype.itemsize)


def _hidden_accumulator(shape: Shape) -> int:
    if not shape.hidden_gradient or shape.hidden_dtype == shape.statistics_dtype:
        return 0
    return shape.tokens * shape.hidden * shape.statistics_dtype.itemsize


def _target_rows(shape: Shape) -> int:
    """Gathered rows of the weight, rounded to the compute dtype, in the accumulator's."""
    dtypes = (shape.weight_dtype, shape.compute_dtype, shape.statistics_dtype)
    item = sum(dtype.itemsize for number, dtype in enumerate(dtypes) if number == 0 or dtype != dtypes[number - 1])
    return min(shape.tokens, TARGET_ROWS) * shape.hidden * item if shape.hidden_gradient else 0


def _logits(shape: Shape, rows: int, window: int, schedule: Schedule) -> int:
    """Kept windows, of which the last may be narrower, and the buffer of the others where there are others."""
    windows = math.ceil(shape.vocabulary / window)
    others = windows - schedule.cached_windows
    kept = max(0, shape.vocabulary - others * window)
    buffer = rows * window if others > schedule.aliased_windows or shape.functional else 0
    return (shape.tokens * kept + buffer) * shape.product_dtype.itemsize


def _dense_forward(shape: Shape, schedule: Schedule) -> int:
    rows, window = min(schedule.rows, shape.tokens), min(schedule.window, shape.vocabulary)
    return (
        _hidden_rows(shape, rows)
        + _logits(shape, rows, window, schedule)
        + _product_scratch(shape, rows * window * shape.product_dtype.itemsize)
        + _scratch(shape, rows, window, gradient=False)
        + _weight_copy(shape, window)
    )


def _dense_backward(shape: Shape, schedule: Schedule) -> int:
    item = shape.product_dtype.itemsize
    window = min(schedule.backward_window, shape.vocabulary)
    hidden_partial = shape.tokens * shape.hidden * item if shape.hidden_gradient and _narrow(shape) else 0
    weight_partial = 0
    if shape.weight_gradient and shape.weight_dtype != shape.product_dtype:
        weight_partial = window * shape.hidden * item
    buffers = (
        _hidden_rows(shape, shape.tokens)
        + _logits(shape, shape.tokens, window, schedule)
        + _scratch(shape, shape.tokens, window, gradient=True)
        + _weight_copy(shape, window)
        + hidden_partial
        + weight_partial
    )
    multiplying = _product_scratch(shape, shape.tokens * window * item)
    # The gradient of the hidden states itself is made from its accumulator when the buffers are gone.
    return max(
        _hidden_accumulator(shape),
        _hidden_accumulator(shape) - _hidden_gradient(shape) + buffers + max(multiplying, _target_rows(shape)),
    )


def _hidden_gradient(shape: Shape) -> int:
    """Bytes of the gradient that the accumulator is rounded to."""
    return shape.tokens * shape.hidden * shape.hidden_dtype.itemsize if _hidden_accumulator(shape) else 0


def _chunked(shape: Shape, schedule: Schedule) -> int:
    rows, item = min(schedule.rows, shape.tokens), shape.product_dtype.itemsize
    total = rows * shape.vocabulary * item
    total += _product_scratch(shape, total) + (total if shape.sharded else 0)
    total += _scratch(shape, rows, shape.vocabulary, gradient=True)
    total += _weight_copy(shape, min(PARTIAL, shape.vocabulary))
    total += _hidden_accumulator(shape) + _target_rows(shape) + _hidden_rows(shape, rows)
    if _narrow(shape):
        total += (rows if shape.hidden_gradient else 0) * shape.hidden * item
        total += (min(PARTIAL, shape.vocabulary) if shape.weight_gradient else 0) * shape.hidden * item
    if shape.weight_gradient and shape.weight_dtype != shape.statistics_dtype:
        total += math.prod(shape.weight_gradient_size) * shape.statistics_dtype.itemsize
    return total


def _pairs(shape: Shape) -> int:
    """Row, weight and index of each kept pair, while they are put in order; then the values of its row."""
    assert shape.threshold is not None
    return kept_pairs_bound(shape.tokens, shape.vocabulary, shape.threshold) * (160 if shape.estimated else 120)


def _sampled_forward(shape: Shape, schedule: Schedule) -> int:
    if shape.estimated:
        return max(_estimated_scan(shape, schedule), _correction(shape))
    rows, window = min(schedule.rows, shape.tokens), min(schedule.window, shape.vocabulary)
    # The table of block masses and the float64 sums, masks and indices of the selection.
    table = rows * block_count(shape.vocabulary) * 56
    if shape.sharded:  # whose selection waits for the other shards
        table += shape.tokens * block_count(shape.vocabulary) * shape.statistics_dtype.itemsize
    return (
        _hidden_rows(shape, rows)
        + rows * window * shape.product_dtype.itemsize
        + _product_scratch(shape, rows * window * shape.product_dtype.itemsize)
        + _scratch(shape, rows, window, gradient=False)
        + _weight_copy(shape, window)
        + table
        + _pairs(shape)
    )


def _estimated_scan(shape: Shape, schedule: Schedule) -> int:
    """Operands in the statistics dtype, and what rounding some of their rows takes."""
    rows, window = min(schedule.rows, shape.tokens), min(schedule.window, shape.vocabulary)
    width, item = shape.hidden + 2 * MAX_OUTLIERS + 1, shape.statistics_dtype.itemsize
    tables = 2 if "smooth_logit" in shape.statistics else 1
    return (
        _hidden_rows(shape, shape.tokens)
        + (shape.tokens + schedule.window) * width * item
        + 8 * ROUNDED_ROWS * width * item
        + schedule.rows * schedule.window * item
        + _product_scratch(shape, rows * window * item)
        + (2 if "smooth_logit" in shape.statistics else 1) * _scratch(shape, rows, window, gradient=False)
        + rows * block_count(shape.vocabulary) * (56 + 8 * tables)
        + _pairs(shape)
    )


def _correction(shape: Shape) -> int:
    """Gathered rows against a block, their logits, and what is added up of them."""
    item = shape.statistics_dtype.itemsize
    return (
        _pairs(shape)
        + (GROUP_ROWS + BLOCK) * shape.hidden * (shape.hidden_dtype.itemsize + shape.weight_dtype.itemsize + item)
        + 4 * GROUP_ROWS * BLOCK * item
        + (PARTIAL + 1) * shape.hidden * item
        + 16 * GROUP_ROWS * 8
    )


def _sampled_backward(shape: Shape) -> int:
    group, width = min(GROUP_ROWS, max(1, shape.tokens)), shape.statistics_dtype.itemsize
    group_rows = GROUP_ROWS * shape.hidden * (2 * shape.product_dtype.itemsize + width)
    rank_one = (PARTIAL + BLOCK) * shape.hidden * width
    return (
        _pairs(shape)
        + _hidden_rows(shape, max(GROUP_ROWS, PARTIAL))
        + GROUP_ROWS * BLOCK * shape.product_dtype.itemsize
        + _product_scratch(shape, GROUP_ROWS * BLOCK * shape.product_dtype.itemsize)
        + _scratch(shape, GROUP_ROWS, BLOCK, gradient=True)
        + _weight_copy(shape, BLOCK)
        + BLOCK * shape.hidden * (width + shape.product_dtype.itemsize)
        + _hidden_accumulator(shape)
        + max(group_rows, rank_one)
        + _target_rows(shape)
        + 16 * group * 8
    )
