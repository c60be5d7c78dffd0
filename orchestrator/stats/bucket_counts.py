"""Arrays of floats counted by bucket of the quantile sketch, numbered as in `stats.quantile_sketch.bucket`.

The counts stay arrays until someone looks one up: boxing every code and count into a dict takes longer than counting.
"""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from orchestrator.stats.exact import UNIT_SHIFT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from orchestrator.stats.exact_numpy import Split

__all__ = ["Counts", "count", "count_ordered"]

_MAGNITUDE: Final = (1 << 63) - 1  # The bits of a float64 without its sign.
_FRACTION: Final = 52  # The bits of it that are its fraction.
_BIAS: Final = 1023


class Counts(Mapping[int, int]):
    """How many values each bucket holds, as a mapping that does not change.

    Equal to the dict of the same items, and copied and pickled as one.

    Args:
        codes: the buckets, each once.
        counts: how many values each holds.
    """

    __slots__ = ("_codes", "_counts", "_dict")

    def __init__(self, codes: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        self._codes, self._counts = codes, counts
        self._dict: dict[int, int] | None = None

    def _boxed(self) -> dict[int, int]:
        if self._dict is None:
            self._dict = dict(zip(self._codes.tolist(), self._counts.tolist(), strict=True))
        return self._dict

    def __getitem__(self, code: int) -> int:
        return self._boxed()[code]

    def __iter__(self) -> Iterator[int]:
        return iter(self._boxed())

    def __len__(self) -> int:
        return len(self._codes)

    def __eq__(self, other: object) -> bool:
        return self._boxed() == (other._boxed() if isinstance(other, Counts) else other)

    __hash__ = None  # type: ignore[assignment]  # a mapping is not hashable, as a dict is not

    def __reduce__(self) -> tuple[type[dict[int, int]], tuple[dict[int, int]]]:
        return dict, (self._boxed(),)

    def __repr__(self) -> str:
        return repr(self._boxed())

    def items(self) -> ItemsView[int, int]:
        """The buckets, each with its count."""
        return self._boxed().items()


def count(parts: Split, sketch_bits: int) -> Counts:
    """Finite floats by bucket."""
    half = 2 << sketch_bits
    cells = (parts.mantissas * half).astype(np.intp)
    cells += parts.exponents << (sketch_bits + 2)
    cells += half
    found, counts = _counted(cells)
    leading = (found & (2 * half - 1)) - half
    codes = np.abs(leading)
    codes += ((found >> (sketch_bits + 2)) + (parts.least + UNIT_SHIFT - 2)) << sketch_bits
    codes += 1
    codes *= np.sign(leading)
    return Counts(codes, counts)


def _counted(cells: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The distinct cells and how often each occurs."""
    if cells.max() > max(8192, 4 * len(cells)):
        return np.unique(cells, return_counts=True)
    counts = np.bincount(cells)
    found = (counts != 0).nonzero()[0]  # nonzero is faster on booleans
    return found, counts[found]


def count_ordered(ordered: NDArray[np.float64], sketch_bits: int) -> Counts | None:
    """Finite floats in ascending order, at least one, by bucket; None where subnormals are among them.

    The bits of a normal float64 begin with its exponent and the first bits of its mantissa, as buckets do.
    """
    codes = _codes(ordered, sketch_bits)
    if codes is None:
        return None
    is_last = np.empty(len(codes), np.bool_)
    is_last[-1] = True
    np.not_equal(codes[1:], codes[:-1], out=is_last[:-1])
    last = is_last.nonzero()[0]
    counts = last.copy()
    counts[0] += 1
    counts[1:] -= last[:-1]
    return Counts(codes[last], counts)


def _codes(ordered: NDArray[np.float64], sketch_bits: int) -> NDArray[np.int64] | None:
    bits = ordered.view(np.int64)
    offset = ((UNIT_SHIFT - _BIAS) << sketch_bits) + 1
    if ordered[0] < 0.0:
        return _signed_codes(ordered, bits, sketch_bits, offset)
    num_zeros = 0 if ordered[0] else len(ordered) - int(np.count_nonzero(ordered))
    if num_zeros < len(ordered) and ordered[num_zeros] < sys.float_info.min:
        return None
    codes = (bits >> (_FRACTION - sketch_bits)) + offset
    codes[:num_zeros] = 0
    return codes


def _signed_codes(
    ordered: NDArray[np.float64], bits: NDArray[np.int64], sketch_bits: int, offset: int
) -> NDArray[np.int64] | None:
    codes = (bits & _MAGNITUDE) >> (_FRACTION - sketch_bits)
    if np.count_nonzero(codes < 1 << sketch_bits) != len(codes) - np.count_nonzero(ordered):
        return None
    codes += offset
    codes *= np.sign(ordered).astype(np.int64)
    return codes
