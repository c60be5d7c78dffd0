"""What supervisors, workers, ranks and nodes say to each other: frozen dataclasses with one encoding.

    encode(Forked(pid=12, slot=0, rank=0))      one line of JSON, with the message's kind first
    decode(line)                                the same message again; `MalformedMessage` for anything else

Every message is matched by its type. A line that is no message, or lacks a field or has one of another type, costs
whoever has sent it: a worker its attempt, a node its place in the job, never the supervisor.

    supervisor -> forkserver    ForkWorker
    forkserver -> supervisor    ImportDone  ImportFailed  Forked  WorkerExited
    supervisor -> worker        RunTrial  Notice
    worker -> supervisor        AttemptMessage, which holds one of the messages about an attempt:
                                Reported  Progress  Resumed  Outcome  AttemptEnded  PackDone  Superseded  Unable
                                RankStarted  RankMember  RankStopped  RankDone
    first node -> other node    StartWorker  ToWorker  TellWorker  KillWorker
    other node -> first node    ImportDone  ImportFailed  NodeFailed  FromWorker  WorkerExited  Heartbeat
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple

import orjson

from orchestrator.core.atomic import Json, JsonObject
from orchestrator.errors import OrcError

__all__ = [
    "AttemptEnded", "AttemptMessage", "Cause", "ForkWorker", "Forked", "FromWorker", "Heartbeat", "ImportDone",
    "ImportFailed", "KillWorker", "MalformedMessage", "Message", "NodeFailed", "Notice", "Outcome", "PackDone",
    "Progress", "RankDone", "RankMember", "RankStarted", "RankStopped", "Reported", "Resumed", "RunTrial",
    "StartWorker", "Status", "Superseded", "TellWorker", "ToWorker", "Unable", "WorkerExited", "decode", "encode",
]  # fmt: skip


class Status(enum.StrEnum):
    """What a trial came to. The order is that of the join: the first found wins."""

    COMPLETE = "complete"
    DIVERGED = "diverged"
    PRUNED = "pruned"
    FAILED = "failed"


class Cause(enum.StrEnum):
    """Why an attempt ended without an outcome, or why a trial failed."""

    ERROR = "error"
    SIGNAL = "signal"
    MEMORY = "out of memory"
    TIMEOUT = "timeout"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    NOTICE = "notice"
    """A notice whose reason Slurm didn't tell: none of the trial's doing."""
    NODE_FAILURE = "node failure"
    UNKNOWN = "unknown"


class MalformedMessage(OrcError):
    """A line that is no message; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What all messages are."""


# To and from the forkserver


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkWorker(Message):
    """Fork a worker; its end of the channel comes along as a file descriptor.

    Args:
        slot: which of the trials side by side it works for.
        rank: which of that trial's ranks it is.
        log: the file it prints into; None to print where the forkserver does.
        devices: its CUDA_VISIBLE_DEVICES; None to leave that variable alone.
    """

    slot: int
    rank: int
    log: str | None
    devices: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportDone(Message):
    """The program is imported, so workers can be started; `forks` tells whether by a fork."""

    forks: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportFailed(Message):
    """The program can't be imported on this machine."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked(Message):
    """A worker was forked."""

    slot: int
    rank: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited(Message):
    """A worker process has ended, with this wait status (waitpid(2))."""

    slot: int
    rank: int
    status: int


# To a worker


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTrial(Message):
    """Run an attempt at a trial, or at a pack of trials.

    Args:
        index: the trial's place in the plan; of a pack its lead.
        trial: the trial's id.
        params: its parameters.
        seed: of its random numbers.
        attempt: counts from 0.
        bar: the objective's value that a model must beat to be kept; None keeps any.
        writer: id of the supervisor's record file.
        rank: which of the trial's ranks the worker is.
        local_rank: the same among those on its machine.
        local_size: ranks of the trial on its machine.
        host: where rank 0 is met.
        pack: all trials of a pack, as the plan has them; empty for a single trial.
        open: the indices of those that have no outcome yet.
    """

    index: int
    trial: str
    params: JsonObject
    seed: int
    attempt: int
    bar: float | None
    writer: str
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    host: str = "127.0.0.1"
    pack: list[Json] = field(default_factory=list)
    open: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Message):
    """Somebody wants the job's place: `save`, `stay` after all, or `leave`."""

    action: str


# From a worker, about its attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported(Message):
    """Metrics at a step; `trial` is the one of a pack that they belong to."""

    step: int
    metrics: JsonObject
    trial: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Message):
    """Where the attempt is: at `step`; the newest durable checkpoint is of step `saved`."""

    step: int
    saved: int | None
    trial: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Message):
    """The attempt goes on from `step`, 0 for a new begin; in a pack, for the trials `together`."""

    step: int
    trial: int | None = None
    together: list[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Message):
    """What the trial came to; `saved` tells whether checkpoints of it may exist."""

    status: Status
    payload: JsonObject
    saved: bool = False
    trial: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnded(Message):
    """The attempt ended without an outcome.

    Args:
        cause: why.
        detail: the same for people.
        step: at which it was saved before it left.
        peer: another rank is the cause, or all ranks.
        noticed: it came after a notice, so that other ranks may be saving.
    """

    cause: Cause
    detail: str
    step: int | None = None
    peer: bool = False
    noticed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PackDone(Message):
    """Every trial of the pack that can have an outcome has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Superseded(Message):
    """Somebody else has finished the trial meanwhile, so there is nothing left to do."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unable(Message):
    """The machine can't go on with the trial, such as for a full disk; the trial is not to blame."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStarted(Message):
    """A rank of this machine runs as process `pid`."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMember(Message):
    """A rank of another machine runs; `member` is a `core.process.Member` in JSON."""

    member: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStopped(Message):
    """A rank has been stopped for longer than anybody waits."""

    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDone(Message):
    """A rank other than 0 has done its part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptMessage(Message):
    """A message about an attempt, with the trial and the attempt that it is about: a late one counts for no other."""

    index: int
    attempt: int
    body: Message


# Between nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker(Message):
    """Start the worker of a slot and rank."""

    slot: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ToWorker(Message):
    """Pass a message on to a worker."""

    slot: int
    rank: int
    body: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class TellWorker(Message):
    """Pass a notice on to a worker, with the signal that makes it look."""

    slot: int
    rank: int
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KillWorker(Message):
    """End a worker that won't leave."""

    slot: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FromWorker(Message):
    """What a worker of another node says."""

    slot: int
    rank: int
    body: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFailed(Message):
    """The node can't go on."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Message):
    """The node lives."""


# On the wire


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
        except (TypeError, ValueError):
            continue
    raise MalformedMessage(f"{kind}: {each.name} can't be {str(value)[:_MOST_SHOWN]!r}")


class _Kind(NamedTuple):
    make: type[Message]
    fields: tuple[_Field, ...]


@cache
def _kinds() -> dict[str, _Kind]:
    return {make.__name__: _Kind(make, tuple(map(_field, fields(make)))) for make in Message.__subclasses__()}


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
