"""The laws of the Summary, against oracles made of fractions and sorted lists."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core import atomic
from orchestrator.stats import exact
from orchestrator.stats.quantile_sketch import bucket, representative
from orchestrator.stats.statistics import QUANTILES
from orchestrator.stats.summary import Summary

TINY, LEAST_NORMAL, HUGE = 5e-324, 2.2250738585072014e-308, sys.float_info.max
SPECIAL = [0.0, -0.0, TINY, -TINY, 1.5e-323, LEAST_NORMAL, HUGE, -HUGE, 1e308, 1.0, -1.0, 1 + 2**-52, 0.1, 1e16]
NO_VALUE = [math.nan, math.inf, -math.inf]

finite = st.sampled_from(SPECIAL) | st.floats(allow_nan=False, allow_infinity=False)
# Small pools make ties and repeated keys likely.
floats = finite | st.sampled_from(NO_VALUE)
keys = st.integers(0, 5) | st.integers(-(2**63), 2**63 - 1)
weights = st.sampled_from([0.0, 1.0, 0.5, 3.0, TINY, HUGE]) | st.floats(0, 1e6)
samples = st.lists(floats, max_size=40)
outcomes = st.sampled_from([Summary.diverged(top=3), Summary.failed(2, top=3), Summary.pruned(top=3)])
ones = st.builds(lambda value, key, weight: Summary.of(value, key=key, weight=weight, top=3), floats, keys, weights)
summaries = st.lists(ones | outcomes, max_size=12).map(
    lambda parts: Summary.merge_all(parts, start=Summary.empty(top=3))
)


def tree(parts: list[Summary], cuts: st.DataObject) -> Summary:
    """The parts merged in an order and a grouping of hypothesis' choice."""
    parts = list(parts)
    while len(parts) > 1:
        left = parts.pop(cuts.draw(st.integers(0, len(parts) - 1)))
        right = parts.pop(cuts.draw(st.integers(0, len(parts) - 1)))
        parts.append(left.merge(right))
    return parts[0]


def image(summary: Summary) -> bytes:
    return atomic.canonical(summary.to_json())


def rounds_to_root(value: float, square: Fraction) -> bool:
    """Whether no float is nearer to the root of `square` than `value`."""
    below = (Fraction(value) + Fraction(math.nextafter(value, -math.inf))) / 2
    above = (Fraction(value) + Fraction(min(math.nextafter(value, math.inf), HUGE))) / 2
    return max(below, 0) ** 2 <= square and (square <= above**2 or value == HUGE)


# The laws


@given(summaries, summaries, summaries)
def test_merging_is_associative(a: Summary, b: Summary, c: Summary) -> None:
    assert image(a.merge(b).merge(c)) == image(a.merge(b.merge(c)))


@given(summaries, summaries)
def test_merging_is_commutative(a: Summary, b: Summary) -> None:
    assert image(a.merge(b)) == image(b.merge(a))
    assert a.merge(b) == b.merge(a)
    assert hash(a.merge(b)) == hash(b.merge(a))


@given(summaries)
def test_empty_is_the_identity(a: Summary) -> None:
    empty = Summary.empty(top=3)
    assert a.merge(empty) == empty.merge(a) == a
    assert image(a.merge(empty)) == image(a)


@given(summaries, summaries)
def test_merging_leaves_its_arguments_alone(a: Summary, b: Summary) -> None:
    before = copy.deepcopy((a, b))
    a.merge(b)
    Summary.merge_all([b, a, b], start=a)
    assert (a, b) == before


@given(st.lists(ones | outcomes, min_size=1, max_size=12), st.data())
def test_any_tree_over_any_order_gives_the_same_bytes(parts: list[Summary], data: st.DataObject) -> None:
    assert image(tree(parts, data)) == image(Summary.merge_all(parts))


@given(summaries)
def test_json_comes_back_as_it_went(a: Summary) -> None:
    assert Summary.from_json(a.to_json()) == a
    read = Summary.from_json(atomic.orjson.loads(image(a)))
    assert read == a
    assert hash(read) == hash(a)
    assert image(read) == image(a)
    assert pickle.loads(pickle.dumps(a)) == a


@given(summaries, summaries)
def test_equal_bytes_and_equal_summaries_are_the_same_thing(a: Summary, b: Summary) -> None:
    assert (image(a) == image(b)) == (a == b)


