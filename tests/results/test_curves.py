"""Curves: whatever was reported twice, late or by two writers, a step of a trial has one value."""

from __future__ import annotations

import os
import tempfile
from itertools import permutations
from pathlib import Path

import pytest
from command_line import Orc
from hypothesis import given
from hypothesis import strategies as st
from sweeps import folder, make, spec
from test_fold import NUM, WRITERS, empty, put

from orchestrator.config.spec import Metric
from orchestrator.core.atomic import JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import NothingMatched
from orchestrator.results import curves, effects
from orchestrator.results.curves import Point
from orchestrator.results.records import report
from orchestrator.stats.summary import Summary
from orchestrator.sweep import Sweep


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return empty(tmp_path)


def said(trial: int, step: int, loss: float | None = 1.0, attempt: int = 0, **others: float) -> JsonObject:
    metrics: JsonObject = {"loss": loss, **others}
    return report(trial=trial, attempt=attempt, step=step, metrics=metrics)


def points(paths: SweepPaths) -> dict[tuple[int, int], float | None]:
    return {where: point.value for where, point in curves.read(paths, NUM, "loss").items()}


# The join


def test_every_step_of_every_trial_has_a_value(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], said(0, 1, 0.5), said(0, 2, 0.25), said(1, 1, 0.75))
    assert points(paths) == {(0, 1): 0.5, (0, 2): 0.25, (1, 1): 0.75}


@pytest.mark.parametrize("writers", list(permutations(WRITERS[:2])))
def test_of_two_attempts_the_later_one_counts(writers: tuple[str, str], paths: SweepPaths) -> None:
    put(paths, writers[0], said(0, 1, 5.0), said(0, 2, 6.0))
    put(paths, writers[1], said(0, 2, 2.0, attempt=1), said(0, 3, 3.0, attempt=1))
    assert points(paths) == {(0, 1): 5.0, (0, 2): 2.0, (0, 3): 3.0}


def test_of_one_attempt_what_was_reported_last_counts(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], said(0, 1, 5.0, attempt=1), said(0, 1, 4.0, attempt=1), said(0, 1, 9.0))
    assert points(paths) == {(0, 1): 4.0}


@pytest.mark.parametrize("writers", list(permutations(WRITERS)))
def test_of_the_files_of_one_process_what_it_reported_last_counts(writers: tuple[str, ...], paths: SweepPaths) -> None:
    put(paths, writers[0], said(0, 1, 3.0), said(0, 2, 3.0))
    put(paths, writers[1], said(0, 1, 4.0), continues=writers[0])
    put(paths, writers[2], said(0, 1, 5.0), said(0, 3, 5.0), continues=writers[1])
    assert points(paths) == {(0, 1): 5.0, (0, 2): 3.0, (0, 3): 5.0}


def test_files_that_say_that_they_continue_each_other_are_all_read(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], said(0, 1), continues=WRITERS[1])
    put(paths, WRITERS[1], said(0, 2), continues=WRITERS[0])
    put(paths, WRITERS[2], said(0, 3), continues=WRITERS[0])
    assert points(paths).keys() == {(0, 1), (0, 2), (0, 3)}


def test_what_is_no_record_file_is_not_read(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], said(0, 1))
    os.mkfifo(paths.record(WRITERS[1]))
    put(paths, WRITERS[2], said(0, 2))
    paths.record(WRITERS[2]).rename(paths.records / "b.jsonl")
    assert points(paths).keys() == {(0, 1)}


def test_metrics_that_are_reported_apart_do_not_hide_each_other(paths: SweepPaths) -> None:
    other = report(trial=0, attempt=1, step=1, metrics={"error": 0.5})
    put(paths, WRITERS[0], said(0, 1, 5.0), other)
    assert points(paths) == {(0, 1): 5.0}


@pytest.mark.parametrize("pair", [(1.0, 2.0), (2.0, 3.0), (3.0, 1.0), (None, 2.0)])
def test_of_two_writers_that_contradict_each_other_the_same_one_counts_always(
    pair: tuple[float | None, float], tmp_path: Path
) -> None:
    found = []
    for number, writers in enumerate(permutations(WRITERS[:2])):
        paths = empty_below(tmp_path, number)
        for writer, value in zip(writers, pair, strict=True):
            put(paths, writer, said(0, 1, value))
        found.append(points(paths))
    assert found[0] == found[1]
    assert found[0][0, 1] is not None


