"""Trials in training on a real Slurm: whatever ends their job, they go on where they were, with the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from on_lab import Slurm
from on_lab_sweeps import WINDOW, Bench

from orchestrator.slurm.lab import LabOptions

OPTIONS = LabOptions(nodes=3, cpus=4, grace_time_s=10, kill_wait_s=5)

JOB = """
import time
from pathlib import Path
import torch
import orchestrator as orc

MARKS = Path("marks")


def build(*, lr):
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.3), torch.nn.Linear(6, 1))
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    return orc.State(net=net, opt=opt, schedule=torch.optim.lr_scheduler.ExponentialLR(opt, 0.99))


def losses(net, batch):
    x, y = batch
    return (net(x) - y).square().mean(dim=1)


def train(trial):
    x = torch.randn(160, 4, generator=torch.Generator().manual_seed(1))
    y = x.sum(dim=1, keepdim=True)
    trial.build(build)
    MARKS.mkdir(exist_ok=True)
    for _ in trial.epochs(20):
        for batch in trial.batches((x, y), 8):
            trial.step(losses, batch)
            with (MARKS / "steps").open("a") as steps:
                steps.write(f"{trial.attempt}:{trial.num_steps} ")
            if not Path("go").exists():
                time.sleep(0.05)
        trial.state.others["schedule"].step()
        trial.validate(losses, (x, y))
"""
"""Four hundred steps in twenty epochs, which take twenty seconds until there is a file `go`."""

SWEEP = """
program: train.py
name: {name}
method: grid
parameters: {{lr: {{values: [0.02]}}}}
checkpoint: {{every: {every}}}
launch: {{form: {form}, notice_s: {notice_s}, retries: {{timeout: 5, unknown: 5}}}}
reduce: {{visibility_s: 1}}
slurm: {{time: {time}, nodelist: {node}{more}}}
"""

Training = Callable[..., Bench]


@pytest.fixture
def training(tmp_path: Path, slurm_of: Callable[[LabOptions], Slurm]) -> Training:
    """Makes a sweep of one trial that trains."""

    def make(
        node: str, *, time: int = 10, notice_s: int = 30, every: str = "1h", form: str = "auto", more: str = ""
    ) -> Bench:
        (tmp_path / "train.py").write_text(JOB)
        name = tmp_path.name.replace("[", ".").replace("]", "")
        text = SWEEP.format(name=name, every=every, form=form, time=time, notice_s=notice_s, node=node, more=more)
        (tmp_path / "sweep.yaml").write_text(text)
        return Bench(tmp_path, slurm_of(OPTIONS))

    return make


def steps(bench: Bench) -> dict[int, list[int]]:
    """Attempt -> the steps that it made."""
    file, found = bench.folder / "marks" / "steps", dict[int, list[int]]()
    for word in file.read_text().split() if file.exists() else ():
        attempt, _, step = word.partition(":")
        found.setdefault(int(attempt), []).append(int(step or 0))
    return found


def wait_for_attempt(bench: Bench, attempt: int, num_steps: int = 15) -> None:
    """Return once that attempt is in training."""
    bench.slurm.wait_for(lambda: len(steps(bench).get(attempt, [])) >= num_steps, 90)


def made_once(bench: Bench) -> None:
    """Each of the four hundred steps was made, and none twice."""
    assert [step for made in steps(bench).values() for step in made] == [*range(1, 401)]


def test_fault_02_05_06_a_trial_goes_on_after_a_preemption_a_requeue_and_a_cancel(training: Training) -> None:
    bench = training("n0")
    sweep = bench.submit()
    wait_for_attempt(bench, 0)
    bench.urgent("n0")
    wait_for_attempt(bench, 1)
    bench.slurm.run("scontrol", "requeue", bench.worker(sweep))
    wait_for_attempt(bench, 2)
    bench.slurm.run("scancel", bench.worker(sweep))
    bench.slurm.wait_for(lambda: not bench.jobs(sweep), 60)
    bench.orc("resume", sweep)
    wait_for_attempt(bench, 3, 1)
    bench.finish(sweep)
    made_once(bench)
    said = bench.orc("status", sweep)
    assert "3 attempts went on from a checkpoint; no step was done twice" in said
    assert json.loads(bench.orc("status", "--json", sweep))["saved"] == {"preempted": 2, "cancelled": 1}


@pytest.mark.usefixtures("unannounced")
@pytest.mark.parametrize("form", ["trap", "exec"])
def test_fault_04_a_trial_that_is_longer_than_its_job_goes_on_in_the_next(training: Training, form: str) -> None:
    bench = training("n2", **WINDOW, form=form)
    sweep = bench.submit()
    for attempt in range(2):
        wait_for_attempt(bench, attempt)
        bench.slurm.run("scancel", "--batch", "--signal", "TERM", bench.worker(sweep))
    wait_for_attempt(bench, 2, 1)
    bench.finish(sweep, says=("2 timeout (2 saved)",))
    made_once(bench)


def test_fault_03_a_preemption_without_grace_costs_less_than_an_interval_and_says_so(training: Training) -> None:
    bench = training("n1", every="1s", more=", partition: abrupt")
    partition = ("PartitionName=abrupt", "Nodes=n1", "PriorityTier=1", "PreemptMode=REQUEUE", "GraceTime=0")
    bench.slurm.run("scontrol", "create", *partition, "State=UP")
    sweep = bench.submit()
    wait_for_attempt(bench, 0, 50)
    bench.urgent("n1")
    wait_for_attempt(bench, 1, 1)
    bench.finish(sweep)
    first, second = steps(bench)[0], steps(bench)[1]
    assert second[0] > 1
    assert (first[0], second[-1], len(second)) == (1, 400, 401 - second[0])
    assert len(first) - second[0] + 1 <= 40  # of about twenty steps a second, with room for a busy machine
    assert "1 attempt went on from a checkpoint" in bench.orc("status", sweep)
    assert f"goes on from step {second[0] - 1}" in bench.orc("logs", "0", sweep)
