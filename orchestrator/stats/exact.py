"""Exact sums of floats as plain integers, and their correctly rounded results.

A finite float64 is a whole number of `2**-1074`, and its square a whole number of `2**-2148`. Kept as Python integers
in those units, sums have no rounding, no overflow and no order; rounding happens once, at the end.

    total = units(0.1) + units(0.2)
    quotient(total, ONE)        # 0.1 + 0.2, rounded once
"""

from __future__ import annotations

import math
import sys
from typing import Final

__all__ = ["ONE", "SQUARE_SHIFT", "UNIT_SHIFT", "bits_of", "decimal", "parse", "quotient", "root", "text", "units"]

UNIT_SHIFT: Final = 1074
SQUARE_SHIFT: Final = 2 * UNIT_SHIFT
ONE: Final = 1 << UNIT_SHIFT
"""The number 1 in units of 2**-1074."""

# Enough for 2**100 squares of the largest float; a longer number in a file is damage, not data.
_MOST_BITS: Final = SQUARE_SHIFT + 2048 + 100


def bits_of(value: float) -> tuple[int, int]:
    """The integers (m, s) with `value == m / 2**s`, for a finite float; s is in 0..1074."""
    numerator, denominator = value.as_integer_ratio()
    return numerator, denominator.bit_length() - 1


def units(value: float) -> int:
    """A finite float in units of 2**-1074."""
    numerator, shift = bits_of(value)
    return numerator << (UNIT_SHIFT - shift)


def quotient(numerator: int, denominator: int) -> float:
    """`numerator / denominator`, correctly rounded; beyond float64, the largest float of that sign."""
    try:
        return numerator / denominator
    except OverflowError:
        return math.copysign(sys.float_info.max, numerator)


def root(square: int, denominator: int) -> float:
    """`sqrt(square) / denominator`, correctly rounded, for `square >= 0` and `denominator > 0`.

    The quotient is taken to at least 55 bits, with a last bit that says whether anything was cut off; rounding such a
    number to 53 bits or fewer gives what rounding the exact one would.
    """
    shift = max(0, 58 - (square.bit_length() // 2 - denominator.bit_length()))
    scaled = square << (2 * shift)
    whole = math.isqrt(scaled)
    digits, rest = divmod(whole, denominator)
    inexact = rest != 0 or whole * whole != scaled
    return quotient(digits << 1 | inexact, 2 << shift)


def decimal(total: int) -> str:
    """A number in units of 2**-1074 as 17 significant decimal digits, correctly rounded: `1.7976931348623157e+309`."""
    from decimal import Context, Decimal

    return f"{Context(prec=17).divide(Decimal(total), Decimal(ONE)):.16e}"


def text(total: int, unit_shift: int) -> str:
    """`total * 2**-unit_shift` exactly, in the one shortest form `-0x1a3p-52` whose digits are an odd integer."""
    if not total:
        return "0x0p+0"
    zeros = (total & -total).bit_length() - 1
    return f"{total >> zeros:#x}p{zeros - unit_shift:+d}"


def parse(value: object, unit_shift: int) -> int:
    """The `total` of which `value` is the `text`.

    Raises:
        ValueError: not a text, not in that form, or not a whole number of units that a sum can reach.
    """
    digits, _, exponent = value.partition("p") if isinstance(value, str) else ("", "", "")
    try:
        number, shift = int(digits, 16), int(exponent) + unit_shift
    except ValueError:
        raise ValueError(f"expected an exact number such as '-0x1a3p-52', found {value!r}") from None
    if not 0 <= shift <= _MOST_BITS or number.bit_length() > _MOST_BITS:
        raise ValueError(f"{value!r} is not a multiple of 2**-{unit_shift} that a sum can reach")
    total = number << shift
    if text(total, unit_shift) != value:
        raise ValueError(f"expected {text(total, unit_shift)!r}, found the same number as {value!r}")
    return total
