from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeSlurm

from orchestrator.config.plan import PlanFile, SweepPlan
from orchestrator.config.snapshot import Snapshot, SnapshotFile
from orchestrator.config.spec import Launch, Reduce, SweepSpec
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process import Process
from orchestrator.errors import FolderError, OrcError, SbatchRejected, SlurmUnreachable, UsageError
from orchestrator.slurm import jobs, ledger, submit, sweep_folder
from orchestrator.slurm.commands import Patience

QUICK = Patience(timeout_s=20, tries=2, pause_s=0.01)
SNAPSHOT = Snapshot(files=(SnapshotFile(path="train.py", executable=False, content=b"pass\n"),), program="train.py")


def plan_of(**changes: object) -> SweepPlan:
    values = {"x": {"values": list(range(20))}}
    spec = SweepSpec(name="s", method="grid", parameters=values, program="train.py", launch=Launch(trials_per_task=2))
    return SweepPlan(spec=replace(spec, **changes), code=SNAPSHOT.digest)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    (tmp_path / "fake").mkdir()
    return FakeSlurm(tmp_path / "fake", monkeypatch)


@pytest.fixture
def plan() -> SweepPlan:
    return plan_of()


@pytest.fixture
def paths(plan: SweepPlan, tmp_path: Path) -> SweepPaths:
    return sweep_folder.prepare(plan, SNAPSHOT, b"name: s\n", tmp_path / "runs")


def submit_in_a_process(paths: SweepPaths) -> int:
    """Submit in a process of its own, which may be killed; gives its exit code."""
    program = (
        "import sys, pathlib; from orchestrator.slurm import commands, submit; "
        "from orchestrator.core import paths; from orchestrator.config import plan\n"
        "p = paths.SweepPaths(pathlib.Path(sys.argv[1]))\n"
        "submit.submit(p, plan.PlanFile.open(p.plan), patience=commands.Patience(tries=1))"
    )
    return subprocess.run([sys.executable, "-c", program, str(paths.root)], timeout=60).returncode


# The folder


def test_a_prepared_folder_is_whole_and_ones_own(paths: SweepPaths, plan: SweepPlan) -> None:
    assert paths.id == plan.id
    assert paths.sweep_file.read_bytes() == b"name: s\n"
    assert PlanFile.open(paths.plan).num_trials == 20
    assert (paths.code / "train.py").read_bytes() == b"pass\n"
    assert {folder.stat().st_mode & 0o777 for folder in paths.folders} == {0o700}
    assert (paths.root.parent / ".gitignore").read_text() == "*\n"
    assert sorted(path.name for path in paths.root.parent.iterdir()) == [".gitignore", paths.id]


def test_preparing_again_finds_the_same_folder(paths: SweepPaths, plan: SweepPlan) -> None:
    before = paths.plan.stat()
    assert sweep_folder.prepare(plan, SNAPSHOT, b"name: s # edited\n", paths.root.parent) == paths
    assert paths.plan.stat() == before
    assert paths.sweep_file.read_bytes() == b"name: s\n"


def test_a_preparation_that_is_killed_is_never_seen(
    plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_folder, "write_plan", die)
        with pytest.raises(KeyboardInterrupt):
            sweep_folder.prepare(plan, SNAPSHOT, b"", tmp_path / "runs")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".gitignore"]
    assert sweep_folder.prepare(plan, SNAPSHOT, b"", tmp_path / "runs").plan.exists()


