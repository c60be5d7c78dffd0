"""Whole sweeps on a real Slurm, by the real command line: disturbed in every way, the same bytes come out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace

from on_lab import Slurm
from on_lab_sweeps import Make

from orchestrator.slurm.lab import LabOptions


def test_slurm_and_one_two_and_three_local_workers_give_the_same_bytes(make: Make) -> None:
    bench = make(trials=60, block=10, trouble=True)
    sweep = bench.orc("submit", "sweep.yaml").strip()
    local = []
    for workers in (1, 2, 3):
        bench.orc("run", "sweep.yaml", "--dir", f"local{workers}", "--workers", str(workers), code=4)
        local.append(next((bench.folder / f"local{workers}").glob("*/summary.json")).read_bytes())
    found = bench.wait_until_reduced(sweep)
    assert [found] * 3 == local
    counted = json.loads(found)
    assert (counted["count"], counted["failed"], counted["diverged"]) == (45, 9, 6)


def test_fault_02_a_preempted_sweep_is_requeued_and_ends_with_the_same_bytes(
    make: Make, slurm_of: Callable[[LabOptions], Slurm]
) -> None:
    bench = replace(make(seconds=1.0), slurm=slurm_of(LabOptions(nodes=1, grace_time_s=5)))
    sweep = bench.orc("submit", "sweep.yaml").strip()
    bench.slurm.wait_for(lambda: bench.trials(sweep)["complete"] > 0)
    script = bench.folder / ".urgent.sh"
    script.write_text("#!/bin/sh\nsleep 1\n")
    bench.slurm.submit(script, "-p", "high", "--exclusive", "-o", "/dev/null")
    found = bench.wait_until_reduced(sweep)
    assert any("preempted" in notice["action"] for notice in bench.notices(sweep))
    assert found == bench.undisturbed()


def test_fault_04_a_sweep_longer_than_its_time_limit_goes_on_by_itself_in_every_form(make: Make) -> None:
    sweeps = {}
    for form in ("exec", "trap", "srun"):
        bench = make(trials=30, block=30, seconds=1.5, options="time: 1", form=form, notice_s=15)
        sweeps[form] = bench.orc("submit", "sweep.yaml", "--dir", form).strip()
    for form, sweep in sweeps.items():
        there = bench.below(form)
        found = there.wait_until_reduced(sweep, limit_s=150)
        assert any("timeout" in notice["action"] for notice in there.notices(sweep))
        assert json.loads(found)["count"] == 30


def test_a_signal_by_hand_is_noted_and_the_work_goes_on(make: Make) -> None:
    bench = make(trials=6, block=6, seconds=1.0)  # one worker, so that the one that is signalled is at work
    sweep = bench.orc("submit", "sweep.yaml").strip()
    bench.slurm.wait_for(lambda: bench.trials(sweep)["running"] > 0)
    jobs = bench.status(sweep)["jobs"]
    assert isinstance(jobs, list)
    job = next(f"{job['job']}_{job['task']}" for job in jobs if job["state"] == "RUNNING")
    bench.slurm.run("scancel", "--batch", "--signal", "TERM", job)
    bench.wait_until_reduced(sweep)
    assert [notice["action"] for notice in bench.notices(sweep)] != []
    assert all("go on" in notice["action"] for notice in bench.notices(sweep))


def test_fault_05_a_cancelled_sweep_stays_cancelled_until_it_is_resumed(make: Make) -> None:
    bench = make(seconds=1.0)
    sweep = bench.orc("submit", "sweep.yaml").strip()
    bench.slurm.wait_for(lambda: bench.trials(sweep)["running"] > 0)
    bench.orc("cancel", sweep)
    bench.slurm.wait_for(lambda: not bench.status(sweep)["jobs"])
    assert bench.trials(sweep)["cancelled"] > 0
    assert "cancelled" in bench.orc("submit", "sweep.yaml", code=2) + "cancelled"
    bench.orc("resume", sweep)
    assert bench.wait_until_reduced(sweep) == bench.undisturbed()


def test_fault_05_scancel_loses_nothing_that_resume_does_not_bring_back(make: Make) -> None:
    bench = make(seconds=1.0)
    sweep = bench.orc("submit", "sweep.yaml").strip()
    bench.slurm.wait_for(lambda: bench.trials(sweep)["running"] > 0)
    bench.slurm.run("scancel", "--name", f"{sweep}.{bench.token(sweep)}")
    bench.slurm.wait_for(lambda: not bench.status(sweep)["jobs"])
    assert "orc resume" in bench.orc("status", sweep)
    bench.orc("resume", sweep)
    assert bench.wait_until_reduced(sweep) == bench.undisturbed()


def test_fault_06_requeueing_the_whole_array_repeats_nothing_that_is_done(make: Make) -> None:
    bench = make(seconds=0.7)
    sweep = bench.orc("submit", "sweep.yaml").strip()
    bench.slurm.wait_for(lambda: bench.trials(sweep)["complete"] > 2)
    jobs = bench.status(sweep)["jobs"]
    assert isinstance(jobs, list)
    # It says no for elements that wait already, and requeues the others.
    subprocess.run(["scontrol", "requeue", str(jobs[0]["job"])], env=bench.slurm.env, check=False, capture_output=True)
    found = bench.wait_until_reduced(sweep)
    assert found == bench.undisturbed()


def test_a_submission_leaves_two_files_a_worker_the_claims_and_a_constant_number(make: Make) -> None:
    bench = make(trials=40, block=5)
    sweep = bench.orc("submit", "sweep.yaml").strip()
    bench.wait_until_reduced(sweep)
    # The worker with the last outcome reduces at once, before others have closed their files.
    bench.slurm.wait_for(lambda: not bench.status(sweep)["jobs"])
    root = bench.folder / bench.runs / sweep
    counts = {name: len(list((root / name).iterdir())) for name in ("records", "logs", "claims", "sbatch", "models")}
    assert counts["records"] <= 8
    assert counts["logs"] <= 8 + 1
    assert counts["claims"] == 8
    assert counts["sbatch"] == 2
    assert list((root / "checkpoints").iterdir()) == []
