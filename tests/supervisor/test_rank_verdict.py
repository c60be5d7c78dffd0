"""What the ranks of a trial say, and how they end, comes to the word of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeps import Clock, until

from orchestrator.core.liveness import ProcessState, RankProcess
from orchestrator.core.messages import (
    AttemptEnded,
    Cause,
    Message,
    Outcome,
    RankDone,
    RankStarted,
    Reported,
    Status,
    Unable,
)
from orchestrator.supervisor.rank_verdict import LOOK_S, RankVerdict, death

OUTCOME = Outcome(status=Status.COMPLETE, payload={"value": 0.5})
LOST = AttemptEnded(cause=Cause.SIGNAL, peer=True, detail="rank 1 (pid 7 on n1) has ended (rank 0 saw: closed)")
OWN = AttemptEnded(cause=Cause.ERROR, detail="ValueError: no")
SAVED = AttemptEnded(cause=Cause.PREEMPTED, detail="saved at step 4, to go on later", step=4)
KILLED = signal.SIGKILL.value
LEFT = 0


def verdict_of(num: int, clock: Clock | None = None) -> RankVerdict:
    return RankVerdict(num, silent_s=30.0, clock=clock or Clock())


def heard(verdict: RankVerdict, rank: int, message: Message) -> list[Message]:
    return list(verdict.hear(rank, message))


def test_rank_0_speaks_for_the_trial_and_any_rank_says_that_it_cannot_go_on_here() -> None:
    ranks = verdict_of(2)
    report = Reported(step=1, metrics={})
    assert heard(ranks, 0, report) == [report]
    assert heard(ranks, 1, report) == []
    assert heard(ranks, 1, Unable(reason="no room")) == [Unable(reason="no room")]


def test_an_outcome_counts_once_all_have_left() -> None:
    ranks = verdict_of(3)
    for rank in (2, 0, 1):
        assert heard(ranks, rank, RankDone() if rank else OUTCOME) == []
        assert ranks.verdict is None
        ranks.exited(rank, LEFT)
    assert ranks.verdict == OUTCOME


def test_who_stays_after_the_outcome_is_killed_and_changes_nothing() -> None:
    clock = Clock()
    ranks = verdict_of(2, clock)
    heard(ranks, 0, OUTCOME)
    ranks.exited(0, LEFT)
    assert ranks.check() == set()
    clock.now = 11.0
    assert ranks.check() == {1}
    ranks.exited(1, KILLED)
    assert ranks.verdict == OUTCOME


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_rank_that_is_killed_is_charged_whatever_the_others_say_before_its_parent_tells(killed: int) -> None:
    ranks = verdict_of(3)
    others = [rank for rank in range(3) if rank != killed]
    for rank in others:
        heard(ranks, rank, LOST)
        ranks.exited(rank, LEFT)
    ranks.exited(killed, KILLED)
    assert ranks.verdict == AttemptEnded(cause=Cause.SIGNAL, detail=f"rank {killed}: killed by SIGKILL")


def test_the_first_death_is_charged_not_those_that_followed() -> None:
    ranks = verdict_of(3)
    ranks.exited(2, signal.SIGSEGV.value)
    ranks.exited(0, signal.SIGABRT.value)
    ranks.exited(1, 3 << 8)
    assert ranks.verdict == AttemptEnded(cause=Cause.SIGNAL, detail="rank 2: killed by SIGSEGV")


@given(st.permutations(range(3)))
def test_of_ranks_that_fail_alike_the_lowest_is_named_whoever_was_faster(order: list[int]) -> None:
    ranks = verdict_of(3)
    for rank in order:
        heard(ranks, rank, OWN)
        ranks.exited(rank, LEFT)
    assert ranks.verdict == AttemptEnded(cause=Cause.ERROR, detail="rank 0: ValueError: no")


@given(st.permutations(range(3)))
def test_a_rank_that_fails_by_itself_is_charged_not_those_that_lost_it(order: list[int]) -> None:
    ranks = verdict_of(3)
    for rank in order:
        heard(ranks, rank, OWN if rank == 1 else LOST)
        ranks.exited(rank, LEFT)
    assert ranks.verdict == AttemptEnded(cause=Cause.ERROR, detail="rank 1: ValueError: no")


def test_those_that_hang_after_another_has_failed_are_killed_after_seconds_and_not_charged() -> None:
    clock = Clock()
    ranks = verdict_of(3, clock)
    ranks.exited(2, KILLED)
    assert ranks.check() == set()
    assert ranks.due_s <= LOOK_S
    clock.now = 3.0
    assert ranks.check() == {0, 1}
    ranks.exited(0, KILLED)
    assert ranks.check() == {1}
    assert ranks.due_s == LOOK_S, "what was killed is waited for, not asked for"
    ranks.exited(1, KILLED)
    assert ranks.verdict == AttemptEnded(cause=Cause.SIGNAL, detail="rank 2: killed by SIGKILL")


def test_ranks_that_leave_together_end_as_one() -> None:
    ranks = verdict_of(2)
    for rank in (1, 0):
        heard(ranks, rank, SAVED)
        ranks.exited(rank, LEFT)
    assert ranks.verdict == SAVED


def test_a_rank_that_leaves_without_a_word_has_failed() -> None:
    ranks = verdict_of(2)
    ranks.exited(1, LEFT)
    heard(ranks, 0, LOST)
    ranks.exited(0, LEFT)
    detail = "rank 1: the worker left with exit code 0 in the middle of the trial"
    assert ranks.verdict == AttemptEnded(cause=Cause.ERROR, detail=detail)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (signal.SIGSEGV.value, AttemptEnded(cause=Cause.SIGNAL, detail="killed by SIGSEGV")),
        (3 << 8, AttemptEnded(cause=Cause.ERROR, detail="the worker left with exit code 3 in the middle of the trial")),
    ],
)
def test_a_death_says_how(status: int, expected: AttemptEnded) -> None:
    assert death(status) == expected


# Ranks that are stopped


@pytest.fixture
def sleeper() -> Iterator[int]:
    """A process that waits to be told."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.kill()
    process.communicate()


