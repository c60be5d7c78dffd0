"""Sweeps in a storm of faults, on a lab that it may break: in the end they come to the bytes of a run in peace.

ORC_STORM_SEED=7 pytest tests/slurm/test_storm.py           the faults of that seed
ORC_STORM_S=120 pytest -m soak tests/slurm/test_storm.py    the long one, for two minutes
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from invariants import check
from on_lab import Slurm
from on_lab_sweeps import STEPS, Bench
from storm import Storm, Target, as_told, draw

from orchestrator.slurm.lab import LabOptions

OPTIONS = LabOptions(nodes=3, cpus=6, grace_time_s=3, kill_wait_s=2, slurmd_timeout_s=8)
FORMS = ("exec", "trap", "srun", "auto")
SEED = 265
"""Of the short storm; the long one takes one that nobody has seen."""

# A trial may end once there is a file `go`, or one of its own; one of them diverges.
STAYING = STEPS.replace('os.path.exists("go")', '(os.path.exists("go") or os.path.exists("go" + index))').replace(
    '"val_loss": 1.0 / (1 + params["x"])', '"val_loss": (float("nan") if index == "1" else 1.0 / (1 + params["x"]))'
)

# Dropout, momentum and a schedule, an odd number of samples, three linear layers: what a resumed run may get wrong.
TRAINING = """
import pathlib, time
import torch, torch.nn.functional as F
import orchestrator as orc

def build(*, lr):
    wide = [torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(30, 30), torch.nn.Tanh()]
    net = torch.nn.Sequential(*wide, torch.nn.Linear(30, 4))
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    return orc.State(net=net, opt=opt, schedule=torch.optim.lr_scheduler.ExponentialLR(opt, 0.9))

def losses(net, batch):
    inputs, labels = batch
    return F.cross_entropy(net(inputs), labels, reduction="none")

def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(75, 20, generator=generator), torch.randint(0, 4, (75,), generator=generator)

def may_end(trial):
    return pathlib.Path("go").exists() or pathlib.Path(f"go{trial.index}").exists()

