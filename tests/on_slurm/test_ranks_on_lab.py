"""Trials of two ranks on a real Slurm: displaced, killed and stopped in mid-epoch, they go on to a calm run's bytes."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from on_lab import Slurm
from on_lab_sweeps import Bench
from test_faults_on_lab import OPTIONS, SHARED, restarts

from orchestrator.slurm.lab import LabOptions

NODE = "n9"
"""Of the test that displaces what runs on it."""

# An attempt stays in its second epoch until the file `go.<attempt>` is there, so that a fault finds it in the middle:
# all its ranks do, or one of them while the others wait for it in the middle of their next step. From there on it is
# slow: half a minute is left to hear of what a supervisor has just written down.
PROGRAM = """
import os, pathlib, time
import torch, torch.nn.functional as F
import orchestrator as orc

STAYS = {stays}

def build(*, width=30):
    wide = [torch.nn.Linear(20, width), torch.nn.Tanh(), torch.nn.Dropout(0.2)]
    net = torch.nn.Sequential(*wide, torch.nn.Linear(width, 4))
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))

def losses(net, batch):
    inputs, labels = batch
    return F.cross_entropy(net(inputs), labels, reduction="none")

def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(50, 20, generator=generator), torch.randint(0, 4, (50,), generator=generator)

def stay(trial):
    rank, attempt = trial.group.rank, trial.attempt
    if attempt < len(STAYS) and rank in STAYS[attempt] and trial.num_steps == 10 + attempt:
        pathlib.Path(f"here.{{attempt}}.{{rank}}.new").write_text(str(os.getpid()))
        pathlib.Path(f"here.{{attempt}}.{{rank}}.new").rename(f"here.{{attempt}}.{{rank}}")
        while not pathlib.Path(f"go.{{attempt}}").exists():
            time.sleep(0.05)
    if attempt < len(STAYS) and trial.num_steps > 10 + attempt:
        time.sleep(1)

def train(trial):
    trial.build(build)
    for epoch in trial.epochs(6):
        for batch in trial.batches(data(0), 8):
            trial.step(losses, batch)
            if "CALM" not in os.environ:
                stay(trial)
        trial.validate(losses, data(1))
"""

SWEEP = """
program: train.py
method: grid
parameters: {{width: {{values: [30]}}}}
checkpoint: {{every: {every}}}
launch: {{ranks_per_node: 2, notice_s: 30, silent_s: 2, retries: {{signal: 9}}}}
reduce: {{visibility_s: 2}}
slurm: {{time: 10, nodelist: {node}{more}}}
"""
Ranks = Callable[..., Bench]


@pytest.fixture
def ranks(tmp_path: Path, slurm_of: Callable[[LabOptions], Slurm]) -> Ranks:
    """Makes a sweep of one trial whose attempt `i` stays at its step `10 + i`, in the ranks `stays[i]`."""

    def make(*stays: tuple[int, ...], node: str, every: str = "1h", more: str = "") -> Bench:
        (tmp_path / "train.py").write_text(PROGRAM.format(stays=stays))
        (tmp_path / "sweep.yaml").write_text(SWEEP.format(every=every, node=node, more=more))
        return Bench(tmp_path, slurm_of(OPTIONS))

    return make


def pid_of(bench: Bench, attempt: int, rank: int) -> int:
    """The process of a rank, once it is where it stays."""
    file = bench.folder / f"here.{attempt}.{rank}"
    bench.slurm.wait_for(file.exists, 120)
    return int(file.read_text())


def finish(bench: Bench, sweep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the end: the summary and the model have the bytes of a run without faults, and nothing is left."""
    monkeypatch.setenv("CALM", "1")  # of the run on this machine; those on Slurm have begun
    bench.finish(sweep, limit_s=150)
    (model,) = bench.paths(sweep).models.iterdir()
    (calm,) = (bench.folder / "calm").glob("*/models/*")
    assert (model.name, model.read_bytes()) == (calm.name, calm.read_bytes())


def test_fault_02_a_trial_of_two_ranks_that_is_preempted_saves_at_one_step_and_ends_with_the_same_bytes(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = ranks((0, 1), node=NODE, more=", partition: patient")
    partition = ("PartitionName=patient", f"Nodes={NODE}", "PriorityTier=1", "PreemptMode=REQUEUE", "GraceTime=120")
    bench.slurm.run("scontrol", "create", *partition, "State=UP")
    sweep = bench.submit()
    logs = bench.paths(sweep).logs

    def said() -> str:
        return "".join(path.read_text() for path in sorted(logs.glob("*.log")))

    for rank in (0, 1):
        pid_of(bench, 0, rank)
    bench.urgent(NODE)
    bench.slurm.wait_for(lambda: any("preempted" in notice["action"] for notice in bench.notices(sweep)))
    (bench.folder / "go.0").touch()
    bench.slurm.wait_for(lambda: "to go on later" in said())
    finish(bench, sweep, monkeypatch)
    steps = re.findall(r"saved at step (\d+), to go on later", said())
    assert len(steps) == 2, "each rank says it"
    assert len(set(steps)) == 1
    assert f"--- goes on from step {steps[0]}" in bench.orc("logs", "0", sweep)
    assert restarts(bench, sweep) == "1"
    assert json.loads(bench.orc("best", "--json", sweep))[0]["attempts"] == 2
    script = (bench.paths(sweep).sbatch / "workers-0.sh").read_text()
    assert "#SBATCH --cpus-per-task=2" in script


def test_fault_08_09_ranks_that_are_killed_or_stopped_are_named_and_the_job_goes_on_to_the_same_bytes(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank is killed, then the last, then the last is stopped: in one job, which outlives them all."""
    bench = ranks((0,), (1,), (1,), node=SHARED, every="1 steps")
    sweep = bench.submit()
    faults = [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
    for attempt, (rank, number) in enumerate(faults):
        pid_of(bench, attempt, rank)
        bench.slurm.wait_for(lambda: any(bench.paths(sweep).checkpoint(0).glob("*.ckpt")))
        os.kill(pid_of(bench, attempt, rank), number)
    finish(bench, sweep, monkeypatch)
    ends = sorted(bench.lines(sweep, "end"), key=lambda line: line["attempt"])
    assert [end["detail"] for end in ends[:2]] == ["rank 0: killed by SIGKILL", "rank 1: killed by SIGKILL"]
    assert re.fullmatch(r"rank 1 \(pid \d+ on \S+\) has been stopped for \d+ s", ends[2]["detail"])
    assert [end["cause"] for end in ends] == ["signal"] * 3
    assert all(1 <= int(line["step"]) <= 10 + int(line["attempt"]) for line in bench.lines(sweep, "resume"))
    assert restarts(bench, sweep) == "0"
    said = bench.orc("status", sweep)
    assert "3 signal" in said
    assert "3 attempts went on from a checkpoint" in said
