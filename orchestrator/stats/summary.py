"""Summary: what is known of a set of values, as an exact commutative monoid.

    a = Summary.of(0.31, key=0)                 # one value; the key is its sample or trial index
    b = Summary.of_samples(losses, first_key=1) # a list, an array or a tensor
    s = a.merge(b).merge(Summary.diverged())    # in any order and any grouping: the same Summary, in every byte
    s.compute().mean, s.compute().top[0].key

`merge` is associative and commutative, and `empty` is its identity: exactly, not to a tolerance. Sums are integers
(`stats.exact`), the best values are ranked by (value, key), and the quantile sketch counts in buckets, so no
result depends on who added what first. Merging is for disjoint sets of samples or trials: a value merged twice counts
twice.

A new statistic is added here and appears everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import index
from typing import TYPE_CHECKING, Final, Literal, TypeGuard

from orchestrator.stats import exact, parsing
from orchestrator.stats.quantile_sketch import bucket, representative
from orchestrator.stats.statistics import QUANTILES, Statistics
from orchestrator.stats.topk import LEAST_KEY, BestValues, Pair, Ranked, ascends, checked_key

if TYPE_CHECKING:
    from orchestrator.core.atomic import Json, JsonObject
    from orchestrator.stats.batch import Chunk, Keys, Samples

__all__ = ["Ranked", "Summary", "check"]

SCHEMA: Final = 1
TOP: Final = 10
SKETCH_BITS: Final = 6

_MOST_SKETCH_BITS: Final = 20
_GREAT: Final = 1 << 1023  # Integers that may round beyond float64.
_FEW: Final = 16  # Samples below which importing and calling NumPy costs more than it saves.


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What is known of a set of values.

    Made by `empty`, `of`, `of_samples`, `diverged`, `failed`, `pruned`, and by merging. How many of the best are kept
    (`top`) and how fine the sketch is (`sketch_bits`) belong to the type: summaries that differ in them don't merge.

    Args:
        top: how many of the smallest and of the largest values are kept, at least 1.
        sketch_bits: mantissa bits that tell buckets of the quantile sketch apart; with b bits the relative error of a
            quantile is at most 2**-(b+1).
        count: finite values.
        num_diverged: values that were NaN or infinite.
        num_failed: what failed.
        num_pruned: what was stopped early.
        total: exact sum of the values, in units of 2**-1074.
        squares: exact sum of their squares, in units of 2**-2148.
        weight_excess: exact sum of the weights less `count`, in units of 2**-1074; 0 where every weight is 1.
        product_excess: exact sum of the rounded products w * x less `total`, in units of 2**-1074.
        low: the smallest (value, key), ascending, without duplicates.
        high: the smallest (-value, key), ascending, without duplicates.
        buckets: number of values by bucket (`stats.quantile_sketch`). Never changed, though it may be a dict.
    """

    top: int = TOP
    sketch_bits: int = SKETCH_BITS
    count: int
    num_diverged: int
    num_failed: int
    num_pruned: int
    total: int
    squares: int
    weight_excess: int
    product_excess: int
    low: tuple[Pair, ...]
    high: tuple[Pair, ...]
    buckets: Mapping[int, int]

    def __hash__(self) -> int:
        return hash((self.count, self.total, self.squares, self.low, self.high, frozenset(self.buckets.items())))

    @classmethod
    def empty(cls, top: int = TOP, sketch_bits: int = SKETCH_BITS) -> Summary:
        """The identity: merging it changes nothing.

        Raises:
            ValueError: `top` is below 1, or `sketch_bits` is not in 0..20.
        """
        return _Tally(top, sketch_bits).summary()

    @classmethod
    def of(
        cls, value: float, *, key: int, weight: float = 1.0, top: int = TOP, sketch_bits: int = SKETCH_BITS
    ) -> Summary:
        """The summary of one value. NaN or infinity, of the value or its product with the weight, counts as diverged.

        Raises:
            ValueError: the weight is negative or not finite, the key is no int64, or as `empty`.
        """
        _check_type(top, sketch_bits)
        key = checked_key(index(key))
        x, w = float(value) + 0.0, float(weight)
        if not 0.0 <= w < math.inf:
            raise ValueError(f"a weight must be finite and not negative, found {weight!r} at key {key}")
        if not math.isfinite(x) or not math.isfinite(w * x):
            return cls.diverged(top=top, sketch_bits=sketch_bits)
        numerator, shift = exact.bits_of(x)
        total = numerator << (exact.UNIT_SHIFT - shift)
        return cls(
            top=top,
            sketch_bits=sketch_bits,
            count=1,
            num_diverged=0,
            num_failed=0,
            num_pruned=0,
            total=total,
            squares=numerator * numerator << (exact.SQUARE_SHIFT - 2 * shift),
            weight_excess=0 if w == 1.0 else exact.units(w) - exact.ONE,
            product_excess=0 if w == 1.0 else exact.units(w * x) - total,
            low=((x, key),),
            high=((0.0 - x, key),),
            buckets={bucket(x, sketch_bits): 1},
        )

    @classmethod
    def of_samples(
        cls,
        values: Samples,
        weights: Samples | None = None,
        first_key: int = 0,
        *,
        keys: Keys | None = None,
        top: int = TOP,
        sketch_bits: int = SKETCH_BITS,
    ) -> Summary:
        """The summary of many values, equal to merging `of(values[i], key=first_key + i, weight=weights[i])` for all i.

        Args:
            values: a sequence, array or tensor of any shape and device, read in C order. float64 and every shorter
                float are taken exactly; integers are rounded to float64.
            weights: as many, finite and not negative; None for 1 each. They matter to the mean alone, through exact
                sums of w and of the products w * x, each product rounded to float64.
            first_key: key of the first value.
            keys: as many integers of 64 bits, in any order: the keys of the values, in place of those from `first_key`.
            top: see the class.
            sketch_bits: see the class.

        Raises:
            TypeError: the values or weights are not real numbers, or the keys not whole ones.
            ValueError: the weights are not as said, or not as many as the values; a key is no int64, or not as many are
                there; or as `empty`.
        """
        # What is not plainly a number, or is too large for one, is for the arrays to take or to refuse.
        if _are_few(values) and (weights is None or _are_few(weights)) and (keys is None or _are_few_keys(keys)):
            names = range(first_key, first_key + len(values)) if keys is None else keys
            return cls._of_few(values, weights, names, top, sketch_bits)
        from orchestrator.stats import batch

        _check_type(top, sketch_bits)
        found = batch.array(values)
        first_key = index(first_key)
        checked_key(checked_key(first_key) + max(0, len(found) - 1))
        weight_excess = product_excess = 0
        if weights is not None:
            found, weight_excess, product_excess = batch.weighted(found, batch.array(weights))
        chunks = batch.chunks(found, first_key if keys is None else keys, top, sketch_bits)
        first = cls._of_chunk(next(chunks, batch.NONE), top, sketch_bits, weight_excess, product_excess)
        second = next(chunks, None)
        if second is None:
            return first
        rest = (cls._of_chunk(chunk, top, sketch_bits) for chunk in chain((second,), chunks))
        return cls.merge_all(rest, start=first)

    @classmethod
    def _of_chunk(
        cls, chunk: Chunk, top: int, sketch_bits: int, weight_excess: int = 0, product_excess: int = 0
    ) -> Summary:
        return cls(
            top=top,
            sketch_bits=sketch_bits,
            count=chunk.num_finite,
            num_diverged=chunk.num_refused,
            num_failed=0,
            num_pruned=0,
            total=chunk.total,
            squares=chunk.squares,
            weight_excess=weight_excess,
            product_excess=product_excess,
            low=tuple(chunk.low),
            high=tuple(chunk.high),
            buckets=chunk.buckets,
        )

    @staticmethod
    def mean_of(values: Samples) -> float | None:
        """The mean of `of_samples(values)` alone, in less time.

        None when one of the values is NaN or infinite, or there is none.

        Raises:
            TypeError: the values are not real numbers.
        """
        from orchestrator.stats import batch

        found = batch.array(values)
        if not len(found) or not batch.all_finite(found):
            return None
        return exact.quotient(batch.total(found), len(found) << exact.UNIT_SHIFT)

    @classmethod
    def _of_few(
        cls,
        values: Sequence[float],
        weights: Sequence[float] | None,
        keys: Sequence[int],
        top: int,
        sketch_bits: int,
    ) -> Summary:
        known = [1.0] * len(values) if weights is None else weights
        for what, found in (("weights", known), ("keys", keys)):
            if len(found) != len(values):
                raise ValueError(f"there must be as many {what} as values, found {len(found)} for {len(values)}")
        ones = (
            cls.of(value, key=key, weight=weight, top=top, sketch_bits=sketch_bits)
            for value, key, weight in zip(values, keys, known, strict=True)
        )
        return cls.merge_all(ones, start=cls.empty(top, sketch_bits))

    @classmethod
    def diverged(cls, n: int = 1, *, top: int = TOP, sketch_bits: int = SKETCH_BITS) -> Summary:
        """The summary of n values that were NaN or infinite."""
        return _Tally(top, sketch_bits, num_diverged=_checked_count(n)).summary()

    @classmethod
    def failed(cls, n: int = 1, *, top: int = TOP, sketch_bits: int = SKETCH_BITS) -> Summary:
        """The summary of n failures."""
        return _Tally(top, sketch_bits, num_failed=_checked_count(n)).summary()

    @classmethod
    def pruned(cls, n: int = 1, *, top: int = TOP, sketch_bits: int = SKETCH_BITS) -> Summary:
        """The summary of n that were stopped early."""
        return _Tally(top, sketch_bits, num_pruned=_checked_count(n)).summary()

    def merge(self, other: Summary) -> Summary:
        """The summary of both sets of values, which must be disjoint. Neither argument is changed.

        Raises:
            TypeError: `other` is not a Summary.
            ValueError: the two keep another number of best values, or have another sketch.
        """
        return Summary.merge_all((other,), start=self)

    @staticmethod
    def merge_all(summaries: Iterable[Summary], *, start: Summary | None = None) -> Summary:
        """Equal to merging them one after the other on to `start`, in time and memory that suit a million of them.

        Args:
            summaries: read once, one at a time.
            start: what to begin with; by default the identity of the first one's type, `Summary.empty()` if there is
                none.

        Raises:
            TypeError, ValueError: as `merge`.
        """
        tally = None if start is None else _Tally.of(start)
        for summary in summaries:
            if tally is None:
                tally = _Tally.of(summary)
            else:
                tally.add(summary)
        return Summary.empty() if tally is None else tally.summary()

    def compute(self, goal: Literal["minimize", "maximize"] = "minimize") -> Statistics:
        """The plain numbers; `goal` says which end `top` is."""
        low = tuple(Ranked(*pair) for pair in self.low)
        high = tuple(Ranked(0.0 - negated, key) for negated, key in self.high)
        least, greatest = (low[0], high[0]) if self.count else (None, None)
        return Statistics(
            count=self.count,
            min=least and least.value,
            max=greatest and greatest.value,
            min_key=least and least.key,
            max_key=greatest and greatest.key,
            mean=self._mean(),
            std=self._std(),
            sum=self._sum(),
            quantiles=dict(zip(QUANTILES, self._quantiles(QUANTILES.values()), strict=True)),
            diverged=self.num_diverged,
            failed=self.num_failed,
            pruned=self.num_pruned,
            top=low if goal == "minimize" else high,
            bottom=high if goal == "minimize" else low,
        )

    def _mean(self) -> float | None:
        weight = (self.count << exact.UNIT_SHIFT) + self.weight_excess
        return exact.quotient(self.total + self.product_excess, weight) if weight else None

    def _std(self) -> float | None:
        if not self.count:
            return None
        # n * sum(x * x) - sum(x)**2 is n**2 times the variance, here without any rounding.
        square = self.count * self.squares - self.total * self.total
        return exact.root(square, self.count << exact.UNIT_SHIFT)

    def _sum(self) -> float | str:
        try:
            return self.total / exact.ONE
        except OverflowError:
            return exact.decimal(self.total)

    def _quantiles(self, percents: Iterable[int]) -> Iterator[float | None]:
        """The values at ascending percents."""
        codes = iter(sorted(self.buckets))
        code, seen = 0, 0
        for percent in percents:
            position = (self.count - 1) * percent // 100
            while self.count and seen <= position:
                code = next(codes)
                seen += self.buckets[code]
            yield self._clamped(representative(code, self.sketch_bits)) if self.count else None

    def _clamped(self, value: float) -> float:
        return min(max(value, self.low[0][0]), 0.0 - self.high[0][0])

    def to_json(self) -> JsonObject:
        """Plain JSON, which `from_json` reads; equal summaries give equal bytes through `store.canonical`."""
        return {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in _PLAIN},
            **{name: exact.text(getattr(self, name), shift) for name, shift in _EXACT.items()},
            "low": [[value, key] for value, key in self.low],
            "high": [[0.0 - negated, key] for negated, key in self.high],
            "buckets": [[code, self.buckets[code]] for code in sorted(self.buckets)],
        }

    @classmethod
    def from_json(cls, value: Json) -> Summary:
        """The summary of which `value` is the `to_json`.

        Raises:
            ValueError: `value` is of another schema or damaged; says which key, what was found and what would be right.
        """
        found = parsing.with_keys("a summary", value, schema=SCHEMA, keys=_KEYS)
        summary = cls(
            **{name: parsing.whole(name, found[name]) for name in _PLAIN},
            **{name: parsing.number(name, found[name], shift) for name, shift in _EXACT.items()},
            low=tuple(parsing.ranked("low", found["low"])),
            high=tuple((0.0 - one, key) for one, key in parsing.ranked("high", found["high"])),
            buckets=_buckets(found["buckets"]),
        )
        check(summary)
        return summary


