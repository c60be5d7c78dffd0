"""The preloaded parent of workers, as a process that has imported nothing."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from sweeps import LIMIT_S

from orchestrator.core.channel import Channel
from orchestrator.core.messages import ForkWorker, Notice, RankStarted
from orchestrator.worker.forkserver import ForkServer

NUM = 20
"""More requests at once than a read takes descriptors."""


def say_and_leave(channel: Channel) -> None:
    """What each worker does: it says who its guardian is, and waits until it may go."""
    channel.send(RankStarted(pid=os.getppid()))
    for _ in channel.receive():
        pass


@pytest.fixture
def server() -> Iterator[Channel]:
    """Our end of the channel to a parent of workers."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        ForkServer(Channel(theirs), say_and_leave).run()
        os._exit(0)
    theirs.close()
    channel = Channel(ours)
    yield channel
    channel.close()
    assert os.waitpid(pid, 0) == (pid, 0)


def hears(channel: Channel, num: int) -> list[Any]:
    """The next `num` messages."""
    found: list[Any] = []
    while len(found) < num:
        assert select.select([channel], [], [], LIMIT_S)[0], f"only {len(found)} of {num} have come"
        found += channel.receive()
    return found


def test_requests_that_come_together_each_get_their_own_channel(server: Channel) -> None:
    pairs = [socket.socketpair() for _ in range(NUM)]
    for number, (_, theirs) in enumerate(pairs):
        server.send(ForkWorker(slot=number // 4, rank=number % 4, log=None, devices=None), (theirs.fileno(),))
        theirs.close()
    forked = hears(server, NUM)
    assert [(each.slot, each.rank) for each in forked] == [divmod(number, 4) for number in range(NUM)]
    channels = [Channel(ours) for ours, _ in pairs]
    assert [hears(channel, 1) for channel in channels] == [[RankStarted(pid=each.pid)] for each in forked]
    for channel in channels:
        channel.send(Notice(action="leave"))
    ended = sorted((each.slot, each.rank, each.status) for each in hears(server, NUM))
    assert ended == [(*divmod(number, 4), 0) for number in range(NUM)]
    for channel in channels:
        channel.close()
