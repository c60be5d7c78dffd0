"""The plan: a function of the spec, trial by trial, in memory and on disk."""

import sys
from dataclasses import replace
from pathlib import Path
from subprocess import run

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.plan import PlanFile, PlannedTrial, SweepPlan, blocks, packs, write_plan
from orchestrator.config.spec import Launch, Metric, Reduce, Retries, SweepSpec
from orchestrator.core.atomic import JsonObject
from orchestrator.errors import FolderError, OrcError

LR: JsonObject = {"distribution": "log_uniform_values", "min": 1e-5, "max": 0.1}
FULL = SweepSpec(
    name="full",
    method="grid",
    parameters={"a": {"values": [1, 2]}, "b": {"parameters": {"c": {"values": ["x", None]}}}},
    metric=Metric(name="acc", goal="maximize", at="best"),
    command=("python", "train.py", "${args}"),
    zip=(("a", "b.c"),),
    run_cap=3,
    repeats=2,
    seed=7,
    env={"A": "1"},
    slurm={"mem": "4G", "exclusive": True, "hold": None},
    launch=Launch(form="trap", modules=("cuda",), retries=Retries(error=2)),
    reduce=Reduce(top=3, slurm={"time": "1:00"}),
)


def random_spec(num_trials: int = 20, **changes: object) -> SweepSpec:
    parameters = changes.pop("parameters", {"lr": LR, "width": {"min": 8, "max": 64}})
    return SweepSpec(name="s", method="random", parameters=parameters, run_cap=num_trials, program="t.py", **changes)


def write(tmp_path: Path, spec: SweepSpec) -> tuple[SweepPlan, Path]:
    plan, path = SweepPlan(spec=spec, code="c0de"), tmp_path / "plan.jsonl"
    write_plan(plan, path)
    return plan, path


@pytest.mark.parametrize("spec", [FULL, random_spec()])
def test_a_spec_survives_json(spec: SweepSpec) -> None:
    assert SweepSpec.from_json(orjson.loads(orjson.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "reduce", [Reduce(visibility_s=1.0), Reduce(trials_per_range=5), Reduce(fan_in=2), Reduce(ranks=4)], ids=str
)
def test_who_reduces_does_not_make_it_another_sweep(reduce: Reduce) -> None:
    plan = SweepPlan(spec=random_spec(), code="c")
    assert SweepPlan(spec=random_spec(reduce=reduce), code="c").id == plan.id
    assert SweepPlan(spec=random_spec(reduce=replace(reduce, top=3)), code="c").id != plan.id


def test_identity_leaves_out_slurm_and_nothing_else() -> None:
    plan = SweepPlan(spec=random_spec(), code="c")
    assert SweepPlan(spec=random_spec(slurm={"mem": "1G"}, reduce=Reduce(slurm={"mem": "1G"})), code="c").id == plan.id
    others = [random_spec(seed=1), random_spec(21), random_spec(launch=Launch(cpus=2)), random_spec(env={"A": "1"})]
    ids = {SweepPlan(spec=spec, code="c").id for spec in others} | {SweepPlan(spec=random_spec(), code="d").id}
    assert len(ids) == 5
    assert plan.id not in ids
    assert plan.id.startswith("s-")


def test_ranks_make_it_another_sweep_and_how_long_they_are_waited_for_does_not() -> None:
    one, patient, four = (
        SweepPlan(spec=random_spec(launch=launch), code="c").id
        for launch in (Launch(), Launch(answer_s=5.0, silent_s=5.0), Launch(ranks_per_node=4))
    )
    assert one == patient
    assert one != four


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_a_trial_depends_on_seed_and_index_alone(seed: int, index: int) -> None:
    few, many = (SweepPlan(spec=random_spec(n, seed=seed), code=str(n)) for n in (10, 1000))
    assert few.trial(index) == many.trial(index)
    assert 0 <= few.trial(index).seed < 2**63
    assert few.trial(index) != few.trial(index + 1)


def test_adding_or_reordering_parameters_moves_no_other() -> None:
    one = SweepPlan(spec=random_spec(parameters={"lr": LR}), code="c")
    two = SweepPlan(spec=random_spec(parameters={"wd": {"distribution": "normal"}, "lr": LR}), code="c")
    assert [t.params["lr"] for t in one] == [t.params["lr"] for t in two]
    assert [t.seed for t in one] == [t.seed for t in two]


def test_a_trial_id_is_its_index_and_a_hash_of_parameters_and_seed() -> None:
    trials = [SweepPlan(spec=random_spec(seed=seed), code="c").trial(3) for seed in (0, 1)]
    assert [t.trial.split("-")[0] for t in trials] == ["3", "3"]
    assert trials[0].trial != trials[1].trial


def test_repeats_keep_parameters_and_change_seeds() -> None:
    trials = list(SweepPlan(spec=random_spec(6, repeats=3), code="c"))
    assert [t.params == trials[0].params for t in trials] == [True] * 3 + [False] * 3
    assert len({t.seed for t in trials}) == 6


@pytest.mark.parametrize(("cap", "expected"), [(None, 8), (3, 3), (100, 8)])
def test_run_cap_cuts_a_grid_repeats_counted(cap: int | None, expected: int) -> None:
    spec = SweepSpec(name="g", method="grid", parameters={"a": {"values": [1, 2, 3, 4]}}, repeats=2, run_cap=cap)
    assert SweepPlan(spec=spec, code="").num_trials == expected == len(list(SweepPlan(spec=spec, code="")))


@pytest.mark.parametrize("num_trials", [1, 2, 3, 9, 10, 100])
def test_a_plan_file_gives_the_plan_back(tmp_path: Path, num_trials: int) -> None:
    plan, path = write(tmp_path, random_spec(num_trials))
    file = PlanFile.open(path)
    assert (file.id, file.num_trials, file.code, file.spec) == (plan.id, num_trials, "c0de", plan.spec)
    assert list(file.trials()) == list(plan) == [file.trial(i) for i in range(num_trials)]
    assert [p.name for p in tmp_path.iterdir()] == ["plan.jsonl"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=80), min_size=1, max_size=8))
