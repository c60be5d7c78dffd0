"""One set of laws, held by every monoid there is, against oracles made of fractions and sorted lists."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import orchestrator as orc
from orchestrator.core import atomic
from orchestrator.stats import exact
from orchestrator.stats.containers import Key, Monoid, SummaryMap, SummaryPair, TopN, from_json
from orchestrator.stats.quantile_sketch import bucket
from orchestrator.stats.summary import Summary

TINY, HUGE = 5e-324, sys.float_info.max
SPECIAL = [0.0, -0.0, TINY, -TINY, 2.2250738585072014e-308, 1e308, -1e308, HUGE, -HUGE, 1.0, -1.0, 1 + 2**-52, 1e16]
NO_VALUE = [math.nan, math.inf, -math.inf]
# Some of these are equal to Python, and each is another key; -0.0 is 0.0.
LABELS: list[Key] = [
    None,
    False,
    True,
    0,
    1,
    -7,
    2**63 - 1,
    0.0,
    -0.0,
    1.0,
    1e-5,
    1e300,
    "",
    "a",
    "1",
    "é",
    "\U0001f600",
]


class Row(NamedTuple):
    value: float
    key: int
    weight: float
    label: Key


finite = st.sampled_from(SPECIAL) | st.floats(allow_nan=False, allow_infinity=False)
keys = st.integers(0, 4) | st.integers(-(2**63), 2**63 - 1)
weights = st.sampled_from([0.0, 1.0, 0.5, TINY, HUGE]) | st.floats(0, 1e6)


def rows(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[Row]]:
    one = st.builds(Row, values, keys, weights, st.sampled_from(LABELS) | st.text(max_size=2))
    # Rows that come again make ties of value and key.
    return st.tuples(st.lists(one, max_size=5), st.integers(0, 3)).map(lambda drawn: drawn[0] + drawn[0][: drawn[1]])


@dataclass(frozen=True)
class Instance:
    """One kind of monoid: how to make it of a row, its identity, and what it must come to by brute force."""

    name: str
    of: Callable[[Row], Monoid]
    empty: Monoid
    oracle: Callable[[list[Row]], object]
    values: st.SearchStrategy[float] = finite | st.sampled_from(NO_VALUE)

    def __str__(self) -> str:
        return self.name

    def rows(self) -> st.SearchStrategy[list[Row]]:
        return rows(self.values)

    def merged(self, drawn: list[Row]) -> Monoid:
        return type(self.empty).merge_all([self.empty, *map(self.of, drawn)])

    def monoids(self) -> st.SearchStrategy[Monoid]:
        return self.rows().map(self.merged)


def summary_instance(name: str, top: int, sketch_bits: int = 6, *, weighted: bool = False) -> Instance:
    def weight(row: Row) -> float:
        return row.weight if weighted else 1.0

    def oracle(drawn: list[Row]) -> object:
        kept = [row for row in drawn if math.isfinite(row.value) and math.isfinite(weight(row) * row.value)]
        weights = sum(Fraction(weight(row)) for row in kept)
        products = sum(Fraction(weight(row) * row.value) for row in kept)
        return {
            "count": (len(kept), len(drawn) - len(kept)),
            "low": sorted({(row.value + 0.0, row.key) for row in kept})[:top],
            "high": sorted({(0.0 - row.value, row.key) for row in kept})[:top],
            "sums": (sum(Fraction(row.value) for row in kept), sum(Fraction(row.value) ** 2 for row in kept)),
            "mean": exact.quotient((products / weights).numerator, (products / weights).denominator)
            if weights
            else None,
            "buckets": Counter(bucket(row.value, sketch_bits) for row in kept),
        }

    return Instance(
        name,
        lambda row: Summary.of(row.value, key=row.key, weight=weight(row), top=top, sketch_bits=sketch_bits),
        Summary.empty(top, sketch_bits),
        oracle,
    )


def map_instance(name: str, label: Callable[[Row], Key], inner: Instance) -> Instance:
    def oracle(drawn: list[Row]) -> object:
        groups: dict[tuple[type, Key], list[Row]] = {}
        for row in drawn:
            groups.setdefault((type(label(row)), label(row)), []).append(row)
        return {key: inner.oracle(group) for key, group in groups.items()}

    return Instance(
        name, lambda row: SummaryMap.of({label(row): inner.of(row)}), SummaryMap.empty(), oracle, inner.values
    )


def pair_instance(name: str, first: Instance, second: Instance) -> Instance:
    return Instance(
        name,
        lambda row: SummaryPair(first=first.of(row), second=second.of(row)),
        SummaryPair(first=first.empty, second=second.empty),
        lambda drawn: (first.oracle(drawn), second.oracle(drawn)),
        second.values,
    )


def top_instance(name: str, n: int) -> Instance:
    return Instance(
        name,
        lambda row: TopN.of(row.value, row.key, n=n),
        TopN.empty(n),
        lambda drawn: sorted({(row.value + 0.0, row.key) for row in drawn})[:n],
        finite,
    )


def plain(value: Monoid) -> object:
    """What a monoid holds, in the form of the oracles."""
    if isinstance(value, Summary):
        return {
            "count": (value.count, value.num_diverged),
            "low": list(value.low),
            "high": list(value.high),
            "sums": (Fraction(value.total, exact.ONE), Fraction(value.squares, exact.ONE**2)),
            "mean": value.compute().mean,
            "buckets": dict(value.buckets),
        }
    if isinstance(value, SummaryMap):
        return {(type(key), key): plain(inner) for key, inner in value.entries}
    if isinstance(value, SummaryPair):
        return plain(value.first), plain(value.second)
    assert isinstance(value, TopN)
    return list(value.entries)


SUMMARY = summary_instance("summary", 3)
MAP = map_instance("map of summaries", lambda row: row.label, SUMMARY)
INSTANCES = [
    summary_instance("coarse summary of top 1", 1, 0),
    SUMMARY,
    summary_instance("fine summary of top 10", 10, 20),
    summary_instance("weighted summary", 3, weighted=True),
    MAP,
    map_instance("map of maps", lambda row: row.key % 2 == 0, MAP),
    map_instance("map of pairs", lambda row: row.label, pair_instance("", SUMMARY, top_instance("", 2))),
    pair_instance("pair", MAP, SUMMARY),
    pair_instance("pair of pairs", pair_instance("", SUMMARY, SUMMARY), top_instance("", 1)),
    *(top_instance(f"top {n}", n) for n in (1, 3, 10)),
]
every_instance = pytest.mark.parametrize("instance", INSTANCES, ids=str)


def image(value: Monoid) -> bytes:
    return atomic.canonical(value.to_json())


# The laws, each in a line


def associative(a: Monoid, b: Monoid, c: Monoid) -> bool:
    return image(a.merge(b).merge(c)) == image(a.merge(b.merge(c)))


def commutative(a: Monoid, b: Monoid) -> bool:
    return image(a.merge(b)) == image(b.merge(a))


def has_identity(a: Monoid, empty: Monoid) -> bool:
    return image(a.merge(empty)) == image(empty.merge(a)) == image(a)


def equal_as_their_bytes(a: Monoid, b: Monoid) -> bool:
    return (a == b) == (image(a) == image(b)) and (a != b or hash(a) == hash(b))


def comes_back(a: Monoid) -> bool:
    return all(image(b) == image(a) and b == a and hash(b) == hash(a) for b in (from_json(a.to_json()), read(image(a))))


def read(data: bytes) -> Monoid:
    return from_json(orjson.loads(data))


def tree(parts: list[Monoid], data: st.DataObject) -> Monoid:
    """The parts merged in an order and a grouping of hypothesis' choice."""
    parts = list(parts)
    while len(parts) > 1:
        left = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(left.merge(parts.pop(data.draw(st.integers(0, len(parts) - 1)))))
    return parts[0]


