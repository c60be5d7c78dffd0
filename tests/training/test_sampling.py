"""Which samples an epoch takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.training.data.sampling import Order

WEIGHTS = st.lists(st.sampled_from([0.0, 5e-324, 1e-300, 0.5, 1.0, 3.0, 1e300]), min_size=1, max_size=30).filter(any)


def drawn(order: Order, seed: int) -> list[int]:
    found = order.indices(seed)
    assert found is not None
    return found.tolist()  # type: ignore[no-any-return]


@given(weights=WEIGHTS, replacement=st.booleans(), seed=st.integers(0, (1 << 63) - 1), data=st.data())
def test_no_sample_without_weight_is_drawn_nor_one_twice_without_replacement(
    weights: list[float], replacement: bool, seed: int, data: st.DataObject
) -> None:
    positive = {index for index, weight in enumerate(weights) if weight}
    most = 50 if replacement else len(positive)
    num = data.draw(st.none() | st.integers(0, most))
    order = Order.of(len(weights), weights=weights, replacement=replacement, num=num)
    found = drawn(order, seed)
    assert len(found) == order.num == ((len(weights) if replacement else most) if num is None else num)
    assert set(found) <= positive
    assert replacement or len(set(found)) == len(found)
    assert found == drawn(order, seed)


@pytest.mark.parametrize("replacement", [True, False])
def test_samples_come_in_proportion_to_their_weights(replacement: bool) -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 5.0])
    order = Order.of(4, weights=weights, replacement=replacement, num=2)
    counts = torch.zeros(4, 4)
    for seed in range(3000):
        first, second = drawn(order, seed)
        counts[first, second] += 1
    share = weights / 8
    left = torch.ones(4) if replacement else 1 - share
    wanted = share[:, None] * share / left[:, None]
    if not replacement:
        wanted.fill_diagonal_(0.0)
    assert ((counts / 3000 - wanted).abs() < 5 * math.sqrt(0.25 / 3000)).all()


def test_more_than_one_without_replacement_is_exact_for_equal_weights() -> None:
    assert sorted(drawn(Order.of(9, weights=[2.0] * 9, replacement=False), 4)) == list(range(9))


def test_without_weights_each_comes_once() -> None:
    assert sorted(drawn(Order.of(50), 1)) == list(range(50))
    assert drawn(Order.of(50), 1) != drawn(Order.of(50), 2)
    assert Order.of(50, shuffle=False).indices(1) is None
    assert drawn(Order.of(0, weights=[]), 1) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": [1.0]}, r"a weight for each of 3 samples, found a shape of \(1,\)"),
        ({"weights": [1.0, -1.0, 1.0]}, "finite and not negative, found -1.0 at sample 1"),
        ({"weights": [1.0, 1.0, math.nan]}, "finite and not negative, found nan at sample 2"),
        ({"weights": [0.0, 0.0, 0.0]}, "can't draw 3 samples with replacement: 0 of 3 have a weight above 0"),
        ({"weights": [0.0, 0.0, 0.0], "replacement": False, "num": 1}, "1 samples without replacement: 0 of 3"),
        ({"weights": [1e308, 1e308, 1e308]}, "more than a float64 holds"),
        ({"weights": [1.0, 0.0, 1.0], "replacement": False, "num": 3}, "3 samples without replacement: 2 of 3"),
        ({"weights": [1.0, 1.0, 1.0], "num": -1}, "can't draw -1 samples"),
        ({"weights": [1.0, 1.0, 1.0], "shuffle": False}, "leave out shuffle=False"),
        ({"num": 2}, "num and replacement say how samples are drawn by weights"),
        ({"replacement": False}, "num and replacement say how samples are drawn by weights"),
    ],
)
def test_what_does_not_fit_is_told(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Order.of(3, **options)
