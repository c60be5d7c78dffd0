"""Channels carry messages between a supervisor and its workers: one a line of JSON, over a socket pair.

    encode(Forked(slot=0, rank=0, pid=12))      one line, with the message's kind first
    decode(line)                                the same message again; `MalformedMessage` for anything else

Nothing is pickled. A worker that dies in the middle of a message loses that message alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import orjson

from orchestrator.core import guardian
from orchestrator.core.atomic import JsonObject
from orchestrator.core.messages import (
    AttemptEnded,
    AttemptMessage,
    Cause,
    Idle,
    Malformed,
    MalformedMessage,
    Message,
    Notice,
    Outcome,
    RunTrial,
    Status,
    Unable,
)
from orchestrator.core.signals import wait_readable
from orchestrator.core.text import spans

__all__ = ["MARK", "Channel", "Send", "decode", "encode", "say", "serve"]

Send: TypeAlias = "Callable[[Message], None]"

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
        self._kept: list[Message] = []
        self._sending = threading.Lock()
        self.closed = False

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """The end that a parent left open as file descriptor `fd`.

        It is this process's alone: what this one starts, by a fork too, doesn't hold it open, and can't speak for it.
        """
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        sock.settimeout(None)  # user code may have set a default
        channel = cls(sock)
        os.register_at_fork(after_in_child=channel.close)
        return channel

    def fileno(self) -> int:
        """The file descriptor, so that a selector takes a channel."""
        return self._sock.fileno()

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send a message, and file descriptors along with it; any thread may.

        A peer that is gone is noticed when reading. After `close`, messages are dropped.
        """
        data = encode(message)
        if self._sock.fileno() < 0:
            return
        with self._sending, contextlib.suppress(*_GONE):
            if fds:
                sent = socket.send_fds(self._sock, [data], list(fds))
                data = data[sent:]
            self._sock.sendall(data)

    def receive(self) -> Iterator[Message]:
        """Yield the complete messages after one read, which waits when there is nothing to read.

        Set `closed` at the end of the stream. A line that is no message is yielded as `Malformed`.
        """
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
        """Return the actions of the notices that are there, without waiting; keep other messages for `receive`."""
        while not self.closed and wait_readable([self._sock.fileno()], 0):
            self._fill(self._read())
        messages = [*self._kept, *self._drain()]
        self._kept = [message for message in messages if not isinstance(message, Notice)]
        return [message.action for message in messages if isinstance(message, Notice)]

    def receive_rest(self) -> Iterator[Message]:
        """Yield the complete messages that are there, without waiting, from a peer that has ended; sets `closed`.

        What it left running may hold its end open, so there needn't be an end to read.
        """
        self._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while not self.closed:
                self._fill(self._read())
        self.closed = True
        yield from self._drain()

    def receive_with_fds(self) -> tuple[list[Message], list[int]]:
        """Return the messages after one read, and the file descriptors that came along."""
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

    def _drain(self) -> Iterator[Message]:
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            try:
                yield decode(line)
            except MalformedMessage as error:
                yield Malformed(error=str(error))

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def say(text: str) -> None:
    """Print a line into the log. A log that has no room loses the line, and costs the trial nothing."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def serve(
    channel: Channel,
    run: Callable[[RunTrial, Send], Message],
    notice: Callable[[str], None],
    *,
    once: bool = False,
    ends_rest: bool = True,
) -> None:
    """Serve trials until the supervisor closes the channel; what they print stands between two marks in the log.

    Args:
        channel: to the supervisor.
        run: runs an attempt and returns the message that ends it. What it sends meanwhile, also by a thread that
            outlives it, carries the trial's index and attempt, so that nothing counts for another trial.
        notice: told the actions of notices that came between trials, or before signals could reach this process.
        once: leave after the first trial.
        ends_rest: end what a trial has left running before the next one begins; else it ends with this process.
    """
    while not channel.closed or channel.has_kept:
        messages = list(channel.receive())
        for message in messages:
            if isinstance(message, Notice):
                notice(message.action)
        for message in messages:
            if isinstance(message, RunTrial):
                send = _sender(channel, message)
                send(_run_marked(run, message, send))
                if once:
                    return
                if ends_rest:
                    guardian.end()  # its outcome is safe by now
                    channel.send(Idle())


def _run_marked(run: Callable[[RunTrial, Send], Message], trial: RunTrial, send: Send) -> Message:
    name = f"trial {trial.trial} attempt {trial.attempt}"
    guardian.begin(name)
    say(f"=== {name}: start {trial.params}{_pack_of(trial)}")
    began = time.monotonic()
    answer = run(trial, send)
    say(f"=== {name}: {_in_words(answer)} after {time.monotonic() - began:.2f} s")
    return answer


def _in_words(answer: Message) -> str:
    match answer:
        case Outcome(status=status):
            return status
        case AttemptEnded(detail=detail):
            return detail
        case Unable(reason=reason):
            return reason
    return "done"


def _pack_of(trial: RunTrial) -> str:
    """The trials that train together with one, in words."""
    if not trial.pack:
        return ""
    return f", in the pack of {spans(int(str(each['index'])) for each in trial.pack if isinstance(each, dict))}"


def _sender(channel: Channel, trial: RunTrial) -> Send:
    return lambda body: channel.send(AttemptMessage(index=trial.index, attempt=trial.attempt, body=body))


def encode(message: Message) -> bytes:
    """Return a message as one line of JSON, newline included."""
    return orjson.dumps(_to_json(message)) + b"\n"


def decode(line: bytes) -> Message:
    """Return the message that `encode` has made a line of.

    Raises:
        MalformedMessage: it is none.
    """
    try:
        value = orjson.loads(line)
    except ValueError as error:
        raise MalformedMessage(f"not JSON ({error}): {line[:_MOST_SHOWN]!r}") from error
    return _read_message(value)


_MOST_SHOWN = 200
"""Bytes of a malformed line that an error shows."""


def _to_json(message: Message) -> JsonObject:
    kind = type(message).__name__
    value: JsonObject = {"kind": kind}
    for each in _kinds()[kind].fields:
        item = getattr(message, each.name)
        value[each.name] = _to_json(item) if isinstance(item, Message) else item
    return value


class _Field(NamedTuple):
    name: str
    readers: tuple[Callable[[Any], Any], ...]
    is_optional: bool


def _read_message(value: object) -> Message:
    kind = value.pop("kind", None) if isinstance(value, dict) else None
    known = _kinds().get(kind) if isinstance(kind, str) else None
    if known is None or not isinstance(value, dict):
        raise MalformedMessage(f"no message of a known kind: {str(value)[:_MOST_SHOWN]}")
    given = {}
    for each in known.fields:
        if each.name in value:
            given[each.name] = _read_field(known.make.__name__, each, value.pop(each.name))
        elif not each.is_optional:
            raise MalformedMessage(f"{kind}: {each.name} is missing")
    if value:
        raise MalformedMessage(f"{kind}: has no field {', '.join(map(repr, value))}")
    return known.make(**given)


def _read_field(kind: str, each: _Field, value: object) -> object:
    for read in each.readers:
        try:
            return read(value)
        except MalformedMessage as error:
            raise MalformedMessage(f"{kind}: {each.name}: {error}") from error
        except (TypeError, ValueError):
            continue
    raise MalformedMessage(f"{kind}: {each.name} can't be {str(value)[:_MOST_SHOWN]!r}")


class _Kind(NamedTuple):
    make: type[Message]
    fields: tuple[_Field, ...]


@cache
def _kinds() -> dict[str, _Kind]:
    return {make.__name__: _Kind(make, tuple(map(_field, fields(make)))) for make in _below(Message)}


def _below(base: type[Message]) -> Iterator[type[Message]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _below(kind)


def _field(declared: Field[Any]) -> _Field:
    readers = tuple(_READERS[name] for name in str(declared.type).split(" | "))
    return _Field(declared.name, readers, declared.default is not MISSING or declared.default_factory is not MISSING)


def _exactly(*types: type) -> Callable[[object], object]:
    def read(value: object) -> object:
        if type(value) not in types:  # a bool is no number here
            raise TypeError
        return value

    return read


def _integers(value: object) -> object:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise TypeError
    return value


_READERS: dict[str, Callable[[Any], Any]] = {
    "None": _exactly(type(None)),
    "bool": _exactly(bool),
    "int": _exactly(int),
    "float": _exactly(int, float),
    "str": _exactly(str),
    "JsonObject": _exactly(dict),
    "list[Json]": _exactly(list),
    "list[int]": _integers,
    "Status": Status,
    "Cause": Cause,
    "Message": _read_message,
}
"""How a field of each type is read; what is not of that type raises TypeError or ValueError."""
