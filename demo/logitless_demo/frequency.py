"""Losses of tokens and rows of the head by how often their id occurs in the training text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DECILES = 10

Counts = NDArray[np.int64]
Values = NDArray[np.float32]


def loss_by_frequency(nll: Values, target: NDArray[np.int64], counts: Counts) -> dict[str, Any]:
    """Returns the mean loss of each tenth of the tokens, those with the rarest targets first.

    Args:
        nll: `[tokens]`, loss of each.
        target: `[tokens]`, its id.
        counts: `[V]`, how often an id occurs in the training text.

    Returns:
        `deciles`, ten groups, and `never_seen`, the group of tokens whose id does not occur there, which are part of
        the first deciles too. A group has `size`, `least_count`, `largest_count` and the mean `loss` of its tokens,
        None where it is empty.
    """
    seen = counts[target]
    return {
        "deciles": [_group(part, seen, loss=nll) for part in _tenths(seen)],
        "never_seen": _group(np.flatnonzero(seen == 0), seen, loss=nll),
    }


def rows_by_frequency(norm: Values, drift: Values, counts: Counts) -> dict[str, Any]:
    """Returns the mean norm and drift of the head's rows, by tenths of the ids that occur, the rarest first.

    Args:
        norm: `[V]`, of each row.
        drift: `[V]`, distance of each row from where it began.
        counts: `[V]`, how often an id occurs in the training text.

    Returns:
        Groups as of `loss_by_frequency`, with the means `norm` and `drift`; ids in `never_seen` are in no decile.
    """
    occurring = np.flatnonzero(counts)
    return {
        "deciles": [_group(occurring[part], counts, norm=norm, drift=drift) for part in _tenths(counts[occurring])],
        "never_seen": _group(np.flatnonzero(counts == 0), counts, norm=norm, drift=drift),
    }


def _tenths(counts: Counts) -> Sequence[NDArray[np.intp]]:
    """Returns positions in ten parts that differ in size by one at most; equal counts keep their order."""
    return np.array_split(np.argsort(counts, kind="stable"), DECILES)


def _group(members: NDArray[np.intp], counts: Counts, **values: Values) -> dict[str, float | int | None]:
    if not members.size:
        return {"size": 0, "least_count": None, "largest_count": None, **dict.fromkeys(values)}
    return {
        "size": len(members),
        "least_count": int(counts[members].min()),
        "largest_count": int(counts[members].max()),
        **{name: float(array[members].mean(dtype=np.float64)) for name, array in values.items()},
    }
