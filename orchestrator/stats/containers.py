"""Monoids made of monoids: a mapping of summaries is a summary, a pair is, a list of the best n is.

    by_class = SummaryMap.of({"cat": Summary.of(0.3, key=0), "dog": Summary.of(0.9, key=1)})
    both = SummaryPair(first=by_class, second=TopN.of(0.3, 0, n=5))
    merged = both.merge(other)                       # in any order and any grouping: the same bytes
    merged.first["cat"].compute().mean, merged.second.entries

Every kind keeps the laws of `Summary`: `merge` is associative and commutative, exactly, leaves both arguments as they
are, and is for disjoint sets of samples or trials. Equal values have equal JSON through `store.canonical`; `from_json`
reads any of them. A learning curve is a mapping from step to Summary, a marginal effect one from a parameter's value.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Generic, Protocol, Self, TypeAlias, TypeVar

from orchestrator.stats import parsing
from orchestrator.stats.summary import Summary
from orchestrator.stats.topk import LEAST_KEY, BestValues, Pair, Ranked, ascends, checked, first

if TYPE_CHECKING:
    from orchestrator.core.atomic import Json, JsonObject

__all__ = ["Key", "Monoid", "SummaryMap", "SummaryPair", "TopN", "from_json"]

SCHEMA: Final = 1
_MOST_DEPTH: Final = 64  # Monoids in one another; orjson writes no more than 254 levels of JSON, a mapping takes three.
_AT_ONCE: Final = 16  # Values merged in one go: enough that a merge of two is not paid for each, few in memory.

Key: TypeAlias = "str | int | float | bool | None"
"""A key of a mapping: a JSON scalar."""


class Monoid(Protocol):
    """What can be merged: `Summary`, `SummaryMap`, `SummaryPair`, `TopN`.

    `merge` is associative and commutative, neither argument is changed, and `==` and `hash` go by value.
    """

    def merge(self, other: Self, /) -> Self:
        """What is known of both, which must be disjoint."""

    @classmethod
    def merge_all(cls, values: Iterable[Self], /) -> Self:
        """Equal to merging them one after the other; reads `values` once."""

    def compute(self) -> object:
        """The plain numbers."""

    def to_json(self) -> JsonObject:
        """Plain JSON, which `from_json` reads."""

    def __hash__(self) -> int: ...


M = TypeVar("M", bound=Monoid)
A = TypeVar("A", bound=Monoid)
B = TypeVar("B", bound=Monoid)


def from_json(value: Json) -> Monoid:
    """The monoid of which `value` is the `to_json`: its key `kind` says which, and a Summary has none.

    Raises:
        ValueError: `value` is of no known kind, of another schema, damaged, or nested more than 64 deep; says where.
    """
    return _read(value, 1)


class _Gathering(Generic[M]):
    """Values being merged, a few at a time: as fast as all at once, in the memory of a few."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: list[M] = []

    def add(self, value: M) -> None:
        self._values.append(value)
        if len(self._values) == _AT_ONCE:
            self._values = [self.merged()]

    def merged(self) -> M:
        if len(self._values) == 1:
            return self._values[0]
        return type(self._values[0]).merge_all(self._values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SummaryMap(Generic[M]):
    """A mapping of monoids: merged, it has the keys of both, and what both have is merged.

    Keys are JSON scalars: text, integers of 64 bits, finite floats (-0.0 is 0.0), True, False and None. They are told
    apart by type and value: 1, 1.0 and True are three keys. In order they are None, False, True, the numbers by value
    (1 before 1.0), the texts by code points.

    Args:
        entries: (key, value) in the order of the keys, each key once. `of` takes them in any order.

    Raises:
        TypeError: a key is no JSON scalar.
        ValueError: a key is NaN, infinite, beyond 64 bits or no Unicode text, or the keys are not in order.
    """

    entries: tuple[tuple[Key, M], ...] = ()

    def __post_init__(self) -> None:
        entries = tuple((_checked(key), value) for key, value in self.entries)
        if any(one >= next_one for one, next_one in pairwise(_rank(key) for key, _ in entries)):
            raise ValueError(f"keys must be in order, each once, found {[key for key, _ in entries]}")
        object.__setattr__(self, "entries", entries)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SummaryMap):
            return NotImplemented
        return self.entries == other.entries and list(map(type, self)) == list(map(type, other))

    def __hash__(self) -> int:
        return hash(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Key]:
        return (key for key, _ in self.entries)

    def __contains__(self, key: Key) -> bool:
        return self.get(key) is not None

    def __getitem__(self, key: Key) -> M:
        found = self.get(key)
        if found is None:
            raise KeyError(key)
        return found

    def get(self, key: Key) -> M | None:
        """The value of a key, None where there is none."""
        rank = _rank(_checked(key))
        position = bisect_left(self.entries, rank, key=lambda entry: _rank(entry[0]))
        if position < len(self.entries) and _rank(self.entries[position][0]) == rank:
            return self.entries[position][1]
        return None

    @classmethod
    def empty(cls) -> Self:
        """The identity: merging it changes nothing."""
        return cls()

    @classmethod
    def of(cls, items: Mapping[Key, M] | Iterable[tuple[Key, M]]) -> Self:
        """The mapping of these keys and values, in any order; the values of a key that comes twice are merged.

        Raises:
            TypeError, ValueError: a key is wrong, as the class says; or values of one key can't be merged.
        """
        gathered: dict[tuple[type, Key], _Gathering[M]] = {}
        for key, value in items.items() if isinstance(items, Mapping) else items:
            gathered.setdefault((type(key), key), _Gathering()).add(value)
        entries = [(_checked(key), gathering) for (_, key), gathering in gathered.items()]
        entries.sort(key=lambda entry: _rank(entry[0]))
        return cls(entries=tuple((key, _merged(key, gathering)) for key, gathering in entries))

    def merge(self, other: SummaryMap[M]) -> Self:
        """The mapping of the keys of both. Neither argument is changed.

        Raises:
            TypeError, ValueError: `other` is no SummaryMap, or the values of a key can't be merged.
        """
        return self.merge_all((self, other))

    @classmethod
    def merge_all(cls, maps: Iterable[SummaryMap[M]]) -> Self:
        """Equal to merging them one after the other, the empty mapping if there is none; reads `maps` once.

        Raises:
            TypeError, ValueError: as `merge`.
        """
        return cls.of(entry for one in maps for entry in _instance(one, SummaryMap).entries)

    def compute(self) -> tuple[tuple[Key, object], ...]:
        """The keys in order, each with the plain numbers of its value. Not a dict, which would mix up 1 and True."""
        return tuple((key, value.compute()) for key, value in self.entries)

    def to_json(self) -> JsonObject:
        """Plain JSON, which `from_json` reads; equal mappings give equal bytes through `store.canonical`."""
        return {"schema": SCHEMA, "kind": "map", "entries": [[key, value.to_json()] for key, value in self.entries]}


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryPair(Generic[A, B]):
    """Two monoids, merged each with its like. The identity is the pair of their identities.

    Args:
        first: the one.
        second: the other.
    """

    first: A
    second: B

    def merge(self, other: SummaryPair[A, B]) -> Self:
        """The pair of what is known of both. Neither argument is changed.

        Raises:
            TypeError, ValueError: `other` is no SummaryPair, or its members can't be merged with these.
        """
        return self.merge_all((self, other))

    @classmethod
    def merge_all(cls, pairs: Iterable[SummaryPair[A, B]]) -> Self:
        """Equal to merging them one after the other; reads `pairs` once.

        Raises:
            TypeError: as `merge`.
            ValueError: as `merge`, or there is none of them, so that nothing tells the identity.
        """
        firsts: _Gathering[A] = _Gathering()
        seconds: _Gathering[B] = _Gathering()
        pair = None
        for pair in pairs:
            firsts.add(_instance(pair, SummaryPair).first)
            seconds.add(pair.second)
        if pair is None:
            raise ValueError("of no pairs at all there is no merged one: nothing tells the identity of their members")
        return cls(first=firsts.merged(), second=seconds.merged())

    def compute(self) -> tuple[object, object]:
        """The plain numbers of both."""
        return self.first.compute(), self.second.compute()

    def to_json(self) -> JsonObject:
        """Plain JSON, which `from_json` reads; equal pairs give equal bytes through `store.canonical`."""
        return {"schema": SCHEMA, "kind": "pair", "first": self.first.to_json(), "second": self.second.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TopN:
    """The first n of (value, key), the smallest value first, ties by the smaller key, each pair once.

    NaN and infinity are refused, so that they never come to a comparison: who ranks values that can diverge counts
    those beside it (as `Summary` does). For the largest values, rank the negated ones.

    Args:
        n: how many are kept, at least 1. It belongs to the type: lists of different n don't merge.
        entries: at most n of them, in order.

    Raises:
        TypeError: an entry is no number with a whole key.
        ValueError: `n` is below 1; an entry is NaN or infinite or its key no int64; too many, not in order, or twice.
    """

    n: int
    entries: tuple[Ranked, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, found {self.n}")
        entries = tuple(Ranked(*checked(*entry)) for entry in self.entries)
        if len(entries) > self.n or not ascends(entries):
            raise ValueError(f"expected at most {self.n} entries in order of rank, each once, found {entries}")
        object.__setattr__(self, "entries", entries)

    @classmethod
    def empty(cls, n: int) -> Self:
        """The identity: merging it changes nothing."""
        return cls(n=n)

    @classmethod
    def of(cls, value: float, key: int, *, n: int) -> Self:
        """One value and its key.

        Raises:
            TypeError, ValueError: as the class.
        """
        return cls.of_pairs([(value, key)], n=n)

    @classmethod
    def of_pairs(cls, pairs: Iterable[Pair], *, n: int) -> Self:
        """The first n of any pairs (value, key).

        Raises:
            TypeError, ValueError: as the class.
        """
        return cls(n=n, entries=tuple(Ranked(*pair) for pair in first((checked(*pair) for pair in pairs), n)))

    def merge(self, other: TopN) -> Self:
        """The first n of both. Neither argument is changed.

        Raises:
            TypeError: `other` is no TopN.
            ValueError: it is of another n.
        """
        return self.merge_all((self, other))

    @classmethod
    def merge_all(cls, tops: Iterable[TopN]) -> Self:
        """Equal to merging them one after the other; reads `tops` once.

        Raises:
            TypeError: as `merge`.
            ValueError: as `merge`, or there is none of them, so that nothing tells n.
        """
        n, best = 0, BestValues(1)
        for top in tops:
            if not n:
                n, best = _instance(top, TopN).n, BestValues(top.n)
            if _instance(top, TopN).n != n:
                raise ValueError(f"lists of the first n of different n can't be merged: {n} and {top.n}")
            best.offer(top.entries)
        if not n:
            raise ValueError("of no lists at all there is no merged one: nothing tells n")
        return cls(n=n, entries=tuple(Ranked(*pair) for pair in best.cut()))

    def compute(self) -> tuple[Ranked, ...]:
        """The entries."""
        return self.entries

    def to_json(self) -> JsonObject:
        """Plain JSON, which `from_json` reads; equal lists give equal bytes through `store.canonical`."""
        return {"schema": SCHEMA, "kind": "top", "n": self.n, "entries": [[value, key] for value, key in self.entries]}


_T = TypeVar("_T")


def _instance(value: _T, kind: type) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"only a {kind.__name__} can be merged with a {kind.__name__}, found a {type(value).__name__}")
    return value


def _merged(key: Key, gathering: _Gathering[M]) -> M:
    try:
        return gathering.merged()
    except (TypeError, ValueError) as error:
        raise type(error)(f"at key {key!r}: {error}") from error


def _checked(key: Key) -> Key:
    """The key, with 0.0 for -0.0."""
    if type(key) is float:
        if not math.isfinite(key):
            raise ValueError(f"a key must be finite, found {key!r}")
        return key + 0.0
    if type(key) is int and not LEAST_KEY <= key < -LEAST_KEY:
        raise ValueError(f"a whole key must have 64 bits at most, found {key}")
    if type(key) is str and not key.isascii():
        _check_text(key)
    elif type(key) not in (str, int, bool, type(None)):
        raise TypeError(f"a key must be text, a number, True, False or None, found {key!r} of type {type(key)}")
    return key


def _check_text(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a key must be Unicode text, found {key!r}") from None


def _rank(key: Key) -> tuple[int, str | float, bool]:
    """Where a key stands among others."""
    if key is None:
        return 0, 0, False
    if isinstance(key, bool):
        return 1, key, False
    if isinstance(key, str):
        return 3, key, False
    return 2, key, isinstance(key, float)


def _read(value: Json, depth: int) -> Monoid:
    if depth > _MOST_DEPTH:
        raise ValueError(f"expected monoids nested at most {_MOST_DEPTH} deep, found more")
    if not isinstance(value, dict) or "kind" not in value:
        return Summary.from_json(value)
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in _READERS:
        raise ValueError(f"kind: expected one of {sorted(_READERS)} or none at all, found {kind!r}")
    return _READERS[kind](value, depth)


def _read_at(where: str, value: Json, depth: int) -> Monoid:
    try:
        return _read(value, depth + 1)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_map(value: Json, depth: int) -> Monoid:
    found = parsing.with_keys("a mapping", value, schema=SCHEMA, keys={"kind", "entries"})
    pairs = [(_scalar(key), one) for key, one in parsing.pairs("entries", found["entries"])]
    entries = tuple((key, _read_at(f"at key {key!r}", one, depth)) for key, one in pairs)
    return SummaryMap(entries=entries)


def _scalar(key: Json) -> Key:
    if isinstance(key, (list, dict)):
        raise ValueError(f"entries: a key must be text, a number, true, false or null, found {key!r}")
    return key


def _read_pair(value: Json, depth: int) -> Monoid:
    found = parsing.with_keys("a pair", value, schema=SCHEMA, keys={"kind", "first", "second"})
    return SummaryPair(
        first=_read_at("first", found["first"], depth), second=_read_at("second", found["second"], depth)
    )


def _read_top(value: Json, depth: int) -> Monoid:
    found = parsing.with_keys("a top", value, schema=SCHEMA, keys={"kind", "n", "entries"})
    entries = tuple(Ranked(*pair) for pair in parsing.ranked("entries", found["entries"]))
    return TopN(n=parsing.whole("n", found["n"], 1), entries=entries)


_READERS: Final[dict[str, Callable[[Json, int], Monoid]]] = {"map": _read_map, "pair": _read_pair, "top": _read_top}
