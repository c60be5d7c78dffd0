"""A trial of several ranks under a real supervisor: trained, stopped, resumed, killed; and what is said of it."""

from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import OTHER, TOKEN, folder, left_running, names, records, run, spec, started, superseded, until

from orchestrator.config.plan import SweepPlan, write_plan
from orchestrator.config.spec import CheckpointOptions, Retries
from orchestrator.core.paths import SweepPaths
from orchestrator.results.records import Cause, Status

# Fifty samples in batches of eight: the last one of each epoch is uneven, and too small for three ranks. Trial 0 is
# small, trial 1 draws random numbers, trial 2 has several megabytes of gradients, trial 3 a loop of its own. Gradients
# are summed in buckets so small that every trial has several: what one bucket hides, their layout shows.
JOB = """
import os, pathlib, signal, time
import torch, torch.nn.functional as F
import orchestrator as orc
from orchestrator.training import data_parallel

ROOT = pathlib.Path(__file__).parent.parent
BUCKET_MB = 0.0005
for _function in (data_parallel.Replica.__init__, data_parallel.wrapped):
    _function.__kwdefaults__["bucket_mb"] = BUCKET_MB
DDP = torch.nn.parallel.DistributedDataParallel

class Counted(DDP):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        MADE.append(self)

MADE = []
data_parallel.DistributedDataParallel = Counted

def check_buckets(trial):
    if trial.group.world_size > 1:
        sizes = [made._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",") for made in MADE]
        assert sizes and all(len(each) >= 3 for each in sizes), sizes

def build(*, x=0):
    wide = 800 if x == 2 else 40
    net = torch.nn.Sequential(
        torch.nn.Linear(20, wide), torch.nn.Tanh(), torch.nn.Dropout(0.2 if x == 1 else 0.0),
        torch.nn.Linear(wide, wide), torch.nn.Tanh(), torch.nn.Linear(wide, 4))
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))

def losses(net, batch):
    inputs, labels = batch
    return F.cross_entropy(net(inputs), labels, reduction="none")

def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(50, 20, generator=generator), torch.randint(0, 4, (50,), generator=generator)

def wait_for_a_checkpoint(trial):
    while not any((ROOT / "checkpoints" / str(trial.index)).glob("*.ckpt")):
        time.sleep(0.01)

def disturb(trial, step):
    {disturb}

def own_loop(trial):
    state = build()
    net, opt = trial.prepare(net=state.net, opt=state.opt)
    step = 0
    for epoch in trial.epochs({epochs}):
        for inputs, labels in trial.batches(data(0), 8):
            opt.zero_grad()
            F.cross_entropy(net(inputs), labels).backward()
            opt.step()
            step += 1
            disturb(trial, step)
        trial.validate(losses, data(1))
    check_buckets(trial)

def train(trial, *, x=0):
    if x == 3:
        return own_loop(trial)
    trial.build(build)
    for epoch in trial.epochs({epochs}):
        for batch in trial.batches(data(0), 8):
            trial.step(losses, batch)
            disturb(trial, trial.num_steps)
        trial.validate(losses, data(1))
    check_buckets(trial)
"""
EPOCHS = 3
STEPS = 7 * EPOCHS
TRIALS = 4


def sweep(runs: Path, ranks: int, disturb: str = "pass", **options: Any) -> SweepPaths:
    """A sweep of which every trial runs `disturb` after each step."""
    options = {"trials": TRIALS, "every": "1 steps", **options}
    every = options.pop("every")
    of = replace(spec(program="train.py", ranks_per_node=ranks, **options), checkpoint=CheckpointOptions(every=every))
    return folder(runs, of, JOB.format(disturb=disturb, epochs=EPOCHS))


def came_to(paths: SweepPaths) -> list[tuple[float, str]]:
    """Value and model of every trial, by index."""
    outcomes = sorted(records(paths, "outcome"), key=lambda line: line["trial"])
    assert [line["status"] for line in outcomes] == [Status.COMPLETE.value] * len(outcomes), outcomes
    return [(line["payload"]["value"], line["payload"]["model"]) for line in outcomes]


def ended(paths: SweepPaths) -> dict[int, str]:
    """How attempts ended that gave no outcome, by trial."""
    return {line["trial"]: line["detail"] for line in records(paths, "end")}


def rank_logs(paths: SweepPaths) -> str:
    return "".join(path.read_text() for path in sorted(paths.logs.glob("rank-*.log")))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[tuple[float, str]]]:
    """What the trials come to, by the number of ranks."""
    found = {}
    for ranks in (1, 2, 3, 4):
        paths = sweep(tmp_path_factory.mktemp(f"calm{ranks}"), ranks, every="off")
        code, said = run(paths)
        assert code == 0, said
        assert left_running(paths) == []
        found[ranks] = came_to(paths)
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_fault_25_ranks_with_uneven_and_empty_parts_follow_one_process(
    calm: dict[int, list[tuple[float, str]]], ranks: int
) -> None:
    expected, found = calm[1], calm[ranks]
    for trial in (0, 2):  # the others draw other numbers, or weigh an uneven batch by themselves
        # 21 steps in float32: sums of gradients in another order.
        assert found[trial][0] == pytest.approx(expected[trial][0], rel=1e-4)
        assert found[trial][0] != calm[1][1][0]


