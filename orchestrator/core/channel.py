"""Messages between a supervisor and its children: JSON objects, one a line, over a socket pair.

Nothing is pickled, and a child that dies in the middle of a message loses that message alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import orjson

from orchestrator.core import guardian
from orchestrator.core.atomic import JsonObject
from orchestrator.core.text import spans

__all__ = ["MARK", "Channel", "Send", "say", "serve"]

Send: TypeAlias = "Callable[[JsonObject], None]"

MARK = re.compile(rb"=== trial (\S+) attempt (\d+): ")
"""How the line begins that a worker's log has before an attempt, and after it: the trial and the attempt."""


_GONE = (BrokenPipeError, ConnectionResetError, TimeoutError)
"""How a peer is gone; the last when its machine is."""


class Channel:
    """One end of a connection.

    Args:
        sock: a connected stream socket; the channel owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._kept: list[JsonObject] = []
        self._sending = threading.Lock()
        self.closed = False

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """The end that a parent left open as file descriptor `fd`.

        It is this process's alone: what this one starts, by a fork too, doesn't hold it open, and can't speak for it.
        """
        os.set_inheritable(fd, False)
        channel = cls(socket.socket(fileno=fd))
        os.register_at_fork(after_in_child=channel.close)
        return channel

    def fileno(self) -> int:
        """The file descriptor, so that a selector takes a channel."""
        return self._sock.fileno()

    def send(self, message: JsonObject, fds: tuple[int, ...] = ()) -> None:
        """Send a message, and file descriptors along with it; any thread may.

        A peer that is gone is noticed when reading. After `close`, messages are dropped.
        """
        data = orjson.dumps(message) + b"\n"
        if self._sock.fileno() < 0:
            return
        with self._sending, contextlib.suppress(*_GONE):
            if fds:
                sent = socket.send_fds(self._sock, [data], list(fds))
                data = data[sent:]
            self._sock.sendall(data)

    def receive(self) -> Iterator[JsonObject]:
        """The complete messages after one read, which waits when there is nothing to read; sets `closed` at the end."""
        if not self._kept:
            self._fill(self._read())
        kept, self._kept = self._kept, []
        yield from kept
        yield from self._drain()

    @property
    def has_kept(self) -> bool:
        """Whether `receive` has something that `notices` has left to it."""
        return bool(self._kept)

    def notices(self) -> list[str]:
        """The words of the notices that are there, without waiting; other messages are kept for `receive`."""
        while not self.closed and select.select([self._sock], [], [], 0)[0]:
            self._fill(self._read())
        messages = [*self._kept, *self._drain()]
        self._kept = [message for message in messages if "notice" not in message]
        return [str(message["notice"]) for message in messages if "notice" in message]

    def receive_rest(self) -> Iterator[JsonObject]:
        """The complete messages that are there, without waiting, from a peer that has ended; sets `closed`.

        What it left running may hold its end open, so there needn't be an end to read.
        """
        self._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while not self.closed:
                self._fill(self._read())
        self.closed = True
        yield from self._drain()

    def receive_with_fds(self) -> tuple[list[JsonObject], list[int]]:
        """As `receive`, with the file descriptors that came along."""
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, 65536, 16)
        except _GONE:
            data, fds = b"", []
        for fd in fds:
            os.set_inheritable(fd, False)
        self._fill(data)
        return list(self._drain()), fds

    def _read(self) -> bytes:
        try:
            return self._sock.recv(1 << 20)
        except _GONE:
            return b""

    def _fill(self, data: bytes) -> None:
        self.closed = self.closed or not data
        self._buffer += data

    def _drain(self) -> Iterator[JsonObject]:
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            yield orjson.loads(line)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def say(text: str) -> None:
    """Print a line into the log. A log that has no room loses the line, and costs the trial nothing."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def serve(
    channel: Channel,
    attempt: Callable[[JsonObject, Send], JsonObject],
    notice: Callable[[str], None],
    *,
    once: bool = False,
    ends_rest: bool = True,
) -> None:
    """Serve trials until the supervisor closes the channel; what they print stands between two marks in the log.

    Args:
        channel: to the supervisor.
        attempt: runs the trial of a message and returns the message that ends it. What it sends meanwhile, also by a
            thread that outlives it, carries the trial's index and attempt, so that nothing counts for another trial.
        notice: told the words of notices that came between trials, or before signals could reach this process.
        once: leave after the first trial.
        ends_rest: end what a trial has left running before the next one begins; else it ends with this process.
    """
    while not channel.closed or channel.has_kept:
        messages = list(channel.receive())
        for message in messages:
            if "notice" in message:
                notice(str(message["notice"]))
        for message in messages:
            if "notice" not in message:
                send = _sender(channel, message)
                send(_marked(attempt, message, send))
                if once:
                    return
                if ends_rest:
                    guardian.end()  # its outcome is safe by now


def _marked(attempt: Callable[[JsonObject, Send], JsonObject], message: JsonObject, send: Send) -> JsonObject:
    name = f"trial {message['trial']} attempt {message['attempt']}"
    guardian.begin(name)
    say(f"=== {name}: start {message['params']}{_company(message)}")
    began = time.monotonic()
    answer = attempt(message, send)
    end = answer.get("outcome", answer.get("detail", answer.get("broken", "done")))
    say(f"=== {name}: {end} after {time.monotonic() - began:.2f} s")
    return answer


def _company(message: JsonObject) -> str:
    """The trials that train together with the one of a message, in words."""
    pack = message.get("pack")
    if not isinstance(pack, list):
        return ""
    return f", in the pack of {spans(int(str(one['index'])) for one in pack if isinstance(one, dict))}"


def _sender(channel: Channel, trial: JsonObject) -> Send:
    name: JsonObject = {"index": trial["index"], "attempt": trial["attempt"]}
    return lambda message: channel.send({**name, **message})
