"""When a checkpoint is due."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeps import Clock

from orchestrator.training.checkpoint.interval import MTBF_S, SHORTEST_S, SaveInterval, interval_s, optimum_s


def saves(
    pace: SaveInterval, clock: Clock, until_s: float, cost_s: float, whole_s: float, tick_s: float = 0.01
) -> list[float]:
    """When saves begin in a training of steps of `tick_s`, by the clock."""
    found, busy_until, step = [], 0.0, 0
    while clock.now < until_s:
        clock.now += tick_s
        step += 1
        busy = clock.now < busy_until
        if found and not busy and busy_until:
            pace.measured(cost_s, whole_s)
            busy_until = 0.0
        if pace.due(step, busy=busy):
            pace.begun(step)
            found.append(clock.now)
            clock.now += cost_s
            busy_until = found[-1] + whole_s
    return found


@given(st.floats(1e-6, 0.5), st.floats(1.0, 1e6))
def test_the_interval_loses_less_than_its_neighbours(part: float, mtbf_s: float) -> None:
    cost_s = part * mtbf_s

    def lost(interval: float) -> float:  # Daly 2006, section 3: the expected time for a unit of work, exactly
        return mtbf_s * math.expm1((interval + cost_s) / mtbf_s) / interval

    best = optimum_s(cost_s, mtbf_s)
    assert lost(best) <= min(lost(best * factor) for factor in (0.25, 0.5, 0.7, 0.8, 1.25, 1.4, 2.0, 4.0))


@given(st.floats(2.0, 1e3))
def test_where_saving_takes_longer_than_machines_last_it_is_done_once_in_that_time(mtbf_s: float) -> None:
    assert optimum_s(3 * mtbf_s, mtbf_s) == mtbf_s


def test_the_interval_is_young_s_where_saving_is_cheap() -> None:
    assert interval_s(0.01, 0.0, 1e6, 3600.0) == pytest.approx(math.sqrt(2 * 0.01 * 3600), rel=0.01)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 1e6))
def test_the_bounds_that_are_stated_hold(cost_s: float, whole_s: float, age_s: float) -> None:
    found = interval_s(cost_s, whole_s, age_s)
    assert found >= max(SHORTEST_S, 5 * whole_s) * (1 - 1e-12)
    assert found <= max(SHORTEST_S, 5 * whole_s, optimum_s(cost_s, MTBF_S)) * (1 + 1e-12)


def test_a_trial_of_a_second_never_saves() -> None:
    clock = Clock()
    assert saves(SaveInterval(clock=clock), clock, 1.0, 0.001, 0.01) == []


@pytest.mark.parametrize(("cost_s", "whole_s"), [(0.0002, 0.003), (0.003, 0.03), (0.02, 0.1), (0.05, 0.3)])
def test_a_trial_of_a_minute_killed_once_keeps_most_of_its_work(cost_s: float, whole_s: float) -> None:
    clock = Clock()
    begun = saves(SaveInterval(clock=clock), clock, 60.0, cost_s, whole_s)

    def lost_s(killed_s: float) -> float:
        return killed_s - max((at for at in begun if at + whole_s <= killed_s), default=0.0)

    kills = [0.1 * i for i in range(600)]
    mean_lost_s = sum(map(lost_s, kills)) / len(kills)
    assert 60.0 / (60.0 + mean_lost_s) > 0.95
    assert len(begun) * cost_s < 0.05 * 60.0


def test_a_long_trial_saves_no_more_than_the_formula_says() -> None:
    clock = Clock()
    begun = saves(SaveInterval(clock=clock), clock, 3 * MTBF_S, 0.5, 1.0, tick_s=1.0)
    assert begun[-1] - begun[-2] == pytest.approx(optimum_s(0.5, MTBF_S), abs=1.5)


def test_seconds_and_steps_are_kept_as_given() -> None:
    clock = Clock()
    pace = SaveInterval(clock=clock, every_s=30.0)
    begun = saves(pace, clock, 100.0, 1.0, 5.0)
    assert [round(at) for at in begun] == [30, 60, 90]
    pace = SaveInterval(clock=clock, every_steps=10)
    pace.resumed(5)
    assert [step for step in range(5, 40) if pace.due(step) and not pace.begun(step)] == [15, 25, 35]
    assert pace.interval_s is None


def test_a_save_that_met_a_busy_moment_is_soon_forgotten() -> None:
    pace = SaveInterval(clock=Clock())
    found = []
    for whole_s in (4.0, 1.0, 4.0, 1.0):
        pace.measured(0.001, whole_s)
        found.append(pace.interval_s)
    assert found == [20.0, 5.0, 12.5, 5.0]


def test_nothing_is_due_while_a_save_is_under_way() -> None:
    pace = SaveInterval(clock=Clock(), every_steps=1)
    assert not pace.due(5, busy=True)
    assert pace.due(5)


def test_the_ranks_do_what_is_agreed() -> None:
    asked: list[bool] = []
    pace = SaveInterval(clock=Clock(), every_steps=1, agree=lambda own: asked.append(own) or False)  # type: ignore[func-returns-value]
    assert not pace.due(1)
    assert not pace.due(1, busy=True)
    assert asked == [True, False]


@pytest.mark.parametrize("given", [{"every_s": 0.0}, {"every_steps": -1}, {"mtbf_s": math.nan}])
def test_what_is_not_above_zero_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        SaveInterval(clock=Clock(), **given)  # type: ignore[arg-type]


def test_both_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        SaveInterval(clock=Clock(), every_s=1.0, every_steps=1)
