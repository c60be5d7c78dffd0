"""Arrays of samples to exact sums, extremes and bucket counts, at the speed of NumPy.

Floats are split into limbs so short that a whole chunk of them adds up in float64 without rounding; limbs are added per
exponent by `numpy.bincount`, and only those few sums are put together as Python integers. Nothing depends on the order
in which NumPy adds. Only this module of the summary imports NumPy, and only `Summary.of_samples` imports this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, TypeGuard

import numpy as np

from orchestrator.exact import SQUARE_SHIFT, UNIT_SHIFT

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Chunk", "Samples", "all_finite", "array", "chunks", "total", "weighted"]

# With 2**15 samples a chunk, the widest sum of limbs (4ac + b*b below, under 1.5 * 2**37 a sample) stays under 2**53.
_CHUNK: Final = 1 << 15

_Pairs: TypeAlias = list[tuple[float, int]]
Floats: TypeAlias = "NDArray[np.float32] | NDArray[np.float64]"


class Tensor(Protocol):
    """What is asked of a torch tensor, so that torch need not be imported."""

    def detach(self) -> Tensor:
        """Without its graph."""

    def cpu(self) -> Tensor:
        """In main memory."""

    def float(self) -> Tensor:
        """As float32."""

    def numpy(self) -> Floats:
        """As an array."""


Samples: TypeAlias = "Sequence[float] | NDArray[np.generic] | Tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What up to 2**15 samples come to.

    Args:
        count: finite samples.
        refused: samples that are NaN or infinite.
        total: exact sum, in units of 2**-1074.
        squares: exact sum of squares, in units of 2**-2148.
        low: the smallest samples as (value, key), in that order.
        high: the largest samples as (-value, key), in that order.
        buckets: number of samples by bucket.
    """

    count: int
    refused: int
    total: int
    squares: int
    low: _Pairs
    high: _Pairs
    buckets: dict[int, int]


def array(values: Samples) -> Floats:
    """`values` flattened in C order, as float32 where that is exact for their type, else as float64.

    Raises:
        TypeError: the values are not real numbers.
    """
    found = np.asarray(_of_tensor(values) if _is_tensor(values) else values)
    if found.dtype.kind not in "biuf" and found.size:
        raise TypeError(f"samples must be real numbers, found an array of {found.dtype}")
    if found.dtype == np.float32 or found.dtype == np.float16:
        return found.astype(np.float32, copy=False).ravel()
    return found.astype(np.float64, copy=False).ravel()


def _is_tensor(values: Samples) -> TypeGuard[Tensor]:
    return hasattr(values, "detach")


def _of_tensor(values: Tensor) -> Floats:
    tensor = values.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:  # bfloat16 and the 8-bit floats, which NumPy does not have; float32 holds each of them exactly
        return tensor.float().numpy()


def chunks(values: Floats, first_key: int, top: int, sketch_bits: int) -> Iterator[Chunk]:
    """The samples chunk by chunk; sample i has the key `first_key + i`."""
    for start in range(0, len(values), _CHUNK):
        yield _chunk(values[start : start + _CHUNK], first_key + start, top, sketch_bits)


def weighted(values: Floats, weights: Floats) -> tuple[Floats, int, int]:
    """Values and weights as sums: the values, the excess of the weights, the excess of the products.

    In the values, NaN stands in place of those whose product with their weight is not finite. The excesses are the
    exact sums of `weight - 1` and of `weight * value - value` over the finite ones of them, in units of 2**-1074, each
    product rounded to float64.

    Raises:
        ValueError: not as many weights as values, or a weight is negative or not finite.
    """
    if len(weights) != len(values):
        raise ValueError(f"there must be as many weights as values, found {len(weights)} for {len(values)}")
    wrong = np.flatnonzero(~((weights >= 0) & (weights < np.inf)))
    if len(wrong):
        raise ValueError(f"a weight must be finite and not negative, found {weights[wrong[0]]} at position {wrong[0]}")
    with np.errstate(all="ignore"):
        products = np.multiply(weights, values, dtype=np.float64)
    kept = np.flatnonzero(np.isfinite(values) & np.isfinite(products))
    result = np.full(len(values), np.nan)
    result[kept] = values[kept]
    excess = total(weights[kept]) - (len(kept) << UNIT_SHIFT)
    return result, excess, total(products[kept]) - total(result[kept])


