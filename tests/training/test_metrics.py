"""What samples come to: the exact result rounded once, the same in every bit on any number of ranks."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crew import together
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.spec import Metric
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.stats.summary import Summary
from orchestrator.training import losses, metrics
from orchestrator.training.trial import Trial

FLOATS = st.floats(-1e6, 1e6, width=32)
PAIRS = st.lists(st.tuples(FLOATS, FLOATS | st.just(0.0)), min_size=1, max_size=30)


def summaries(values: dict[str, torch.Tensor], cut: int = 0) -> dict[str, Summary]:
    """The Summaries of some values, merged from two parts."""
    return {
        name: Summary.of_samples(one[:cut]).merge(Summary.of_samples(one[cut:], first_key=cut))
        for name, one in values.items()
    }


def exactly(values: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.double().tolist()]


def rounded(value: Fraction) -> float:
    return value.numerator / value.denominator


@given(pairs=PAIRS, data=st.data())
@settings(max_examples=60)
def test_results_of_numbers_are_exact(pairs: list[tuple[float, float]], data: st.DataObject) -> None:
    prediction, target = torch.tensor(pairs).unbind(1)
    parts = losses.regression(prediction, target)
    found = summaries(parts, data.draw(st.integers(0, len(pairs))))
    of = {name: exactly(values) for name, values in parts.items()}
    num, t = len(pairs), of["_target"]
    assert metrics.mae(found) == rounded(sum(of["_absolute"], Fraction()) / num)
    square = sum(of["_square"], Fraction()) / num
    assert metrics.rmse(found) == pytest.approx(math.sqrt(square), rel=2**-52)
    assert metrics.zero_targets(found) == sum(value == 0 for value in t)
    upper, lower = sum(of["_relative"], Fraction()), sum(of["_nonzero"], Fraction())
    assert metrics.mape(found) == rounded(upper / lower) if lower else math.isnan(metrics.mape(found))
    upper, lower = sum(of["_absolute"], Fraction()), sum(map(abs, t), Fraction())
    assert metrics.wmape(found) == rounded(upper / lower) if lower else math.isnan(metrics.wmape(found))
    spread = sum(((value - sum(t) / num) ** 2 for value in t), Fraction())
    r2 = metrics.r2(found)
    assert r2 == rounded(1 - square * num / spread) if spread else math.isnan(r2)


def test_results_of_numbers_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(200, generator=generator) + 3
    prediction = target + 0.3 * torch.randn(200, generator=generator)
    found = summaries(losses.regression(prediction, target))
    t, p = target.double().numpy(), prediction.double().numpy()
    assert metrics.r2(found) == pytest.approx(sklearn.r2_score(t, p), rel=1e-6)
    assert metrics.rmse(found) == pytest.approx(math.sqrt(sklearn.mean_squared_error(t, p)), rel=1e-6)
    assert metrics.mape(found) == pytest.approx(sklearn.mean_absolute_percentage_error(t, p), rel=1e-6)
    assert metrics.mae(found) == pytest.approx(sklearn.mean_absolute_error(t, p), rel=1e-6)
    assert metrics.wmape(found) == pytest.approx(np.abs(t - p).sum() / np.abs(t).sum(), rel=1e-6)


@given(
    num=st.integers(1, 40), classes=st.integers(2, 5), bins=st.integers(1, 20), seed=st.integers(0, 99), data=st.data()
)
@settings(max_examples=40)
def test_the_calibration_error_is_exact(num: int, classes: int, bins: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(num, classes, generator=generator)
    y = torch.randint(0, classes, (num,), generator=generator)
    found = summaries(losses.calibration(z, y, bins=bins), data.draw(st.integers(0, num)))
    sums = [Fraction()] * bins
    for c, right in zip(exactly(z.softmax(1).amax(1)), (z.argmax(1) == y).tolist(), strict=True):
        m = min(bins - 1, max(0, math.ceil(float(c) * bins) - 1))
        sums[m] += int(right) - c
    assert metrics.calibration_error(found) == rounded(sum(map(abs, sums), Fraction()) / num)


def test_perplexity() -> None:
    loss = {"loss": torch.tensor([1.0, 2.0, 6.0])}
    assert metrics.perplexity(summaries(loss)) == math.exp(3.0)
    assert metrics.perplexity({"nats": Summary.of(1e9, key=0)}, loss="nats") == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_makes_every_result_nan(bad: float) -> None:
    z, y = torch.tensor([[bad, 1.0], [0.0, 1.0]]), torch.tensor([0, 1])
    found = summaries(
        losses.regression(z[:, 0], torch.tensor([1.0, 2.0]))
        | losses.calibration(torch.where(z == bad, math.nan, z), y)
        | {"loss": losses.cross_entropy(z, y)}
    )
    of = [metrics.rmse, metrics.mae, metrics.mape, metrics.wmape, metrics.r2, metrics.perplexity]
    assert all(math.isnan(metric(found)) for metric in (*of, metrics.calibration_error))


@pytest.mark.parametrize("metric", [metrics.rmse, metrics.r2, metrics.calibration_error, metrics.perplexity])
def test_values_that_are_missing_are_told(metric: metrics.Derived) -> None:
    with pytest.raises(ValueError, match=r"expected values named '[a-z_0]+' from losses, found far, near"):
        metric({"near": Summary.of(1.0, key=0), "far": Summary.of(1.0, key=0)})


# In a validation

X = torch.linspace(-2, 2, 37)[:, None]
LABELS = torch.arange(37) % 3
TARGETS = X[:, 0].sin() * (torch.arange(37) % 5 != 0)


def values(net: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    x, y, t = batch
    z = net(x)
    return {
        "loss": losses.cross_entropy(z, y),
        "accuracy": losses.accuracy(z, y),
        **losses.calibration(z, y),
        **losses.regression(z[:, 0], t),
    }


def weighted(net: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    x, y, _ = batch
    z = net(x)
    return {"loss": losses.cross_entropy(z, y), "weight": x[:, 0].abs(), **losses.calibration(z, y)}


DERIVED: dict[str, metrics.Derived] = {
    "rmse": metrics.rmse,
    "mae": metrics.mae,
    "mape": metrics.mape,
    "wmape": metrics.wmape,
    "zeros": metrics.zero_targets,
    "r2": metrics.r2,
    "perplexity": metrics.perplexity,
    "ece": metrics.calibration_error,
    "double": lambda found: 2 * metrics.mean(found, "accuracy"),
}


def trial(metric: str = "val_loss", party: RankContext | None = None) -> Trial:
    found = Trial(
        index=0,
        params={},
        seed=3,
        metric=Metric(name=metric),
        emit=lambda report: None,
        device=torch.device("cpu"),
        party=party,
    )
    torch.manual_seed(1)
    found.prepare(net=torch.nn.Linear(1, 3))
    return found


def validated(party: RankContext | None) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What is reported with and without weights, bit for bit, and the names of what is folded."""
    one = trial(party=party)
    plain = one.validate(values, (X, LABELS, TARGETS), batch_size=5, derived=DERIVED)
    names = sorted(one.summaries)
    heavy = one.validate(weighted, (X, LABELS, TARGETS), batch_size=5, derived={"ece": metrics.calibration_error})
    return {k: v.hex() for k, v in plain.items()}, {k: v.hex() for k, v in heavy.items()}, names


