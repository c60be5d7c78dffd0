"""Arrays of samples: every way through them gives what one by one gives."""

from __future__ import annotations

import copy
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from orchestrator.stats import batch, bucket_counts, exact, exact_numpy
from orchestrator.stats.quantile_sketch import bucket
from orchestrator.stats.summary import Summary

TINY, LEAST_NORMAL, HUGE = 5e-324, 2.2250738585072014e-308, sys.float_info.max

finite = st.sampled_from([0.0, -0.0, TINY, -TINY, LEAST_NORMAL, HUGE, 1.0, -1.0, 1 - 2**-53]) | st.floats(
    allow_nan=False, allow_infinity=False
)
near = st.sampled_from([0.0, -0.0, 0.5, 1.0]) | st.floats(2.0**-20, 2.0**10) | st.floats(-(2.0**10), -(2.0**-20))
arrays = st.sampled_from([finite, near, near.map(abs)]).flatmap(
    lambda values: nps.arrays(np.float64, st.integers(1, 40), elements=values)
)


def as_singles(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        rounded = values.astype(np.float32)
    return rounded[np.isfinite(rounded)]


def one_by_one(values: list[float], keys: list[int], top: int = 3) -> Summary:
    ones = (Summary.of(value, key=key, top=top) for value, key in zip(values, keys, strict=True))
    return Summary.merge_all(ones, start=Summary.empty(top))


def exactly(values: np.ndarray) -> tuple[int, int]:
    units = [exact.units(value) for value in values.tolist()]
    return sum(units), sum(unit * unit for unit in units)


# Sums


@given(arrays)
def test_every_way_to_add_is_exact(values: np.ndarray) -> None:
    for array in (values, as_singles(values)):
        if len(array):
            assert exact_numpy.sums(exact_numpy.split(array)) == exactly(array)
            assert exact_numpy.total(array) == exactly(array)[0]


@given(arrays)
def test_sums_of_few_are_exact_or_declined(values: np.ndarray) -> None:
    for array in (values, as_singles(values)):
        sizes = np.abs(array.astype(np.float64))
        for smallest in (None, sizes.min(initial=np.inf)):
            if len(array):
                found = exact_numpy.sums_of_few(
                    array.astype(float), float(sizes.max()), smallest, exact_numpy.digits(array)
                )
                assert found is None or found == exactly(array)


@given(st.lists(near, min_size=1, max_size=40))
def test_sums_of_few_are_not_declined_for_what_losses_look_like(values: list[float]) -> None:
    assert exact_numpy.sums_of_few(np.array(values), max(map(abs, values))) is not None or min(map(abs, values)) < 1e-9


@pytest.mark.parametrize("value", [1 - 2**-53, 1 - 2**-24, 2.0**60 * (1 - 2**-53), -1 + 2**-53, 2.0**-800 / 3])
@pytest.mark.parametrize("small", [None, 2.0**-31, 2.0**-50])
def test_limbs_of_few_never_round_however_long_they_are(value: float, small: float | None) -> None:
    values = np.full(exact_numpy.FEW, value)
    if small:
        values[7] = small * value
    assert exact_numpy.sums_of_few(values, abs(value)) == exactly(values)


@pytest.mark.parametrize(
    ("largest", "smallest"), [(1.0, 2.0**-60), (HUGE, 1.0), (1.0, TINY), (TINY, TINY), (HUGE, HUGE)]
)
def test_what_ranges_too_wide_is_declined_and_summed_otherwise(largest: float, smallest: float) -> None:
    values = np.array([largest, smallest / 3 or smallest, -largest] * 10)
    assert exact_numpy.sums_of_few(values, largest) is None
    assert Summary.of_samples(values, top=3) == one_by_one(values.tolist(), list(range(30)))


# Buckets


@given(arrays, st.integers(0, 20))
def test_every_way_to_count_finds_the_buckets_of_the_sketch(values: np.ndarray, sketch_bits: int) -> None:
    wanted: dict[int, int] = {}
    for value in values.tolist():
        wanted[bucket(value, sketch_bits)] = wanted.get(bucket(value, sketch_bits), 0) + 1
    assert bucket_counts.count(exact_numpy.split(values), sketch_bits) == wanted
    subnormal = (values != 0) & (np.abs(values) < LEAST_NORMAL)
    found = bucket_counts.count_ordered(np.sort(values), sketch_bits)
    assert (found is None) == bool(subnormal.any())
    assert found is None or found == wanted


def test_counts_are_a_mapping_like_a_dict() -> None:
    counts = bucket_counts.Counts(np.array([5, 3]), np.array([2, 9]))
    assert (counts[3], len(counts), list(counts), dict(counts)) == (9, 2, [5, 3], {5: 2, 3: 9})
    assert counts == {3: 9, 5: 2} == counts
    assert counts == bucket_counts.Counts(np.array([3, 5]), np.array([9, 2]))
    assert counts != {3: 9}
    assert repr(counts) == "{5: 2, 3: 9}"
    assert type(pickle.loads(pickle.dumps(counts))) is type(copy.deepcopy(counts)) is dict


# Ranks


@given(arrays, st.integers(1, 12))
def test_few_and_many_give_the_same_chunk(values: np.ndarray, top: int) -> None:
    for array in (values, as_singles(values)):
        few = batch._chunk_of_few(batch.Named(array, 4), top, 6) if len(array) else None
        assert few is None or few == batch._chunk_of_many(batch.Named(array, 4), top, 6)


@pytest.mark.parametrize("num", [20, 360, exact_numpy.FEW, exact_numpy.FEW + 1, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_ties_of_any_number_go_to_the_smallest_keys(num: int, dtype: torch.dtype) -> None:
    errors = (torch.arange(num) % 3 != 0).to(dtype)
    found = Summary.of_samples(errors, first_key=-5, top=4)
    assert found.low == tuple((0.0, -5 + 3 * i) for i in range(4))
    assert found.high == tuple((-1.0, -5 + i) for i in (1, 2, 4, 5))
    assert found == one_by_one(errors.tolist(), list(range(-5, num - 5)), 4)


# Keys of their own


pairs = st.lists(
    st.tuples(
        st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -2.5]) | finite,
        st.integers(0, 6) | st.integers(-(2**63), 2**63 - 1),
    ),
    max_size=40,
)


@given(pairs, st.integers(1, 5))
def test_scattered_and_repeated_keys_give_what_one_by_one_gives(drawn: list[tuple[float, int]], top: int) -> None:
    values, keys = [value for value, _ in drawn], [key for _, key in drawn]
    wanted = one_by_one(values, keys, top)
    assert Summary.of_samples(values, keys=keys, top=top) == wanted
    assert Summary.of_samples(np.array(values), keys=np.array(keys, np.int64), top=top) == wanted


@given(st.integers(0, 2**32), st.sampled_from([3, 50, 10**6]))
def test_many_scattered_keys_give_what_one_by_one_gives(seed: int, num_keys: int) -> None:
    random = np.random.default_rng(seed)
    values, keys = random.integers(0, 9, 300) / 8, random.integers(-num_keys, num_keys, 300)
    wanted = one_by_one(values.tolist(), keys.tolist(), 5)
    assert Summary.of_samples(values, keys=keys, top=5) == wanted
    ascending = keys.argsort(kind="stable")
    assert Summary.of_samples(values[ascending], keys=keys[ascending].tolist(), top=5) == wanted


def test_keys_hold_over_more_than_one_chunk_and_with_weights() -> None:
    random = np.random.default_rng(1)
    values, keys = (
        random.integers(0, 1000, 2 * exact_numpy.CHUNK + 5) / 1000,
        random.permutation(2 * exact_numpy.CHUNK + 5),
    )
    weights = random.integers(0, 3, len(values)) / 2
    inverse = keys.argsort()
    assert Summary.of_samples(values, weights, keys=keys) == Summary.of_samples(values[inverse], weights[inverse])


@pytest.mark.parametrize(
    ("keys", "error", "said"),
    [
        ([1, 2], ValueError, "as many keys as values, found 2 for 3"),
        (np.arange(4), ValueError, "as many keys as values, found 4 for 3"),
        (np.array([0.5, 1.0, 2.0]), TypeError, "whole numbers, found an array of float64"),
        (np.array([1, 2, 2**63], np.uint64), ValueError, "64-bit integers"),
        (np.array([1, 2, 2**70], object), ValueError, "64-bit integers"),
        ([1, 2, 2**63], ValueError, "a key must be a 64-bit integer"),
        ([0.5, 1.0, 2.0], TypeError, "float"),
    ],
)
def test_keys_that_are_none_are_refused(keys: list[int], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Summary.of_samples([1.0, 2.0, 3.0], keys=keys)
    with pytest.raises((TypeError, ValueError)):
        Summary.of_samples(np.arange(3.0), keys=keys)


@pytest.mark.parametrize("first_key", [np.int64(7), 7])
def test_a_first_key_may_be_of_numpy(first_key: int) -> None:
    assert Summary.of_samples(np.ones(20), first_key=first_key).low[0] == (1.0, 7)


def test_lists_of_every_kind_of_number_are_taken() -> None:
    numbers = [1, 2.5, True, np.float32(0.1), np.int64(3), torch.tensor(4.0)] * 5
    assert Summary.of_samples(numbers) == one_by_one([float(number) for number in numbers], list(range(30)), 10)
    assert Summary.of_samples([[1.0, 2.0]] * 20) == Summary.of_samples([1.0, 2.0] * 20)
    with pytest.raises(TypeError, match="real numbers"):
        Summary.of_samples(["a"] * 20)  # type: ignore[list-item]