KILL = """
    if trial.attempt == 0 and step == 10:
        wait_for_a_checkpoint(trial)
        if trial.group.rank == [trial.group.world_size - 1, 0, 1, 0][trial.index]:
            os.kill(os.getpid(), [signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL][trial.index])
"""
"""In the middle of the second epoch the last rank is killed, or the first, or the second is stopped."""


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_fault_08_09_a_rank_that_is_killed_or_stopped_is_named_and_the_trial_goes_on_to_the_same_bytes(
    tmp_path: Path, calm: dict[int, list[tuple[float, str]]], ranks: int
) -> None:
    paths = sweep(tmp_path, ranks, KILL, silent_s=1.0)
    code, said = run(paths)
    assert code == 0, said
    details = ended(paths)
    assert details[0] == f"rank {ranks - 1}: killed by SIGKILL"
    assert details[1] == details[3] == "rank 0: killed by SIGKILL"
    assert re.fullmatch(r"rank 1 \(pid \d+ on \S+\) has been stopped for \d+ s", details[2])
    assert {line["cause"] for line in records(paths, "end")} == {Cause.SIGNAL.value}
    resumed = {line["trial"]: line["step"] for line in records(paths, "resume")}
    assert all(1 <= resumed[trial] <= 10 for trial in range(TRIALS)), resumed
    assert re.search(rf"PeerLost: rank {ranks - 1} \(pid \d+ on \S+\) has ended", said), "the others say whom they lost"
    assert came_to(paths) == calm[ranks]
    assert left_running(paths) == []
    assert names(paths.checkpoints) == []


def test_one_process_goes_on_to_the_same_bytes_too(tmp_path: Path, calm: dict[int, list[tuple[float, str]]]) -> None:
    kill = KILL.replace("signal.SIGSTOP", "signal.SIGKILL").replace(
        "[trial.group.world_size - 1, 0, 1, 0]", "[0, 0, 0, 0]"
    )
    paths = sweep(tmp_path, 1, kill)
    code, said = run(paths)
    assert code == 0, said
    assert len(ended(paths)) == TRIALS
    assert came_to(paths) == calm[1]


NOTICE = """
    if trial.attempt == 0:
        time.sleep(0.05)
        if step == 10 and trial.group.rank == 0:
            (ROOT / "here").touch()
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_fault_01_at_a_notice_all_ranks_save_at_the_same_step_and_go_on_later(
    tmp_path: Path, calm: dict[int, list[tuple[float, str]]], ranks: int
) -> None:
    paths = sweep(tmp_path, ranks, NOTICE, trials=2, every="1h")
    with started(paths) as process:
        until(lambda: (paths.root / "here").exists())
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[0]
        assert process.returncode == 75, said
    steps = re.findall(r"saved at step (\d+), to go on later", said + rank_logs(paths))
    assert len(steps) == ranks
    assert len(set(steps)) == 1
    assert 10 <= int(steps[0]) < STEPS
    assert left_running(paths) == []
    superseded(paths, OTHER, TOKEN)
    code, said = run(paths, submission=OTHER)
    assert code == 0, said
    assert [line["step"] for line in records(paths, "resume")] == [int(steps[0])]
    assert came_to(paths) == calm[ranks][:2]


FAIL = """
    if step == 10 and trial.group.rank == 1:
        if trial.index == 0:
            time.sleep(3600)
        if trial.index == 1:
            raise ValueError("of its own")
    if step == 10 and trial.index == 2:
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(3600)
        if trial.group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if trial.index == 3:
        trial.batches(torch.utils.data.DataLoader(list(range(8))))
"""


def test_fault_09_10_ranks_that_hang_fail_or_leave_children_behind_are_named_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    paths = sweep(tmp_path, 2, FAIL, every="off", retries=Retries(signal=0), answer_s=3.0)
    code, said = run(paths)
    assert code == 0, said
    failed = {line["trial"]: line["payload"]["error"] for line in records(paths, "outcome")}
    assert re.match(
        r"rank 1 \(pid \d+ on \S+\) has not come to where the others wait; its last sign was step", failed[0]
    )
    assert failed[1] == "rank 1: ValueError: of its own"
    assert failed[2] == "rank 1: killed by SIGKILL"
    assert failed[3].startswith("rank 0: TypeError: trial.batches was given a DataLoader, whose batches can't be dealt")
    assert failed[3].endswith("pass the data set itself, with the batch size")
    assert "ValueError: of its own" in rank_logs(paths)
    assert left_running(paths) == []


def test_fault_26_trials_side_by_side_do_not_meet(tmp_path: Path, calm: dict[int, list[tuple[float, str]]]) -> None:
    paths = sweep(tmp_path, 2, every="off")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code, said = run(paths, "--slots", "2", env={"TMPDIR": str(scratch)})
    assert code == 0, said
    assert came_to(paths) == calm[2]
    assert [name for name in names(scratch) if name.startswith("orc-")] == []
    assert len(list(paths.logs.glob("rank-*-0-?.1.log"))) == 2


WAIT = """
    if step == 10:
        wait_for_a_checkpoint(trial)
        (ROOT / "here").touch()
        time.sleep(3600)
"""


def test_fault_27_another_number_of_ranks_is_refused_and_a_killed_supervisor_leaves_nothing(tmp_path: Path) -> None:
    paths = sweep(tmp_path, 2, WAIT, trials=1)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with started(paths, env={"TMPDIR": str(scratch)}):
        until(lambda: (paths.root / "here").exists())
    until(lambda: left_running(paths) == [])
    until(lambda: [name for name in names(scratch) if name.startswith("orc-")] == [])
    # Nobody's plan changes; this is what a checkpoint that came here from elsewhere would meet.
    paths.plan.unlink()
    write_plan(SweepPlan(spec=spec(program="train.py", trials=1, ranks_per_node=3), code="0" * 64), paths.plan)
    superseded(paths, OTHER, TOKEN)
    code, said = run(paths, submission=OTHER)
    assert code == 1, said
    assert "is of 2 ranks and can't be resumed with 3, since the result would differ" in said
