"""A trial of two ranks on a real Slurm: displaced in the middle of an epoch, it goes on to the bytes of a calm run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from on_lab import Slurm
from on_lab_sweeps import Bench
from test_faults_on_lab import OPTIONS, restarts

from orchestrator.lab import LabOptions

NODE = "n6"

# It stays in its second epoch until the file `go` is there, so that a fault finds it in the middle.
PROGRAM = """
import pathlib, time
import torch, torch.nn.functional as F
import orchestrator as orc

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

def train(trial):
    trial.build(build)
    for epoch in trial.epochs(3):
        for batch in trial.batches(data(0), 8):
            trial.step(losses, batch)
            print("rank", trial.group.rank, "of", trial.group.world_size, "is at step", trial.num_steps, flush=True)
            if trial.num_steps >= 10 and not pathlib.Path("go").exists():
                time.sleep(0.2)
        trial.validate(losses, data(1))
"""

SWEEP = """
program: train.py
method: grid
parameters: {width: {values: [30]}}
launch: {ranks_per_node: 2, notice_s: 30}
reduce: {visibility_s: 2}
slurm: {time: 10, nodelist: NODE}
"""


def test_fault_02_a_trial_of_two_ranks_that_is_preempted_resumes_and_ends_with_the_same_bytes(
    tmp_path: Path, slurm_of: Callable[[LabOptions], Slurm]
) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("NODE", NODE))
    bench = Bench(tmp_path, slurm_of(OPTIONS))
    sweep = bench.submit()
    logs = bench.paths(sweep).logs

    def said() -> str:
        return "".join(path.read_text() for path in sorted(logs.glob("*.log")))

    bench.slurm.wait_for(lambda: "rank 1 of 2 is at step 10" in said(), 90)
    bench.urgent(NODE)
    bench.slurm.wait_for(lambda: "to go on later" in said(), 60)
    bench.finish(sweep, limit_s=150)
    steps = re.findall(r"saved at step (\d+), to go on later", said())
    assert len(steps) == 2, "each rank says it"
    assert len(set(steps)) == 1
    assert f"--- goes on from step {steps[0]}" in bench.orc("logs", "0", sweep)
    assert restarts(bench, sweep) == "1"
    assert json.loads(bench.orc("best", "--json", sweep))[0]["attempts"] == 2
    script = (bench.paths(sweep).sbatch / "workers-0.sh").read_text()
    assert "#SBATCH --cpus-per-task=2" in script