@every_instance
@given(data=st.data())
def test_merging_is_associative_and_commutative(instance: Instance, data: st.DataObject) -> None:
    a, b, c = (data.draw(instance.monoids()) for _ in range(3))
    assert associative(a, b, c)
    assert commutative(a, b)


@every_instance
@given(data=st.data())
def test_empty_is_the_identity(instance: Instance, data: st.DataObject) -> None:
    assert has_identity(data.draw(instance.monoids()), instance.empty)


@every_instance
@given(data=st.data())
def test_merging_leaves_its_arguments_as_they_are(instance: Instance, data: st.DataObject) -> None:
    a, b = data.draw(instance.monoids()), data.draw(instance.monoids())
    before = copy.deepcopy((a, b)), image(a), image(b)
    a.merge(b)
    type(a).merge_all([b, a, b])
    assert ((a, b), image(a), image(b)) == before


@every_instance
@given(data=st.data())
def test_equality_and_hash_go_by_value(instance: Instance, data: st.DataObject) -> None:
    a, b = data.draw(instance.monoids()), data.draw(instance.monoids())
    assert equal_as_their_bytes(a, b)
    assert equal_as_their_bytes(a.merge(b), b.merge(a))
    assert a != image(a)


@every_instance
@given(data=st.data())
def test_json_and_pickle_bring_back_what_went(instance: Instance, data: st.DataObject) -> None:
    a = data.draw(instance.monoids())
    assert comes_back(a)
    assert pickle.loads(pickle.dumps(a)) == a


