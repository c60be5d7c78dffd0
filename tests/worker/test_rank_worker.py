"""The worker that is one of several ranks: it meets the others, trains its part, and leaves with them."""

from __future__ import annotations

import os
import signal
import socket
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sweeps
import torch
from crew import LIMIT_S

from orchestrator.config.plan import PlanFile
from orchestrator.config.spec import CheckpointOptions
from orchestrator.core.channel import Channel, decode, encode
from orchestrator.core.messages import AttemptMessage, Progress, RankDone, RankStarted, RunTrial
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import OrcError
from orchestrator.worker import rank as ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

JOB = """
import os, signal
import torch
import orchestrator as orc

def build():
    net = torch.nn.Linear(3, 1)
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))

def losses(net, batch):
    return net(batch[0])[:, 0] ** 2

def train(trial):
    trial.build(build)
    for epoch in trial.epochs(2):
        for batch in trial.batches((torch.ones(12, 3),), 4):
            trial.step(losses, batch)
            disturb(trial)
        trial.validate(losses, (torch.ones(6, 3),))

def disturb(trial):
    {disturb}
"""


def sweep(runs: Path, disturb: str = "pass", world_size: int = 2, answer_s: float = 60.0) -> SweepPaths:
    of = sweeps.spec(program="train.py", trials=1, parameters={}, ranks_per_node=world_size, answer_s=answer_s)
    spec = replace(of, checkpoint=CheckpointOptions(every="1h"))
    return sweeps.folder(runs, spec, JOB.format(disturb=textwrap.indent(disturb, "    ").strip()))


def message(rank: int, attempt: int = 0) -> RunTrial:
    return RunTrial(
        index=0, trial="0-abc", params={}, seed=5, attempt=attempt, bar=None, writer="e" * 32,
        rank=rank, local_rank=rank, local_size=2, host="127.0.0.1",
    )  # fmt: skip


def together(paths: SweepPaths, world_size: int = 2) -> list[list[Any]]:
    """What each rank of a trial says to its supervisor, from forks that have all that the job imports."""
    meeting = paths.root.parent / "meeting"
    meeting.mkdir(mode=0o700, exist_ok=True)
    torch.set_num_threads(1)  # a fork has none of the threads that the pool of this process counts on
    serve = ranks.server(paths, PlanFile.open(paths.plan).spec, meeting)
    started = [fork(serve, message(rank)) for rank in range(world_size)]
    return [heard(*each) for each in started]


def fork(serve: Callable[[Channel], None], first: RunTrial) -> tuple[int, socket.socket]:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        signal.alarm(int(LIMIT_S))
        try:
            serve(Channel(theirs))
        finally:
            os._exit(0)
    theirs.close()
    ours.sendall(encode(first))
    return pid, ours


def heard(pid: int, ours: socket.socket) -> list[Any]:
    with ours, ours.makefile("rb") as file:
        found = [decode(line) for line in file]
    os.waitpid(pid, 0)
    return found


def without_places(said: list[Any]) -> list[Any]:
    return [each for each in said if not isinstance(each.body, Progress)]


def test_the_first_rank_speaks_for_the_trial_and_the_others_say_that_they_are_done(tmp_path: Path) -> None:
    first, second = map(without_places, together(sweep(tmp_path)))
    assert isinstance(first[0].body, RankStarted)
    assert isinstance(second[0].body, RankStarted)
    assert [each.body.step for each in first[1:-1]] == [3, 6]
    assert first[-1].body.status == "complete"
    assert second[-1] == AttemptMessage(index=0, attempt=0, body=RankDone())
    assert second[1:-1] == first[1:-1], "all report the same, of which the supervisor takes the first one's"


def test_a_rank_that_fails_by_its_own_doing_says_so_and_the_others_name_it(tmp_path: Path) -> None:
    fails = "if trial.num_steps == 2 and trial.group.rank == 1:\n    raise ValueError('of its own')"
    first, second = together(sweep(tmp_path, fails))
    assert (second[-1].body.cause, second[-1].body.detail) == ("error", "ValueError: of its own")
    assert not second[-1].body.peer
    assert (first[-1].body.cause, first[-1].body.peer) == ("signal", True)
    assert "failed: ValueError: of its own" in first[-1].body.detail


def test_ranks_that_go_different_ways_are_told_so(tmp_path: Path) -> None:
    apart = "while trial.group.rank == 1 and trial.num_steps == 2:\n    trial.step(losses, (torch.ones(2, 3),))"
    found = [said[-1] for said in together(sweep(tmp_path, apart, answer_s=2.0))]
    assert all(each.body.peer for each in found), found
    assert {each.body.cause for each in found} <= {"error", "signal"}


def test_a_rank_that_is_alone_says_who_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sweep(tmp_path)
    monkeypatch.setattr(ranks, "_JOIN_S", 0.5)
    spec = PlanFile.open(paths.plan).spec
    spec = replace(spec, launch=replace(spec.launch, import_timeout_s=0.5))
    meeting = tmp_path / "meeting"
    meeting.mkdir(mode=0o700)
    torch.set_num_threads(1)
    [*_, last] = heard(*fork(ranks.server(paths, spec, meeting), message(0)))
    assert last.body.peer
    assert "of 2 ranks, not all came within 0.5 s; missing: 1" in last.body.detail


# Devices


@pytest.mark.parametrize(("has_gpu", "num"), [(False, 0), (True, 2)])
def test_a_rank_has_a_gpu_of_its_own_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, num: int
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    expected = torch.device("cuda", 1) if has_gpu else None
    assert ranks._device(1, 2, 0) == expected
    assert chosen == ([expected] if has_gpu else [])


def test_fewer_gpus_than_ranks_is_an_error_that_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OrcError, match=r"^2 ranks on one machine need a GPU each, and this one shows 1$"):
        ranks._device(0, 2, 0)
