"""How much of the work of trials that are killed without notice counts: above 95% with the default interval.

The share is that of steps: those that counted, over all that were computed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import pytest
from command_line import Orc

from orchestrator.training.checkpoint.interval import SaveInterval

STEPS = 600
PERIOD_S = 0.1
"""A step takes at least this, so that a trial takes a minute on any machine."""
TRIALS = 4

JOB = f"""
import os, time
from pathlib import Path
import torch
import orchestrator as orc


def build():
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10))
    return orc.State(net=net, opt=torch.optim.Adam(net.parameters()))


def losses(net, batch):
    x, y = batch
    return (net(x) - y).square().mean(dim=1)


def train(trial, *, number):
    x = torch.randn(160, 64, generator=torch.Generator().manual_seed(number))
    y = x[:, :10]
    trial.build(build)
    for _ in trial.epochs({STEPS} // 10):
        for batch in trial.batches((x, y), 16):
            began = time.monotonic()
            trial.step(losses, batch)
            with Path(f"steps.{{number}}").open("a") as marks:
                marks.write(f"{{os.getpid()}} {{trial.num_steps}}\\n")
            time.sleep(max(0.0, began + {PERIOD_S} - time.monotonic()))
    trial.validate(losses, (x, y))
"""


def marks(orc: Orc, trial: int) -> list[tuple[int, int]]:
    """(process, step) of each step that a trial has made, in order."""
    file = orc.folder / f"steps.{trial}"
    lines = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    return [(int(process), int(step)) for process, step in map(str.split, lines)]


def kill_each_once(orc: Orc, process: subprocess.Popen[str], seed: int) -> None:
    """SIGKILL to the worker of every trial, after a step that is drawn at random; return when all is over."""
    chance = random.Random(seed)
    fatal = {trial: chance.randrange(STEPS // 10, STEPS * 19 // 20) for trial in range(TRIALS)}
    limit = time.monotonic() + 900
    while process.poll() is None:
        assert time.monotonic() < limit
        for trial in list(fatal):
            made = marks(orc, trial)
            if made and made[-1][1] >= fatal[trial]:
                os.kill(made[-1][0], signal.SIGKILL)
                del fatal[trial]
        time.sleep(0.05)
    assert not fatal


@pytest.mark.soak
def test_of_minutes_of_work_killed_once_without_notice_all_but_a_twentieth_counts(tmp_path: Path) -> None:
    orc = Orc(tmp_path)
    (tmp_path / "train.py").write_text(JOB)
    name = orc.write(program="train.py", parameters={"number": {"values": [*range(TRIALS)]}})
    with orc.start("run", name, "--workers", str(TRIALS), stdout=subprocess.DEVNULL, stderr=None) as process:
        kill_each_once(orc, process, seed=5)
    assert process.returncode == 0
    computed = 0
    for trial in range(TRIALS):
        steps = [step for _, step in marks(orc, trial)]
        assert set(steps) == set(range(1, STEPS + 1))
        assert len({who for who, _ in marks(orc, trial)}) == 2
        computed += len(steps)
    assert TRIALS * STEPS / computed > 0.95


# What the default interval leaves to be lost, by a clock of our own


@dataclass(slots=True)
class Saves:
    """A trial that saves whenever its pace says so, a step every twentieth of a second.

    Args:
        cost_s: what a save holds the training up.
        whole_s: until it is durable.
        lost_s: at each step, how much work a kill would lose.
    """

    cost_s: float
    whole_s: float
    now_s: float = 0.0
    lost_s: list[float] = field(default_factory=list)

    def train(self, seconds: float) -> None:
        pace = SaveInterval(clock=lambda: self.now_s)
        saved = worked = 0.0
        under_way: tuple[float, float] | None = None  # what a save has taken in, and when it is durable
        while worked < seconds:
            worked += 0.05
            self.now_s += 0.05
            if under_way is not None and self.now_s >= under_way[1]:
                saved, under_way = under_way[0], None
                pace.measured(self.cost_s, self.whole_s)
            if pace.due(0, busy=under_way is not None):
                pace.begun(0)
                under_way = worked, self.now_s + self.whole_s
                self.now_s += self.cost_s
            self.lost_s.append(worked - saved)


@pytest.mark.parametrize("seconds", [60.0, 600.0, 7200.0])
@pytest.mark.parametrize(("cost_s", "whole_s"), [(0.001, 0.02), (0.005, 0.1), (0.02, 0.3), (0.05, 0.6)])
def test_a_kill_at_any_moment_loses_less_than_a_twentieth_on_average(
    cost_s: float, whole_s: float, seconds: float
) -> None:
    trial = Saves(cost_s, whole_s)
    trial.train(seconds)
    assert seconds / (seconds + mean(trial.lost_s)) > 0.95
    assert max(trial.lost_s) < seconds / 10


@pytest.mark.parametrize(("cost_s", "whole_s"), [(0.005, 0.1), (0.05, 0.6)])
def test_and_saving_takes_no_more_than_a_twentieth_of_the_time(cost_s: float, whole_s: float) -> None:
    trial = Saves(cost_s, whole_s)
    trial.train(60.0)
    assert 60.0 / trial.now_s > 0.95