_PLAIN: Final = ("top", "sketch_bits", "count", "num_diverged", "num_failed", "num_pruned")
_EXACT: Final = {
    "total": exact.UNIT_SHIFT,
    "squares": exact.SQUARE_SHIFT,
    "weight_excess": exact.UNIT_SHIFT,
    "product_excess": exact.UNIT_SHIFT,
}
_KEYS: Final = {*_PLAIN, *_EXACT, "low", "high", "buckets"}


class _Tally:
    """A Summary in the making, which may change: what `merge_all` adds into."""

    __slots__ = (
        "_buckets",
        "_high",
        "_low",
        "_mine",
        "count",
        "num_diverged",
        "num_failed",
        "num_pruned",
        "product_excess",
        "sketch_bits",
        "squares",
        "top",
        "total",
        "weight_excess",
    )

    def __init__(
        self, top: int, sketch_bits: int, *, num_diverged: int = 0, num_failed: int = 0, num_pruned: int = 0
    ) -> None:
        _check_type(top, sketch_bits)
        self.top, self.sketch_bits = top, sketch_bits
        self.count, self.num_diverged, self.num_failed, self.num_pruned = 0, num_diverged, num_failed, num_pruned
        self.total = self.squares = self.weight_excess = self.product_excess = 0
        self._low, self._high = BestValues(top), BestValues(top)
        self._buckets: Mapping[int, int] = {}
        self._mine: dict[int, int] | None = None

    @classmethod
    def of(cls, summary: Summary) -> _Tally:
        _check_summary(summary)
        tally = cls(summary.top, summary.sketch_bits)
        tally.add(summary)
        return tally

    def add(self, other: Summary) -> None:
        _check_summary(other)
        if other.top != self.top or other.sketch_bits != self.sketch_bits:
            raise ValueError(
                f"summaries of different types can't be merged: top {self.top} and {other.top}, "
                f"sketch_bits {self.sketch_bits} and {other.sketch_bits}"
            )
        self.num_diverged += other.num_diverged
        self.num_failed += other.num_failed
        self.num_pruned += other.num_pruned
        self.weight_excess += other.weight_excess
        self.product_excess += other.product_excess
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self._low.offer(other.low)
        self._high.offer(other.high)
        self._add_buckets(other.buckets)

    def _add_buckets(self, more: Mapping[int, int]) -> None:
        """The first ones are kept as they are: of a single part nothing is copied."""
        if not self._buckets:
            self._buckets = more
            return
        if self._mine is None:
            self._mine = self._buckets = dict(self._buckets)
        mine = self._mine
        for code, count in more.items():
            mine[code] = mine.get(code, 0) + count

    def summary(self) -> Summary:
        return Summary(
            top=self.top,
            sketch_bits=self.sketch_bits,
            count=self.count,
            num_diverged=self.num_diverged,
            num_failed=self.num_failed,
            num_pruned=self.num_pruned,
            total=self.total,
            squares=self.squares,
            weight_excess=self.weight_excess,
            product_excess=self.product_excess,
            low=self._low.cut(),
            high=self._high.cut(),
            buckets=self._buckets,
        )


