"""Arrays of samples, chunk by chunk: exact sums, extremes, counts by bucket.

Few samples are sorted once, and everything is read off in a few calls; many go through passes whose cost is per sample.
Which way was taken shows in no bit of the result. Of the summary's modules only this one and those it is made of
(`limbs`, `cells`) import NumPy, and only `Summary.of_samples` and `Summary.mean_of` import this one.
"""

from __future__ import annotations

import math
from array import array as doubles
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, TypeGuard

import numpy as np

from orchestrator.stats import bucket_counts, exact_numpy
from orchestrator.stats.exact import UNIT_SHIFT
from orchestrator.stats.exact_numpy import Floats, total
from orchestrator.stats.topk import LEAST_KEY, Pair

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NONE", "Chunk", "Keys", "Samples", "all_finite", "array", "chunks", "total", "weighted"]


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
Keys: TypeAlias = "Sequence[int] | NDArray[np.integer]"


class Chunk(NamedTuple):
    """What up to 2**15 samples come to.

    Args:
        num_finite: finite samples.
        num_refused: samples that are NaN or infinite.
        total: exact sum, in units of 2**-1074.
        squares: exact sum of squares, in units of 2**-2148.
        low: the smallest samples as (value, key), in that order.
        high: the largest samples as (-value, key), in that order.
        buckets: number of samples by bucket.
    """

    num_finite: int
    num_refused: int
    total: int
    squares: int
    low: Sequence[Pair]
    high: Sequence[Pair]
    buckets: Mapping[int, int]


NONE = Chunk(0, 0, 0, 0, (), (), {})
"""No samples at all."""


class Named(NamedTuple):
    """Samples and their keys: of samples of equal value, the earlier has the smaller key, if not the same.

    Args:
        values: the samples.
        keys: as many keys, or the key of the first when each next one's is one more.
    """

    values: Floats
    keys: int | NDArray[np.int64]

    def cut(self, start: int, end: int) -> Named:
        """The samples from position `start` to before `end`."""
        if not start and end >= len(self.values):
            return self
        keys = self.keys + start if isinstance(self.keys, int) else self.keys[start:end]
        return Named(self.values[start:end], keys)

    def keys_at(self, positions: NDArray[np.intp]) -> list[int]:
        """The keys of the samples at these positions."""
        if isinstance(self.keys, int):
            found: list[int] = positions.tolist()
            return [self.keys + position for position in found] if self.keys else found
        keys: list[int] = self.keys[positions].tolist()
        return keys


def array(values: Samples) -> Floats:
    """`values` flattened in C order, as float32 where that is exact for their type, else as float64.

    Raises:
        TypeError: the values are not real numbers.
    """
    found = _of_list(values) if isinstance(values, (list, tuple)) else _as_array(values)
    if found.dtype.kind not in "biuf" and found.size:
        raise TypeError(f"samples must be real numbers, found an array of {found.dtype}")
    if found.dtype == np.float32 or found.dtype == np.float16:
        return found.astype(np.float32, copy=False).ravel()
    return found.astype(np.float64, copy=False).ravel()


def _of_list(values: Sequence[float]) -> NDArray[np.generic]:
    try:
        return np.frombuffer(doubles("d", values))  # half the time of np.asarray
    except (TypeError, ValueError, OverflowError):  # lists in lists, or no numbers
        pass
    try:
        return np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise TypeError(f"samples must be real numbers: {error}") from None


def _as_array(values: Samples) -> NDArray[np.generic]:
    return np.asarray(_of_tensor(values) if _is_tensor(values) else values)


def _is_tensor(values: Samples) -> TypeGuard[Tensor]:
    return hasattr(values, "detach")


def _of_tensor(values: Tensor) -> Floats:
    tensor = values.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:  # bfloat16 and the 8-bit floats, which NumPy does not have; float32 holds each of them exactly
        return tensor.float().numpy()


def chunks(values: Floats, keys: int | Keys, top: int, sketch_bits: int) -> Iterator[Chunk]:
    """The samples chunk by chunk; `keys` are as many keys, or the key of the first when each next one's is one more.

    Raises:
        TypeError: the keys are not whole numbers.
        ValueError: not as many keys as values, or a key is no 64-bit integer.
    """
    for part in (Named(values, keys),) if isinstance(keys, int) else _named(values, _key_array(keys)):
        for start in range(0, len(part.values), exact_numpy.CHUNK):
            yield _chunk(part.cut(start, start + exact_numpy.CHUNK), top, sketch_bits)


def _named(values: Floats, keys: NDArray[np.int64]) -> Iterator[Named]:
    """The samples with keys of their own, in an order that ranks ties right, in one part or two.

    Where a key occurs with one value several times, the repetitions come in a part of their own: they count in sums,
    and rank no better than what they repeat.
    """
    if len(keys) != len(values):
        raise ValueError(f"there must be as many keys as values, found {len(keys)} for {len(values)}")
    if (keys[1:] > keys[:-1]).all():
        yield Named(values, keys)
        return
    order = np.lexsort((values, keys))
    values, keys = values[order], keys[order]
    repeated = np.zeros(len(keys), np.bool_)
    repeated[1:] = (keys[1:] == keys[:-1]) & (values[1:] == values[:-1])
    yield Named(values[~repeated], keys[~repeated])
    yield Named(values[repeated], keys[repeated])


