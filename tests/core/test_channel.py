"""Messages between a supervisor and its children."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator

import pytest

from orchestrator.core.channel import MARK, Channel, serve
from orchestrator.core.messages import (
    AttemptMessage,
    Malformed,
    Message,
    Notice,
    Outcome,
    PackDone,
    RankDone,
    RankStarted,
    RunTrial,
    Status,
    WorkerId,
)
from orchestrator.supervisor.local_workers import LocalWorker


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    ends = Channel(ours), Channel.from_fd(theirs.detach())
    yield ends
    for end in ends:
        end.close()


def assigned(index: int, attempt: int) -> RunTrial:
    return RunTrial(index=index, trial=f"{index}-name", params={}, seed=0, attempt=attempt, bar=None, writer="w")


def test_a_fork_has_no_say_and_holds_nothing_open(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        theirs.send(RankStarted(pid=1))
        os.close(go)
        os.read(wait, 1)
        os._exit(0)
    theirs.send(RankStarted(pid=2))
    theirs.close()
    assert list(ours.receive()) == [RankStarted(pid=2)]
    assert list(ours.receive()) == []
    assert ours.closed
    os.close(go)
    os.close(wait)
    assert os.waitpid(child, 0)[1] == 0


def test_what_this_process_starts_does_not_inherit_its_end(pair: tuple[Channel, Channel]) -> None:
    assert not os.get_inheritable(pair[1].fileno())


def test_descriptors_that_come_along_are_not_inherited(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.send(RankStarted(pid=1), (0,))
    messages, (fd,) = theirs.receive_with_fds()
    assert (messages, os.get_inheritable(fd)) == ([RankStarted(pid=1)], False)
    os.close(fd)


def test_the_rest_of_a_dead_peer_is_read_without_waiting_for_an_end(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    theirs.send(RankStarted(pid=1))
    theirs.send(RankStarted(pid=2))
    assert list(ours.receive_rest()) == [RankStarted(pid=1), RankStarted(pid=2)]
    assert ours.closed


def test_every_answer_names_its_trial_and_notices_come_first(
    pair: tuple[Channel, Channel], capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    ours, theirs = pair
    seen: list[str] = []

    def attempt(assigned: RunTrial, _: object) -> Message:
        seen.append(str(assigned.index))
        return Outcome(status=Status.COMPLETE, payload={})

    for trial in (3, 4):
        ours.send(assigned(trial, trial + 1))
    ours.send(Notice(action="save"))
    ours.close()
    serve(theirs, attempt, lambda word: seen.append(f"notice: {word}"))
    assert seen == ["notice: save", "3", "4"]
    assert MARK.findall(capsysbinary.readouterr().out) == [
        (name, attempt) for name, attempt in ((b"3-name", b"4"), (b"4-name", b"5")) for _ in ("start", "end")
    ]


def test_a_look_for_notices_does_not_wait_and_leaves_other_messages_to_be_received(
    pair: tuple[Channel, Channel],
) -> None:
    ours, theirs = pair
    assert theirs.notices() == []
    for message in (Notice(action="save"), RankStarted(pid=3), Notice(action="leave"), RankStarted(pid=4)):
        ours.send(message)
    assert theirs.notices() == ["save", "leave"]
    assert theirs.notices() == []
    assert theirs.has_kept
    assert list(theirs.receive()) == [RankStarted(pid=3), RankStarted(pid=4)]
    ours.close()
    assert theirs.notices() == []
    assert theirs.closed


def test_who_serves_once_leaves_after_the_first_trial(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    for trial in (3, 4):
        ours.send(assigned(trial, 0))
    serve(theirs, lambda assigned, _: RankDone(), lambda _: None, once=True)
    assert list(ours.receive()) == [AttemptMessage(index=3, attempt=0, body=RankDone())]


def test_a_worker_that_only_starts_is_told_by_message_and_by_signal_once_it_can_be(
    pair: tuple[Channel, Channel],
) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        worker = LocalWorker(WorkerId(0), pair[0])
        worker.tell("leave")
        assert heard == []
        worker.has_pid(os.getpid())
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert list(pair[1].receive()) == [Notice(action="leave")]


@pytest.mark.parametrize(
    "line", [b"words", b"[1]", b'{"kind":"Nothing"}', b'{"kind":"RankStarted","pid":"1"}', b"\xff"]
)
def test_a_line_that_is_no_message_is_told_apart_and_those_around_it_are_heard(
    pair: tuple[Channel, Channel], line: bytes
) -> None:
    ours, theirs = pair
    theirs.send(RankDone())
    os.write(theirs.fileno(), line + b"\n")
    theirs.send(PackDone())
    first, malformed, last = ours.receive()
    assert (first, last) == (RankDone(), PackDone())
    assert isinstance(malformed, Malformed)