def test_a_runs_folder_that_is_a_file_is_named(plan: SweepPlan, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(FolderError, match="runs: should be a folder for sweeps, but is a file"):
        sweep_folder.prepare(plan, SNAPSHOT, b"", tmp_path / "runs")


def test_a_runs_folder_that_is_not_writable_is_named(plan: SweepPlan) -> None:
    with pytest.raises(FolderError, match=r"/proc/runs: can't be made: .*--dir or \$ORC_DIR"):
        sweep_folder.prepare(plan, SNAPSHOT, b"", Path("/proc/runs"))


def test_a_folder_of_another_schema_is_refused(paths: SweepPaths, plan: SweepPlan) -> None:
    paths.plan.write_bytes(paths.plan.read_bytes().replace(b'"schema":1', b'"schema":9', 1))
    with pytest.raises(FolderError, match="schema 9"):
        sweep_folder.prepare(plan, SNAPSHOT, b"", paths.root.parent)


def test_fault_30_a_folder_that_anyone_may_write_is_not_executed(
    fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan
) -> None:
    paths.code.chmod(0o777)
    with pytest.raises(FolderError, match="anyone may write it"):
        submit.submit(paths, plan)
    assert fake.calls == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_fault_30_a_folder_of_a_third_user_is_not_executed(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    os.chown(paths.plan, 12345, -1)
    with pytest.raises(FolderError, match="belongs to another user"):
        submit.submit(paths, plan)
    assert fake.calls == []


# Once


def test_three_commands_hand_a_sweep_over(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    receipt = submit.submit(paths, plan)
    assert fake.commands == ["scontrol", "sbatch", "sbatch"]
    workers, reducer = fake.jobs
    token = receipt.submission.token
    assert (workers["tasks"], workers["comment"]) == (10, f"orc:{token}:workers-0")
    assert (reducer["tasks"], reducer["comment"]) == (0, f"orc:{token}:reducer")
    assert "--dependency=afterany:101" in fake.argv("sbatch")[1]
    assert [part.job for part in receipt.submission.parts] == ["101", "102"]
    assert not receipt.already


def test_twice_submits_once(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    first = submit.submit(paths, plan)
    second = submit.submit(paths, plan_of(slurm={"mem": "1G"}))
    assert second.already
    assert second.submission == first.submission == ledger.current(paths)
    assert len(fake.jobs) == 2


@pytest.mark.parametrize("when", ["kill-before", "kill-after"])
@pytest.mark.parametrize("part", [0, 1])
def test_a_submission_that_was_killed_is_completed_not_repeated(
    fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan, when: str, part: int
) -> None:
    fake.will("sbatch", *["ok"] * part, when)
    assert submit_in_a_process(paths) == -signal.SIGKILL
    cut_off = ledger.current(paths)
    assert cut_off is not None
    assert not cut_off.is_complete
    done = submit.submit(paths, plan)
    assert not done.already
    assert done.submission.is_complete
    assert done.submission.token == cut_off.token
    assert [job["comment"] for job in fake.jobs] == [f"orc:{cut_off.token}:{what}" for what in ("workers-0", "reducer")]
    assert fake.commands.count("squeue") == 1


def test_a_torn_last_line_of_the_ledger_harms_no_other(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    submit.submit(paths, plan)
    lines = paths.submissions.read_bytes()
    paths.submissions.write_bytes(lines[:-20])
    assert [part.is_done for part in ledger.current(paths).parts] == [True, False]
    assert submit.submit(paths, plan).submission.is_complete
    assert len(fake.jobs) == 2
    assert submit.submit(paths, plan).already


def test_a_reducer_that_is_completed_late_waits_only_for_jobs_that_live(
    fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan
) -> None:
    fake.will("sbatch", "ok", "reject nope")
    with pytest.raises(SbatchRejected, match=r"workers are submitted \(job 101\)(.|\n)*same command again"):
        submit.submit(paths, plan)
    fake.jobs = [{**job, "state": "COMPLETED"} for job in fake.jobs]
    submit.submit(paths, plan)
    assert [argument for argument in fake.argv("sbatch")[-1] if argument.startswith("--dependency")] == []
    assert len(fake.jobs) == 2


def test_a_refusal_leaves_a_sweep_that_can_be_submitted(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    fake.will("sbatch", "reject invalid partition specified: nowhere")
    with pytest.raises(SbatchRejected, match="invalid partition specified: nowhere"):
        submit.submit(paths, plan)
    assert fake.jobs == []
    receipt = submit.submit(paths, plan_of(slurm={"partition": "low"}))
    assert receipt.submission.is_complete
    assert "#SBATCH --partition=low\n" in paths.script("workers-0").read_text()


def test_without_slurm_nothing_is_begun(
    paths: SweepPaths, plan: SweepPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmUnreachable, match="--on local"):
        submit.submit(paths, plan, patience=QUICK)
    assert ledger.current(paths) is None
    assert jobs.live(paths) == []


def test_fault_14_a_silent_controller_leaves_a_submission_to_complete(
    fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan
) -> None:
    fake.will("sbatch", "ok", "lost")
    fake.will("squeue", *["down"])
    with pytest.raises(SlurmUnreachable):
        submit.submit(paths, plan, patience=QUICK)
    assert submit.submit(paths, plan, patience=QUICK).submission.is_complete
    assert len(fake.jobs) == 2


# Sizes


def test_more_workers_than_an_array_holds_become_several_arrays(
    fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan
) -> None:
    fake.set("config", "MaxArraySize = 4\n")
    submission = submit.submit(paths, plan).submission
    assert [(part.first_worker, part.num_workers) for part in submission.parts] == [(0, 4), (4, 4), (8, 2), (0, 0)]
    assert "--dependency=afterany:101:102:103" in fake.argv("sbatch")[-1]


@pytest.mark.parametrize(("asked", "most", "expected"), [(3, None, 3), (None, 4, 4), (99, 99, 10)])
def test_workers_are_bounded_by_the_blocks_and_by_what_was_asked(
    fake: FakeSlurm, tmp_path: Path, asked: int | None, most: int | None, expected: int
) -> None:
    plan = plan_of(launch=Launch(trials_per_task=2, max_workers=most))
    paths = sweep_folder.prepare(plan, SNAPSHOT, b"", tmp_path / "runs")
    assert submit.submit(paths, plan, workers=asked).submission.num_workers == expected


def test_workers_shrink_by_half_to_an_unknown_limit(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    fake.set("limit", "6")
    receipt = submit.submit(paths, plan)
    assert [job["tasks"] for job in fake.jobs] == [5, 0]
    assert receipt.notes == (
        "5 workers instead of 10, since Slurm limits how many jobs you may have in the queue; the trials are the same",
    )
    assert submit.submit(paths, plan).already


def test_workers_shrink_to_a_known_limit_less_the_reducer(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    fake.set("limit", "8")
    fake.will("sacctmgr", "say 8|normal\\n", "say normal|\\n")
    submit.submit(paths, plan)
    assert [job["tasks"] for job in fake.jobs] == [7, 0]


def test_arrays_that_the_limit_leaves_no_room_for_are_left_out(
    fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan
) -> None:
    fake.set("config", "MaxArraySize = 4\n")
    fake.set("limit", "5")
    assert submit.submit(paths, plan).submission.num_workers == 4
    assert [job["tasks"] for job in fake.jobs] == [4, 0]


def test_a_limit_without_room_is_a_refusal(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    fake.set("limit", "0")
    with pytest.raises(SbatchRejected, match="QOSMaxSubmitJobPerUserLimit"):
        submit.submit(paths, plan)
    assert fake.jobs == []


def test_a_check_asks_about_every_script_and_writes_nothing(fake: FakeSlurm, plan: SweepPlan, tmp_path: Path) -> None:
    paths = SweepPaths(tmp_path / "runs" / plan.id)
    answers = submit.check(paths, plan)
    assert [answer.partition(":")[0] for answer in answers] == ["workers-0", "reducer"]
    assert fake.jobs == []
    assert not paths.root.parent.exists()


def test_fault_28_hostile_folders_and_options_reach_sbatch_as_text(fake: FakeSlurm, tmp_path: Path) -> None:
    plan = plan_of(slurm={"comment-like": 'a "b" $(touch x)'}, env={"A": "'; touch x; $(touch x)"})
    paths = sweep_folder.prepare(plan, SNAPSHOT, b"", tmp_path / "it's $(touch x) 100%")
    submit.submit(paths, plan)
    assert str(paths.script("workers-0")) == fake.argv("sbatch")[0][-1]
    assert list(tmp_path.rglob("x")) == []


# Afterwards


def test_fault_39_only_jobs_that_match_what_was_written_down_are_live(
    fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan
) -> None:
    submit.submit(paths, plan)
    workers, reducer = fake.jobs
    stranger = {"id": "102", "name": "other", "comment": "other", "tasks": 0, "state": "RUNNING"}
    overwritten = {**workers, "comment": "the site's own"}
    fake.jobs = [{**overwritten, "tasks": 2}, stranger, {**reducer, "id": "9", "state": "COMPLETED"}]
    assert [(job.job, job.what, job.state) for job in jobs.live(paths)] == [
        ("101_0", "workers-0", "PENDING"),
        ("101_1", "workers-0", "PENDING"),
    ]


def test_a_cancel_mark_is_durable_before_scancel(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    token = submit.submit(paths, plan).submission.token
    fake.jobs = [*fake.jobs, {"id": "999", "name": "mine too", "comment": "", "tasks": 0, "state": "RUNNING"}]
    fake.set("watched-mark", str(paths.cancelled))
    cancelled = jobs.cancel(paths)
    assert (fake.root / "mark-at-scancel").read_text() == "True"
    assert [job["state"] for job in fake.jobs] == ["CANCELLED", "CANCELLED", "RUNNING"]
    assert len(cancelled) == 11
    assert fake.argv("scancel") == [["101", "102"]]
    assert ledger.is_cancelled(paths, token)


def test_the_mark_stays_when_slurm_is_silent(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    token = submit.submit(paths, plan).submission.token
    fake.will("squeue", "down")
    with pytest.raises(SlurmUnreachable):
        jobs.cancel(paths, patience=QUICK)
    assert ledger.is_cancelled(paths, token)


def test_a_cancelled_sweep_is_resumed_not_submitted(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    first = submit.submit(paths, plan).submission
    jobs.cancel(paths)
    with pytest.raises(UsageError, match="was cancelled; `orc resume"):
        submit.submit(paths, plan)
    second = submit.resubmit(paths, plan, missing=5, settings={"mem": "32G"}).submission
    assert (second.epoch, second.supersedes, second.num_workers) == (1, (first.token,), 3)
    assert "#SBATCH --mem=32G\n" in paths.script("workers-0.1").read_text()
    assert [ledger.is_cancelled(paths, one.token) for one in (first, second)] == [True, False]
    assert submit.submit(paths, plan).already


def test_a_mark_that_nobody_can_read_ends_every_submission_but_no_later_one(
    fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan
) -> None:
    token = submit.submit(paths, plan).submission.token
    paths.cancelled.write_bytes(b"\0\0")
    assert ledger.is_cancelled(paths, token)
    fake.jobs = []
    assert not ledger.is_cancelled(paths, submit.resubmit(paths, plan, missing=5).submission.token)


def test_nothing_is_resumed_beside_something_alive(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    first = submit.submit(paths, plan).submission
    fake.jobs = fake.jobs[:1]
    receipt = submit.resubmit(paths, plan, missing=5)
    assert receipt.already
    assert receipt.submission == first
    assert len(receipt.alive) == 10
    forced = submit.resubmit(paths, plan, missing=5, force=True).submission
    assert (forced.epoch, forced.supersedes) == (1, ())


def test_resuming_completes_a_submission_that_is_alive(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    fake.will("sbatch", "ok", "reject nope")
    with pytest.raises(SbatchRejected):
        submit.submit(paths, plan)
    receipt = submit.resubmit(paths, plan, missing=5)
    assert receipt.submission.is_complete
    assert len(fake.jobs) == 2


def test_with_no_trial_missing_only_a_reducer_is_resumed(fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan) -> None:
    submit.submit(paths, plan)
    fake.jobs = []
    submission = submit.resubmit(paths, plan, missing=0, retry_failed=True).submission
    assert [part.what for part in submission.parts] == ["reducer"]
    intents = [json.loads(line) for line in paths.submissions.read_text().splitlines()]
    assert [line["retry_failed"] for line in intents if line["kind"] == "intent"] == [False, False, True]


# A tree of reducers

TREE = Reduce(trials_per_range=5, fan_in=2)
"""Four ranges of the 20 trials, two reducers that merge them, and the root."""
PARTS = ("workers-0", "reduce-0", "reduce-1", "reducer")


def whats(fake: FakeSlurm) -> list[tuple[str, object]]:
    return [(str(job["comment"]).rpartition(":")[2], job["tasks"]) for job in fake.jobs]


def test_a_tree_of_reducers_is_one_more_array_a_level_each_after_those_before_it(
    fake: FakeSlurm, paths: SweepPaths
) -> None:
    receipt = submit.submit(paths, plan_of(reduce=TREE))
    assert fake.commands.count("sbatch") == 4
    assert whats(fake) == [("workers-0", 10), ("reduce-0", 4), ("reduce-1", 2), ("reducer", 0)]
    after = [[word for word in argv if word.startswith("--dependency")] for argv in fake.argv("sbatch")]
    assert after == [
        [],
        ["--dependency=afterany:101"],
        ["--dependency=afterany:101:102"],
        ["--dependency=afterany:101:102:103"],
    ]
    assert receipt.submission.num_workers == 10
    assert receipt.notes == ()
    assert submit.submit(paths, plan_of(reduce=TREE)).already


@pytest.mark.parametrize("when", ["kill-before", "kill-after"])
@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_tree_whose_submission_was_killed_is_completed_not_repeated(
    fake: FakeSlurm, tmp_path: Path, when: str, part: int
) -> None:
    plan = plan_of(reduce=TREE)
    paths = sweep_folder.prepare(plan, SNAPSHOT, b"", tmp_path / "trees")
    fake.will("sbatch", *["ok"] * part, when)
    assert submit_in_a_process(paths) == -signal.SIGKILL
    done = submit.submit(paths, plan).submission
    assert done.is_complete
    assert [what for what, _ in whats(fake)] == list(PARTS)
    assert len({part.job for part in done.parts}) == 4


def test_workers_shrink_by_the_elements_of_all_reducers(fake: FakeSlurm, paths: SweepPaths) -> None:
    fake.set("limit", "12")
    fake.will("sacctmgr", "say 12|normal\\n", "say normal|\\n")
    receipt = submit.submit(paths, plan_of(reduce=TREE))
    assert whats(fake) == [("workers-0", 5), ("reduce-0", 4), ("reduce-1", 2), ("reducer", 0)]
    assert len(receipt.notes) == 1


@pytest.mark.parametrize(("limit", "workers"), [(19, [4, 4, 2]), (15, [4, 4]), (10, [3])])
def test_several_arrays_of_workers_shrink_from_the_end(
    fake: FakeSlurm, paths: SweepPaths, limit: int, workers: list[int]
) -> None:
    fake.set("config", "MaxArraySize = 4\n")
    fake.set("limit", str(limit))
    fake.will("sacctmgr", f"say {limit}|normal\\n", "say normal|\\n")
    submit.submit(paths, plan_of(reduce=TREE))
    assert [tasks for _, tasks in whats(fake)] == [*workers, 4, 2, 0]


def test_with_no_room_for_a_tree_the_root_reduces_alone(fake: FakeSlurm, paths: SweepPaths) -> None:
    fake.set("limit", "6")
    fake.will("sacctmgr", "say 6|normal\\n", "say normal|\\n")
    receipt = submit.submit(paths, plan_of(reduce=TREE))
    assert whats(fake) == [("workers-0", 5), ("reducer", 0)]
    assert "--ranges" not in paths.script("reducer").read_text()
    assert [note for note in receipt.notes if "fewer reducers" in note] != []
    assert submit.submit(paths, plan_of(reduce=TREE)).already


def test_a_level_that_finds_no_room_is_left_out_and_the_root_knows_the_ranges(
    fake: FakeSlurm, paths: SweepPaths
) -> None:
    fake.will("sbatch", "ok", "ok", "reject QOSMaxSubmitJobPerUserLimit")
    submit.submit(paths, plan_of(reduce=TREE))
    assert whats(fake) == [("workers-0", 10), ("reduce-0", 4), ("reducer", 0)]
    assert "--ranges 4 --fan-in 2\n" in paths.script("reducer").read_text()


def test_a_level_that_is_refused_for_good_says_that_the_workers_are_there(fake: FakeSlurm, paths: SweepPaths) -> None:
    fake.will("sbatch", "ok", "reject invalid partition specified: nowhere")
    with pytest.raises(SbatchRejected, match=r"nowhere(.|\n)*workers are submitted \(job 101\)(.|\n)*same command"):
        submit.submit(paths, plan_of(reduce=TREE))
    submit.submit(paths, plan_of(reduce=TREE))
    assert [what for what, _ in whats(fake)] == list(PARTS)


def test_a_resumption_with_no_trial_missing_submits_the_whole_tree(fake: FakeSlurm, paths: SweepPaths) -> None:
    submit.submit(paths, plan_of(reduce=TREE))
    fake.jobs = []
    submission = submit.resubmit(paths, plan_of(reduce=TREE), missing=0).submission
    assert submission is not None
    assert [part.what for part in submission.parts] == ["reduce-0", "reduce-1", "reducer"]
    assert submission.num_workers == 0


def test_a_cancel_ends_every_level(fake: FakeSlurm, paths: SweepPaths) -> None:
    submission = submit.submit(paths, plan_of(reduce=TREE)).submission
    assert submission is not None
    assert list(dict.fromkeys(job.what for job in jobs.cancel(paths))) == list(PARTS)
    assert {part.job for part in submission.parts} <= set(fake.argv("scancel")[-1])


def test_several_ranks_are_one_job_and_no_tree(fake: FakeSlurm, paths: SweepPaths) -> None:
    submit.submit(paths, plan_of(reduce=replace(TREE, ranks=4)))
    assert whats(fake) == [("workers-0", 10), ("reducer", 0)]
    script = paths.script("reducer").read_text()
    assert "#SBATCH --ntasks=4\n" in script
    assert "srun --ntasks=4 " in script


def test_a_level_has_no_more_elements_than_an_array_may_have(fake: FakeSlurm, paths: SweepPaths) -> None:
    fake.set("config", "MaxArraySize = 3\n")
    submit.submit(paths, plan_of(reduce=Reduce(trials_per_range=1, fan_in=2)), workers=2)
    assert whats(fake) == [("workers-0", 2), ("reduce-0", 3), ("reduce-1", 2), ("reducer", 0)]


# This machine


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in that sleeps; gives the file in which it writes its arguments and environment."""
    seen = tmp_path / "seen"
    script = tmp_path / "python"
    dump = 'printf "%s\\n" "$@" "JOB=$SLURM_JOB_ID" "PYTHONPATH=$PYTHONPATH"'
    wait = f"mkfifo '{seen}.pipe'\n{dump} > '{seen}.part'\nmv '{seen}.part' '{seen}'\nread -r -t 60 <> '{seen}.pipe'\n"
    script.write_text(f"#!/bin/bash\n{wait}")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    return seen


def read(path: Path) -> list[str]:
    from test_process import eventually

    assert eventually(path.exists)
    return path.read_text().splitlines()


def test_a_sweep_on_this_machine_is_one_supervisor_and_no_slurm(
    fake: FakeSlurm, paths: SweepPaths, plan: SweepPlan, supervisor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("PYTHONPATH", "src")
    submission = submit.submit(paths, plan, on="local", workers=2).submission
    *argv, job, search = read(supervisor)
    start = ["-P", "-m", "orchestrator.supervisor", "work", "--dir", str(paths.root), "--submission", submission.token]
    assert argv == [*start, "--slots", "2", "--then-reduce"]
    assert (job, search) == ("JOB=", f"PYTHONPATH={Path.cwd() / 'src'}")
    assert submit.submit(paths, plan, on="local").already
    assert [(one.what, one.state) for one in jobs.live(paths)] == [("local", "alive")]
    jobs.cancel(paths, grace_s=5)
    assert jobs.live(paths) == []
    assert fake.calls == []


def test_a_local_start_without_a_word_of_it_is_found_by_its_token(
    paths: SweepPaths, plan: SweepPlan, supervisor: Path
) -> None:
    submission = submit.submit(paths, plan, on="local").submission
    read(supervisor)
    intent, _, _ = paths.submissions.read_bytes().partition(b"\n")
    paths.submissions.write_bytes(intent + b"\n")
    again = submit.submit(paths, plan, on="local").submission
    assert again == submission
    assert jobs.cancel(paths, grace_s=5)[0].process == submission.parts[0].process


def test_a_process_of_another_machine_keeps_a_resumption_from_starting(
    paths: SweepPaths, plan: SweepPlan, supervisor: Path
) -> None:
    part = ledger.SubmissionPart(what="local", num_workers=1)
    submission = ledger.Submission(token="0" * 32, epoch=0, on="local", host="elsewhere", parts=(part,))
    ledger.append(paths, ledger.intent(submission, "local"))
    with pytest.raises(OrcError, match="is being submitted on elsewhere"):
        submit.submit(paths, plan, on="local")
    process = Process(pid=1, start_time=1, boot_id="b", host="elsewhere")
    ledger.append(paths, ledger.submitted_process(submission.token, "local", process))
    assert [job.state for job in submit.resubmit(paths, plan, missing=5).alive] == ["elsewhere"]


def test_reading_the_ledger_imports_nothing_heavy() -> None:
    program = (
        "import sys; from orchestrator.slurm import ledger, submit\n"
        "print({'filelock', 'jinja2', 'pydantic', 'torch', 'numpy', 'yaml'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"
