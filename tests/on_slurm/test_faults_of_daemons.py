"""Faults of Slurm's own daemons, on a lab that these tests may break: one at a time, and whole again after each."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from invariants import Memory, check
from on_lab import Slurm
from on_lab_sweeps import STEPS, Bench, build

from orchestrator.slurm.lab import LabOptions

OPTIONS = LabOptions(nodes=3, cpus=4, slurmd_timeout_s=10, kill_wait_s=2)
Steps = Callable[..., Bench]


@pytest.fixture
def own(shared: Path, slurm_of: Callable[[LabOptions], Slurm]) -> Iterator[Slurm]:
    """The lab, to one test at a time; its daemons run again afterwards."""
    with FileLock(shared / "daemons.lock"):
        slurm = slurm_of(OPTIONS)
        yield slurm
        for name, pid in slurm.lab.status().daemons:
            if pid is None:
                slurm.lab.start_daemon(name)
        open_queue(slurm)
        slurm.run("scancel", "--user", "root", "--quiet")
        slurm.wait_for(lambda: slurm.run("squeue", "-h") == "", 60)
        slurm.wait_for(lambda: are_idle(slurm), 120)


def are_idle(slurm: Slurm) -> bool:
    """Whether all nodes are; those that Slurm has drained, since a job's start failed there, are given back to it."""
    states = dict(line.split() for line in slurm.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
    for node, state in states.items():
        if state.startswith("drained"):
            slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    return set(states.values()) == {"idle"}


def open_queue(slurm: Slurm, state: str = "UP") -> None:
    """Whether jobs start: they do, or with `DOWN` wait."""
    slurm.run("scontrol", "update", "PartitionName=low", f"State={state}")


@pytest.fixture
def steps(tmp_path: Path, own: Slurm) -> Iterator[Steps]:
    """Makes a sweep of trials that take steps, save after each, and stay at the third until they are let go."""

    def make(more: str = "", **options: object) -> Bench:
        return build(tmp_path, own, program=STEPS, options=f"time: 10{more}", **options)  # type: ignore[arg-type]

    yield make
    (tmp_path / "go").touch()


def wait_until_saved(slurm: Slurm, job: str) -> None:
    """The controller writes its state some seconds after a change; killed before that, it has forgotten."""
    state = slurm.lab.root / "state" / "job_state"
    before = state.stat().st_mtime_ns if state.exists() else 0
    slurm.run("scontrol", "update", f"JobId={job}", "Priority=99")
    slurm.wait_for(lambda: state.exists() and state.stat().st_mtime_ns > before)


# 11: a node whose daemon dies


def test_fault_11_a_node_that_is_lost_runs_on_and_its_late_record_changes_nothing(steps: Steps, own: Slurm) -> None:
    bench = steps(", exclude: n2", trials=1, block=1, at_term="ignore")
    # Each copy waits for a file of its own.
    waits = STEPS.replace('"go"', '"go" + os.environ.get("SLURM_RESTART_COUNT", "0")')
    (bench.folder / "trial.py").write_text(waits)
    sweep = bench.submit()
    memory = Memory(bench.paths(sweep))
    bench.wait_for_step()
    memory.look()
    node = own.show(bench.worker(sweep))["NodeList"]
    own.lab.stop_daemon(f"slurmd-{node}", signal.SIGKILL)
    own.wait_for(lambda: len(bench.began_from()) == 2, 90)
    (bench.folder / "go1").touch()
    before = bench.wait_until_reduced(sweep)
    (bench.folder / "go0").touch()
    own.wait_for(lambda: len(bench.lines(sweep, "outcome")) == 2, 60)
    bench.finish(sweep)
    assert bench.wait_until_reduced(sweep) == before
    memory.look()


# 13: a controller that dies just after a start


def test_fault_13_a_job_that_is_held_is_shown_with_the_command_that_lets_it_go(steps: Steps, own: Slurm) -> None:
    bench = steps(trials=1, block=1)
    sweep = bench.submit()
    bench.wait_for_step()
    own.run("scontrol", "requeuehold", bench.worker(sweep))
    own.wait_for(lambda: "is held" in bench.orc("status", sweep), 60)
    assert f"`scontrol release {bench.worker(sweep)}`" in bench.orc("status", sweep)
    own.wait_for(lambda: bench.do_as_told(sweep))
    own.wait_for(lambda: len(bench.began_from()) == 2, 60)
    bench.finish(sweep)


@pytest.mark.parametrize("is_over", [True, False])
def test_fault_13_a_controller_that_forgets_a_start_repeats_no_trial_and_whoever_does_as_told_ends_the_sweep(
    steps: Steps, own: Slurm, is_over: bool
) -> None:
    bench = steps(trials=2, block=1)
    (bench.folder / "trial.py").write_text(STEPS.replace('params["stay"]', '(3 if index != "0" else 9)'))
    open_queue(own, "DOWN")
    sweep = bench.submit()
    wait_until_saved(own, bench.worker(sweep).partition("_")[0])
    before = kept_state(own)
    open_queue(own)
    bench.wait_for_step(trial=1)
    own.wait_for(lambda: bench.trials(sweep)["complete"] == 1)
    if is_over:
        own.wait_for(lambda: len(bench.jobs(sweep)) == 2)  # the other worker, and the reducer
    memory = Memory(bench.paths(sweep))
    memory.look()
    forget(own, before)
    open_queue(own)
    bench.let_go()
    told: list[str] = []
    own.wait_for(lambda: told.extend(bench.do_as_told(sweep)) or bench.is_reduced(sweep), 180)
    own.wait_for(lambda: told.extend(bench.do_as_told(sweep)) or not bench.jobs(sweep), 180)
    bench.finish(sweep)
    memory.look()
    assert bench.began_from(0) == [0], f"a finished trial ran again; told: {told}"
    assert bench.began_from(1) in ([0], [0, 3])


# 14: no controller


def test_fault_14_without_a_controller_a_submission_ends_with_5_and_later_goes_through_once(
    steps: Steps, own: Slurm
) -> None:
    bench = steps(trials=2, block=1)
    own.lab.stop_daemon("slurmctld", signal.SIGKILL)
    said = bench.run("submit", "sweep.yaml")
    assert said.returncode == 5
    assert "run the same command again" in said.stderr
    assert "Traceback" not in said.stderr
    own.lab.start_daemon("slurmctld")
    sweep = bench.submit()
    assert bench.submit() == sweep
    names = own.run("squeue", "-h", "--states=all", "-o", "%F %j").splitlines()
    assert len({name for name in names if sweep in name}) == 2  # workers and reducer
    bench.finish(sweep)


def test_fault_14_a_controller_that_is_gone_after_the_submission_is_said_and_costs_nothing(
    steps: Steps, own: Slurm
) -> None:
    bench = steps(trials=2, block=1)
    sweep = bench.submit()
    bench.wait_for_step(trial=0)
    bench.wait_for_step(trial=1)
    wait_until_saved(own, bench.worker(sweep))
    own.lab.stop_daemon("slurmctld", signal.SIGKILL)
    assert "jobs: unknown" in bench.orc("status", sweep)
    assert bench.run("cancel", sweep).returncode == 5
    bench.let_go()
    own.wait_for(lambda: len(bench.lines(sweep, "outcome")) == 2, 60)
    own.lab.start_daemon("slurmctld")
    bench.orc("cancel", sweep)
    own.wait_for(lambda: not bench.jobs(sweep), 90)
    bench.orc("resume", sweep)
    bench.finish(sweep)


# 39: a job id that comes back


def kept_state(slurm: Slurm) -> Path:
    """A copy of what the controller has written down up to now."""
    copy = slurm.lab.root / "state.kept"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(slurm.lab.root / "state", copy, ignore=shutil.ignore_patterns("*.lock"))
    return copy


def forget(slurm: Slurm, state: Path) -> None:
    """Kill the controller, and start it as if it had written nothing down since."""
    slurm.lab.stop_daemon("slurmctld", signal.SIGKILL)
    shutil.rmtree(slurm.lab.root / "state")
    shutil.copytree(state, slurm.lab.root / "state")
    slurm.lab.start_daemon("slurmctld")


def test_fault_39_a_job_id_that_comes_back_is_nobodys_and_no_file_is_shared(steps: Steps, own: Slurm) -> None:
    # Not on the same node: the first job of that number may be at work still, and Slurm would not start a second there.
    bench = steps(", exclude: n2", trials=1, block=1, at_term="leave")
    elsewhere = ("-w", "n2", "-o", "/dev/null")
    sleeper = bench.folder / "foreign.sh"
    sleeper.write_text("#!/bin/sh\nsleep 300\n")
    own.wait_for(lambda: own.run("squeue", "-h") == "")
    state = kept_state(own)
    sweep = bench.submit()
    job = bench.worker(sweep).partition("_")[0]
    forget(own, state)
    foreign = own.submit(sleeper, *elsewhere)
    while int(foreign) < int(job):
        foreign = own.submit(sleeper, *elsewhere)
    assert foreign == job, "the controller did not give the id again"
    own.wait_for_state(foreign, "RUNNING", limit_s=60)
    assert bench.jobs(sweep) == []  # it is not taken for ours
    bench.orc("cancel", sweep)
    assert own.job_state(foreign) == "RUNNING"
    own.run("scancel", foreign)
    bench.let_go()
    bench.orc("resume", sweep)
    writers = bench.lines(sweep, "writer")
    bench.finish(sweep)
    assert len({writer["writer"] for writer in bench.lines(sweep, "writer")}) >= len(writers)
    check(bench.paths(sweep), jobs=bench.all_jobs(sweep))
