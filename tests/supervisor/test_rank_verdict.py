"""What the ranks of a trial say, and how they end, comes to the word of one."""

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

from orchestrator.core.atomic import JsonObject
from orchestrator.core.liveness import Member, Vital
from orchestrator.supervisor.rank_verdict import LOOK_S, Crew, death

OUTCOME: JsonObject = {"outcome": "complete", "payload": {"value": 0.5}}
LOST: JsonObject = {"end": "signal", "peer": True, "detail": "rank 1 (pid 7 on n1) has ended (rank 0 saw: closed)"}
OWN: JsonObject = {"end": "error", "detail": "ValueError: no"}
SAVED: JsonObject = {"end": "preempted", "detail": "saved at step 4, to go on later", "step": 4}
KILLED = signal.SIGKILL.value
LEFT = 0


def crew(num: int, clock: Clock | None = None) -> Crew:
    return Crew(num, silent_s=30.0, clock=clock or Clock())


def heard(crew: Crew, rank: int, message: JsonObject) -> list[JsonObject]:
    return list(crew.hear(rank, message))


def test_rank_0_speaks_for_the_trial_and_any_rank_says_that_it_cannot_go_on_here() -> None:
    one = crew(2)
    report: JsonObject = {"report": {"step": 1, "metrics": {}}}
    assert heard(one, 0, report) == [report]
    assert heard(one, 1, report) == []
    assert heard(one, 1, {"broken": "no room"}) == [{"broken": "no room"}]


def test_an_outcome_counts_once_all_have_left() -> None:
    one = crew(3)
    for rank in (2, 0, 1):
        assert heard(one, rank, {"done": True} if rank else OUTCOME) == []
        assert one.verdict is None
        one.left(rank, LEFT)
    assert one.verdict == OUTCOME


def test_who_stays_after_the_outcome_is_killed_and_changes_nothing() -> None:
    clock = Clock()
    one = crew(2, clock)
    heard(one, 0, OUTCOME)
    one.left(0, LEFT)
    assert one.look() == set()
    clock.now = 11.0
    assert one.look() == {1}
    one.left(1, KILLED)
    assert one.verdict == OUTCOME


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_rank_that_is_killed_is_charged_whatever_the_others_say_before_its_parent_tells(killed: int) -> None:
    one = crew(3)
    others = [rank for rank in range(3) if rank != killed]
    for rank in others:
        heard(one, rank, LOST)
        one.left(rank, LEFT)
    one.left(killed, KILLED)
    assert one.verdict == {"end": "signal", "detail": f"rank {killed}: killed by SIGKILL"}


def test_the_first_death_is_charged_not_those_that_followed() -> None:
    one = crew(3)
    one.left(2, signal.SIGSEGV.value)
    one.left(0, signal.SIGABRT.value)
    one.left(1, 3 << 8)
    assert one.verdict == {"end": "signal", "detail": "rank 2: killed by SIGSEGV"}


@given(st.permutations(range(3)))
def test_of_ranks_that_fail_alike_the_lowest_is_named_whoever_was_faster(order: list[int]) -> None:
    one = crew(3)
    for rank in order:
        heard(one, rank, OWN)
        one.left(rank, LEFT)
    assert one.verdict == {"end": "error", "detail": "rank 0: ValueError: no"}


@given(st.permutations(range(3)))
def test_a_rank_that_fails_by_itself_is_charged_not_those_that_lost_it(order: list[int]) -> None:
    one = crew(3)
    for rank in order:
        heard(one, rank, OWN if rank == 1 else LOST)
        one.left(rank, LEFT)
    assert one.verdict == {"end": "error", "detail": "rank 1: ValueError: no"}


def test_those_that_hang_after_another_has_failed_are_killed_after_seconds_and_not_charged() -> None:
    clock = Clock()
    one = crew(3, clock)
    one.left(2, KILLED)
    assert one.look() == set()
    assert one.due_s <= LOOK_S
    clock.now = 3.0
    assert one.look() == {0, 1}
    one.left(0, KILLED)
    assert one.look() == {1}
    assert one.due_s == LOOK_S, "what was killed is waited for, not asked for"
    one.left(1, KILLED)
    assert one.verdict == {"end": "signal", "detail": "rank 2: killed by SIGKILL"}


def test_ranks_that_leave_together_end_as_one() -> None:
    one = crew(2)
    for rank in (1, 0):
        heard(one, rank, SAVED)
        one.left(rank, LEFT)
    assert one.verdict == SAVED


def test_a_rank_that_leaves_without_a_word_has_failed() -> None:
    one = crew(2)
    one.left(1, LEFT)
    heard(one, 0, LOST)
    one.left(0, LEFT)
    detail = "rank 1: the worker left with exit code 0 in the middle of the trial"
    assert one.verdict == {"end": "error", "detail": detail}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (signal.SIGSEGV.value, {"end": "signal", "detail": "killed by SIGSEGV"}),
        (3 << 8, {"end": "error", "detail": "the worker left with exit code 3 in the middle of the trial"}),
    ],
)
def test_a_death_says_how(status: int, expected: JsonObject) -> None:
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
    until(lambda: Member.of(0, pid).vital() is Vital.STOPPED)


def watched(one: Crew, clock: Clock, seconds: int) -> set[int]:
    """Who is to be killed after so long, looked for each second."""
    found: set[int] = set()
    for _ in range(seconds):
        clock.now += LOOK_S
        found |= one.look()
    return found


def test_fault_09_a_rank_that_is_stopped_for_too_long_ends_all_and_is_named(sleeper: int) -> None:
    clock = Clock()
    one = crew(2, clock)
    heard(one, 1, {"pid": sleeper})
    stopped(sleeper)
    assert watched(one, clock, 29) == set()
    assert watched(one, clock, 2) == {0, 1}
    for rank in (0, 1):
        one.left(rank, KILLED)
    found = one.verdict
    assert found is not None
    text = f"rank 1 (pid {sleeper} on {os.uname().nodename}) has been stopped for 30 s"
    assert (found["end"], found["detail"]) == ("signal", text)


def test_time_in_which_nobody_looked_is_held_against_nobody(sleeper: int) -> None:
    clock = Clock()
    one = crew(2, clock)
    heard(one, 1, {"pid": sleeper})
    stopped(sleeper)
    assert one.look() == set()
    clock.now = 3600.0
    assert one.look() == set(), "all of us were suspended"


def test_of_a_rank_that_has_ended_its_parent_tells(sleeper: int) -> None:
    clock = Clock()
    one = crew(2, clock)
    heard(one, 1, {"pid": sleeper})
    os.kill(sleeper, signal.SIGKILL)
    until(lambda: Member.of(0, sleeper).vital() is Vital.GONE)
    assert watched(one, clock, 40) == set()
    one.left(1, KILLED)
    one.left(0, KILLED)
    assert one.verdict == {"end": "signal", "detail": "rank 1: killed by SIGKILL"}
