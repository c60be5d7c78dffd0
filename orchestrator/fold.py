"""Fold: all record files into one table, a row a trial.

    fold = Fold(paths, num_trials)
    fold.update()                      reads what is new; call it again at any time
    fold.status(7), fold.values        what counts
    fold.outcome(7)                    the kept record itself, read back from its file

The join is idempotent, commutative and associative: per trial the greatest outcome under complete > diverged > pruned >
failed, then the smallest sha256 of the canonical payload without its model, then one with a model. So lines may come
late, twice, in any order, and from writers that were thought dead, and the table is the same. A line that is not intact
is read again by each update, since a network file system can show zeros where data will be; the lines after it count
already.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Container
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
_ENDED_BY_SLURM = (Cause.PREEMPTED, Cause.CANCELLED, Cause.TIMEOUT, Cause.NOTICE)
"""Notices after which a writer that falls silent was ended by Slurm, not by its trial."""
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
    notices: dict[int, JsonObject] = field(default_factory=dict)
    open: dict[Attempt, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The writer's id."""
        return self.path.stem

    @property
    def job(self) -> tuple[Json, Json]:
        """Submission and job, which all runs of a requeued job share."""
        return self.writer.get("submission"), self.writer.get("job")

    def running(self, closed: Container[Attempt]) -> list[Attempt]:
        """The starts without outcome or end that had begun: starts are written in the order in which they run.

        What is `closed` may have been so in another file, if its writer had to abandon this one.
        """
        slots = max(1, as_index(self.writer.get("slots")))
        # Starts may become visible in another order than they were written in.
        written = sorted(self.open, key=self.open.__getitem__)
        return list(islice((this for this in written if this not in closed), slots))


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
        self._closed: dict[Attempt, bool] = {}
        """Attempts with an outcome or an end, and whether they had begun."""
        self._restarts: dict[tuple[Json, Json], int] = {}
        self._continued: dict[str, str] = {}
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
            self._take_writer(file, line)
        elif kind == "notice":
            file.notices[offset] = line
        elif 0 <= as_index(line.get("trial")) < self.num_trials:
            self._take_trial(number, file, offset, line)

    def _take_writer(self, file: _File, line: JsonObject) -> None:
        file.writer = line
        self._restarts[file.job] = max(as_index(line.get("restarts")), self._restarts.get(file.job, 0))
        if isinstance(before := line.get("continues"), str):
            self._continued[before] = file.name

    def _take_trial(self, number: int, file: _File, offset: int, line: JsonObject) -> None:
        this = Attempt(as_index(line["trial"]), as_index(line.get("attempt")))
        kind = line["kind"]
        if kind == "start":
            self._take_start(file, this, offset)
            return
        if kind == "outcome":
            self._join(number, offset, this.trial, line)
        elif kind != "end":
            return
        elif line.get("begun", True):
            # Two live copies of a trial can number their attempts alike: each is charged.
            self._ends[this, number] = Cause(str(line["cause"]))
        file.open.pop(this, None)
        self._closed[this] = self._closed.get(this, False) or kind == "outcome" or line.get("begun") is not False

    def _take_start(self, file: _File, this: Attempt, offset: int) -> None:
        self._next_attempt[this.trial] = max(this.attempt + 1, self._next_attempt.get(this.trial, 0))
        if this not in self._closed:
            file.open[this] = min(offset, file.open.get(this, offset))

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
        return _order(line["payload"]) < _order((self.outcome(trial) or {}).get("payload"))

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

    def charges(self, trial: int) -> Counter[Cause]:
        """How often attempts at a trial ended without an outcome, by cause.

        An attempt that was running when its writer fell silent counts as unknown; but nothing if the writer's job is
        seen to have been requeued, and as its notice if that was of a preemption, a cancel or the time limit.
        An attempt that had not begun costs nothing. All this is read from records, so every reader counts alike.
        """
        found = Counter(cause for (this, _), cause in self._ends.items() if this.trial == trial)
        for file in self._files:
            lost = sum(this.trial == trial for this in file.running(self._closed))
            if lost and not self._was_requeued(file):
                found[_silenced_by(file)] += lost
        return found

    def _was_requeued(self, file: _File) -> bool:
        """Whether a later run of the job of this file's writer is seen."""
        return file.job[1] is not None and self._restarts.get(file.job, 0) > as_index(file.writer.get("restarts"))

    def authors(self, trial: int) -> list[JsonObject]:
        """The writer lines of the files that hold an outcome of a trial, kept or not."""
        if self._ranks[trial] == _NO_OUTCOME:
            return []
        kept = self._where_file[trial], self._where_offset[trial]
        return [self._files[number].writer for number, _ in sorted(self._rivals.get(trial, {kept}))]

    def latest(self, writer: str) -> str:
        """The id of the file in which the process of `writer` goes on, if it had to abandon that one."""
        while (after := self._continued.get(writer)) is not None:
            writer = after
        return writer

    def running(self) -> dict[int, list[JsonObject]]:
        """Trial -> writer lines of the processes that started it and neither finished nor gave up; each may be dead."""
        found: dict[int, list[JsonObject]] = {}
        for file in sorted(self._files, key=lambda file: file.name):
            for this in file.running(self._closed):
                if self._ranks[this.trial] == _NO_OUTCOME:
                    found.setdefault(this.trial, []).append(file.writer)
        return found

    def retries(self) -> Counter[Cause]:
        """How often any attempt ended without an outcome, by cause."""
        return Counter(self._ends.values())

    def attempts(self, trial: int) -> int:
        """How often a trial was begun; at least 1 once it has an outcome."""
        started = [Attempt(trial, number) for number in range(self.next_attempt(trial))]
        unended = {this for this in started if this not in self._closed}
        if unended:
            unended.intersection_update(this for file in self._files for this in file.running(self._closed))
        begun = sum(self._closed.get(this, False) for this in started) + len(unended)
        return max(begun, int(self._ranks[trial] != _NO_OUTCOME))

    @property
    def disagreements(self) -> list[Disagreement]:
        """Trials with outcomes that contradict the kept one, in order.

        Two payloads of one status contradict each other, and so do complete and diverged. No contradiction is a failed
        trial that completed when it was tried again or failed in other words, nor a model that only one has: which
        worker keeps one depends on what else it ran.
        """
        found = (self._disagreement(trial) for trial in sorted(self._rivals))
        return [disagreement for disagreement in found if disagreement is not None]

    def _disagreement(self, trial: int) -> Disagreement | None:
        status = self.status(trial)
        if status is Status.FAILED:
            return None
        comparable = _RESULTS if status in _RESULTS else {status}
        found: list[tuple[int, tuple[bytes, str], str]] = []
        for number, offset in self._rivals[trial]:
            line = self._record(number, offset)
            status = Status(str(line["status"]))
            if status in comparable:
                found.append((_RANK.index(status), _order(line["payload"]), self._host(number)))
        kept, *others = sorted(found)
        host = next((one[2] for one in others if _differ(kept, one)), None)
        return None if host is None else Disagreement(trial, (min(kept[2], host), max(kept[2], host)))

    @property
    def num_bad_lines(self) -> int:
        """Lines that were not intact at the last look: torn by a crash, or not visible yet."""
        return sum(file.bad for file in self._files)

    @property
    def has_begun(self) -> bool:
        """Whether any attempt at any trial has begun."""
        return any(self._closed.values()) or any(file.running(self._closed) for file in self._files)

    @property
    def seconds(self) -> float:
        """How long the kept outcomes took, in seconds, added up."""
        return sum(self._seconds)

    def writers(self) -> dict[str, JsonObject]:
        """Writer id -> the first line of its file."""
        return {file.name: file.writer for file in self._files}

    def notices(self) -> list[tuple[JsonObject, JsonObject]]:
        """(writer line, notice) of every notice."""
        return [(file.writer, line) for file in self._files for line in file.notices.values()]


def _silenced_by(file: _File) -> Cause:
    """What ended a writer that fell silent: its last notice to leave; one to go on takes none of these back."""
    told = (str(file.notices[offset].get("action")).partition(":")[0] for offset in sorted(file.notices, reverse=True))
    return next((Cause(cause) for cause in told if cause in _ENDED_BY_SLURM), Cause.UNKNOWN)


def _order(payload: Json) -> tuple[bytes, str]:
    """Sorts payloads of one status: by what was measured; of equal ones, those without a model come last."""
    fields = payload if isinstance(payload, dict) else {"payload": payload}
    measured: JsonObject = {name: value for name, value in fields.items() if name != "model"}
    model = fields.get("model")
    return hashlib.sha256(store.canonical(measured)).digest(), model if isinstance(model, str) else _NO_MODEL


_NO_MODEL = "~"  # after every hexadecimal digit


def _differ(one: tuple[int, tuple[bytes, str], str], other: tuple[int, tuple[bytes, str], str]) -> bool:
    """Whether two outcomes, by rank, order and host, contradict each other."""
    (measured, model), (its_measured, its_model) = one[1], other[1]
    models_differ = _NO_MODEL not in (model, its_model) and model != its_model
    return one[0] != other[0] or measured != its_measured or models_differ