def _are_few(values: Samples) -> TypeGuard[Sequence[float]]:
    if not isinstance(values, (list, tuple)) or len(values) >= _FEW:
        return False
    return all(isinstance(value, float) or (isinstance(value, int) and abs(value) < _GREAT) for value in values)


def _are_few_keys(keys: Keys) -> TypeGuard[Sequence[int]]:
    return isinstance(keys, (list, tuple)) and len(keys) < _FEW and all(type(key) is int for key in keys)


def _check_type(top: int, sketch_bits: int) -> None:
    if top < 1:
        raise ValueError(f"top must be at least 1, found {top}")
    if not 0 <= sketch_bits <= _MOST_SKETCH_BITS:
        raise ValueError(f"sketch_bits must be in 0..{_MOST_SKETCH_BITS}, found {sketch_bits}")


def _check_summary(value: object) -> None:
    if not isinstance(value, Summary):
        raise TypeError(f"only a Summary can be merged, found a {type(value).__name__}")


def _checked_count(n: int) -> int:
    if n < 0:
        raise ValueError(f"a number of trials or samples must not be negative, found {n}")
    return n


def _buckets(value: Json) -> dict[int, int]:
    """Buckets in the order of the file; a code that comes twice is caught by the count."""
    pairs = parsing.pairs("buckets", value)
    return {parsing.whole("buckets", code, LEAST_KEY): parsing.whole("buckets", count, 1) for code, count in pairs}