def _chunk(values: Floats, first_key: int, top: int, sketch_bits: int) -> Chunk:
    finite = np.isfinite(values)
    keys = None if finite.all() else np.flatnonzero(finite)
    kept = values if keys is None else values[keys]
    if not len(kept):
        return Chunk(count=0, refused=len(values), total=0, squares=0, low=[], high=[], buckets={})
    mantissas, exponents, least = _split(kept)
    total, squares = _sums(mantissas, exponents, least)
    low, high = _extremes(kept, keys, first_key, top)
    return Chunk(
        count=len(kept),
        refused=len(values) - len(kept),
        total=total,
        squares=squares,
        low=low,
        high=high,
        buckets=_buckets(mantissas, exponents, least, sketch_bits),
    )


def _split(values: Floats) -> tuple[Floats, NDArray[np.intp], int]:
    """Mantissas, of size 0 or in [0.5, 1) even for subnormals; exponents over the least one; the least one."""
    mantissas, exponents = np.frexp(values)
    least = int(exponents.min())
    return mantissas, np.subtract(exponents, least, dtype=np.intp), least


def all_finite(values: Floats) -> bool:
    """Whether none of the values is NaN or infinite."""
    return bool(np.isfinite(values).all())


def total(values: Floats) -> int:
    """The exact sum of finite floats, in units of 2**-1074."""
    parts = (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))
    return sum(_sums(*_split(part))[0] for part in parts)


def _sums(mantissas: Floats, exponents: NDArray[np.intp], least: int) -> tuple[int, int]:
    limbs = _sums24 if mantissas.dtype == np.float32 else _sums53
    total, squares, digits = limbs(mantissas, exponents)
    return _shift(total, UNIT_SHIFT + least - digits), _shift(squares, SQUARE_SHIFT + 2 * (least - digits))


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


def _buckets(mantissas: Floats, exponents: NDArray[np.intp], least: int, sketch_bits: int) -> dict[int, int]:
    """Samples by bucket, numbered as in `sketch.bucket`."""
    half = 2 << sketch_bits
    cells = (mantissas * half).astype(np.intp)
    cells += exponents << (sketch_bits + 2)
    cells += half
    found, counts = _count(cells)
    leading = (found & (2 * half - 1)) - half
    codes = np.abs(leading)
    codes += ((found >> (sketch_bits + 2)) + (least + UNIT_SHIFT - 2)) << sketch_bits
    codes += 1
    codes *= np.sign(leading)
    return dict(zip(codes.tolist(), counts.tolist(), strict=True))


def _count(cells: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The distinct cells and how often each occurs."""
    if cells.max() > max(8192, 4 * len(cells)):
        return np.unique(cells, return_counts=True)
    counts = np.bincount(cells)
    found = (counts != 0).nonzero()[0]  # nonzero is faster on booleans
    return found, counts[found]


def _extremes(values: Floats, keys: NDArray[np.intp] | None, first_key: int, top: int) -> tuple[_Pairs, _Pairs]:
    """The `top` first by (value, key) and by (-value, key)."""
    most = min(top, len(values))
    ranked = np.partition(values, (most - 1, len(values) - most))
    low = _first(values, ranked[most - 1], keys, first_key, most)
    return low, _first(0.0 - values, 0.0 - ranked[len(values) - most], keys, first_key, most)


def _first(values: Floats, last: np.floating, keys: NDArray[np.intp] | None, first_key: int, most: int) -> _Pairs:
    """The `most` first by (value, key), where `last` is the value of the last of them."""
    found = (values <= last).nonzero()[0]
    if len(found) > 2 * most:  # Many are tied with the last one: of those only the first can rank.
        found = np.concatenate(((values < last).nonzero()[0], (values == last).nonzero()[0][:most]))
    where = found if keys is None else keys[found]
    numbers = (values[found] + 0.0).tolist()
    return sorted(zip(numbers, [first_key + position for position in where.tolist()], strict=True))[:most]
