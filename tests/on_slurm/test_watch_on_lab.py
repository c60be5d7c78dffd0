"""`--watch` on a real Slurm: what a sweep's jobs can't do for themselves is done from outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from invariants import check
from on_lab import Slurm
from on_lab_sweeps import STEPS, Bench, build

from orchestrator.slurm.lab import LabOptions

OPTIONS = LabOptions(nodes=6, cpus=16, grace_time_s=5, kill_wait_s=5, cred_expire_s=600)
"""After a requeue, this Slurm lets a job wait for ten minutes: longer than any test here."""
LIMIT_S = 300.0


@dataclass(frozen=True)
class Watcher:
    """An `orc` that stays; `log` is what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()

    def end(self, code: int) -> str:
        """What it said, once it has ended with that exit code."""
        found = self.process.wait(timeout=LIMIT_S)
        assert (found, "Traceback" in self.said) == (code, False), self.said
        return self.said


Steps = Callable[..., Bench]
Watch = Callable[..., Watcher]


@pytest.fixture
def steps(tmp_path: Path, slurm_of: Callable[[LabOptions], Slurm]) -> Iterator[Steps]:
    """Makes a sweep of trials that take steps, save after each, and stay at the third until they are let go."""
    made: list[Bench] = []

    def make(node: str, *, more: str = "", **options: object) -> Bench:
        where = f"time: 10, nodelist: {node}{more}"
        made.append(build(tmp_path, slurm_of(OPTIONS), program=STEPS, options=where, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for bench in made:
        bench.let_go()
        bench.run("cancel")  # where a test failed in the middle


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Starts `orc`, returns when it watches, and ends it with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(bench: Bench, *argv: str) -> Watcher:
        log = bench.folder / f"watch-{len(started)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", *argv, "--watch"],
                cwd=bench.folder,
                env={**bench.slurm.env, "ORC_DIR": bench.runs},
                stdout=file,
                stderr=file,
            )
        started.append(process)
        watcher = Watcher(process, log)
        bench.slurm.wait_for(lambda: "watching it to its end" in watcher.said or process.poll() is not None, LIMIT_S)
        return watcher

    yield start
    for process in started:
        process.kill()
        process.wait()


def the_sweep(bench: Bench) -> str:
    (folder,) = [path for path in (bench.folder / bench.runs).iterdir() if path.is_dir()]
    return folder.name


def cancelling(bench: Bench, name: str, node: str, grace_time_s: int) -> str:
    """A partition of one node whose jobs are cancelled when they are preempted; as an option of sbatch."""
    settings = (f"Nodes={node}", "PriorityTier=1", "PreemptMode=CANCEL", f"GraceTime={grace_time_s}", "State=UP")
    bench.slurm.run("scontrol", "create", f"PartitionName={name}", *settings)
    return f", partition: {name}"


def without_scontrol(folder: Path) -> str:
    """`launch.setup` by which a worker finds few programs, and not scontrol."""
    commands = folder / "commands"
    commands.mkdir()
    for name in ("srun", "rm", "mktemp", "sleep", "readlink"):
        found = shutil.which(name)
        assert found is not None
        (commands / name).symlink_to(found)
    return f"setup: 'export PATH={commands}'"


@pytest.mark.parametrize("has_scontrol", [True, False], ids=["killed", "told, without scontrol"])
def test_what_slurm_cancels_instead_of_requeueing_is_submitted_again_and_goes_on(
    steps: Steps, watch: Watch, has_scontrol: bool
) -> None:
    node, grace_s = ("n0", 0) if has_scontrol else ("n1", 5)
    bench = steps(node, trials=2, block=2)
    more = cancelling(bench, f"cancelling{node}", node, grace_s)
    launch = "" if has_scontrol else without_scontrol(bench.folder)
    bench = steps(node, more=more, launch=launch, trials=2, block=2)
    watcher = watch(bench, "submit", "sweep.yaml")
    bench.wait_for_step()
    bench.urgent(node)
    bench.slurm.wait_for(lambda: len(bench.began_from()) == 2, LIMIT_S)
    bench.let_go()
    said = watcher.end(0)
    assert "its workers have ended (1 PREEMPTED); 2 of 2 trials go on in workers-0" in said
    assert "2 of 2 complete" in said
    assert bench.began_from() == [0, 3]
    bench.finish(the_sweep(bench), says=("attempts that ended without an outcome: 1 ",))


def test_what_somebody_cancels_is_not_submitted_again_until_somebody_resumes_it(steps: Steps, watch: Watch) -> None:
    bench = steps("n2", trials=1, block=1)
    watcher = watch(bench, "submit", "sweep.yaml")
    bench.wait_for_step()
    sweep = the_sweep(bench)
    bench.slurm.run("scancel", bench.worker(sweep))
    said = watcher.end(4)
    assert f"not submitted again: a job of it is CANCELLED; `orc resume {sweep}` goes on" in said
    assert bench.began_from() == [0]
    bench.let_go()
    assert "1 of 1 complete" in watch(bench, "resume", sweep).end(0)
    assert bench.began_from() == [0, 3]
    bench.finish(sweep)


def test_a_sweep_goes_on_when_nobody_watches_it_any_more(steps: Steps, watch: Watch) -> None:
    bench = steps("n3", trials=1, block=1)
    watcher = watch(bench, "submit", "sweep.yaml")
    bench.wait_for_step()
    watcher.process.send_signal(signal.SIGINT)
    said = watcher.end(75)
    sweep = the_sweep(bench)
    assert f"{sweep}: no longer watched, but it goes on" in said
    assert f"`orc resume --watch {sweep}`" in said
    assert bench.trials(sweep)["running"] == 1
    bench.finish(sweep)


@pytest.mark.parametrize("by", ["submit --watch", "resume"])
def test_a_requeued_job_does_not_wait_where_slurm_lets_it_start(steps: Steps, watch: Watch, by: str) -> None:
    node = "n4" if by == "resume" else "n5"
    bench = steps(node, trials=1, block=1)
    watcher = watch(bench, "submit", "sweep.yaml") if by != "resume" else None
    sweep = bench.submit() if watcher is None else ""
    bench.wait_for_step()
    sweep = sweep or the_sweep(bench)
    worker = bench.worker(sweep)
    bench.slurm.run("scontrol", "requeue", worker)
    if watcher is None:
        waiting = f"squeue --noheader --array --format=%i|%T|%r --user={os.getuid()}".split()
        bench.slurm.wait_for(lambda: f"{worker}|PENDING|BeginTime" in bench.slurm.run(*waiting), LIMIT_S)
        done = bench.run("resume", sweep)
        assert f"requeued, and started without the wait that Slurm imposes: {worker}" in done.stderr
    bench.slurm.wait_for(lambda: len(bench.began_from()) == 2, LIMIT_S)
    bench.let_go()
    if watcher is not None:
        assert f"requeued, and started without the wait: {worker}" in watcher.end(0)
    assert bench.began_from() == [0, 3]
    bench.finish(sweep)


def test_a_job_that_waits_because_its_user_said_so_is_left_alone(steps: Steps) -> None:
    bench = steps("n4", more=", begin: now+1hour", trials=1, block=1)
    sweep = bench.submit()
    bench.slurm.wait_for(lambda: "BeginTime" in {job["reason"] for job in bench.jobs(sweep)}, LIMIT_S)
    assert "started without" not in bench.run("resume", sweep).stderr
    assert {job["state"] for job in bench.jobs(sweep)} == {"PENDING"}
    bench.orc("cancel", sweep)
    check(bench.paths(sweep), jobs=bench.all_jobs(sweep))
