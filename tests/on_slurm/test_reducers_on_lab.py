"""Reducers on a real Slurm: one, a tree chained by dependencies, several ranks; undisturbed and not: the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from hashlib import sha256
from pathlib import Path

import pytest
from on_lab import Slurm
from on_lab_sweeps import Bench

# Starts in a tenth of a second. Some trials die at the first attempt, some always, some give no number.
PROGRAM = """
import json, os, pathlib, signal, sys, time
params = json.load(open(os.environ["ORC_PARAMS"]))
index = int(os.environ["ORC_TRIAL"])
time.sleep(params["seconds"])
if index % 8 == 3:
    first = pathlib.Path(os.environ["ORC_SWEEP"], "logs", f"first-{index}")
    if not first.exists():
        first.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
if index % 16 == 5:
    sys.exit(1)
loss = float("nan") if index % 16 == 7 else 1.0 / (1 + params["x"]) + index * 1e-3
with open(os.environ["ORC_REPORT"], "a") as report:
    report.write(json.dumps({"step": 1, "val_loss": loss}) + "\\n")
"""

SWEEP = """
command: ["{python}", trial.py]
name: {name}
method: random
run_cap: {trials}
parameters:
  x: {{min: 0.0, max: 10.0}}
  seconds: {{value: {seconds}}}
launch: {{trials_per_task: 2, lease_s: 5, notice_s: 30}}
reduce: {{visibility_s: {visibility_s}}}
slurm: {{time: 10}}
"""
TREE = ("reduce.trials_per_range=8", "reduce.fan_in=2")
WAYS = {"one": (), "tree": TREE, "ranks": ("reduce.ranks=4",)}


def bench(folder: Path, slurm: Slurm, *, trials: int, seconds: float, visibility_s: int = 2) -> Bench:
    (folder / "trial.py").write_text(textwrap.dedent(PROGRAM))
    text = SWEEP.format(
        python=sys.executable,
        name=folder.name.replace("[", ".").replace("]", ""),
        trials=trials,
        seconds=seconds,
        visibility_s=visibility_s,
    )
    (folder / "sweep.yaml").write_text(text)
    return Bench(folder, slurm)


def calm(there: Bench) -> bytes:
    """What one worker on this machine comes to, undisturbed."""
    there.orc("run", "sweep.yaml", "--dir", "calm", "--workers", "1", code=4)
    return next((there.folder / "calm").glob("*/summary.json")).read_bytes()


def ended(there: Bench, sweep: str) -> bool:
    return not there.status(sweep)["jobs"]


def add_duplicates(root: Path) -> None:
    """What a second live copy of each worker would have written: all of its outcomes, once more."""
    for path in list((root / "records").glob("*.jsonl")):
        shutil.copy(path, path.with_name(f"{os.urandom(16).hex()}.jsonl"))


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def have_ended(slurm: Slurm, jobs: list[str]) -> bool:
    """Whether these, which the sweep's ledger doesn't know, have ended: all elements of them."""
    return all(set(slurm.job_state(job).split()) <= {*ENDED} for job in jobs)


def reduce_again(slurm: Slurm, root: Path) -> None:
    """Hand in the scripts of the reducers as they were, each after the one before."""
    scripts = sorted((root / "sbatch").glob("reduce*.sh"))
    before: list[str] = []
    for script in scripts:
        after = [f"--dependency=afterany:{before[-1]}"] if before else []
        before.append(slurm.submit(script, *after))
    assert len(before) in (1, 3)
    slurm.wait_for(lambda: have_ended(slurm, before), limit_s=90)


def test_a_worker_sixteen_workers_a_tree_and_four_ranks_write_the_same_bytes(tmp_path: Path, slurm: Slurm) -> None:
    there = bench(tmp_path, slurm, trials=32, seconds=0.0)
    sweeps = {way: there.orc("submit", "sweep.yaml", "--dir", way, *options).strip() for way, options in WAYS.items()}
    expected = calm(there)
    assert len(set(sweeps.values())) == 1
    for way, sweep in sweeps.items():
        at = there.below(way)
        slurm.wait_for(lambda at=at, sweep=sweep: ended(at, sweep), limit_s=150)
        root = at.summary_file(sweep).parent
        found = {"undisturbed": at.summary_file(sweep).read_bytes()}
        assert len(list((root / "logs").glob("first-*"))) == 4, "some trials were tried again"
        add_duplicates(root)
        at.summary_file(sweep).unlink()
        reduce_again(slurm, root)
        found["with duplicates"] = at.summary_file(sweep).read_bytes()
        hashes = {name: sha256(data).hexdigest() for name, data in found.items()}
        assert hashes == dict.fromkeys(found, sha256(expected).hexdigest()), way
        assert not (root / "reduce").exists()
    counted = json.loads(expected)
    assert (counted["planned"], counted["count"], counted["failed"], counted["diverged"]) == (32, 28, 2, 2)
    submitted = (tmp_path / "tree" / sweeps["tree"] / "submissions.jsonl").read_text()
    assert all(f'"what":"{part}"' in submitted for part in ("reduce-0", "reduce-1", "reducer")), "a tree of depth 3"


def by_hand(slurm: Slurm, root: Path, part: str) -> str:
    """Submit a script of the sweep once more, without its dependency."""
    return slurm.submit(root / "sbatch" / f"{part}.sh")


@pytest.mark.parametrize("way", ["one", "tree"])
def test_fault_38_a_requeue_beside_reducers_that_are_killed(tmp_path: Path, slurm: Slurm, way: str) -> None:
    there = bench(tmp_path, slurm, trials=8, seconds=1.5, visibility_s=20)
    sweep = there.orc(
        "submit", "sweep.yaml", "reduce.trials_per_range=2", "reduce.fan_in=2" if way == "tree" else "reduce.fan_in=4"
    ).strip()
    root = there.summary_file(sweep).parent
    slurm.wait_for(lambda: there.trials(sweep)["running"] > 0)
    # Reducers beside the workers: one level that waits for records, and the root; Slurm requeues one, one is killed.
    early = [by_hand(slurm, root, path.stem) for path in sorted((root / "sbatch").glob("reduce*.sh"))]
    slurm.wait_for_state(early[-1], "RUNNING")
    workers = json.loads((root / "submissions.jsonl").read_text().splitlines()[1])["job"]
    subprocess.run(["scontrol", "requeue", f"{workers}_0"], env=slurm.env, check=False, capture_output=True)
    subprocess.run(["scontrol", "requeue", early[-1]], env=slurm.env, check=False, capture_output=True)
    subprocess.run(["scancel", "--signal=KILL", "--full", early[0]], env=slurm.env, check=False, capture_output=True)
    slurm.wait_for(lambda: ended(there, sweep) and have_ended(slurm, early), limit_s=120)
    assert there.summary_file(sweep).read_bytes() == calm(there)


def test_fault_38_a_reducer_before_the_last_outcome_says_that_it_is_missing(tmp_path: Path, slurm: Slurm) -> None:
    there = bench(tmp_path, slurm, trials=2, seconds=6.0, visibility_s=0)
    sweep = there.orc("submit", "sweep.yaml").strip()
    root = there.summary_file(sweep).parent
    early = by_hand(slurm, root, "reducer")
    slurm.wait_for_state(early, "FAILED", limit_s=60)
    assert slurm.show(early)["ExitCode"] == "4:0"
    assert json.loads(there.summary_file(sweep).read_bytes())["missing"] == 2
    there.wait_until_reduced(sweep)
