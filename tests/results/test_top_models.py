"""Which models are kept: those that rank, and none is deleted before others are known to beat it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeps import names
from test_fold import WRITERS, put

from orchestrator.config.spec import Metric
from orchestrator.core.paths import SweepPaths
from orchestrator.results import top_models
from orchestrator.results.fold import Fold
from orchestrator.results.records import Status, outcome
from orchestrator.results.top_models import TopModels

GOALS = st.sampled_from(["minimize", "maximize"])
RESULTS = st.lists(
    st.tuples(st.integers(0, 20), st.sampled_from([0.0, 1.0, 2.5, -3.0])), unique_by=lambda pair: pair[0]
)


def sha(trial: int) -> str:
    return f"{trial:02x}" * 32


def ranked(results: list[tuple[int, float]], goal: str) -> list[int]:
    """The oracle: sort, and take."""
    return [i for _, i in sorted((value if goal == "minimize" else -value, i) for i, value in results)]


@given(RESULTS, st.integers(1, 4), GOALS)
def test_the_podium_lets_go_of_all_that_do_not_rank(results: list[tuple[int, float]], top: int, goal: str) -> None:
    podium = TopModels(Metric(goal=goal), top)  # type: ignore[arg-type]
    gone = [i for index, value in results for i, _ in podium.add(index, value, sha(index))]
    assert sorted(gone) == sorted(ranked(results, goal)[top:])


@given(RESULTS, st.integers(1, 4), GOALS)
def test_nothing_below_the_bar_would_have_ranked(results: list[tuple[int, float]], top: int, goal: str) -> None:
    podium = TopModels(Metric(goal=goal), top)  # type: ignore[arg-type]
    for position, (index, value) in enumerate(results):
        bar = podium.bar
        below = bar is not None and (value > bar if goal == "minimize" else value < bar)
        assert not below or index not in ranked(results[: position + 1], goal)[:top]
        podium.add(index, value, sha(index))
    assert (podium.bar is None) == (len(results) < top)


@pytest.mark.parametrize(("value", "bar"), [(0.1, 0.2), (0.3, 0.3)])
def test_a_trial_has_one_place_on_the_podium(value: float, bar: float) -> None:
    podium = TopModels(Metric(), 2)
    assert podium.add(3, 0.1, sha(3)) == podium.add(3, value, sha(3)) == podium.add(5, 0.2, sha(5)) == []
    assert podium.bar == bar
    assert podium.add(6, 0.0, sha(6)) == [({0.2: 5, 0.3: 3}[bar], sha({0.2: 5, 0.3: 3}[bar]))]


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    found = SweepPaths(tmp_path)
    found.records.mkdir()
    found.models.mkdir()
    return found


def complete(paths: SweepPaths, values: dict[int, float], num: int = 4) -> Fold:
    lines = [
        outcome(trial=i, attempt=0, status=Status.COMPLETE, payload={"value": v, "model": sha(i)}, seconds=0.0)
        for i, v in values.items()
    ]
    put(paths, WRITERS[0], *lines)
    fold = Fold(paths, num)
    fold.update()
    return fold


def store(paths: SweepPaths, *trials: int) -> None:
    for trial in trials:
        paths.model(trial, sha(trial)).write_bytes(b"weights")


def kept(paths: SweepPaths) -> list[int]:
    return [int(name.partition("-")[0]) for name in names(paths.models)]


@pytest.mark.parametrize(("goal", "left"), [("minimize", [1, 2]), ("maximize", [0, 3])])
def test_pruning_keeps_the_models_that_rank(paths: SweepPaths, goal: str, left: list[int]) -> None:
    fold = complete(paths, {0: 5.0, 1: 1.0, 2: 2.0, 3: 5.0})
    store(paths, 0, 1, 2, 3)
    assert top_models.prune(paths, fold, Metric(goal=goal), 2, alone=False) == 2  # type: ignore[arg-type]
    assert kept(paths) == left
    assert top_models.best(fold, Metric(goal=goal), 2) == {"minimize": [1, 2], "maximize": [0, 3]}[goal]  # type: ignore[arg-type]


def test_a_model_without_a_record_goes_only_when_no_worker_is_alive(paths: SweepPaths) -> None:
    fold = complete(paths, {0: 1.0, 1: 2.0})
    store(paths, 0, 1, 2)
    assert top_models.prune(paths, fold, Metric(), 2, alone=False) == 0
    assert top_models.prune(paths, fold, Metric(), 2, alone=True) == 1
    assert kept(paths) == [0, 1]


def test_a_file_that_is_no_model_of_this_sweep_stays(paths: SweepPaths) -> None:
    fold = complete(paths, {0: 1.0})
    for name in ("notes.txt", "mine.safetensors", "99-abc.safetensors"):
        (paths.models / name).touch()
    assert top_models.prune(paths, fold, Metric(), 1, alone=True) == 0


def test_a_model_that_is_gone_already_is_no_error(paths: SweepPaths) -> None:
    store(paths, 1)
    top_models.remove(paths, [(0, sha(0)), (1, sha(1))])
    assert kept(paths) == []