def empty_below(folder: Path, number: int) -> SweepPaths:
    (folder / str(number)).mkdir()
    return empty(folder / str(number))


trials, attempts, steps = st.integers(0, NUM - 1), st.integers(0, 2), st.integers(0, 2)
found_points = st.dictionaries(
    st.tuples(trials, steps),
    st.builds(Point, attempts, st.sampled_from([None, 0.0, 1.0, 2.0, -1.0, 1e-300])),
    max_size=6,
)


def joined(*parts: curves.Points) -> curves.Points:
    whole: curves.Points = {}
    for part in parts:
        curves.join(whole, part)
    return whole


@given(found_points, found_points, found_points)
def test_the_join_is_idempotent_commutative_and_associative(
    a: curves.Points, b: curves.Points, c: curves.Points
) -> None:
    assert joined(a, a) == a
    assert joined(a, b) == joined(b, a)
    assert joined(joined(a, b), c) == joined(a, joined(b, c))
    assert joined(c, a, b, a, c) == joined(a, b, c)


reports = st.lists(st.builds(said, trials, steps, st.sampled_from([None, 1.0, 2.0, 0.5]), attempts), max_size=6)


@given(st.tuples(reports, reports, reports), st.permutations(WRITERS))
def test_the_order_of_the_files_and_repeated_files_do_not_matter(
    files: tuple[list[JsonObject], ...], order: list[str]
) -> None:
    found = []
    for writers in (WRITERS, tuple(order)):
        with tempfile.TemporaryDirectory() as place:
            paths = empty(Path(place))
            put(paths, "d" * 32, *files[0], said(0, 9))
            for writer, lines in zip(writers, files, strict=True):
                put(paths, writer, *lines)
            found.append(points(paths))
    assert found[0] == found[1]


def test_a_line_that_is_torn_counts_once_it_is_whole(paths: SweepPaths) -> None:
    data = put(paths, WRITERS[0], said(0, 1), said(0, 2), said(0, 3))
    whole, path = points(paths), paths.record(WRITERS[0])
    for cut in range(data.index(b"\n") + 1, len(data)):
        path.write_bytes(data[:cut])
        if b'"report"' in data[: data.rindex(b"\n", 0, cut)]:
            assert points(paths).items() <= whole.items()
    middle = data.replace(b'"step":2', b"\0" * 8)
    path.write_bytes(middle)
    assert points(paths).keys() == {(0, 1), (0, 3)}
    path.write_bytes(data)
    assert points(paths) == whole


def test_what_is_of_no_trial_of_the_plan_is_passed_over(paths: SweepPaths) -> None:
    strange: list[JsonObject] = [
        said(NUM, 1),
        said(-1, 1),
        {**said(0, 1), "step": "one"},
        said(0, 2**63),
        {**said(0, 1), "metrics": ["loss"]},
        {**said(0, 1), "metrics": {"accuracy": "loss"}},
    ]
    put(paths, WRITERS[0], *strange, said(1, 1))
    assert points(paths) == {(1, 1): 1.0}


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([said(0, 1, error=0.5)], "no trial has reported 'los'; reported: error, loss; did you mean 'loss'?"),
        ([], "no trial has reported anything yet"),
    ],
)
def test_a_metric_that_nobody_reported_is_not_found(lines: list[JsonObject], text: str, paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *lines)
    with pytest.raises(NothingMatched) as error:
        curves.read(paths, NUM, "los")
    assert text in str(error.value)


# The summary of each step


def sweep(runs: Path, *lines: JsonObject, goal: str = "minimize") -> Sweep:
    """A sweep over x = 0, 1 and y = 0, 1 with these reports."""
    metric = Metric(name="loss", goal=goal)  # type: ignore[arg-type]
    parameters: JsonObject = {"x": {"values": [0, 1]}, "y": {"values": [0, 1]}}
    paths = folder(runs, spec(parameters=parameters, metric=metric))
    put(paths, WRITERS[0], *lines)
    return Sweep(paths)


def test_each_step_has_the_statistics_of_the_trials_that_reported_it(tmp_path: Path) -> None:
    found = sweep(tmp_path, said(0, 20, 1.0), said(0, 10, 4.0), said(1, 10, 2.0), said(2, 10, None)).curve("loss")
    assert list(found) == [10, 20]
    assert (found[10].count, found[10].mean, found[10].std, found[10].diverged) == (2, 3.0, 1.0, 1)
    assert (found[20].count, found[20].mean) == (1, 1.0)


