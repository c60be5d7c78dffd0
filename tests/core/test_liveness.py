"""Processes are seen as they are: at work, stopped, ended; and nobody is taken for another."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sweeps import Clock, until

from orchestrator.core.liveness import ProcessState, RankProcess, StallDetector


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["/bin/sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_process_runs_then_is_stopped_then_is_gone(sleeper: subprocess.Popen[bytes]) -> None:
    member = RankProcess.of(2, sleeper.pid)
    assert member.state() is ProcessState.RUNS
    sleeper.send_signal(signal.SIGSTOP)
    until(lambda: member.state() is ProcessState.STOPPED)
    sleeper.send_signal(signal.SIGCONT)
    until(lambda: member.state() is ProcessState.RUNS)
    sleeper.kill()
    until(lambda: member.state() is ProcessState.GONE)  # nobody has waited for it yet
    sleeper.wait()
    assert member.state() is ProcessState.GONE


def test_a_process_that_has_the_number_of_one_that_ended_is_not_taken_for_it() -> None:
    me = RankProcess.here(0)
    assert me.state() is ProcessState.RUNS
    assert replace(me, start=me.start - 1).state() is ProcessState.GONE


def test_nothing_is_said_of_a_process_elsewhere() -> None:
    far = replace(RankProcess.here(1), space="another boot/pid:[1]", host="n2")
    assert far.state() is None
    assert StallDetector([far], silent_s=0.0, clock=Clock()).check() == {}


def test_a_member_is_what_was_written_down() -> None:
    me = RankProcess.here(3)
    assert RankProcess.from_json(me.to_json()) == me
    with pytest.raises(ValueError, match="not a process"):
        RankProcess.from_json({"rank": "3"})


def test_one_that_is_stopped_is_waited_for_a_while(sleeper: subprocess.Popen[bytes]) -> None:
    clock = Clock()
    member = RankProcess.of(2, sleeper.pid)
    watch = StallDetector([RankProcess.here(0), member], silent_s=30.0, clock=clock)
    sleeper.send_signal(signal.SIGSTOP)
    until(lambda: member.state() is ProcessState.STOPPED)
    assert watch.check() == {}
    clock.now = 29.0
    assert watch.check() == {}
    clock.now = 31.0
    assert watch.check() == {2: f"rank 2 (pid {sleeper.pid} on {os.uname().nodename}) has been stopped for 31 s"}


def test_one_that_goes_on_is_forgiven(sleeper: subprocess.Popen[bytes]) -> None:
    clock = Clock()
    member = RankProcess.of(2, sleeper.pid)
    watch = StallDetector([member], silent_s=30.0, clock=clock)
    for clock.now in (0.0, 20.0):
        sleeper.send_signal(signal.SIGSTOP)
        until(lambda: member.state() is ProcessState.STOPPED)
        assert watch.check() == {}
        sleeper.send_signal(signal.SIGCONT)
        until(lambda: member.state() is ProcessState.RUNS)
        assert watch.check() == {}
    clock.now = 40.0
    sleeper.send_signal(signal.SIGSTOP)
    until(lambda: member.state() is ProcessState.STOPPED)
    assert watch.check() == {}


def test_one_that_ended_is_named_at_once(sleeper: subprocess.Popen[bytes]) -> None:
    watch = StallDetector([RankProcess.of(1, sleeper.pid)], silent_s=30.0, clock=Clock())
    sleeper.kill()
    until(watch.check)
    assert watch.check()[1].endswith("has ended")