def test_ranks_give_the_same_bits_as_one_process(tmp_path: Path) -> None:
    one = validated(None)
    assert together(tmp_path, 3, validated) == [one] * 3
    assert list(one[0]) == ["val_loss", "val_accuracy", *(f"val_{name}" for name in DERIVED)]
    assert {"val__square", "val__gap_00"} < set(one[2])  # folded, and not reported
    assert list(one[1]) == ["val_loss", "val_ece"]
    assert not any(math.isnan(float.fromhex(value)) for value in one[0].values())


def test_weights_count_in_the_mean() -> None:
    one = trial()
    found = one.validate(weighted, (X, LABELS, TARGETS))
    with torch.no_grad():
        loss = exactly(losses.cross_entropy(one.net(X), LABELS))
    weight = exactly(X[:, 0].abs())
    products = [Fraction(float(w) * float(x)) for w, x in zip(weight, loss, strict=True)]
    assert found["val_loss"] == rounded(sum(products, Fraction()) / sum(weight, Fraction()))


def test_what_is_derived_can_be_the_objective() -> None:
    one = trial("val_rmse")
    found = one.validate(values, (X, LABELS, TARGETS), derived={"rmse": metrics.rmse})
    assert one.result(None).payload["value"] == found["val_rmse"]


def test_a_name_that_is_given_twice_is_told() -> None:
    with pytest.raises(ValueError, match="derived: accuracy: losses gives values of that name"):
        trial().validate(values, (X, LABELS, TARGETS), derived={"accuracy": metrics.rmse})


def test_r2_of_weighted_samples_is_refused() -> None:
    found = {"_square": Summary.of(1.0, key=0, weight=2.0), "_target": Summary.of(1.0, key=0)}
    with pytest.raises(ValueError, match="r2 is not defined here for samples that have weights"):
        metrics.r2(found)
