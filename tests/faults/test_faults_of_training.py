"""Faults of trials in training, with real workers and real kills: they go on where they were, with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import sweeps
from invariants import Memory, check, processes_of
from sweeps import OTHER, TOKEN, counts, records, started, superseded, until

from orchestrator.cli import logs
from orchestrator.config.spec import CheckpointOptions, Retries
from orchestrator.core.paths import SweepPaths
from orchestrator.results import resumption
from orchestrator.sweep import Sweep

JOB = """
import os, time
from pathlib import Path
import torch
import orchestrator as orc


def build(*, lr):
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.3), torch.nn.Linear(6, 1))
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    return orc.State(net=net, opt=opt, schedule=torch.optim.lr_scheduler.ExponentialLR(opt, 0.9))


def losses(net, batch):
    x, y = batch
    return (net(x) - y).square().mean(dim=1)


def train(trial):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    y = x.sum(dim=1, keepdim=True)
    trial.build(build)
    for _ in trial.epochs(6):
        for batch in trial.batches((x, y), 8):
            trial.step(losses, batch)
            if "CALM" not in os.environ:
                tell(trial)
        trial.state.others["schedule"].step()
        trial.validate(losses, (x, y))


def tell(trial):
    here = Path(__file__).parent
    with (here / f"steps-{trial.index}").open("a") as steps:
        steps.write(f"{trial.attempt}:{trial.num_steps} ")
    (here / "worker").write_text(str(os.getpid()))
    if trial.attempt == 0 and trial.num_steps in (6, 11) and (here / "orderly").exists():
        saved = here.parent / "checkpoints" / str(trial.index)
        while not list(saved.glob(f"{trial.num_steps - 1:012d}-*.ckpt")):
            time.sleep(0.01)
    if trial.attempt == 0 and trial.num_steps == 12:
        time.sleep(1.1)  # it tells once a second where it is
    while trial.attempt == 0 and trial.num_steps == 13 and not trial.should_stop and not (here / "go").exists():
        (here / f"at-{trial.index}").touch()
        time.sleep(0.01)
    time.sleep(0.03 if (here / "slow").exists() else 0.0)
"""
"""Thirty steps, five an epoch. The first attempt stays at the 13th, in the middle of the third epoch, until it is told
of a notice, or killed, or may go on. An orderly one waits for its saves, which come later where the disk is slow."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> SweepPaths:
    """The same sweep, run by one worker in peace."""
    paths = sweep(tmp_path_factory.mktemp("calm"))
    assert sweeps.run(paths, env={"CALM": "1"})[0] == 0
    sweeps.summary(paths)
    return paths


def sweep(runs: Path, every: str = "5 steps") -> SweepPaths:
    """Two trials; how often they save is no part of what the sweep is."""
    spec = sweeps.spec(
        program="train.py",
        parameters={"lr": {"values": [0.01, 0.03]}},
        retries=Retries(signal=60, unknown=20),
        trials_per_task=2,
        notice_s=5,
    )
    return sweeps.folder(runs, replace(spec, checkpoint=CheckpointOptions(every=every)), JOB)


def at_step_13(paths: SweepPaths, trial: int = 0) -> None:
    until((paths.code / f"at-{trial}").exists)


def steps_of(paths: SweepPaths, trial: int = 0) -> dict[int, list[int]]:
    """Attempt -> the steps that it made."""
    found: dict[int, list[int]] = {}
    for word in (paths.code / f"steps-{trial}").read_text().split():
        attempt, _, step = word.partition(":")
        found.setdefault(int(attempt), []).append(int(step))
    return found


def worker_of(paths: SweepPaths) -> int:
    return int((paths.code / "worker").read_text())


def finished(paths: SweepPaths, calm: SweepPaths, *, says: tuple[str, ...] = (), memory: Memory | None = None) -> None:
    """Nothing was lost, nothing counts twice, and every bit is that of the sweep that was left in peace."""
    assert counts(paths) == {"complete": 2}
    assert sweeps.summary(paths) == calm.summary.read_bytes()
    assert {path.name: path.read_bytes() for path in paths.models.iterdir()} == {
        path.name: path.read_bytes() for path in calm.models.iterdir()
    }
    assert sweeps.names(paths.checkpoints) == []
    check(paths, undisturbed=calm.summary.read_bytes(), says=says, memory=memory, exit_codes=[0])