def check(summary: Summary) -> None:
    """Return if what came from outside is a Summary as merging makes them, of which everything can be computed.

    Raises:
        ValueError: its parts contradict each other.
    """
    _check_type(summary.top, summary.sketch_bits)
    if least := min(summary.count, summary.num_diverged, summary.num_failed, summary.num_pruned, 0):
        raise ValueError(f"expected numbers of trials or samples, which are not negative, found {least}")
    for name, pairs in (("low", summary.low), ("high", summary.high)):
        if not ascends(pairs) or not all(math.isfinite(value) for value, _ in (*pairs[:1], *pairs[-1:])):
            raise ValueError(f"{name}: expected its pairs in order of rank, each once")
        if len(pairs) > min(summary.top, summary.count) or (summary.count and not pairs):
            raise ValueError(f"{name}: found {len(pairs)} pairs of {summary.count} values, with top {summary.top}")
    if sum(summary.buckets.values()) != summary.count or min(summary.buckets.values(), default=1) < 1:
        found = sum(summary.buckets.values())
        raise ValueError(f"buckets: expected counts that add up to {summary.count}, each at least 1, found {found}")
    if summary.count and {min(summary.buckets), max(summary.buckets)} != {
        bucket(summary.low[0][0], summary.sketch_bits),
        bucket(0.0 - summary.high[0][0], summary.sketch_bits),
    }:
        raise ValueError("buckets: expected the first to hold the smallest value and the last the largest")
    if summary.count:
        _check_sums(summary, exact.units(summary.low[0][0]), exact.units(0.0 - summary.high[0][0]))


def _check_sums(summary: Summary, least: int, greatest: int) -> None:
    count, total = summary.count, summary.total
    if not count * least <= total <= count * greatest:
        raise ValueError(f"total: expected a sum of {count} values from the smallest to the largest")
    if count * summary.squares < total * total:
        raise ValueError(f"squares: expected at least the square of the total over {count}")
    if (count << exact.UNIT_SHIFT) + summary.weight_excess < 0:
        raise ValueError("weight_excess: expected weights that are not negative")
