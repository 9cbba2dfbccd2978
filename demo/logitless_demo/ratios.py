"""How runs compare."""

from __future__ import annotations

import math


def ratio(value: float, reference: float) -> float:
    """Returns ``value / reference``; NaN where the reference is 0, as the resident memory of a tiny head may be."""
    return value / reference if reference else math.nan
