"""Per-sample values, each against its formula written out, or against PyTorch's mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.training import losses

GENERATOR = torch.Generator().manual_seed(1)
Z = torch.randn(12, 7, generator=GENERATOR) * 3
Y = torch.randint(0, 7, (12,), generator=GENERATOR)
P = torch.randn(12, 7, generator=GENERATOR).softmax(1)


def naive_cross_entropy(z: list[float], y: int) -> float:
    return math.log(math.fsum(math.exp(one - max(z)) for one in z)) + max(z) - z[y]


def naive_hinge(z: list[float], y: int) -> float:
    return math.fsum(max(0.0, 1 - z[y] + one) for j, one in enumerate(z) if j != y) / len(z)


def naive_top_3(z: list[float], y: int) -> float:
    return float(y in sorted(range(len(z)), key=lambda j: (-z[j], j))[:3])


@pytest.mark.parametrize(
    ("value", "naive"),
    [
        (losses.cross_entropy, naive_cross_entropy),
        (losses.hinge, naive_hinge),
        (losses.accuracy, lambda z, y: float(max(range(len(z)), key=z.__getitem__) == y)),
        (lambda z, y: losses.top_k(z, y, 3), naive_top_3),
    ],
)
def test_values_of_classes_are_those_of_the_formula(
    value: Callable[..., torch.Tensor], naive: Callable[[list[float], int], float]
) -> None:
    found = value(Z, Y)
    assert (found.shape, found.dtype) == (Y.shape, torch.float32)
    wanted = [naive(z, y) for z, y in zip(Z.tolist(), Y.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert len(set(wanted)) > 1  # else it would say little


def test_divergence_is_that_of_the_target_from_the_softmax() -> None:
    q = Z.softmax(1).tolist()
    wanted = [sum(p * math.log(p / q) for p, q in zip(*pair, strict=True)) for pair in zip(P.tolist(), q, strict=True)]
    assert losses.kl_divergence(Z, P).tolist() == pytest.approx(wanted, rel=1e-5)
    assert losses.kl_divergence(P.log(), P).abs().max() < 1e-6
    assert losses.kl_divergence(Z, F.one_hot(Y, 7).float()).tolist() == pytest.approx(
        losses.cross_entropy(Z, Y).tolist(), rel=1e-5
    )


def test_cross_entropy_takes_scores_of_any_size() -> None:
    found = losses.cross_entropy(torch.tensor([[1e30, 0.0], [-1e4, 1e4]]), torch.tensor([0, 0]))
    assert found.tolist() == [0.0, 2e4]


@pytest.mark.parametrize("value", [losses.mse, losses.mae])
def test_errors_are_those_of_torch_and_wrong_shapes_are_told(value: Callable[..., torch.Tensor]) -> None:
    error = (Z - P).double()
    wanted = (error**2 if value is losses.mse else error.abs()).mean(1)
    assert torch.allclose(value(Z, P).double(), wanted)
    assert torch.equal(value(Z[:, 0], P[:, 0]), value(Z[:, :1], P[:, :1]))
    with pytest.raises(ValueError, match=r"one shape, \(batch, ...\); found \(12, 1\) and \(12,\)"):
        value(Z[:, :1], P[:, 0])


@pytest.mark.parametrize("value", [losses.accuracy, losses.top_k, losses.calibration])
def test_labels_of_another_shape_are_told(value: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"labels of the same without classes; found \(12, 7\) and \(12, 1\)"):
        value(Z, Y[:, None])


@pytest.mark.parametrize("value", [losses.cross_entropy, losses.accuracy, losses.top_k])
def test_of_a_sequence_the_value_is_the_mean_over_its_places(value: Callable[..., torch.Tensor]) -> None:
    found = value(Z.view(3, 4, 7).transpose(1, 2), Y.view(3, 4))
    assert found.shape == (3,)
    assert torch.allclose(found, value(Z, Y).view(3, 4).mean(1))


@given(scores=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=6), k=st.integers(1, 7), data=st.data())
def test_ties_go_to_the_first_class_and_the_top_one_is_accuracy(
    scores: list[float], k: int, data: st.DataObject
) -> None:
    y = data.draw(st.integers(0, len(scores) - 1))
    z, label = torch.tensor([scores]), torch.tensor([y])
    first = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k]
    assert losses.top_k(z, label, k).item() == (y in first)
    assert losses.top_k(z, label, 1).item() == losses.accuracy(z, label).item()


def test_a_score_that_is_nan_is_never_right() -> None:
    z = torch.tensor([[math.nan, 1.0, 2.0], [0.0, math.nan, 2.0]])
    assert losses.top_k(z, torch.tensor([2, 2]), 3).tolist() == [0.0, 0.0]


def test_bins_have_each_sample_once_and_nan_shows() -> None:
    z = torch.cat((Z, torch.tensor([[50.0, *[0.0] * 6], [0.0] * 7])))  # certain, and as unsure as can be
    y = torch.cat((Y, torch.tensor([0, 3])))
    found = losses.calibration(z, y, bins=10)
    assert list(found) == [f"_gap_{m:02}" for m in range(10)]
    gaps = torch.stack(list(found.values()))
    confidence = z.softmax(1).amax(1).double()
    right = (z.argmax(1) == y).double()
    for i, (c, r) in enumerate(zip(confidence.tolist(), right.tolist(), strict=True)):
        [m] = [m for m in range(10) if m / 10 < c <= (m + 1) / 10]
        assert gaps[:, i].tolist() == [r - c if j == m else 0.0 for j in range(10)]
    broken = losses.calibration(torch.full((1, 3), math.nan), torch.tensor([0]), bins=2)
    assert all(one.isnan().all() for one in broken.values())
    with pytest.raises(ValueError, match="at least 1 bin"):
        losses.calibration(Z, Y, bins=0)


def test_parts_of_a_regression() -> None:
    found = losses.regression(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([2.0, 0.0, -4.0]))
    assert {name: values.tolist() for name, values in found.items()} == {
        "_square": [1, 9, 36],
        "_absolute": [1, 3, 6],
        "_magnitude": [2, 0, 4],
        "_relative": [0.5, 0, 1.5],
        "_nonzero": [1, 0, 1],
        "_zero": [0, 1, 0],
        "_target": [2, 0, -4],
    }
    several = losses.regression(torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert several["_relative"].tolist() == [0.5, 0.0]
    assert (several["_nonzero"].tolist(), several["_zero"].tolist()) == ([1, 0], [1, 2])
    assert "_target" not in several
