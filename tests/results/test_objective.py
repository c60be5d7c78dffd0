"""Which report of a trial counts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.spec import Metric
from orchestrator.results.objective import Diverged, NoResult, Objective
from orchestrator.results.records import Status

VALUES = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1)


def after(metric: Metric, *values: float) -> Objective:
    found = Objective(metric)
    for step, value in enumerate(values):
        found.take(step, {metric.name: value, "other": float(step)})
    return found


@given(VALUES)
def test_the_last_report_counts_by_default(values: list[float]) -> None:
    status, payload = after(Metric(), *values).outcome()
    assert status is Status.COMPLETE
    assert (payload["value"], payload["step"]) == (values[-1], len(values) - 1)


@given(VALUES, st.sampled_from(["minimize", "maximize"]))
def test_the_best_report_counts_where_asked_the_earlier_of_two(values: list[float], goal: str) -> None:
    _, payload = after(Metric(at="best", goal=goal), *values).outcome()  # type: ignore[arg-type]
    best = (min if goal == "minimize" else max)(values)
    assert (payload["value"], payload["step"]) == (best, values.index(best))
    assert payload["metrics"] == {"val_loss": best, "other": float(values.index(best))}


@pytest.mark.parametrize("at", ["last", "best"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_objective_that_is_not_finite_ends_the_trial_for_good(at: str, bad: float) -> None:
    found = after(Metric(at=at), 1.0)  # type: ignore[arg-type]
    with pytest.raises(Diverged, match=r"val_loss is -?(nan|inf) at step 4"):
        found.take(4, {"val_loss": bad})
    with pytest.raises(Diverged):  # a job that catches it can't bring the trial back
        found.take(5, {"val_loss": 0.5})
    status, payload = found.outcome()
    assert (status, payload["step"], payload["metrics"]) == (Status.DIVERGED, 4, {"val_loss": None})


def test_another_metric_may_be_nan() -> None:
    found = Objective(Metric())
    assert found.take(1, {"val_loss": 1.0, "grad": math.nan})
    assert not found.take(2, {"grad": math.inf})
    assert found.outcome()[1]["metrics"] == {"val_loss": 1.0, "grad": None}


@pytest.mark.parametrize(
    ("reported", "text"),
    [
        ({}, "no result: the job ended without a report of 'val_loss'"),
        ({"loss": 1.0, "acc": 0.5}, "no result: the job never reported 'val_loss'; it reported acc, loss"),
    ],
)
def test_without_a_report_there_is_no_result(reported: dict[str, float], text: str) -> None:
    found = Objective(Metric())
    if reported:
        found.take(0, reported)
    with pytest.raises(NoResult) as error:
        found.outcome()
    assert str(error.value) == text
