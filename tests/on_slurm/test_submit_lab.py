"""Submitting to a real Slurm, with a stand-in for the interpreter, so that jobs sleep instead of training."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from on_lab import Slurm

from orchestrator.config.plan import SweepPlan
from orchestrator.config.snapshot import Snapshot
from orchestrator.config.spec import Launch, SweepSpec
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import SbatchRejected
from orchestrator.slurm import commands, jobs, ledger, submit, sweep_folder

HOSTILE = "a|b c $(touch x) '\""
SPEC = SweepSpec(
    name="submit",
    method="grid",
    parameters={"x": {"values": list(range(6))}},
    command=("true",),
    # Held by its wish for a time that never comes, so that nothing runs, and nothing of a node is taken.
    slurm={"begin": "now+1days", "mem": "10M", "time": 5},
    launch=Launch(trials_per_task=2, form="exec"),
)


def sweep(tmp_path: Path, **changes: object) -> tuple[SweepPaths, SweepPlan]:
    snapshot = Snapshot()
    plan = SweepPlan(spec=replace(SPEC, **changes), code=snapshot.digest)
    return sweep_folder.prepare(plan, snapshot, b"", tmp_path / "runs of mine, 100%"), plan


def test_a_sweep_becomes_an_array_and_a_reducer_once(slurm: Slurm, tmp_path: Path) -> None:
    paths, plan = sweep(tmp_path)
    submission = submit.submit(paths, plan).submission
    assert submit.submit(paths, plan).already
    workers, reducer = (part.job for part in submission.parts)
    assert [job.job for job in jobs.live(paths)] == [f"{workers}_0", f"{workers}_1", f"{workers}_2", reducer]
    shown = commands.show_job(str(reducer))
    assert shown is not None
    assert shown["Dependency"].startswith(f"afterany:{workers}_*")
    assert shown["Comment"] == f"orc:{submission.token}:reducer"
    assert shown["JobName"] == submission.parts[1].name
    # Shown as sbatch was told, with the per cent sign doubled.
    assert shown["StdOut"] == f"{paths.logs}/reducer-{reducer}.log".replace("%", "%%")
    jobs.cancel(paths)
    assert jobs.live(paths) == []


def test_a_submission_without_a_word_of_its_result_is_found_again(slurm: Slurm, tmp_path: Path) -> None:
    paths, plan = sweep(tmp_path)
    before = submit.submit(paths, plan).submission
    intents = [line for line in paths.submissions.read_bytes().splitlines(keepends=True) if b'"intent"' in line]
    paths.submissions.write_bytes(b"".join(intents))
    assert not ledger.current(paths).is_complete
    assert submit.submit(paths, plan).submission == before
    jobs.cancel(paths)


def test_a_cancelled_sweep_is_resumed_with_other_options(slurm: Slurm, tmp_path: Path) -> None:
    paths, plan = sweep(tmp_path)
    first = submit.submit(paths, plan).submission
    assert {job.token for job in submit.resubmit(paths, plan, missing=2).alive} == {first.token}
    jobs.cancel(paths)
    second = submit.resubmit(paths, plan, missing=2, settings={"time": 7}).submission
    assert (second.epoch, second.num_workers, second.supersedes) == (1, 1, (first.token,))
    shown = commands.show_job(f"{second.parts[0].job}_0")
    assert shown is not None
    assert shown["TimeLimit"] == "00:07:00"
    jobs.cancel(paths)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partition": "no-such-partition"}, "invalid partition specified: no-such-partition"),
        ({"no-such": 1}, "no-such"),
    ],
)
def test_a_refusal_shows_sbatchs_own_words(
    slurm: Slurm, tmp_path: Path, options: dict[str, str | int], words: str
) -> None:
    paths, plan = sweep(tmp_path, slurm={**SPEC.slurm, **options})
    with pytest.raises(SbatchRejected, match=words):
        submit.submit(paths, plan)
    with pytest.raises(SbatchRejected, match=words):
        submit.check(paths, plan)
    assert jobs.live(paths) == []


def test_a_check_says_when_and_submits_nothing(slurm: Slurm, tmp_path: Path) -> None:
    paths, plan = sweep(tmp_path)
    assert all(re.search(r"to start at \d{4}-", answer) for answer in submit.check(paths, plan))
    assert jobs.live(paths) == []


def test_more_workers_than_an_array_holds_reach_slurm_as_several(slurm: Slurm, tmp_path: Path) -> None:
    size = int(commands.config()["MaxArraySize"])
    values = {"x": {"values": list(range(size + 1))}}
    paths, plan = sweep(tmp_path, parameters=values, launch=Launch(trials_per_task=1, form="exec"))
    receipt = submit.submit(paths, plan)
    assert [part.num_workers for part in receipt.submission.parts] == [size, 1, 0]
    assert len(jobs.live(paths)) == size + 2
    jobs.cancel(paths)


def test_a_row_keeps_hostile_text_and_a_job_is_followed_through_its_requeue(slurm: Slurm, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsleep 60\n")
    job = slurm.submit(script, f"--job-name={HOSTILE}", f"--comment={HOSTILE} JobState=FAILED", "--mem=10M")
    (row,) = [row for row in commands.queue() if row.job_id == job]
    assert (row.name, row.comment, row.task_id) == (HOSTILE, f"{HOSTILE} JobState=FAILED", None)
    slurm.wait_for(lambda: (commands.show_job(job) or {}).get("JobState") == "RUNNING")
    assert commands.requeue(job)
    slurm.wait_for(lambda: (commands.show_job(job) or {}).get("Restarts") == "1")
    commands.cancel([job])
    slurm.wait_for(lambda: not any(row.is_live for row in commands.queue() if row.job_id == job))
    assert commands.show_job("999999") is None
    commands.cancel([job, "999999"])


def test_workers_and_reducer_run_in_their_order(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> "{seen}"\n')
    interpreter.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    paths, plan = sweep(tmp_path, slurm={"mem": "10M"})
    token = submit.submit(paths, plan).submission.token
    slurm.wait_for(lambda: jobs.live(paths) == [], limit_s=60)
    *workers, reducer = seen.read_text().splitlines()
    started = f"-P -m orchestrator.supervisor work --dir {paths.root} --submission {token} --worker"
    assert sorted(workers) == [f"{started} {k}" for k in range(3)]
    assert reducer.startswith(f"-P -m orchestrator.results.reducer --dir {paths.root} --submission {token}")
    assert len(list(paths.logs.iterdir())) == 4