def train(trial):
    trial.build(build)
    for epoch in trial.epochs(12):
        for batch in trial.batches(data(0), 8):
            trial.step(losses, batch)
            if not may_end(trial):
                time.sleep(0.3 if trial.num_steps > 60 else 0.03)
        trial.state.others["schedule"].step()
        trial.validate(losses, data(1))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A sweep for storms: of a program that saves by itself, or of ranks that train."""

    ranks: int
    form: str
    num_trials: int

    @classmethod
    def draw(cls, seed: int, num: int) -> list[Kind]:
        """So many of different ranks and forms, the first of a program: a function of the arguments."""
        rng = random.Random(seed)
        forms, ranks = rng.sample(FORMS, num), [0, *rng.sample((1, 2), min(2, num - 1))]
        return [cls(ranks=r, form=form, num_trials=3 if r else 6) for r, form in zip(ranks, forms, strict=True)]

    def __str__(self) -> str:
        return f"{('a command', 'one rank', 'two ranks')[self.ranks]}, {self.form}"

    def submit(self, folder: Path, slurm: Slurm) -> Target:
        (folder / "tmp").mkdir(parents=True)
        (folder / "trial.py").write_text(TRAINING if self.ranks else STAYING)
        (folder / "sweep.yaml").write_text(yaml.safe_dump(self._file(folder)))
        bench = Bench(folder, slurm)
        return Target.of(bench, bench.submit(), self.num_trials)

    def _file(self, folder: Path) -> dict[str, object]:
        own = (
            {"program": "trial.py", "parameters": {"lr": {"min": 0.01, "max": 0.1}}, "checkpoint": {"every": "1s"}}
            if self.ranks
            else {
                "command": [sys.executable, "trial.py"],
                "parameters": {"x": {"min": 0.0, "max": 9.0}, "stay": {"value": 3}, "at_term": {"value": "leave"}},
            }
        )
        often = dict.fromkeys(("error", "signal", "memory", "timeout", "unknown"), 1000)
        launch = {
            "form": self.form,
            "trials_per_task": 2,
            "notice_s": 30,
            "lease_s": 5,
            "silent_s": 8,
            "retries": often,
        }
        return {
            "name": folder.name,
            "method": "random",
            "run_cap": self.num_trials,
            "launch": launch | ({"ranks_per_node": self.ranks} if self.ranks else {}),
            "reduce": {"visibility_s": 2, "top": 3},
            "env": {"TMPDIR": str(folder / "tmp")},
            "slurm": {"time": 30},
            **own,
        }


@pytest.fixture
def own(shared: Path, slurm_of: Callable[[LabOptions], Slurm]) -> Iterator[Slurm]:
    """The lab, to one test at a time; whole again afterwards."""
    with FileLock(shared / "storm.lock"):
        slurm = slurm_of(OPTIONS)
        yield slurm
        for name, pid in slurm.lab.status().daemons:
            if pid is None:
                slurm.lab.start_daemon(name)
        slurm.run("scancel", "--user", "root", "--quiet")
        slurm.wait_for(lambda: slurm.run("squeue", "-h") == "", 120)


def models(runs: Path) -> dict[str, bytes]:
    """The models of the only sweep in a folder."""
    return {path.name: path.read_bytes() for path in runs.glob("*/models/*")}


def come_to_an_end(target: Target, say: Callable[[str], object]) -> None:
    """After the storm: the user does as told, and everything holds."""
    bench, sweep = target.bench, target.sweep
    bench.let_go()
    for command in as_told(bench, sweep):
        say(f"         as told: {command}")
    calm = bench.undisturbed()
    check(bench.paths(sweep), undisturbed=calm, jobs=bench.all_jobs(sweep), memory=target.memory)
    found = bench.status(sweep)
    assert (found["disagreements"], found["failures"], found["unreadable"]) == ([], [], [])
    assert models(bench.folder / "runs") == models(bench.folder / "calm")
    assert list((bench.folder / "tmp").glob("orc*")) == []


Say = Callable[[str], object]


def run_out(seed: int, num_sweeps: int, num_faults: int, folder: Path, slurm: Slurm, say: Say) -> Counter[str]:
    """A storm of a seed, from the submission of its sweeps to the last check; the number of faults by kind."""
    kinds = Kind.draw(seed, num_sweeps)
    say(f"ORC_STORM_SEED={seed}: {num_faults} faults on sweeps of {'; of '.join(map(str, kinds))}")
    targets = [kind.submit(folder / f"storm{number}", slurm) for number, kind in enumerate(kinds)]
    storm = Storm(slurm, targets, say)
    try:
        storm.blow(draw(seed, num_faults, pause_s=2.0))
    finally:
        storm.calm()
    for target in targets:
        come_to_an_end(target, say)
    # Someone was hit, and it can be read.
    assert any(target.bench.status(target.sweep)["retries"] for target in targets)
    return storm.counts


def test_sweeps_in_a_storm_come_to_the_bytes_of_a_run_in_peace(tmp_path: Path, own: Slurm) -> None:
    run_out(int(os.environ.get("ORC_STORM_SEED", SEED)), 2, 12, tmp_path, own, print)


@pytest.mark.soak
def test_sweeps_in_a_long_storm_come_to_the_bytes_of_a_run_in_peace(
    tmp_path: Path, own: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Storm after storm over sweeps of other forms, for twenty minutes and for two hundred faults at least."""
    first = int(os.environ.get("ORC_STORM_SEED", time.time()))
    until = time.monotonic() + float(os.environ.get("ORC_STORM_S", 20 * 60))
    least = 0 if "ORC_STORM_S" in os.environ else 200
    counts: Counter[str] = Counter()
    with capsys.disabled():
        for seed in itertools.count(first):
            counts += run_out(seed, 3, 25, tmp_path / str(seed), own, partial(print, flush=True))
            print(f"in all {dict(sorted(counts.items()))}", flush=True)
            if time.monotonic() >= until and counts.total() >= least:
                break
    assert set(counts) > {"Kill", "Stop"}
