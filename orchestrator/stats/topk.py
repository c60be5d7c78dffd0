"""The one order in which values are ranked: by (value, key), each pair once.

    first([(0.5, 2), (0.5, 1), (0.3, 7), (0.3, 7)], 2)      # [(0.3, 7), (0.5, 1)]

The order is total, so which pairs are the first n depends neither on the order in which they came nor on how they were
grouped on the way. Values must be finite, NaN compares with nothing; who makes a pair checks that, with `checked`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise, starmap
from operator import eq, index, lt
from typing import Final, NamedTuple, TypeAlias

__all__ = ["LEAST_KEY", "BestValues", "Pair", "Ranked", "ascends", "checked", "checked_key", "first"]

# Where small is good (value, key), where large is (-value, key): both rank by the plain order of tuples.
Pair: TypeAlias = tuple[float, int]

LEAST_KEY: Final = -(1 << 63)
_KEYS: Final = 1 << 64
_NO_LIMIT: Final[Pair] = (math.inf, 0)


class Ranked(NamedTuple):
    """A value and the key, a sample's or a trial's index, that has it."""

    value: float
    key: int


def checked_key(key: int) -> int:
    """The key.

    Raises:
        ValueError: it is no 64-bit integer.
    """
    if not 0 <= key - LEAST_KEY < _KEYS:
        raise ValueError(f"a key must be a 64-bit integer, found {key}")
    return key


def checked(value: float, key: int) -> Pair:
    """The pair, with 0.0 for -0.0.

    Raises:
        TypeError: the value is no number, or the key is not whole.
        ValueError: the value is NaN or infinite, or the key is no 64-bit integer.
    """
    if not math.isfinite(value):
        raise ValueError(f"only finite values are ranked, found {value!r} at key {key}")
    return float(value) + 0.0, checked_key(index(key))


def first(pairs: Iterable[Pair], n: int) -> list[Pair]:
    """The first `n` of the pairs in their order, without duplicates."""
    ordered = sorted(pairs)
    best = ordered[:n]
    if any(map(eq, best, islice(best, 1, None))):
        return list(dict.fromkeys(ordered))[:n]
    return best


def ascends(pairs: Iterable[Pair]) -> bool:
    """Whether each pair ranks after the one before it."""
    return all(starmap(lt, pairwise(pairs)))


class BestValues:
    """The first `n` of the pairs offered so far, in the memory of a few times `n`."""

    __slots__ = ("_is_cut", "_limit", "_n", "_pairs")

    def __init__(self, n: int) -> None:
        self._n = n
        self._pairs: list[Pair] = []
        self._is_cut = True
        self._limit = _NO_LIMIT

    def offer(self, ascending: Sequence[Pair]) -> None:
        """Take at most `n` pairs, in order and each once: the first tells whether any of them can still rank."""
        if not ascending or ascending[0] >= self._limit:
            return
        self._is_cut = not self._pairs  # A single offer needs no sorting.
        self._pairs += ascending
        if len(self._pairs) > 4 * self._n + 64:
            self.cut()

    def cut(self) -> tuple[Pair, ...]:
        """The first `n` of them."""
        if not self._is_cut:
            self._pairs, self._is_cut = first(self._pairs, self._n), True
        if len(self._pairs) == self._n:
            self._limit = self._pairs[-1]
        return tuple(self._pairs)