def test_merging_all_is_the_left_fold_even_over_many_and_of_none() -> None:
    parts = [Summary.of(math.sin(i * i), key=i, top=2) for i in range(1000)]
    folded = Summary.empty(top=2)
    for part in parts:
        folded = folded.merge(part)
    assert Summary.merge_all(iter(parts)) == folded
    assert Summary.merge_all([]) == Summary.empty()


# Against oracles


@given(samples)
def test_statistics_agree_with_fractions_and_sorting(values: list[float]) -> None:
    found = Summary.of_samples(np.array(values), top=4).compute()
    pairs = [(value, key) for key, value in enumerate(values) if math.isfinite(value)]
    assert found.count == len(pairs)
    assert found.diverged == len(values) - len(pairs)
    assert found.top == tuple(sorted(pairs)[:4])
    assert found.bottom == tuple(sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:4])
    if pairs:
        assert (found.min, found.min_key) == min(pairs)
        assert (found.max, found.max_key) == found.bottom[0]
        assert found.mean == float(Fraction(sum(Fraction(value) for value, _ in pairs), len(pairs)))


@given(st.lists(finite, min_size=1, max_size=30))
def test_the_standard_deviation_is_the_float_nearest_to_the_exact_one(values: list[float]) -> None:
    exactly = [Fraction(value) for value in values]
    mean = Fraction(sum(exactly), len(exactly))
    variance = Fraction(sum((value - mean) ** 2 for value in exactly), len(exactly))
    found = Summary.of_samples(values).compute().std
    assert found is not None
    assert rounds_to_root(found, variance)


@given(samples)
def test_the_sum_is_the_float_nearest_to_the_exact_one_or_its_digits(values: list[float]) -> None:
    exactly = sum(Fraction(value) for value in values if math.isfinite(value))
    found = Summary.of_samples(values).compute().sum
    if isinstance(found, float):
        assert found == float(exactly)
    else:
        assert abs(Fraction(found) - exactly) <= abs(exactly) / 10**16
        with pytest.raises(OverflowError):
            float(exactly)