def test_any_trial_is_found_among_lines_of_any_length(values: list[str]) -> None:
    plan = SweepPlan(spec=SweepSpec(name="t", method="grid", parameters={"x": {"values": list(values)}}), code="")
    lines = [orjson.dumps({"kind": "plan", "schema": 1, "sweep": plan.id, "num_trials": len(values), "code": "",
                           "spec": plan.spec.to_json()}), *(orjson.dumps(t.to_json()) for t in plan)]  # fmt: skip
    file = PlanFile(Path("plan.jsonl"), b"\n".join(lines) + b"\n")
    assert [file.trial(i).params["x"] for i in range(len(values))] == values


@pytest.mark.parametrize("index", [-1, 20])
def test_a_trial_beyond_the_plan_is_refused(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError, match="there are 20"):
        PlanFile.open(write(tmp_path, random_spec())[1]).trial(index)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"", "empty"),
        (lambda b: b[:-1], "cut off"),
        (lambda b: b[: b[:-1].rfind(b"\n") + 1], "19 of its 20"),
        (lambda b: b[: b.find(b"\n") + 1], "0 of its 20"),
        (lambda b: b[: b.find(b"\n") + 40], "cut off"),
        (lambda b: b.replace(b'"schema":1', b'"schema":9'), "schema 9, this version reads 1"),
        (lambda b: b.replace(b'"kind":"plan"', b'"kind":"other"'), "not a plan"),
        (lambda b: b.replace(b'"num_trials"', b'"count"'), "header"),
        (lambda b: b.replace(b'"method"', b'"methods"'), "header"),
        (lambda b: b"\0" * len(b), "no JSON"),
        (lambda b: b"[]\n", "no JSON object"),
    ],
)
def test_a_damaged_or_foreign_plan_is_named(tmp_path: Path, damage, message: str) -> None:
    path = write(tmp_path, random_spec())[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FolderError, match=message) as caught:
        PlanFile.open(path)
    assert str(path) in str(caught.value)


