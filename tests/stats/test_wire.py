"""Words of monoids: there and back, and nothing but what was sent."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.stats import exact, wire
from orchestrator.stats.containers import Monoid, SummaryMap, SummaryPair, TopN
from orchestrator.stats.exact import UNIT_SHIFT
from orchestrator.stats.summary import Summary

finite = st.floats(allow_nan=False, allow_infinity=False)
keys = st.integers(-(2**63), 2**63 - 1)
ones = st.builds(Summary.of, st.floats(), key=keys, weight=st.floats(0, 1e300))
summaries = st.lists(ones | st.builds(Summary.failed, st.integers(0, 2**60)), max_size=20).map(
    lambda parts: Summary.merge_all(parts, start=Summary.empty())
)
tops = st.builds(lambda n, pairs: TopN.of_pairs(pairs, n=n), st.integers(1, 9), st.lists(st.tuples(finite, keys)))
scalars = st.none() | st.booleans() | keys | finite | st.text(st.characters(exclude_categories=["Cs"]))


def composed(members: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    maps = st.lists(st.tuples(scalars, members), max_size=5, unique_by=lambda item: (type(item[0]), item[0]))
    return maps.map(SummaryMap.of) | st.builds(lambda a, b: SummaryPair(first=a, second=b), members, members)


monoids = st.recursive(summaries | tops, composed, max_leaves=6)


@given(monoids)
def test_every_monoid_comes_back_as_it_went(value: Monoid) -> None:
    words = wire.encode(value)
    found = wire.decode(words)
    assert found == value
    assert found.to_json() == value.to_json()
    assert len(words) % 8 == 0


@given(summaries, summaries)
def test_equal_values_have_equal_words(a: Summary, b: Summary) -> None:
    assert wire.encode(a.merge(b)) == wire.encode(b.merge(a))
    assert (wire.encode(a) == wire.encode(b)) == (a == b)


@given(monoids, st.data())
def test_words_that_are_cut_or_continued_are_refused(value: Monoid, choice: st.DataObject) -> None:
    words = wire.encode(value)
    cut = choice.draw(st.integers(0, len(words) - 1))
    with pytest.raises(ValueError, match="expected"):
        wire.decode(words[:cut])
    with pytest.raises(ValueError, match="expected the end"):
        wire.decode(words + bytes(8))


@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, -1, 2**62]), max_size=30))
def test_words_of_anything_are_a_monoid_or_refused(numbers: list[int]) -> None:
    words = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)
    try:
        value = wire.decode(words)
    except ValueError:
        return
    assert wire.decode(wire.encode(value)) == value


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 3},
        {"count": 1, "buckets": {}},
        {"num_failed": -1},
        {"top": 1},
        {"low": ((-math.inf, 0), (2.0, 1))},
        {"high": ((-2.0, 1), (-1.0, 0), (math.nan, 2))},
        {"total": 5 * exact.units(1.0)},
        {"squares": 0},
        {"weight_excess": -exact.units(2.5)},
    ],
    ids=str,
)
def test_a_summary_that_no_merge_could_make_is_refused(changes: dict[str, Any]) -> None:
    value = dataclasses.replace(Summary.of_samples([1.0, 2.0]), **changes)
    with pytest.raises(ValueError, match=r"expected|found"):
        wire.decode(wire.encode(value))


@pytest.mark.parametrize("exponent", [0, 62, 63, 64, 127, 128, UNIT_SHIFT, 4000])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_sums_are_whole_at_the_ends_of_their_words(exponent: int, sign: int, beside: int) -> None:
    number = sign * 2**exponent + beside
    value = SummaryPair(first=_with_total(number), second=_with_total(-number))
    found = wire.decode(wire.encode(value))
    assert found == value


def _with_total(total: int) -> Summary:

    return dataclasses.replace(Summary.empty(), total=total, squares=total * total)


def nested(depth: int) -> Any:
    value: Any = Summary.empty()
    for _ in range(depth - 1):
        value = SummaryMap.of({1: value})
    return value


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ({"a": 1}, TypeError, "expected a Summary, SummaryMap, SummaryPair or TopN, found a dict"),
        (SummaryMap.of({"a": None}), TypeError, "found a NoneType"),
        (Summary.failed(2**63), ValueError, "beyond 64 bits"),
        (nested(65), ValueError, "nested at most 64 deep"),
    ],
)
def test_what_has_no_words_is_told(value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        wire.encode(value)


def test_what_is_nested_as_deep_as_may_be_comes_back() -> None:
    assert wire.decode(wire.encode(nested(64))) == nested(64)


# Frames

SIZES = [0, 1, 8, wire.FRAME_BYTES - 24, wire.FRAME_BYTES - 23, wire.FRAME_BYTES, 100_001]


@pytest.mark.parametrize("size", SIZES)
def test_a_frame_holds_any_bytes(size: int) -> None:
    words = bytes(i % 251 for i in range(size))
    first, rest = wire.framed(7, words)
    assert (len(first), len(rest) % 8) == (wire.FRAME_BYTES, 0)
    assert wire.head(first) == (7, len(rest))
    assert wire.body(first, rest) == words


def test_a_frame_of_which_one_bit_has_changed_is_refused() -> None:
    words = wire.encode(Summary.of_samples([0.1 * i for i in range(20)], top=3))
    first, rest = wire.framed(1, words)
    assert not rest
    for at in range(8 * (32 + len(words))):
        damaged = bytearray(first)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError, match="expected"):
            wire.body(bytes(damaged), rest)


def test_a_bit_that_changed_beyond_the_first_message_is_seen() -> None:
    first, rest = wire.framed(1, bytes(2 * wire.FRAME_BYTES))
    with pytest.raises(ValueError, match="damaged"):
        wire.body(first, rest[:-1] + b"\1")


def test_a_summary_of_the_promised_size_is_one_message() -> None:
    value = Summary.of_samples([1.05**i for i in range(240)], top=100)
    assert len(value.buckets) == 240
    assert wire.framed(1, wire.encode(value))[1] == b""


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (b"", b""),
        (bytes(wire.FRAME_BYTES), b""),
        (wire.framed(1, b"x")[0], b"more"),
        (wire.framed(1, bytes(wire.FRAME_BYTES))[0], b""),
        (wire.framed(1, b"")[0][:16] + b"\xff" * (wire.FRAME_BYTES - 16), b""),
    ],
)
def test_what_is_no_message_is_refused(first: bytes, rest: bytes) -> None:
    with pytest.raises(ValueError, match="expected"):
        wire.body(first, rest)
