"""Plain Python values out of what callers give: numbers, integers, names and flags, each with an error of its own.

A number may be of any type that stands for one, NumPy's scalars among them, and comes back as a ``float`` or an
``int``: further on it is compared, hashed, sent to other ranks and written into graphs as such. Booleans and tensors
are refused; to read a tensor would be to wait for its device.
"""

from __future__ import annotations

import math
import numbers
from fractions import Fraction
from typing import TypeVar

# Statistics and losses are fp32: a larger number would be infinite there, and one nearer to zero none at all.
LARGEST = 3.4028234663852886e38
SMALLEST = 1.1754943508222875e-38
INT64_LEAST, INT64_MOST = -(2**63), 2**63 - 1

LONGEST_SHOWN = 200
LONGEST_SHOWN_BITS = 256

Name = TypeVar("Name", bound=str)


def shown(value: object) -> str:
    """What was given, short enough for a message."""
    if isinstance(value, int) and value.bit_length() > LONGEST_SHOWN_BITS:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float | None = None,
    underflows: bool = True,
) -> float:
    """A finite number within bounds and within those of fp32, as a float.

    Args:
        name: of the argument.
        value: what was given for it.
        least: the smallest number allowed.
        most: the largest.
        above: a number that it must be greater than.
        underflows: whether a number other than 0 may be 0 in fp32.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if isinstance(value, (int, Fraction)) and not -LARGEST <= value <= LARGEST:  # before it is made a float
        raise ValueError(_too_large(name, value))
    number = float(value)
    if not -math.inf < number < math.inf:  # NaN neither; a number that torch.compile leaves open can be compared
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    if above is not None and number <= above:
        raise ValueError(f"{name} must be greater than {above}, got {shown(value)}")
    if not least <= number <= most:
        expected = f"at least {least}" if most == math.inf else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    if abs(number) > LARGEST:
        raise ValueError(_too_large(name, value))
    if not underflows and 0 < abs(number) < SMALLEST:
        raise ValueError(f"{name} must be at least {SMALLEST:.1e}, below which fp32 has no precision, got {number}")
    return number


def _too_large(name: str, value: object) -> str:
    return f"{name} must be at most {LARGEST:.1e} in magnitude, the largest number of fp32, got {shown(value)}"


def check_index(name: str, value: object) -> int:
    """An integer that 64 bits can hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    index = int(value)
    if not INT64_LEAST <= index <= INT64_MOST:
        raise ValueError(f"{name} must be an integer of 64 bits, in [-2**63, 2**63 - 1], got {shown(index)}")
    return index


def check_size(name: str, value: object, *, least: int) -> int:
    """An integer size."""
    size = check_index(name, value)
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    return size


def check_choice(name: str, value: object, choices: tuple[Name, ...]) -> Name:
    """One of the names, as a plain string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
    return next(choice for choice in choices if choice == value)


def check_flag(name: str, value: object) -> bool:
    """A boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value