def test_damage_in_the_middle_is_found_when_read(tmp_path: Path) -> None:
    path = write(tmp_path, random_spec())[1]
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{"index":10,', b'{"index":"x",'))
    file = PlanFile.open(path)
    with pytest.raises(FolderError, match="no trial at byte"):
        file.trial(10)
    with pytest.raises(FolderError, match="no trial at byte"):
        list(file.trials())


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no such plan"):
        PlanFile.open(tmp_path / "plan.jsonl")


def test_a_plan_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OrcError, match="can't be written"):
        write(tmp_path / "missing", random_spec())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("num_trials", "per_task", "expected"),
    [(1, None, (1, 1)), (100, None, (1, 100)), (101, None, (2, 51)), (1000, None, (10, 100)), (60, 7, (7, 9))],
)
def test_blocks(num_trials: int, per_task: int | None, expected: tuple[int, int]) -> None:
    dealt = blocks(num_trials, per_task)
    assert dealt == expected
    assert [i for k in range(dealt.num_blocks) for i in dealt.trials(k, num_trials)] == list(range(num_trials))


def test_blocks_hold_at_least_a_pack_unless_their_size_is_given() -> None:
    assert blocks(200, None, 32) == (32, 7)
    assert blocks(10_000, None, 32) == (100, 100)
    assert blocks(200, 64, 32) == (64, 4)


@given(st.lists(st.sampled_from([1, 2, 3]), max_size=40), st.integers(1, 9))
def test_packs_hold_each_trial_once_equal_ones_together_in_their_order(values: list[int], most: int) -> None:
    trials = [PlannedTrial(index=n, trial="", params={"epochs": v, "lr": n}, seed=n) for n, v in enumerate(values, 5)]
    found = packs(trials, ["epochs", "absent"], most)
    assert sorted(index for pack in found for index in pack) == [trial.index for trial in trials]
    assert [pack[0] for pack in found] == sorted(pack[0] for pack in found)
    for value in set(values):
        own = [pack for pack in found if values[pack[0] - 5] == value]
        assert [n for pack in own for n in pack] == [n for n, v in enumerate(values, 5) if v == value]
        assert all(len(pack) == most for pack in own[:-1])


def test_packs_are_in_the_plan_and_the_same_for_all_who_read_it(tmp_path: Path) -> None:
    spec = random_spec(
        20, launch=Launch(pack=3, trials_per_task=7), parameters={"lr": LR, "epochs": {"values": [1, 2]}}
    )
    plan = SweepPlan(spec=spec, code="c", packed_by=("epochs",))
    write_plan(plan, tmp_path / "plan.jsonl")
    found = PlanFile.open(tmp_path / "plan.jsonl")
    assert found.packed_by == ("epochs",)
    assert found.blocks == plan.blocks == (7, 3)
    of = list(plan.packs())
    for index in reversed(range(20)):
        (pack,) = [pack for pack in of if index in pack]
        assert found.pack(index) == pack
        assert len({found.trial(one).params["epochs"] for one in pack}) == 1
        assert len({one // 7 for one in pack}) == 1


def test_without_packs_a_trial_is_alone_and_the_sweep_is_the_one_of_before(tmp_path: Path) -> None:
    alone, packed = (SweepPlan(spec=random_spec(launch=Launch(pack=n)), code="c") for n in (1, 2))
    assert b"pack" not in alone.spec.identity()
    assert alone.id != packed.id
    write_plan(alone, tmp_path / "plan.jsonl")
    assert b"packed_by" not in (tmp_path / "plan.jsonl").read_bytes()
    assert PlanFile.open(tmp_path / "plan.jsonl").pack(3) == (3,)


def test_reading_a_plan_back_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "pydantic", "yaml", "statistics", "orchestrator.config.distributions"}
    code = "import sys, orchestrator.config.plan; print(*sys.modules)"
    loaded = run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)


def test_a_trial_is_a_plain_value() -> None:
    trial = PlannedTrial(index=1, trial="1-00000000", params={"a": 1}, seed=2)
    assert PlannedTrial(**trial.to_json()) == trial