@given(st.lists(finite, min_size=1, max_size=60))
def test_quantiles_are_the_lower_empirical_ones_within_the_promised_error(values: list[float]) -> None:
    ordered = sorted(values)
    found = Summary.of_samples(values).compute()
    for name, percent in QUANTILES.items():
        true, estimate = ordered[(len(values) - 1) * percent // 100], found.quantiles[name]
        assert estimate is not None
        assert abs(Fraction(estimate) - Fraction(true)) <= abs(Fraction(true)) / 128
        assert ordered[0] <= estimate <= ordered[-1]


@given(st.lists(st.tuples(floats, weights), max_size=30))
def test_the_weighted_mean_is_exact_over_rounded_products(pairs: list[tuple[float, float]]) -> None:
    kept = [(x, w) for x, w in pairs if math.isfinite(x) and math.isfinite(w * x)]
    weight = sum(Fraction(w) for _, w in kept)
    found = Summary.of_samples([x for x, _ in pairs], [w for _, w in pairs]).compute()
    assert found.diverged == len(pairs) - len(kept)
    assert (found.mean is None) == (weight == 0)
    if weight:
        assert found.mean == exact.quotient(
            sum(exact.units(w * x) for x, w in kept), sum(exact.units(w) for _, w in kept)
        )
        assert found.mean == pytest.approx(float(Fraction(sum(Fraction(w * x) for x, w in kept)) / weight), rel=1e-15)


# Samples, in bulk


@given(samples, st.integers(-5, 2**62), st.data())
def test_bulk_equals_one_by_one(values: list[float], first_key: int, data: st.DataObject) -> None:
    known = data.draw(st.none() | st.lists(weights, min_size=len(values), max_size=len(values)))
    one_by_one = Summary.merge_all(
        (
            Summary.of(value, key=first_key + i, weight=1.0 if known is None else known[i], top=3)
            for i, value in enumerate(values)
        ),
        start=Summary.empty(top=3),
    )
    bulk = Summary.of_samples(np.array(values), None if known is None else np.array(known), first_key, top=3)
    assert image(bulk) == image(one_by_one)
    assert Summary.of_samples(values, known, first_key, top=3) == one_by_one


@given(samples, st.integers(0, 40))
def test_any_split_of_the_samples_gives_the_same(values: list[float], cut: int) -> None:
    left, right = values[:cut], values[cut:]
    parts = Summary.of_samples(left), Summary.of_samples(np.array(right), first_key=len(left))
    assert parts[0].merge(parts[1]) == Summary.of_samples(np.array(values))


@given(st.integers(0, 2**32), st.sampled_from([0, 1, 200, 1000]), st.sampled_from([1, 6, 20]))
def test_bulk_equals_one_by_one_over_the_whole_range_of_floats(seed: int, spread: int, sketch_bits: int) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal(100) * np.exp2(random.integers(-spread, spread + 1, 100).astype(float))
    ones = (Summary.of(value, key=i, sketch_bits=sketch_bits) for i, value in enumerate(values.tolist()))
    assert Summary.of_samples(values, sketch_bits=sketch_bits) == Summary.merge_all(ones)


@pytest.mark.parametrize("value", [1 - 2**-53, -1 + 2**-53, HUGE, 3.0, TINY, 0.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_limbs_never_round_however_many_equal_values_there_are(value: float, dtype: type[np.floating]) -> None:
    with np.errstate(over="ignore"):
        values = np.full(70_000, value, dtype)
    x = float(values[0])
    summary = Summary.of_samples(values, top=2)
    if math.isfinite(x):
        assert summary.total == 70_000 * exact.units(x)
        assert summary.squares == 70_000 * exact.units(x) ** 2
        assert summary.low == ((x, 0), (x, 1))
        assert summary.high == ((-x, 0), (-x, 1))
    else:
        assert summary == Summary.diverged(70_000, top=2)


def test_a_long_array_equals_its_shuffled_parts() -> None:
    values = np.random.default_rng(3).lognormal(size=100_000)
    values[::7] = np.round(values[::7], 1)
    values[5::1000] = np.nan
    parts = [Summary.of_samples(values[i : i + 999], first_key=i) for i in range(0, len(values), 999)]
    whole = Summary.of_samples(values)
    assert Summary.merge_all(reversed(parts)) == whole
    assert whole.compute().sum == math.fsum(values[np.isfinite(values)].tolist())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_of_every_type_equal_lists(dtype: torch.dtype) -> None:
    tensor = (torch.randn(6, 9, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    assert Summary.of_samples(tensor) == Summary.of_samples([float(x) for x in tensor.flatten()])


def test_tensors_with_a_graph_and_without_elements_are_taken() -> None:
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    assert Summary.of_samples(tensor * 2) == Summary.of_samples([2.0, 4.0])
    assert Summary.of_samples(torch.tensor(3.0)) == Summary.of(3.0, key=0)
    assert (
        Summary.of_samples(torch.zeros(0))
        == Summary.of_samples([])
        == Summary.of_samples(np.array([]))
        == Summary.empty()
    )


def test_arrays_that_are_strided_or_of_another_byte_order_are_taken() -> None:
    values = np.arange(40, dtype=np.float32)
    expected = Summary.of_samples(values[::2].tolist())
    assert Summary.of_samples(values[::2]) == Summary.of_samples(values.astype(">f4")[::2]) == expected


# Values and keys


def test_negative_zero_is_zero() -> None:
    assert image(Summary.of(-0.0, key=1)) == image(Summary.of(0.0, key=1))
    assert image(Summary.of_samples(np.full(20, -0.0))) == image(Summary.of_samples(np.zeros(20)))
    for number in (Summary.of(-0.0, key=1).compute().min, Summary.of(0.0, key=1).compute().max):
        assert math.copysign(1, number or 0.0) == 1


def test_ties_go_to_the_smaller_key_at_both_ends() -> None:
    summary = Summary.merge_all(
        Summary.of(value, key=key, top=2) for value, key in [(1, 9), (1, 4), (2, 8), (2, 3), (2, 5)]
    )
    least, most = summary.compute("minimize"), summary.compute("maximize")
    assert least.top == most.bottom == ((1.0, 4), (1.0, 9))
    assert least.bottom == most.top == ((2.0, 3), (2.0, 5))
    assert (least.min_key, least.max_key) == (4, 3)


def test_the_best_have_no_duplicates_but_every_value_counts() -> None:
    one = Summary.of(1.0, key=7)
    assert one.merge(one).compute().top == ((1.0, 7),)
    assert one.merge(one).count == 2
    assert one.merge(Summary.of(2.0, key=7)).compute().top == ((1.0, 7), (2.0, 7))
    many = Summary.merge_all([one] * 500 + [Summary.of(2.0, key=7)])
    assert (many.count, many.compute().top) == (501, ((1.0, 7), (2.0, 7)))


@pytest.mark.parametrize("value", NO_VALUE)
def test_what_is_not_finite_is_counted_as_diverged_and_nothing_else(value: float) -> None:
    assert Summary.of(value, key=0) == Summary.diverged()
    assert Summary.of_samples(np.full(30, value)) == Summary.diverged(30)
    assert Summary.of_samples([value], [0.5]) == Summary.diverged()


def test_a_product_beyond_float64_is_diverged() -> None:
    assert Summary.of(1e308, key=0, weight=10.0) == Summary.of_samples([1e308], [10.0]) == Summary.diverged()
    assert Summary.of_samples(np.full(20, 1e308), np.full(20, 10.0)) == Summary.diverged(20)


def test_weights_of_one_change_nothing() -> None:
    values = [0.1, 0.2, 0.7]
    assert Summary.of_samples(values, [1.0, 1.0, 1.0]) == Summary.of_samples(np.array(values), np.ones(3))
    assert Summary.of_samples(values, [1.0, 1.0, 1.0]) == Summary.of_samples(values)


def test_an_empty_summary_has_no_numbers() -> None:
    found = Summary.failed(2).merge(Summary.pruned(3)).compute()
    assert (found.min, found.max, found.min_key, found.max_key, found.mean, found.std) == (None,) * 6
    assert (found.count, found.sum, found.diverged, found.failed, found.pruned) == (0, 0.0, 0, 2, 3)
    assert set(found.quantiles.values()) == {None}
    assert found.top == found.bottom == ()


@pytest.mark.parametrize(
    ("value", "is_taken"),
    [
        (1.5, True),
        (True, True),
        (2**1023, True),
        (np.float32(0.1), True),
        (Fraction(1, 3), True),
        ([1.0, 2.0], True),
        ("1.5", False),
        (None, False),
        (1j, False),
        (10**400, False),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", [list, tuple])
def test_what_few_samples_may_be_many_may_be_too(value: Any, kind: Any, *, is_taken: bool) -> None:
    for num in (2, 20):
        if is_taken:
            ones = [Summary.of(one, key=i) for i, one in enumerate(np.ravel([value] * num).tolist())]
            assert Summary.of_samples(kind([value] * num)) == Summary.merge_all(ones)
        else:
            with pytest.raises(TypeError, match="real numbers"):
                Summary.of_samples(kind([value] * num))


@pytest.mark.parametrize("key", ["1", 1.0, None])
def test_what_is_no_key_of_few_is_none_of_many(key: Any) -> None:
    for num in (2, 20):
        with pytest.raises((TypeError, ValueError), match="keys must be"):
            Summary.of_samples([1.0] * num, keys=[key] * num)


def test_a_sum_beyond_float64_is_told_in_digits_while_the_mean_is_a_number() -> None:
    found = Summary.of_samples([HUGE, HUGE, HUGE]).compute()
    assert (found.sum, found.mean, found.std) == ("5.3930794045869471e+308", HUGE, 0.0)
    assert Summary.of_samples([-HUGE, -HUGE, 1.0]).compute().sum == "-3.5953862697246314e+308"


def test_statistics_are_plain_json() -> None:
    found = Summary.of_samples([2.0, 1.0, math.nan], top=1).compute("maximize").to_json()
    assert atomic.orjson.loads(atomic.canonical(found)) == found
    assert found["top"] == [{"value": 2.0, "key": 0}]
    assert (found["count"], found["mean"], found["diverged"]) == (2, 1.5, 1)


# The sketch


@given(finite, st.integers(0, 20))
def test_a_bucket_stands_for_its_values_within_half_its_width(value: float, sketch_bits: int) -> None:
    code = bucket(value, sketch_bits)
    error = abs(Fraction(representative(code, sketch_bits)) - Fraction(value))
    assert error <= abs(Fraction(value)) / 2 ** (sketch_bits + 1)
    assert bucket(representative(code, sketch_bits), sketch_bits) == code


@given(st.lists(finite, min_size=2, max_size=5), st.integers(0, 20))
def test_buckets_ascend_with_their_values(values: list[float], sketch_bits: int) -> None:
    codes = [bucket(value, sketch_bits) for value in sorted(values)]
    assert codes == sorted(codes)
    assert [bucket(-value, sketch_bits) for value in sorted(values)] == [-code for code in codes]


# Misuse


@pytest.mark.parametrize("other", [Summary.empty(top=5), Summary.empty(sketch_bits=7)])
def test_summaries_of_different_types_do_not_merge(other: Summary) -> None:
    with pytest.raises(ValueError, match="different types"):
        Summary.empty().merge(other)
    with pytest.raises(ValueError, match="different types"):
        Summary.merge_all([Summary.empty(), other])
    assert Summary.empty() != other


def test_only_summaries_merge() -> None:
    with pytest.raises(TypeError, match="only a Summary"):
        Summary.merge_all([Summary.empty(), 0.5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="only a Summary"):
        Summary.merge_all([0.5])  # type: ignore[list-item]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", [list, np.array])
def test_weights_that_are_none_are_refused(bad: float, kind: type) -> None:
    with pytest.raises(ValueError, match="a weight must be finite"):
        Summary.of_samples(kind([1.0, 2.0]), kind([1.0, bad]))
    with pytest.raises(ValueError, match="as many weights"):
        Summary.of_samples(kind([1.0, 2.0]), kind([1.0]))


@pytest.mark.parametrize("values", [np.array(["a"]), np.array([1j]), np.array([None])])
def test_samples_that_are_no_numbers_are_refused(values: np.ndarray) -> None:
    with pytest.raises(TypeError, match="real numbers"):
        Summary.of_samples(values)


def test_keys_widths_and_counts_out_of_range_are_refused() -> None:
    for call in (
        lambda: Summary.of(1.0, key=2**63),
        lambda: Summary.of_samples(np.ones(20), first_key=2**63 - 5),
        lambda: Summary.empty(top=0),
        lambda: Summary.of(1.0, key=0, sketch_bits=21),
        lambda: Summary.failed(-1),
    ):
        with pytest.raises(ValueError, match="must"):
            call()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema 1, found 2"),
        ({"extra": 1}, "unknown \\['extra'\\]"),
        ({"count": -1}, "count: expected an integer from 0, found -1"),
        ({"count": True}, "count: expected an integer"),
        ({"count": 3}, "buckets: expected counts that add up to 3"),
        ({"total": "0x2p-1"}, "total: expected '0x1p\\+0'"),
        ({"total": "one"}, "total: expected an exact number"),
        ({"total": 7}, "total: expected an exact number"),
        ({"squares": "0x1p+999999999"}, "squares: '0x1p\\+999999999' is not"),
        ({"squares": "0x1p-9999"}, "not a multiple"),
        ({"low": [[1.0, 0], [1.0, 0]]}, "low: expected its pairs in order"),
        ({"low": []}, "low: found 0 pairs of 2 values"),
        ({"low": [[None, 0]]}, "low: expected a finite number, found None"),
        ({"high": [[2.0, 2**63]]}, "a key must be a 64-bit integer"),
        ({"high": 5}, "high: expected a list of pairs"),
        ({"buckets": [[1, 2]]}, "the smallest value"),
        ({"buckets": [[1, 0]]}, "buckets: expected an integer from 1"),
        ({"top": 0}, "top must be at least 1"),
    ],
)
def test_damaged_json_is_refused_with_what_is_wrong(change: dict[str, atomic.Json], said: str) -> None:
    good = Summary.of_samples([1.0, 2.0]).to_json()
    with pytest.raises(ValueError, match=said):
        Summary.from_json(good | change)


def test_what_is_no_summary_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="must be an object"):
        Summary.from_json([1])
    with pytest.raises(ValueError, match="missing \\['total'\\]"):
        Summary.from_json({key: value for key, value in Summary.empty().to_json().items() if key != "total"})


def test_importing_the_summary_imports_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator.stats.summary import Summary;"
        "Summary.of_samples([1.0, 2.0]).compute().to_json();"
        "print(sorted({'numpy', 'torch', 'pandas', 'decimal', 'fractions'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@given(samples)
def test_the_mean_alone_is_the_mean_unless_a_value_is_none(values: list[float]) -> None:
    found = Summary.of_samples(values)
    wanted = None if found.num_diverged else found.compute().mean
    assert Summary.mean_of(values) == wanted
    assert Summary.mean_of(np.array(values)) == wanted