def resumes(paths: SweepPaths) -> list[tuple[int, int, int, int]]:
    return [(each.trial, each.attempt, each.step, each.lost) for each in resumption.read(paths).resumptions]


def log_of(paths: SweepPaths, trial: int = 0) -> str:
    shown: list[str] = []
    found = Sweep(paths)
    logs.show(found, found.plan.trial(trial), follow=False, write=shown.append)
    return "".join(shown)


# Kills


def test_fault_03_a_worker_that_is_killed_loses_what_was_not_saved_and_the_loss_is_reported(
    tmp_path: Path, calm: SweepPaths
) -> None:
    paths = sweep(tmp_path)
    (paths.code / "orderly").touch()
    memory = Memory(paths)
    with started(paths) as process:
        at_step_13(paths)
        until(lambda: saves(paths) == [5, 10] and records(paths, "at"))
        os.kill(worker_of(paths), signal.SIGKILL)
        memory.look()
        (paths.code / "go").touch()
        assert process.wait(60) == 0
    assert steps_of(paths) == {0: [*range(1, 14)], 1: [*range(11, 31)]}
    assert resumes(paths) == [(0, 1, 10, 2)]  # as far as is known: it said that it was at step 12
    finished(
        paths, calm, says=("1 signal", "1 attempt went on from a checkpoint; 2 steps were done twice"), memory=memory
    )


def test_fault_03_a_job_that_is_killed_as_a_whole_goes_on_in_its_next_run(tmp_path: Path, calm: SweepPaths) -> None:
    paths = sweep(tmp_path)
    (paths.code / "orderly").touch()
    job = {"SLURM_JOB_ID": "77", "PATH": "/nowhere"}
    with started(paths, env=job) as process:
        at_step_13(paths)
        until(lambda: saves(paths) == [5, 10] and records(paths, "at"))
        process.kill()
        process.wait(60)
    until(lambda: not processes_of(paths))
    (paths.code / "go").touch()
    assert sweeps.run(paths, env=job | {"SLURM_RESTART_COUNT": "1"})[0] == 0
    assert steps_of(paths)[1] == [*range(11, 31)]
    assert resumes(paths)[0] == (0, 1, 10, 2)
    finished(paths, calm)


@pytest.mark.parametrize("seed", range(2))
def test_fault_20_whenever_a_worker_is_killed_in_the_middle_of_saving_the_newest_whole_checkpoint_is_used(
    tmp_path: Path, calm: SweepPaths, seed: int
) -> None:
    rng, paths = random.Random(seed), sweep(tmp_path, "1 steps")
    (paths.code / "slow").touch()
    (paths.code / "go").touch()
    with started(paths) as process:
        killed: set[int] = set()
        while process.poll() is None and len(killed) < 40:
            with suppress(FileNotFoundError, ValueError, ProcessLookupError, subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.02, 0.25))
                break
            with suppress(FileNotFoundError, ValueError, ProcessLookupError):
                os.kill(worker := worker_of(paths), signal.SIGKILL)
                killed.add(worker)
        (paths.code / "slow").unlink()
        assert process.wait(60) == 0
    assert len(killed) > 3
    assert max(len(steps) for steps in steps_of(paths).values()) < 31
    finished(paths, calm)


# Notices


class Controller:
    """A scontrol that says what a test wants of job 77, and of its state once it was asked to requeue it."""

    def __init__(self, folder: Path, facts: str) -> None:
        folder.mkdir()
        self._folder = folder
        (folder / "scontrol").write_text(f"""#!/bin/sh
        case "$*" in *requeue*) echo x >> {folder}/requeued; exit 0 ;; esac
        state=RUNNING n=${{SLURM_RESTART_COUNT:-0}}
        [ -e {folder}/requeued ] && state=PENDING n=$((n + 1))
        echo "JobId=77 JobState=$state Restarts=$n {facts} Comment=orc:{TOKEN}:w"
        """)
        (folder / "scontrol").chmod(0o755)
        self.env = {"SLURM_JOB_ID": "77", "PATH": f"{folder}:{os.environ['PATH']}"}

    @property
    def requeues(self) -> int:
        calls = self._folder / "requeued"
        return len(calls.read_text().split()) if calls.exists() else 0