@every_instance
@given(data=st.data())
def test_any_tree_agrees_with_the_oracle(instance: Instance, data: st.DataObject) -> None:
    drawn = data.draw(instance.rows())
    parts = [instance.empty, *map(instance.of, drawn)]
    merged = tree(parts, data)
    assert plain(merged) == instance.oracle(drawn)
    assert image(merged) == image(type(merged).merge_all(iter(parts)))


@every_instance
def test_merging_many_is_the_left_fold(instance: Instance) -> None:
    parts = [instance.of(Row(math.sin(i * i), i % 40, 1.0, i % 3)) for i in range(150)]
    folded = instance.empty
    for part in parts:
        folded = folded.merge(part)
    assert type(folded).merge_all(iter(parts)) == folded


@every_instance
def test_statistics_come_of_every_kind(instance: Instance) -> None:
    row = Row(0.5, 3, 2.0, "a")
    assert "0.5" in repr(instance.of(row).compute())
    assert "0.5" not in repr(instance.empty.compute())


# NaN and infinity


@pytest.mark.parametrize("value", NO_VALUE)
def test_fault_24_nan_and_infinity_are_counted_as_diverged_and_never_in_min_mean_or_top(value: float) -> None:
    good = {"a": Summary.of_samples([2.0, 1.0]), "b": Summary.of(3.0, key=9)}
    found = SummaryMap.of([*good.items(), ("a", Summary.of(value, key=5)), ("b", Summary.of(value, key=6))])
    for label, alone in good.items():
        with_it, without = found[label].compute(), alone.compute()
        assert with_it.diverged == 1
        assert (with_it.count, with_it.min, with_it.max, with_it.mean) == (
            (without.count, without.min, without.max, without.mean)
        )
        assert (with_it.std, with_it.top, with_it.quantiles) == (without.std, without.top, without.quantiles)


@pytest.mark.parametrize("value", NO_VALUE)
def test_fault_24_nan_and_infinity_are_refused_where_only_ranks_are_kept(value: float) -> None:
    with pytest.raises(ValueError, match=r"only finite values are ranked, found .* at key 4"):
        TopN.of(value, 4, n=3)
    with pytest.raises(ValueError, match="only finite values are ranked"):
        TopN(n=3, entries=((1.0, 0), (value, 1)))
    with pytest.raises(ValueError, match="a key must be finite"):
        SummaryMap.of({value: Summary.empty()})


# A mapping's keys


def test_keys_are_told_apart_by_type_and_ordered() -> None:
    found = SummaryMap.of((label, Summary.of(1.0, key=position)) for position, label in enumerate(reversed(LABELS)))
    wanted = [None, False, True, -7, 0, 0.0, 1e-5, 1, 1.0, 2**63 - 1, 1e300, "", "1", "a", "é", "\U0001f600"]
    assert [(type(key), key) for key in found] == [(type(key), key) for key in wanted]
    assert len(found) == len(LABELS) - 1
    assert found[0.0] == found[-0.0]
    assert found[0.0].count == 2
    assert found[1] != found[1.0] != found[True]


def test_equal_looking_mappings_of_other_keys_differ() -> None:
    one, also, again = (SummaryMap.of({key: Summary.empty()}) for key in (1, 1.0, True))
    assert len({one, also, again}) == 3
    assert len({image(one), image(also), image(again)}) == 3


def test_a_mapping_is_asked_by_its_keys() -> None:
    found = SummaryMap.of({"a": Summary.of(1.0, key=0), 3: Summary.of(2.0, key=1)})
    assert (found["a"].count, list(found), len(found)) == (1, [3, "a"], 2)
    assert 3 in found
    assert 3.0 not in found
    assert found.get("b") is None
    with pytest.raises(KeyError, match="b"):
        found["b"]
    assert dict(found.compute())["a"] == found["a"].compute()


