"""When ranks can't go on, each of them says which one is to blame, and why."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crew import LIMIT_S, Rank, call, crew
from torch import nn

from orchestrator.core.liveness import ProcessState, RankProcess
from orchestrator.distributed.consensus import Agreement, Wish
from orchestrator.distributed.control_group import PeerLost
from orchestrator.distributed.failure import Case, is_of_others
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.training.data_parallel import MicroBatch, Replica

SECONDS = 15.0
"""Within this a step of ranks ends that has lost one; it takes less than one on a machine with nothing else to do."""
ANSWER_S = 3.0


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def endless(party: RankContext, say: Callable[[int], None]) -> None:
    """Trains until something stops it; says when it has begun."""
    net = nn.Linear(4, 1)
    replica, agreement = Replica(net, party), Agreement(party)
    for step in range(1_000_000):
        replica.gradients(lambda net, x: net(x).sum(1), [MicroBatch(torch.ones(2, 4), 2)], 2 * party.world_size)
        agreement.ask(Wish(), step)
        if step == 3:
            say(step)


def ends(ranks: list[Rank], lost: int) -> dict[int, str]:
    """What the others say, by rank, in time."""
    until_s = time.monotonic() + SECONDS
    found = {number: rank.end() for number, rank in enumerate(ranks) if number != lost}
    assert time.monotonic() < until_s
    return found


def started(place: Path, world_size: int, **options: Any) -> Any:
    return crew([call(place, rank, world_size, **options) for rank in range(world_size)], endless, saying=True)


@pytest.mark.parametrize(("world_size", "lost"), [(2, 1), (3, 2), (3, 0), (4, 3), (2, 0)])
def test_fault_08_a_rank_that_was_killed_is_named_by_all_others_within_seconds(
    place: Path, world_size: int, lost: int
) -> None:
    with started(place, world_size) as ranks:
        assert [rank.hears() for rank in ranks] == [3] * world_size
        ranks[lost].signal(signal.SIGKILL)
        for text in ends(ranks, lost).values():
            name = f"rank {lost} (pid {ranks[lost].pid} on {os.uname().nodename})"
            assert text.startswith(f"{PeerLost.__name__}: {name} has ended (rank ")


@pytest.mark.parametrize("lost", [0, 2])
def test_fault_09_a_rank_that_is_stopped_is_named_when_the_time_is_over(place: Path, lost: int) -> None:
    with started(place, 3, answer_s=ANSWER_S) as ranks:
        assert [rank.hears() for rank in ranks] == [3] * 3
        ranks[lost].signal(signal.SIGSTOP)
        for text in ends(ranks, lost).values():
            name = f"rank {lost} (pid {ranks[lost].pid} on {os.uname().nodename})"
            assert text.startswith(f"{PeerLost.__name__}: {name} is stopped (rank ")


def hangs(party: RankContext, say: Callable[[int], None]) -> None:
    agreement = Agreement(party)
    for step in range(10):
        agreement.ask(Wish(), step)
    if party.rank == 1:
        say(os.getpid())
        signal.pause()
    dist.all_reduce(torch.ones(1))


def test_fault_09_a_rank_that_never_comes_is_named_with_its_last_sign(place: Path) -> None:
    with crew([call(place, rank, 3, answer_s=ANSWER_S) for rank in range(3)], hangs, saying=True) as ranks:
        for text in ends(ranks, 1).values():
            name = f"rank 1 (pid {ranks[1].pid} on {os.uname().nodename})"
            assert f"{name} has not come to where the others wait; its last sign was step 0, at " in text


def fails(party: RankContext, step: int) -> float:
    for _ in range(step):
        dist.all_reduce(torch.ones(1))
    if party.rank == 1:
        return 1 / 0
    dist.all_reduce(torch.ones(1))
    return 0.0


def test_a_rank_that_fails_by_its_own_doing_is_named_with_its_cause(place: Path) -> None:
    with crew([call(place, rank, 3) for rank in range(3)], fails, 2) as ranks:
        found = [rank.end() for rank in ranks]
    assert found[1] == "ZeroDivisionError: division by zero"
    for text in (found[0], found[2]):
        assert text.startswith(f"{PeerLost.__name__}: rank 1 (pid ")
        assert " failed: ZeroDivisionError: division by zero (rank " in text


def leaves_early(party: RankContext) -> str:
    if party.rank == 2:
        os._exit(7)
    return "done"


def test_a_rank_that_leaves_before_the_end_is_missed_at_the_end(place: Path) -> None:
    with crew([call(place, rank, 3) for rank in range(3)], leaves_early) as ranks:
        found = [rank.end() for rank in ranks]
    assert found[2] == 7
    assert all(text.startswith(f"{PeerLost.__name__}: rank 2 (pid {ranks[2].pid} on ") for text in found[:2])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistNetworkError("Failed to recv"), True),
        (PeerLost("lost rank 1 of 2"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_an_error_for_another_rank_s_sake_is_told_from_the_job_s_own(error: BaseException, expected: bool) -> None:
    assert is_of_others(error) is expected


def test_members_are_all_on_the_roll(place: Path) -> None:
    with crew([call(place, rank, 2) for rank in range(2)], listed) as ranks:
        pids = [rank.pid for rank in ranks]
        assert [rank.end() for rank in ranks] == [pids, pids]


def listed(party: RankContext) -> list[int]:
    assert party.roll is not None
    assert party.roll.members[party.rank] == RankProcess.here(party.rank)
    return [member.pid for member in party.roll.members]


assert LIMIT_S > SECONDS


def test_who_says_that_it_waited_and_leaves_at_once_is_not_blamed() -> None:
    gone = [RankProcess(rank=rank, pid=0, start=0, host="n1", space=RankProcess.here(0).space) for rank in (1, 2)]
    case = Case({member.rank: member for member in gone})
    ended = case.see()
    assert ended == {1: ProcessState.GONE, 2: ProcessState.GONE}
    case.hear(gone[0], "")  # said between the two
    case.close(ended)
    assert case.charges == {2: "rank 2 (pid 0 on n1) has ended"}
