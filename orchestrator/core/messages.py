"""What supervisors, workers, ranks and nodes say to each other: frozen dataclasses, which `core.channel` encodes.

Every message is matched by its type. A line that is no message, or lacks a field or has one of another type, costs
whoever has sent it: a worker its attempt, a node its place in the job, never the supervisor.

    supervisor -> forkserver    ForkWorker
    forkserver -> supervisor    ImportDone  ImportFailed  Forked  WorkerExited
    supervisor -> worker        RunTrial  Notice
    worker -> supervisor        Idle, and AttemptMessage, which holds one of the messages about an attempt:
                                Reported  Progress  Resumed  Outcome  AttemptEnded  PackDone  Superseded  Unable
                                RankStarted  RankMember  RankStopped  RankDone
    first node -> other node    StartWorker  ToWorker  TellWorker  KillWorker
    other node -> first node    ImportDone  ImportFailed  NodeFailed  FromWorker  WorkerExited  Heartbeat
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from orchestrator.core.atomic import Json, JsonObject
from orchestrator.errors import OrcError

__all__ = [
    "AttemptEnded", "AttemptMessage", "Cause", "ForkWorker", "Forked", "FromWorker", "Heartbeat", "Idle",
    "ImportDone", "ImportFailed", "KillWorker", "Malformed", "MalformedMessage", "Message", "NodeFailed", "Notice",
    "Outcome", "PackDone", "Progress", "RankDone", "RankMember", "RankStarted", "RankStopped", "Reported", "Resumed",
    "RunTrial", "StartWorker", "Status", "Superseded", "TellWorker", "ToWorker", "Unable", "WorkerExited", "WorkerId",
    "WorkerMessage",
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


class WorkerId(NamedTuple):
    """Names a worker process.

    Args:
        slot: which of the trials that its supervisor runs side by side it works for.
        rank: which of that trial's ranks it is.
    """

    slot: int
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message; each kind is a subclass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed(Message):
    """Stands for a line that was no message; never sent."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMessage(Message):
    """A message about a worker, or for it; for `slot` and `rank` see `WorkerId`."""

    slot: int
    rank: int

    @property
    def worker(self) -> WorkerId:
        """The worker's name."""
        return WorkerId(self.slot, self.rank)


# To and from the forkserver


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkWorker(WorkerMessage):
    """Fork a worker; its end of the channel comes along as a file descriptor.

    Args:
        log: the file it prints into; None to print where the forkserver does.
        devices: its CUDA_VISIBLE_DEVICES; None to leave that variable alone.
    """

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
class Forked(WorkerMessage):
    """A worker was forked."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited(WorkerMessage):
    """A worker process has ended, with this wait status (waitpid(2))."""

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
    """A rank of another machine runs; for its fields see `core.liveness.RankProcess`."""

    pid: int
    start: int
    host: str
    space: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStopped(Message):
    """A rank has been stopped for longer than anybody waits."""

    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDone(Message):
    """A rank other than 0 has done its part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle(Message):
    """The worker has ended what its trial had left running, and takes another trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptMessage(Message):
    """A message about an attempt, with the trial and the attempt that it is about: a late one counts for no other."""

    index: int
    attempt: int
    body: Message


# Between nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker(WorkerMessage):
    """Start the worker of a slot and rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToWorker(WorkerMessage):
    """Pass a message on to a worker."""

    body: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class TellWorker(WorkerMessage):
    """Pass a notice on to a worker, with the signal that makes it look."""

    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KillWorker(WorkerMessage):
    """End a worker that won't leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FromWorker(WorkerMessage):
    """What a worker of another node says."""

    body: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFailed(Message):
    """The node can't go on."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Message):
    """The node lives."""
