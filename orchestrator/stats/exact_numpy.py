"""Exact sums of arrays of floats, and of their squares, at the speed of NumPy.

Floats are cut into limbs, integers so short that as many as there are add up in float64 without rounding. Whatever the
order in which NumPy or its BLAS adds, the sums are exact, and only those few are put together as Python integers.

    split(values)           mantissas and exponents; `sums` adds limbs per exponent with one pass for each: for many
    sums_of_few(values)     limbs of one fixed point, multiplied as a small matrix: a few calls in all, for few
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import numpy as np

from orchestrator.stats.exact import SQUARE_SHIFT, UNIT_SHIFT

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CHUNK", "FEW", "Floats", "Split", "digits", "split", "sums", "sums_of_few", "total"]

Floats: TypeAlias = "NDArray[np.float32] | NDArray[np.float64]"

CHUNK: Final = 1 << 15
"""Most values of a `Split`: the widest sum of its limbs (4ac + b*b below, 1.5 * 2**37 a value) stays under 2**53."""

FEW: Final = 1 << 11
"""Most values of `sums_of_few`: the product of two limbs is under 2**42, and the sum of 2**11 of them under 2**53."""

_LIMB: Final = 21
_DOUBLE: Final = 53
_MOST_LIMBS: Final = 5  # 105 bits: float64 over a range of 2**52.
_MOST_LIMBS_OF_SINGLE: Final = 3  # 63 bits: float32 over a range of 2**39.


class Split(NamedTuple):
    """Up to `CHUNK` finite floats as `mantissas * 2**(exponents + least)`.

    The mantissas are 0 or of size [0.5, 1), even for subnormals; the least of the exponents is 0.
    """

    mantissas: Floats
    exponents: NDArray[np.intp]
    least: int


def split(values: Floats) -> Split:
    """Finite floats, at least one."""
    mantissas, exponents = np.frexp(values)
    least = int(exponents.min())
    return Split(mantissas, np.subtract(exponents, least, dtype=np.intp), least)


def digits(values: Floats) -> int:
    """Bits in the mantissa of each."""
    return 24 if values.itemsize == 4 else _DOUBLE


def total(values: Floats) -> int:
    """The exact sum of finite floats, in units of 2**-1074."""
    if 0 < len(values) <= FEW:
        largest = float(np.abs(values).max())
        few = sums_of_few(values.astype(np.float64, copy=False), largest, digits=digits(values))
        if few is not None:
            return few[0]
    return sum(sums(split(values[start : start + CHUNK]))[0] for start in range(0, len(values), CHUNK))


def sums(parts: Split) -> tuple[int, int]:
    """The exact sum, in units of 2**-1074, and the exact sum of squares, in units of 2**-2148."""
    limbs = _sums24 if parts.mantissas.dtype == np.float32 else _sums53
    total, squares, digits = limbs(parts.mantissas, parts.exponents)
    return _shift(total, UNIT_SHIFT + parts.least - digits), _shift(squares, SQUARE_SHIFT + 2 * (parts.least - digits))


def _shift(number: int, by: int) -> int:
    return number << by if by >= 0 else number >> -by


def _sums24(mantissas: Floats, exponents: NDArray[np.intp]) -> tuple[int, int, int]:
    """Sums for float32: with m the mantissas as 24-bit integers, the sums of m * 2**e and m * m * 4**e, and 24."""
    whole = np.multiply(mantissas, 2.0**24, dtype=np.float64)
    square = whole * whole
    high = np.trunc(square * 2.0**-24)
    square -= high * 2.0**24
    total = _gather(exponents, whole, 1)
    return total, (_gather(exponents, high, 2) << 24) + _gather(exponents, square, 2), 24


def _sums53(mantissas: Floats, exponents: NDArray[np.intp]) -> tuple[int, int, int]:
    """Sums for float64: as `_sums24` for 53-bit integers m = a * 2**35 + b * 2**17 + c, and 53."""
    scaled = np.multiply(mantissas, 2.0**18, dtype=np.float64)
    a = np.trunc(scaled)
    scaled = (scaled - a) * 2.0**18
    b = np.trunc(scaled)
    c = (scaled - b) * 2.0**17
    total = (_gather(exponents, a * 2.0**18 + b, 1) << 17) + _gather(exponents, c, 1)
    squares = (
        (_gather(exponents, a * a, 2) << 70)
        + (_gather(exponents, a * b, 2) << 53)
        + (_gather(exponents, 4.0 * a * c + b * b, 2) << 34)
        + (_gather(exponents, b * c, 2) << 18)
        + _gather(exponents, c * c, 2)
    )
    return total, squares, 53


def _gather(exponents: NDArray[np.intp], limbs: NDArray[np.float64], step: int) -> int:
    """The sum of `limbs * 2**(step * exponents)`; the limbs are integers whose sum stays under 2**53."""
    result = 0
    for part in np.bincount(exponents, limbs)[::-1].tolist():
        result = (result << step) + int(part)
    return result


def sums_of_few(
    values: NDArray[np.float64], largest: float, smallest: float | None = None, digits: int = 53
) -> tuple[int, int] | None:
    """`sums` of at most `FEW` finite floats, or None where they range too wide for limbs of one fixed point.

    With 2**t over every value, limb k of a value has the weight 2**(t - 21 * (k + 1)). The matrix of the limbs times
    itself holds every sum of products of two limbs; a row of ones beside them gives the sums of the limbs.

    Args:
        values: at least one.
        largest: the largest magnitude among them.
        smallest: the smallest magnitude among them, over 0, where that is known: then no limb too many is taken.
        digits: bits in the mantissa of each, 24 where they were float32.
    """
    top = math.frexp(largest)[1]
    num_limbs = _MOST_LIMBS if digits == _DOUBLE else _MOST_LIMBS_OF_SINGLE
    if smallest:
        num_limbs = -((math.frexp(smallest)[1] - digits - top) // _LIMB)
    # Neither overflow in the weights, nor underflow in what they scale.
    if num_limbs > _MOST_LIMBS or not -900 <= top <= _LIMB * num_limbs:
        return None
    scaled = values * _weights(top, num_limbs)
    limbs = np.empty((num_limbs + 1, len(values)))
    whole = np.trunc(scaled, out=limbs[:num_limbs])
    if not smallest and np.count_nonzero(whole[-1] != scaled[-1]):
        return None
    whole[1:] -= whole[:-1] * 2.0**_LIMB
    limbs[num_limbs] = 1.0
    *products, sums = limbs.dot(whole.T).tolist()
    shift = top - _LIMB * num_limbs
    return _joined(sums) << (UNIT_SHIFT + shift), _joined(map(_joined, products)) << (SQUARE_SHIFT + 2 * shift)


@cache
def _weights(top: int, num_limbs: int) -> NDArray[np.float64]:
    return np.array([[2.0 ** (_LIMB * (limb + 1) - top)] for limb in range(num_limbs)])


def _joined(limbs: Iterable[float]) -> int:
    """The number with these limbs, the highest first; they may be negative, or longer than a limb."""
    result = 0
    for limb in limbs:
        result = (result << _LIMB) + int(limb)
    return result