def _key_array(keys: Keys) -> NDArray[np.int64]:
    found = np.asarray(keys).ravel()
    if not found.size:
        return np.empty(0, np.int64)
    if found.dtype.kind == "O" or (found.dtype.kind == "u" and found.max() >= -LEAST_KEY):
        raise ValueError(f"keys must be 64-bit integers, found {found}")
    if found.dtype.kind not in "iu":
        raise TypeError(f"keys must be whole numbers, found an array of {found.dtype}")
    return found.astype(np.int64, copy=False)


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


def all_finite(values: Floats) -> bool:
    """Whether none of the values is NaN or infinite."""
    return bool(np.isfinite(values).all())


def _chunk(samples: Named, top: int, sketch_bits: int) -> Chunk:
    few = _chunk_of_few(samples, top, sketch_bits) if len(samples.values) <= exact_numpy.FEW else None
    return few or _chunk_of_many(samples, top, sketch_bits)


def _chunk_of_many(samples: Named, top: int, sketch_bits: int) -> Chunk:
    finite = np.isfinite(samples.values)
    positions = None if finite.all() else finite.nonzero()[0]
    kept = samples.values if positions is None else samples.values[positions]
    refused = len(samples.values) - len(kept)
    if not len(kept):
        return NONE._replace(num_refused=refused)
    parts = exact_numpy.split(kept)
    low, high = _extremes(samples, positions, kept, top)
    return Chunk(len(kept), refused, *exact_numpy.sums(parts), low, high, bucket_counts.count(parts, sketch_bits))


def _chunk_of_few(samples: Named, top: int, sketch_bits: int) -> Chunk | None:
    """None where the samples are not all finite, or range so wide that the shorter ways don't do."""
    order = samples.values.argsort(kind="stable")  # of equal values, the earlier first
    ordered = samples.values[order].astype(np.float64, copy=False)
    least, greatest = float(ordered[0]), float(ordered[-1])
    if not (math.isfinite(least) and math.isfinite(greatest)):  # NaN comes last
        return None
    sums = exact_numpy.sums_of_few(
        ordered, max(-least, greatest), _smallest(ordered), exact_numpy.digits(samples.values)
    )
    buckets = None if sums is None else bucket_counts.count_ordered(ordered, sketch_bits)
    if sums is None or buckets is None:
        return None
    most = min(top, len(ordered))
    low = _pairs(ordered[:most], samples.keys_at(order[:most]))
    highest = _highest(ordered, most)
    high = _pairs(-ordered[highest], samples.keys_at(order[highest]))
    high.sort()
    return Chunk(len(ordered), 0, sums[0], sums[1], low, high, buckets)


def _pairs(values: NDArray[np.float64], keys: list[int]) -> list[Pair]:
    numbers = values.tolist()
    if 0.0 in numbers:
        numbers = [number + 0.0 for number in numbers]
    return list(zip(numbers, keys, strict=True))


def _smallest(ordered: NDArray[np.float64]) -> float | None:
    """The smallest value over 0, where no value is below."""
    if ordered[0] < 0.0 or not ordered[-1]:
        return None
    return float(ordered[0] or ordered[-np.count_nonzero(ordered)])


def _highest(ordered: NDArray[np.float64], most: int) -> slice | NDArray[np.intp]:
    """Where the `most` largest stand; of those tied with the last of them, the first."""
    start = len(ordered) - most
    if not start or ordered[start - 1] != ordered[start]:
        return slice(start, None)
    tied, end = ordered.searchsorted(ordered[start]), ordered.searchsorted(ordered[start], "right")
    return np.concatenate((np.arange(tied, tied + end - start), np.arange(end, len(ordered))))


def _extremes(
    samples: Named, positions: NDArray[np.intp] | None, kept: Floats, top: int
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """The `top` first by (value, key) and by (-value, key) of the samples at `positions`, whose values are `kept`."""
    most = min(top, len(kept))
    ranked = np.partition(kept, (most - 1, len(kept) - most))
    low = _first(samples, positions, kept, ranked[most - 1], most)
    return low, _first(samples, positions, 0.0 - kept, 0.0 - ranked[len(kept) - most], most)


def _first(
    samples: Named, positions: NDArray[np.intp] | None, values: Floats, last: np.floating, most: int
) -> Sequence[Pair]:
    """The `most` first by (value, key), where `last` is the value of the last of them."""
    found = (values <= last).nonzero()[0]
    if len(found) > 2 * most:  # Many are tied with the last one: of those only the first can rank.
        found = np.concatenate(((values < last).nonzero()[0], (values == last).nonzero()[0][:most]))
    keys = samples.keys_at(found if positions is None else positions[found])
    return sorted(zip((values[found] + 0.0).tolist(), keys, strict=True))[:most]
