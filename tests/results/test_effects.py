"""Effects: trials by the values of their parameters, a partition of the sweep whose summaries merge to its own."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from command_line import HALF, Orc
from hypothesis import given
from hypothesis import strategies as st
from sweeps import folder, make, spec
from test_fold import WRITERS, put

from orchestrator.config.plan import PlanFile, SweepPlan, write_plan
from orchestrator.config.spec import Metric, SweepSpec
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.errors import UsageError
from orchestrator.results import effects
from orchestrator.results.fold import Fold
from orchestrator.results.records import Status, outcome
from orchestrator.stats.summary import Summary
from orchestrator.sweep import Sweep

GRID: JsonObject = {
    "lr": {"values": [0.1, 0.01]},
    "opt": {"parameters": {"momentum": {"values": [0.9, 0.0]}, "nesterov": {"value": True}}},
}


def done(trial: int, value: float = 1.0, status: Status = Status.COMPLETE) -> JsonObject:
    payload: JsonObject = {"value": value} if status is Status.COMPLETE else {}
    return outcome(trial=trial, attempt=0, status=status, payload=payload, seconds=0.0)


def grid(runs: Path, *lines: JsonObject, metric: Metric | None = None) -> Sweep:
    """A sweep of four trials with these outcomes."""
    paths = folder(runs, spec(parameters=GRID, metric=metric, top=2))
    put(paths, WRITERS[0], *lines)
    return Sweep(paths)


def drawn(runs: Path, trials: int, **parameters: Json) -> PlanFile:
    """The plan of a random search."""
    plan = SweepPlan(
        spec=SweepSpec(name="drawn", method="random", run_cap=trials, command=("true",), parameters=dict(parameters)),
        code="0" * 64,
    )
    write_plan(plan, runs / "plan.jsonl")
    return PlanFile.open(runs / "plan.jsonl")


def values(groups: effects.Groups, name: str) -> list[Json | effects.Range]:
    return [group[name] for group in groups.values]


# Groups


def test_trials_that_share_a_value_are_a_group(tmp_path: Path) -> None:
    found = effects.group(grid(tmp_path).plan, ["lr"])
    assert values(found, "lr") == [0.01, 0.1]
    assert found.places == (1, 1, 0, 0)


def test_a_nested_parameter_is_named_by_its_path(tmp_path: Path) -> None:
    found = effects.group(grid(tmp_path).plan, ["opt.momentum"])
    assert values(found, "opt.momentum") == [0.0, 0.9]
    assert found.places == (1, 0, 1, 0)


def test_several_parameters_give_a_group_for_each_combination_in_order(tmp_path: Path) -> None:
    found = effects.group(grid(tmp_path).plan, ["lr", "opt.momentum", "lr"])
    assert [tuple(group.values()) for group in found.values] == [(0.01, 0.0), (0.01, 0.9), (0.1, 0.0), (0.1, 0.9)]
    assert [list(group) for group in found.values] == [["lr", "opt.momentum"]] * 4
    assert found.places == (3, 2, 1, 0)


def test_only_combinations_that_occur_are_groups(tmp_path: Path) -> None:
    plan = drawn(tmp_path, 2, a={"min": 1, "max": 9}, b={"min": 1, "max": 9})
    assert len(effects.group(plan, ["a", "b"]).values) == 2


def test_values_are_told_apart_by_type_and_stand_in_one_order(tmp_path: Path) -> None:
    parameters: JsonObject = {"x": {"values": ["1", [2], True, None, 10, 9.5, "0", False, [1, 2]]}}
    found = effects.group(PlanFile.open(folder(tmp_path, spec(parameters=parameters)).plan), ["x"])
    assert values(found, "x") == [None, False, True, 9.5, 10, "0", "1", [1, 2], [2]]
    assert sorted(found.places) == list(range(9))
    assert len(set(found.labels)) == 9


@pytest.mark.parametrize("trials", [21, 200, 1003])
def test_a_parameter_drawn_from_a_range_is_cut_into_ranges_of_about_as_many_trials(trials: int, tmp_path: Path) -> None:
    plan = drawn(tmp_path, trials, lr={"min": 0.0, "max": 1.0})
    found = effects.group(plan, ["lr"])
    ranges = [one for one in values(found, "lr") if isinstance(one, effects.Range)]
    assert len(ranges) == len(found.values) == effects.NUM_RANGES
    assert {found.places.count(place) for place in range(10)} <= {trials // 10, trials // 10 + 1}
    of_trials = [trial.params["lr"] for trial in plan.trials()]
    assert {end for one in ranges for end in one} <= set(of_trials)
    for value, place in zip(of_trials, found.places, strict=True):
        assert isinstance(value, float)
        assert ranges[place].low <= value <= ranges[place].high
    assert all(one.high < other.low for one, other in pairwise(ranges))


def test_trials_of_one_value_are_in_one_range(tmp_path: Path) -> None:
    plan = drawn(tmp_path, 300, depth={"min": 1, "max": 25})
    found = effects.group(plan, ["depth"])
    where: dict[Json, set[int]] = {}
    for trial, place in zip(plan.trials(), found.places, strict=True):
        where.setdefault(str(trial.params["depth"]), set()).add(place)
    assert len(where) > effects.MOST_VALUES
    assert {len(places) for places in where.values()} == {1}


def test_few_drawn_values_are_shown_one_by_one(tmp_path: Path) -> None:
    found = effects.group(drawn(tmp_path, 300, depth={"min": 1, "max": effects.MOST_VALUES}), ["depth"])
    assert values(found, "depth") == list(range(1, effects.MOST_VALUES + 1))


def test_values_that_the_sweep_file_lists_are_never_put_together(tmp_path: Path) -> None:
    plan = PlanFile.open(make(tmp_path, trials=effects.MOST_VALUES + 5).plan)
    assert values(effects.group(plan, ["x"]), "x") == list(range(effects.MOST_VALUES + 5))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("l", "there are lr, opt.momentum, opt.nesterov"),
        ("opt.momentun", "did you mean 'opt.momentum'?"),
        ("opt", "it holds opt.momentum, opt.nesterov"),
        ("", "no parameter ''"),
    ],
)
def test_an_unknown_parameter_is_refused_with_a_guess(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        effects.group(grid(tmp_path).plan, ["lr", name])
    assert hint in str(error.value)


# What they came to


def test_every_trial_counts_in_its_group_and_nowhere_else(tmp_path: Path) -> None:
    sweep = grid(tmp_path, done(0, 4.0), done(1, 2.0), done(2, status=Status.DIVERGED))
    low, high = sweep.effects("lr")
    assert (low.planned, low.missing, low.statistics.count, low.statistics.diverged) == (2, 1, 0, 1)
    assert (high.planned, high.missing, high.statistics.count, high.statistics.mean) == (2, 0, 2, 3.0)
    assert high.statistics.std == 1.0


@pytest.mark.parametrize(("goal", "best"), [("minimize", 1), ("maximize", 0)])
def test_the_best_of_a_group_is_so_by_the_goal(goal: str, best: int, tmp_path: Path) -> None:
    metric = Metric(goal=goal)  # type: ignore[arg-type]
    sweep = grid(tmp_path, done(0, 4.0), done(1, 2.0), metric=metric)
    assert sweep.effects("lr")[1].statistics.top[0].key == best


statuses = st.sampled_from([*Status, None])


@given(st.lists(st.tuples(statuses, st.floats(allow_nan=False, allow_infinity=False)), min_size=4, max_size=4))
def test_the_groups_merged_are_the_summary_of_the_sweep(came: list[tuple[Status | None, float]]) -> None:
    lines = [done(trial, value, status) for trial, (status, value) in enumerate(came) if status is not None]
    with tempfile.TemporaryDirectory() as runs:
        sweep = grid(Path(runs), *lines)
        for by in (["lr"], ["lr", "opt.momentum"], ["opt.nesterov"]):
            found = effects.summarize(sweep.fold, effects.group(sweep.plan, by), top=3)
            assert Summary.merge_all(one for _, one in found.entries) == sweep.fold.summary(3)


@pytest.mark.parametrize("cut", range(5))
def test_the_summaries_of_two_ranges_of_trials_merge_to_that_of_the_sweep(cut: int, tmp_path: Path) -> None:
    sweep = grid(tmp_path, done(0, 4.0), done(1, status=Status.FAILED), done(2, 1.0), done(3, 8.0))
    groups = effects.group(sweep.plan, ["lr"])
    parts = [Fold(sweep.paths, 4, trials=trials) for trials in (range(cut), range(cut, 4))]
    for part in parts:
        part.update()
    first, second = (effects.summarize(part, groups, top=3) for part in parts)
    assert first.merge(second) == effects.summarize(sweep.fold, groups, top=3)


def test_many_values_are_summed_up_as_few_are() -> None:
    values, keys = [1.0 / key for key in range(1, 10_002)], list(range(10_001, 0, -1))
    few = [effects.of_values(values[at : at + 999], keys[at : at + 999], 3) for at in range(0, 10_001, 999)]
    assert effects.of_values(values, keys, 3) == Summary.merge_all(few)


# For a person


def test_as_json_a_group_has_the_keys_of_a_summary(tmp_path: Path) -> None:
    sweep = grid(tmp_path, done(0, 4.0), done(1, 2.0))
    found = sweep.summary(by="lr")
    assert {name: found[name] for name in ("schema", "sweep", "metric", "goal", "by")} == {
        "schema": 1,
        "sweep": sweep.id,
        "metric": "val_loss",
        "goal": "minimize",
        "by": ["lr"],
    }
    groups = found["groups"]
    assert isinstance(groups, list)
    empty, full = groups
    assert isinstance(empty, dict)
    assert isinstance(full, dict)
    outside = {"schema", "sweep", "metric", "goal"}
    assert full.keys() == empty.keys() == (sweep.summary().keys() - outside) | {"values"}
    assert full["values"] == {"lr": 0.1}
    assert full["top"] == [
        {"index": 1, "value": 2.0, "params": sweep.plan.trial(1).params},
        {"index": 0, "value": 4.0, "params": sweep.plan.trial(0).params},
    ]
    assert (empty["count"], empty["mean"], empty["top"], empty["missing"]) == (0, None, [], 2)


def test_a_range_is_an_object_as_json() -> None:
    assert effects.values_json({"lr": effects.Range(0.1, 0.2), "n": 3}) == {"lr": {"from": 0.1, "to": 0.2}, "n": 3}


@pytest.fixture(scope="module")
def orc(tmp_path_factory: pytest.TempPathFactory) -> Orc:
    """A finished sweep of four trials, of which the last failed."""
    orc = Orc(tmp_path_factory.mktemp("effects"))
    parameters = {"lr": {"values": [0.1, 0.01]}, "name": {"values": ["a", "b"]}}
    command = ["sh", "-c", f'test "$ORC_TRIAL" != 3 || exit 1; {HALF}']
    orc("run", orc.write(parameters=parameters, command=command), expect=4)
    return orc


def test_a_person_sees_a_row_a_group(orc: Orc) -> None:
    head, names, *rows = orc("summary", "--by", "lr").out.splitlines()
    assert head == "val_loss (minimize) by lr"
    assert names.split() == [*("lr", "complete", "mean", "std", "min", "p50", "max"), "best", "trial", "failed"]
    assert [row.split() for row in rows] == [
        ["0.01", "1", "2.5", "0", "2.5", "2.5", "2.5", "2", "1"],
        ["0.1", "2", "1", "0.5", "0.5", "0.503906", "1.5", "0", "0"],
    ]


def test_by_may_be_repeated(orc: Orc) -> None:
    rows = orc("summary", "--by", "lr", "--by", "name").out.splitlines()[2:]
    assert [row.split()[:3] for row in rows] == [
        ["0.01", "a", "1"],
        ["0.01", "b", "0"],
        ["0.1", "a", "1"],
        ["0.1", "b", "1"],
    ]


def test_json_is_what_python_gives(orc: Orc) -> None:
    found = orc("summary", "--by", "lr", "--by", "name", "--json").json
    assert found == Sweep.open(runs=orc.runs).summary(by=["lr", "name"])


def test_an_unknown_parameter_is_bad_usage(orc: Orc) -> None:
    assert "did you mean 'name'?" in orc("summary", "--by", "nme", expect=2).err
