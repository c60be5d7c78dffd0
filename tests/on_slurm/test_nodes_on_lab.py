"""A trial that trains on two nodes of a real Slurm, two ranks on each: displaced in mid-epoch, and with ranks lost."""

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
from test_ranks_on_lab import PROGRAM, finish, pid_of

from orchestrator.slurm.lab import LabOptions

PARTITION = ("PartitionName=pairs", "Nodes=n10,n11", "PriorityTier=1", "PreemptMode=REQUEUE", "GraceTime=120")

SWEEP = """
program: train.py
method: grid
parameters: {{width: {{values: [30]}}}}
checkpoint: {{every: {every}}}
launch: {{nodes: 2, ranks_per_node: 2, notice_s: 30, silent_s: 2, retries: {{signal: 9}}}}
reduce: {{visibility_s: 2}}
slurm: {{time: 10, {where}}}
"""
Pair = Callable[..., Bench]


@pytest.fixture
def pair(tmp_path: Path, slurm_of: Callable[[LabOptions], Slurm]) -> Pair:
    """Makes a sweep of one trial on two nodes, whose attempt `i` stays at its step `10 + i` in `stays[i]`."""

    def make(*stays: tuple[int, ...], where: str, every: str = "1h") -> Bench:
        (tmp_path / "train.py").write_text(PROGRAM.format(stays=stays))
        (tmp_path / "sweep.yaml").write_text(SWEEP.format(every=every, where=where))
        return Bench(tmp_path, slurm_of(OPTIONS))

    return make


def no_meeting_is_left(bench: Bench, sweep: str) -> bool:
    return not list(bench.paths(sweep).root.glob(".rendezvous-*"))


def test_fault_02_a_trial_on_two_nodes_is_preempted_resumes_and_ends_with_the_bits_of_the_undisturbed_one(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = pair((0, 1, 2, 3), where="partition: pairs")
    bench.slurm.run("scontrol", "create", *PARTITION, "State=UP")
    sweep = bench.submit()

    def said() -> str:
        return "".join(path.read_text() for path in sorted(bench.paths(sweep).logs.glob("*.log")))

    pids = [pid_of(bench, 0, rank) for rank in range(4)]
    nodes = [Path(f"/proc/{pid}/environ").read_bytes().split(b"SLURMD_NODENAME=")[1].split(b"\0")[0] for pid in pids]
    assert nodes == [b"n10", b"n10", b"n11", b"n11"]
    bench.urgent("n11")
    bench.slurm.wait_for(lambda: any("preempted" in notice["action"] for notice in bench.notices(sweep)))
    (bench.folder / "go.0").touch()
    bench.slurm.wait_for(lambda: said().count("to go on later") >= 4)
    finish(bench, sweep, monkeypatch)
    steps = re.findall(r"saved at step (\d+), to go on later", said())
    assert len(steps) == 4, "each rank says it"
    assert len(set(steps)) == 1
    assert f"--- goes on from step {steps[0]}" in bench.orc("logs", "0", sweep)
    assert restarts(bench, sweep) == "1"
    assert json.loads(bench.orc("best", "--json", sweep))[0]["attempts"] == 2
    assert no_meeting_is_left(bench, sweep)
    script = (bench.paths(sweep).sbatch / "workers-0.sh").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=2\n" in script


def test_fault_08_09_ranks_on_another_node_that_are_killed_or_stopped_are_named_and_the_job_goes_on_to_the_same_bytes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank is killed, then the third is stopped: both on the second node, in one job that outlives them."""
    bench = pair((3,), (2,), where='nodelist: "n12,n13"', every="1 steps")
    sweep = bench.submit()
    for attempt, (rank, number) in enumerate([(3, signal.SIGKILL), (2, signal.SIGSTOP)]):
        pid_of(bench, attempt, rank)
        bench.slurm.wait_for(lambda: any(bench.paths(sweep).checkpoint(0).glob("*.ckpt")))
        os.kill(pid_of(bench, attempt, rank), number)
    finish(bench, sweep, monkeypatch)
    ends = sorted(bench.lines(sweep, "end"), key=lambda line: line["attempt"])
    assert ends[0]["detail"] == "rank 3: killed by SIGKILL"
    assert re.fullmatch(r"rank 2 \(pid \d+ on \S+\) has been stopped for \d+ s", ends[1]["detail"])
    assert [end["cause"] for end in ends] == ["signal"] * 2
    assert restarts(bench, sweep) == "0"
    assert no_meeting_is_left(bench, sweep)


def test_two_trials_of_two_ranks_side_by_side_in_one_job_don_t_meet(
    tmp_path: Path, slurm_of: Callable[[LabOptions], Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 26: with the same job id, on the same node, at the same time."""
    (tmp_path / "train.py").write_text(PROGRAM.format(stays=((0, 1),)))
    launch = "{ranks_per_node: 2, trials_per_node: 2, trials_per_task: 2, max_workers: 1}"
    (tmp_path / "sweep.yaml").write_text(
        f"program: train.py\nmethod: grid\nparameters: {{width: {{values: [30]}}}}\nrepeats: 2\nlaunch: {launch}\n"
        f"reduce: {{visibility_s: 2}}\nslurm: {{time: 10, nodelist: {SHARED}}}\n"
    )
    bench = Bench(tmp_path, slurm_of(OPTIONS))
    sweep = bench.submit()
    for rank in (0, 1):
        pid_of(bench, 0, rank)
    starts = [line["trial"] for line in bench.lines(sweep, "start")]
    assert sorted(starts) == [0, 1], "both run"
    (bench.folder / "go.0").touch()
    monkeypatch.setenv("CALM", "1")
    bench.finish(sweep, limit_s=150)
    logs = sorted(path.name.partition("-")[0] for path in bench.paths(sweep).logs.glob("*-0-*.log"))
    assert logs == ["rank", "rank", "slot", "slot"], "each trial's ranks have their own"
