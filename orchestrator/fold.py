"""Fold: all record files into one table, a row a trial.

    fold = Fold(paths, num_trials)
    fold.update()                      reads what is new; call it again at any time
    fold.status(7), fold.values        what counts
    fold.outcome(7)                    the kept record itself, read back from its file

The join is idempotent, commutative and associative: per trial the greatest outcome under complete > diverged > pruned >
failed, then the smallest sha256 of the canonical payload. So lines may come late, twice, in any order, and from writers
that were thought dead, and the table is the same. A line that is not intact is read again by each update, since a
network file system can show zeros where data will be; the lines after it count already.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import orjson

from orchestrator import store
from orchestrator.errors import FolderError
from orchestrator.paths import SweepPaths
from orchestrator.records import Cause, Status, as_index
from orchestrator.store import Json, JsonObject

__all__ = ["Attempt", "Disagreement", "Fold"]

_RANK = (Status.COMPLETE, Status.DIVERGED, Status.PRUNED, Status.FAILED)
_NO_OUTCOME = len(_RANK)
_RESULTS = {Status.COMPLETE, Status.DIVERGED}
_SKIPPED = (b'{"kind":"report"', b'{"kind":"beat"')


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a trial, by its index and its number from 0."""

    trial: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two outcomes of one trial that differ in their payload, and the hosts that wrote them."""

    trial: int
    hosts: tuple[str, str]


@dataclass(slots=True)
class _File:
    """What is known of one record file. Up to `offset`, every line was intact; `beyond` it, that many were."""

    path: Path
    offset: int = 0
    beyond: int = 0
    bad: int = 0
    writer: JsonObject = field(default_factory=dict)
    notices: list[JsonObject] = field(default_factory=list)
    open: dict[Attempt, None] = field(default_factory=dict)

    def running(self, closed: Set[Attempt]) -> list[Attempt]:
        """The starts without outcome or end that had begun: starts are written in the order in which they run.

        What is `closed` may have been so in another file, if its writer had to abandon this one.
        """
        slots = max(1, as_index(self.writer.get("slots")))
        return list(islice((this for this in self.open if this not in closed), slots))


class Fold:
    """The join of all records of a sweep.

    Args:
        paths: the sweep.
        num_trials: how many trials the plan has; records of others are ignored.
    """

    def __init__(self, paths: SweepPaths, num_trials: int) -> None:
        self._paths = paths
        self.num_trials = num_trials
        self._ranks = bytearray([_NO_OUTCOME]) * num_trials
        self._files: list[_File] = []
        self._known: dict[str, int] = {}
        self._where_file = array("i", [-1]) * num_trials
        self._where_offset = array("q", [0]) * num_trials
        self.values = array("d", [0.0]) * num_trials
        self._seconds = array("f", [0.0]) * num_trials
        self._next_attempt: dict[int, int] = {}
        self._closed: set[Attempt] = set()
        self._ends: dict[tuple[Attempt, int], Cause] = {}
        self._rivals: dict[int, set[tuple[int, int]]] = {}

    # Reading

    def update(self) -> int:
        """Read what has become visible since the last call; returns the number of intact lines that are new."""
        for name in sorted(os.listdir(self._paths.records)):  # noqa: PTH208 (names are all that is needed)
            if name.endswith(".jsonl") and name not in self._known:
                self._known[name] = len(self._files)
                self._files.append(_File(self._paths.records / name))
        return sum(self._read(number, file) for number, file in enumerate(self._files))

    def _read(self, number: int, file: _File) -> int:
        bad = good = contiguous = 0
        for offset, line in store.lines(file.path, file.offset, torn=True):
            if not store.intact(line):
                bad += 1
                continue
            good += 1
            if not line.startswith(_SKIPPED):
                self._take(number, file, offset, line)
            if not bad:
                file.offset = offset + len(line) + 1
                contiguous = good
        # Lines after a bad one are read again by each update, and were counted by the one before.
        new, file.beyond, file.bad = good - file.beyond, good - contiguous, bad
        return new

    def _take(self, number: int, file: _File, offset: int, data: bytes) -> None:
        try:
            self._take_line(number, file, offset, orjson.loads(data))
        except (ValueError, KeyError, OverflowError) as error:
            raise FolderError(
                f"{file.path}: a record at byte {offset} is not one of this version ({type(error).__name__}: {error}); "
                "read the sweep with the version that ran it"
            ) from error

    def _take_line(self, number: int, file: _File, offset: int, line: JsonObject) -> None:
        kind = line.get("kind")
        if kind == "writer":
            file.writer = line
        elif kind == "notice":
            if line not in file.notices:
                file.notices.append(line)
        elif 0 <= as_index(line.get("trial")) < self.num_trials:
            self._take_trial(number, file, offset, line)

    def _take_trial(self, number: int, file: _File, offset: int, line: JsonObject) -> None:
        this = Attempt(as_index(line["trial"]), as_index(line.get("attempt")))
        kind = line["kind"]
        if kind == "start":
            self._take_start(file, this)
            return
        if kind == "outcome":
            self._join(number, offset, this.trial, line)
        elif kind != "end":
            return
        elif line.get("begun", True):
            # Two live copies of a trial can number their attempts alike: each is charged.
            self._ends[this, number] = Cause(str(line["cause"]))
        file.open.pop(this, None)
        self._closed.add(this)

    def _take_start(self, file: _File, this: Attempt) -> None:
        self._next_attempt[this.trial] = max(this.attempt + 1, self._next_attempt.get(this.trial, 0))
        if this not in self._closed:
            file.open[this] = None

    # The join

    def _join(self, number: int, offset: int, trial: int, line: JsonObject) -> None:
        rank = _RANK.index(Status(str(line["status"])))
        if self._ranks[trial] != _NO_OUTCOME and not self._replaces(number, offset, trial, line, rank):
            return
        self._ranks[trial] = rank
        self._where_file[trial] = number
        self._where_offset[trial] = offset
        payload = line["payload"]
        value = payload.get("value") if isinstance(payload, dict) else None
        self.values[trial] = value if isinstance(value, (int, float)) else 0.0
        took = line.get("seconds")
        self._seconds[trial] = took if isinstance(took, (int, float)) else 0.0

    def _replaces(self, number: int, offset: int, trial: int, line: JsonObject, rank: int) -> bool:
        kept, where = self._ranks[trial], (self._where_file[trial], self._where_offset[trial])
        if where == (number, offset):
            return False
        self._rivals.setdefault(trial, {where}).add((number, offset))
        if rank != kept:
            return rank < kept
        return _digest(line["payload"]) < _digest((self.outcome(trial) or {}).get("payload"))

    def _host(self, number: int) -> str:
        return str(self._files[number].writer.get("host", "unknown host"))

    # What a person asks

    def status(self, trial: int) -> Status | None:
        """What counts for a trial; None while there is no outcome."""
        rank = self._ranks[trial]
        return None if rank == _NO_OUTCOME else _RANK[rank]

    def count(self, status: Status) -> int:
        """How many trials came to `status`."""
        return self._ranks.count(_RANK.index(status))

    @property
    def num_missing(self) -> int:
        """How many trials have no outcome."""
        return self._ranks.count(_NO_OUTCOME)

    def missing(self) -> list[int]:
        """Trials without an outcome, in order."""
        return [trial for trial, rank in enumerate(self._ranks) if rank == _NO_OUTCOME]

    def trials(self, status: Status) -> list[int]:
        """Trials that came to `status`, in order."""
        rank = _RANK.index(status)
        return [trial for trial, found in enumerate(self._ranks) if found == rank]

    def outcome(self, trial: int) -> JsonObject | None:
        """The kept outcome record of a trial, read back from its file."""
        if self._ranks[trial] == _NO_OUTCOME:
            return None
        return self._record(self._where_file[trial], self._where_offset[trial])

    def _record(self, number: int, offset: int) -> JsonObject:
        with self._files[number].path.open("rb") as file:
            file.seek(offset)
            line: JsonObject = orjson.loads(file.readline())
        return line

    def payload(self, trial: int) -> JsonObject:
        """The payload of the kept outcome of a trial; empty without an outcome."""
        payload = (self.outcome(trial) or {}).get("payload")
        return payload if isinstance(payload, dict) else {}

    def next_attempt(self, trial: int) -> int:
        """The number that the next attempt at a trial gets: one more than any that was started."""
        return self._next_attempt.get(trial, 0)

    def charges(self, trial: int, *, free: Callable[[JsonObject], bool] = lambda _: False) -> Counter[Cause]:
        """How often attempts at a trial ended without an outcome, by cause.

        An attempt that was running when its writer fell silent counts as unknown, unless `free` says of the writer's
        line that its end was none of the trial's doing. An attempt that had not begun costs nothing.
        """
        found = Counter(cause for (this, _), cause in self._ends.items() if this.trial == trial)
        lost = [this for file in self._files if not free(file.writer) for this in file.running(self._closed)]
        found[Cause.UNKNOWN] += sum(this.trial == trial for this in lost)
        return found

    def author(self, trial: int) -> JsonObject:
        """The writer line of the file that the kept outcome of a trial is in; empty without an outcome."""
        return self._files[self._where_file[trial]].writer if self._ranks[trial] != _NO_OUTCOME else {}

    def running(self) -> dict[int, JsonObject]:
        """Trial -> writer line of a process that started it and neither finished nor gave up; it may be dead."""
        return {
            this.trial: file.writer
            for file in self._files
            for this in file.running(self._closed)
            if self._ranks[this.trial] == _NO_OUTCOME
        }

    def retries(self) -> Counter[Cause]:
        """How often any attempt ended without an outcome, by cause."""
        return Counter(self._ends.values())

    def attempts(self, trial: int) -> int:
        """How often a trial was started; at least 1 once it has an outcome."""
        return max(self._next_attempt.get(trial, 0), int(self._ranks[trial] != _NO_OUTCOME))

    @property
    def disagreements(self) -> list[Disagreement]:
        """Trials with outcomes that contradict the kept one, in order.

        Two payloads of one status contradict each other, and so do complete and diverged. A failed trial that completed
        when it was tried again is no contradiction.
        """
        found = (self._disagreement(trial) for trial in sorted(self._rivals))
        return [disagreement for disagreement in found if disagreement is not None]

    def _disagreement(self, trial: int) -> Disagreement | None:
        comparable = _RESULTS if self.status(trial) in _RESULTS else {self.status(trial)}
        found: list[tuple[int, bytes, str]] = []
        for number, offset in self._rivals[trial]:
            line = self._record(number, offset)
            status = Status(str(line["status"]))
            if status in comparable:
                found.append((_RANK.index(status), _digest(line["payload"]), self._host(number)))
        kept, *others = sorted(found)
        host = next((host for rank, digest, host in others if (rank, digest) != kept[:2]), None)
        return None if host is None else Disagreement(trial, (min(kept[2], host), max(kept[2], host)))

    @property
    def num_bad_lines(self) -> int:
        """Lines that were not intact at the last look: torn by a crash, or not visible yet."""
        return sum(file.bad for file in self._files)

    @property
    def has_starts(self) -> bool:
        """Whether any trial was ever started."""
        return bool(self._next_attempt)

    @property
    def seconds(self) -> float:
        """How long the kept outcomes took, in seconds, added up."""
        return sum(self._seconds)

    def writers(self) -> dict[str, JsonObject]:
        """Writer id -> the first line of its file."""
        return {file.path.stem: file.writer for file in self._files}

    def notices(self) -> list[tuple[JsonObject, JsonObject]]:
        """(writer line, notice) of every notice."""
        return [(file.writer, line) for file in self._files for line in file.notices]


def _digest(payload: Json) -> bytes:
    return hashlib.sha256(store.canonical(payload)).digest()