@pytest.mark.parametrize(
    ("key", "error", "said"),
    [
        (2**63, ValueError, "64 bits at most, found 9223372036854775808"),
        ("\ud800", ValueError, "must be Unicode text"),
        (1j, TypeError, "found 1j of type"),
        ((1, 2), TypeError, "must be text, a number, True, False or None"),
    ],
)
def test_keys_that_json_lacks_are_refused(key: Key, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        SummaryMap.of({key: Summary.empty()})


@pytest.mark.parametrize("labels", [("b", "a"), ("a", "a"), (1.0, 1)])
def test_entries_out_of_order_are_refused(labels: tuple[Key, ...]) -> None:
    with pytest.raises(ValueError, match="in order, each once"):
        SummaryMap(entries=tuple((label, Summary.empty()) for label in labels))


# Misuse


@pytest.mark.parametrize(
    ("one", "other", "error", "said"),
    [
        (SummaryMap.empty(), Summary.empty(), TypeError, "only a SummaryMap"),
        (TopN.empty(2), Summary.empty(), TypeError, "only a TopN"),
        (SummaryPair(first=TopN.empty(1), second=TopN.empty(1)), TopN.empty(1), TypeError, "only a SummaryPair"),
        (TopN.empty(2), TopN.empty(3), ValueError, "different n can't be merged: 2 and 3"),
        (
            SummaryMap.of({1: Summary.empty(3)}),
            SummaryMap.of({1: Summary.empty(4)}),
            ValueError,
            "at key 1: .*top 3 and 4",
        ),
        (
            SummaryMap.of({"a": Summary.empty()}),
            SummaryMap.of({"a": TopN.empty(1)}),
            TypeError,
            "at key 'a': only a Summary",
        ),
    ],
)
def test_what_is_of_another_kind_does_not_merge(one: Monoid, other: Monoid, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as found:
        one.merge(other)
    assert len(str(found.value)) < 120


def test_of_nothing_only_a_mapping_and_a_summary_can_be_merged() -> None:
    assert SummaryMap.merge_all([]) == SummaryMap.empty()
    for kind in (SummaryPair, TopN):
        with pytest.raises(ValueError, match="nothing tells"):
            kind.merge_all([])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TopN(n=0), "n must be at least 1, found 0"),
        (lambda: TopN(n=1, entries=((1.0, 0), (2.0, 0))), "expected at most 1 entries"),
        (lambda: TopN(n=2, entries=((2.0, 0), (1.0, 0))), "in order of rank"),
        (lambda: TopN.of(1.0, 2**63, n=1), "a key must be a 64-bit integer"),
    ],
)
def test_a_top_that_is_none_is_refused(make: Callable[[], TopN], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


MAP_JSON = SummaryMap.of({"a": TopN.of(1.0, 2, n=3)}).to_json()


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ({"kind": "set"}, "kind: expected one of \\['map', 'pair', 'top'\\] or none at all, found 'set'"),
        ({"kind": ["map"]}, "kind: expected one of"),
        (MAP_JSON | {"schema": 2}, "a mapping is read in schema 1, found 2"),
        (MAP_JSON | {"more": 1}, "unknown \\['more'\\]"),
        (MAP_JSON | {"entries": {}}, "entries: expected a list of pairs"),
        (MAP_JSON | {"entries": [[[1], {}]]}, "entries: a key must be text"),
        (MAP_JSON | {"entries": MAP_JSON["entries"] * 2}, "in order, each once"),
        (MAP_JSON | {"entries": [["a", {"kind": "top"}]]}, "at key 'a': a top is read in schema 1, found None"),
        ({"schema": 1, "kind": "pair", "first": MAP_JSON}, "a pair must have its own keys .*missing \\['second'\\]"),
        ({"schema": 1, "kind": "pair", "first": MAP_JSON, "second": 3}, "second: a summary must be an object, found 3"),
        ({"schema": 1, "kind": "top", "n": 0, "entries": []}, "n: expected an integer from 1, found 0"),
        ({"schema": 1, "kind": "top", "n": 1, "entries": [[None, 1]]}, "entries: expected a finite number, found None"),
        (
            {"schema": 1, "kind": "top", "n": 1, "entries": [[10**400, 1]]},
            "entries: expected a finite number, found 1000",
        ),
        ({"schema": 1, "kind": "top", "n": 1, "entries": [[1.0, 2.0]]}, "entries: key: expected an integer from"),
        ({"schema": 1, "kind": "top", "n": 1, "entries": [[1, 1], [2, 2]]}, "expected at most 1 entries"),
        ([], "a summary must be an object"),
    ],
)
def test_damaged_json_is_refused_with_what_is_wrong_and_where(damaged: atomic.Json, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_json(damaged)


def nested(depth: int) -> atomic.Json:
    value = Summary.of(1.0, key=0).to_json()
    for _ in range(depth):
        value = {"schema": 1, "kind": "map", "entries": [["a", value]]}
    return value


def test_json_is_read_to_a_depth_that_can_be_written_and_no_deeper() -> None:
    assert image(from_json(nested(63))) == atomic.canonical(nested(63))
    with pytest.raises(ValueError, match="nested at most 64 deep"):
        from_json(nested(64))


def test_the_package_offers_every_kind() -> None:
    assert (orc.SummaryMap, orc.SummaryPair, orc.TopN) == (SummaryMap, SummaryPair, TopN)


def test_importing_the_algebra_imports_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator.stats.containers import SummaryMap, TopN; TopN.of(1.0, 2, n=3).to_json();"
        "print(sorted({'numpy', 'torch', 'pandas', 'decimal', 'fractions'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