def test_the_objective_is_the_metric_unless_another_is_named(tmp_path: Path) -> None:
    of = sweep(tmp_path, said(0, 1, 4.0, error=0.5))
    assert of.curve() == of.curve("loss")
    assert of.curve("error")[1].mean == 0.5


@pytest.mark.parametrize(("goal", "best"), [("minimize", 1), ("maximize", 0)])
def test_the_best_of_a_step_is_so_by_the_goal_of_the_objective(goal: str, best: int, tmp_path: Path) -> None:
    of = sweep(tmp_path, said(0, 1, 4.0, error=4.0), said(1, 1, 2.0, error=2.0), goal=goal)
    assert of.curve("loss")[1].top[0].key == best
    assert of.curve("error")[1].top[0].key == 1


def test_by_parameter_there_is_a_curve_a_group(tmp_path: Path) -> None:
    of = sweep(tmp_path, said(0, 1, 4.0), said(1, 1, 2.0), said(1, 2, 1.0))
    (first, steps), (second, none) = of.curve("loss", by="x")
    assert (first, second) == ({"x": 0}, {"x": 1})
    assert [(step, found.count, found.mean) for step, found in steps.items()] == [(1, 2, 3.0), (2, 1, 1.0)]
    assert none == {}


@given(found_points)
def test_the_curves_of_groups_merge_to_the_curve_of_all(points: curves.Points) -> None:
    halves: list[curves.Points] = [{}, {}]
    for (trial, step), point in points.items():
        halves[trial % 2][trial, step] = point
    merged = curves.summarize(halves[0]).merge(curves.summarize(halves[1]))
    assert merged == curves.summarize(points)
    values = [point.value for point in points.values()]
    whole = Summary.merge_all(found for _, found in merged.entries)
    assert (whole.count, whole.num_diverged) == (len(values) - values.count(None), values.count(None))


def test_a_group_is_named_in_its_curve_as_json(tmp_path: Path) -> None:
    of = sweep(tmp_path, said(0, 1, 4.0))
    groups = effects.group(of.plan, ["x"])
    found = curves.curves(curves.read(of.paths, NUM, "loss"), groups, goal="minimize")[0].to_json()
    assert found["values"] == {"x": 0}
    assert isinstance(found["steps"], list)
    (step,) = found["steps"]
    assert isinstance(step, dict)
    assert step.keys() == {"step", "count", "min", "max", "mean", "std", "quantiles", "diverged"}
    assert (step["step"], step["mean"]) == (1, 4.0)


# For a person


@pytest.fixture(scope="module")
def orc(tmp_path_factory: pytest.TempPathFactory) -> Orc:
    """Two trials, one of which reports 60 steps and the other one."""
    orc = Orc(tmp_path_factory.mktemp("curves"))
    paths = make(orc.runs, trials=2)
    many = [report(trial=0, attempt=0, step=step, metrics={"val_loss": 1.0 / step}) for step in range(1, 61)]
    put(paths, WRITERS[0], *many, report(trial=1, attempt=0, step=1, metrics={"val_loss": None}))
    return orc


def test_a_person_sees_some_steps_of_many_the_first_and_the_last_among_them(orc: Orc) -> None:
    head, names, *rows, note = orc("summary", "--curve", "val_loss").out.splitlines()
    assert head == "val_loss by step"
    assert names.split() == ["step", "trials", "mean", "std", "min", "p50", "max", "diverged"]
    assert rows[0].split() == ["1", "1", "1", "0", "1", "1", "1", "1"]
    assert (rows[-1].split()[0], len(rows)) == ("60", 40)
    assert note.strip() == "40 of 60 steps; --json has them all"


def test_few_steps_are_all_seen(orc: Orc) -> None:
    rows = orc("summary", "--curve", "val_loss", "--by", "x").out.splitlines()[2:-1]
    assert rows[-1].split() == ["1", "1", "0", *["null"] * 5, "1"]


def test_json_has_every_step(orc: Orc) -> None:
    found = orc("summary", "--curve", "val_loss", "--json").json
    assert found.keys() == {"schema", "sweep", "metric", "by", "curves"}
    (curve,) = found["curves"]
    assert curve["values"] == {}
    assert [one["step"] for one in curve["steps"]] == list(range(1, 61))


def test_an_unknown_metric_is_not_found(orc: Orc) -> None:
    assert "did you mean 'val_loss'?" in orc("summary", "--curve", "val_los", expect=3).err