def stopped(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: RankProcess.of(0, pid).state() is ProcessState.STOPPED)


def watched(ranks: RankVerdict, clock: Clock, seconds: int) -> set[int]:
    """Who is to be killed after so long, looked for each second."""
    found: set[int] = set()
    for _ in range(seconds):
        clock.now += LOOK_S
        found |= ranks.check()
    return found


def test_fault_09_a_rank_that_is_stopped_for_too_long_ends_all_and_is_named(sleeper: int) -> None:
    clock = Clock()
    ranks = verdict_of(2, clock)
    heard(ranks, 1, RankStarted(pid=sleeper))
    stopped(sleeper)
    assert watched(ranks, clock, 29) == set()
    assert watched(ranks, clock, 2) == {0, 1}
    for rank in (0, 1):
        ranks.exited(rank, KILLED)
    verdict = ranks.verdict
    assert isinstance(verdict, AttemptEnded)
    text = f"rank 1 (pid {sleeper} on {os.uname().nodename}) has been stopped for 30 s"
    assert (verdict.cause, verdict.detail) == (Cause.SIGNAL, text)


def test_time_in_which_nobody_looked_is_held_against_nobody(sleeper: int) -> None:
    clock = Clock()
    ranks = verdict_of(2, clock)
    heard(ranks, 1, RankStarted(pid=sleeper))
    stopped(sleeper)
    assert ranks.check() == set()
    clock.now = 3600.0
    assert ranks.check() == set(), "all of us were suspended"


def test_of_a_rank_that_has_ended_its_parent_tells(sleeper: int) -> None:
    clock = Clock()
    ranks = verdict_of(2, clock)
    heard(ranks, 1, RankStarted(pid=sleeper))
    os.kill(sleeper, signal.SIGKILL)
    until(lambda: RankProcess.of(0, sleeper).state() is ProcessState.GONE)
    assert watched(ranks, clock, 40) == set()
    ranks.exited(1, KILLED)
    ranks.exited(0, KILLED)
    assert ranks.verdict == AttemptEnded(cause=Cause.SIGNAL, detail="rank 1: killed by SIGKILL")