PREEMPTED = "RunTime=00:00:01 TimeLimit=01:00:00 PreemptTime=2030-01-01T00:00:00"
NEAR_ITS_LIMIT = "RunTime=00:59:00 TimeLimit=01:00:00 PreemptTime=None"
BY_HAND = "RunTime=00:00:01 TimeLimit=10:00:00 PreemptTime=None"


def saves(paths: SweepPaths, trial: int = 0) -> list[int]:
    """The steps of which there are checkpoints."""
    folder = paths.checkpoint(trial)
    return [int(path.name.partition("-")[0]) for path in sorted(folder.glob("*.ckpt"))]


@pytest.mark.parametrize(("facts", "cause"), [(PREEMPTED, "preempted"), (NEAR_ITS_LIMIT, "timeout")])
def test_fault_02_and_04_a_job_that_is_noticed_saves_at_that_step_leaves_and_goes_on_there(
    tmp_path: Path, calm: SweepPaths, facts: str, cause: str
) -> None:
    paths, controller = sweep(tmp_path, "1h"), Controller(tmp_path / "slurm", facts)
    with started(paths, env=controller.env) as process:
        at_step_13(paths)
        for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
        assert process.wait(60) == 75
    assert (saves(paths), controller.requeues) == ([13], 1)
    (end,) = [line for line in records(paths, "end") if line["trial"] == 0]
    assert (end["cause"], end["step"], end["detail"]) == (cause, 13, "saved at step 13, to go on later")
    assert sweeps.run(paths, env=controller.env | {"SLURM_RESTART_COUNT": "1"})[0] == 0
    assert steps_of(paths) == {0: [*range(1, 14)], 1: [*range(14, 31)]}
    assert resumes(paths)[0] == (0, 1, 13, 0)
    finished(paths, calm, says=(f"1 {cause}", "1 attempt went on from a checkpoint; no step was done twice"))


def test_fault_05_a_cancelled_trial_is_saved_and_resume_goes_on_there(tmp_path: Path, calm: SweepPaths) -> None:
    paths = sweep(tmp_path, "1h")
    with started(paths) as process:
        at_step_13(paths)
        paths.cancelled.write_text("0")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    check(paths, says=("cancelled", "orc resume"), exit_codes=[75])
    assert saves(paths) == [13]
    superseded(paths, OTHER, TOKEN)
    assert sweeps.run(paths, submission=OTHER)[0] == 0
    assert steps_of(paths)[1] == [*range(14, 31)]
    finished(paths, calm)


@pytest.mark.parametrize(("facts", "complete"), [(BY_HAND, 2), ("Comment=another's", 1)])
def test_a_signal_by_hand_or_without_a_reason_saves_and_the_trial_goes_on(
    tmp_path: Path, calm: SweepPaths, facts: str, complete: int
) -> None:
    paths, controller = sweep(tmp_path, "1h"), Controller(tmp_path / "slurm", facts)
    (paths.code / "slow").touch()
    with started(paths, env=controller.env) as process:
        at_step_13(paths)
        process.send_signal(signal.SIGTERM)
        until(lambda: saves(paths) == [13])
        (paths.code / "slow").unlink()
        (paths.code / "go").touch()
        said, _ = process.communicate(timeout=60)
    assert said.count("--- saved at step 13 after a notice, and goes on") == 1
    assert steps_of(paths) == {0: [*range(1, 31)]}
    assert counts(paths).get("complete") == complete
    assert sweeps.names(paths.checkpoints) == []
    calm_values = sweeps.fold(calm).values
    assert sweeps.fold(paths).values[0] == calm_values[0]
