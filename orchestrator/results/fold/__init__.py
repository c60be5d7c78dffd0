"""Fold: all record files into one table, a row a trial.

    fold = Fold(paths, num_trials)
    fold.update()                      reads what is new; call it again at any time
    fold.status(7), fold.value(7)      what counts
    fold.outcome(7)                    the kept record itself, read back from its file
    fold.best(metric, 10)              the best trials; fold.summary(10), all of them as a Summary

The join is idempotent, commutative and associative: per trial the greatest outcome under complete > diverged > pruned >
failed, then the smallest sha256 of the canonical payload without its model, then one with a model; of equal ones, the
first by writer and offset. So lines may come late, twice, in any order, and from writers that were thought dead, and
the table is the same. A line that is not intact is read again by each update, since a network file system can show
zeros where data will be; the lines after it count already.

What the last fold knew lies beside the records, if whoever folded could write there (`cache`); much that is new is read
by several processes (`parallel`). Neither changes an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import cast

from orchestrator.config.spec import Metric
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.results.fold.columns import BEGUN, STARTED, STATUSES, at
from orchestrator.results.fold.incremental import IncrementalBest
from orchestrator.results.fold.segment import RecordFile, Segment, Unit, attempt_key, trial_of
from orchestrator.results.fold.table import NO_MODEL, Table, Vanished, order
from orchestrator.results.records import Cause, Seen, Status, as_index, look
from orchestrator.stats.summary import Summary

__all__ = ["Disagreement", "Fold"]

_RESULTS = {Status.COMPLETE, Status.DIVERGED}
_ENDED_BY_SLURM = (Cause.PREEMPTED, Cause.CANCELLED, Cause.TIMEOUT, Cause.NOTICE)
"""Notices after which a writer that falls silent was ended by Slurm, not by its trial."""
_SAVED_BYTES = 1 << 20
"""What must be new, in bytes, for the cache to be written anew."""
_DEALT_BYTES = 8 << 20
"""What must be new, in bytes, for it to be dealt to processes."""
_HAS_BEGUN = bytes(bool(marks & BEGUN) for marks in range(256))


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two outcomes of one trial that differ in their payload, and the hosts that wrote them."""

    trial: int
    hosts: tuple[str, str]


class Fold:
    """The join of all records of a sweep.

    Args:
        paths: the sweep.
        num_trials: how many trials the plan has; records of others are ignored.
        trials: those that have a row, consecutive; all by default. Indices stay those of the plan. Whatever counts
            trials, attempts or outcomes counts those of these trials, and others can't be asked for (IndexError).
        eager: use several processes when much is new, and save the cache when much was read. For a process that
            answers and ends; not for one that serves others, as a supervisor does.
    """

    def __init__(self, paths: SweepPaths, num_trials: int, *, trials: range | None = None, eager: bool = False) -> None:
        self._paths = paths
        self.num_trials = num_trials
        self.indices = range(num_trials) if trials is None else trials
        self._eager = eager
        self._is_new = True
        self.num_changes = 0
        """Grows whenever what counts may have changed, in whatever way."""
        self._begin()

    def _begin(self) -> None:
        self._files: list[RecordFile] = []
        self._numbers: dict[str, int] = {}
        self._table = Table(self._files, self.num_trials, self.indices)
        self._leaders = IncrementalBest(self._table)
        self._restarts: dict[tuple[Json, Json], int] = {}
        self._continued: dict[str, str] = {}
        self._num_unsaved = 0
        self._is_savable = True
        self._busy: list[tuple[RecordFile, list[int]]] | None = None
        self._counts: dict[int, int] = {}

    # Reading

    def update(self) -> int:
        """Read what has become visible since the last call; returns how many more intact lines there are now.

        Lines can also go, where a file server loses what was not on its disk, or shows zeros again beyond a hole: they
        no longer count, for a trial whose outcome is gone must be run again. `num_changes` tells of any change. A file
        that can't be read counts as empty; `unreadable` tells of it.

        Raises:
            FolderError: an intact line is not of this version; names it.
            FileNotFoundError: there is no folder of records.
        """
        before = self._num_lines
        seen = look(self._paths)
        first, self._is_new = self._is_new, False
        if any(file.stop > _size(seen, file) for file in self._files):
            self._begin_anew()
        if first and self._paths.fold_cache.exists():
            self._recall(seen)
        # Opening a file is what makes a network file system look again, so only a first look goes by sizes.
        read_already = {file.path.name for file in self._files if first and file.offset == seen[file.path.name].size}
        if not self._take_news(seen, read_already):
            self._begin_anew()
            self._take_news(seen, set())
        if self._eager and self._num_unsaved >= _SAVED_BYTES:
            self._save(seen)
        return self._num_lines - before

    def _begin_anew(self) -> None:
        """Something that was read is lost. No row tells of all the lines that made it, so all are read again."""
        self._begin()
        self.num_changes += 1

    def _take_news(self, seen: Mapping[str, Seen], read_already: set[str]) -> bool:
        """Read what is new; whether all that had been read before is still there."""
        for name in sorted(seen.keys() - self._numbers.keys()):
            self._add(RecordFile(self._paths.records / name))
        news = [
            (Unit(number, file.offset), file.path, _size(seen, file))
            for number, file in enumerate(self._files)
            if file.path.name not in read_already
        ]
        had_holes = any(file.runs for file in self._files)
        try:
            self._take(self._read(news))
        except Vanished:
            if not had_holes:
                raise
            return False
        return not any(file.has_lost for file in self._files)

    @property
    def _num_lines(self) -> int:
        return sum(file.num_lines + file.beyond for file in self._files)

    def _add(self, file: RecordFile) -> None:
        self._numbers[file.path.name] = len(self._files)
        self._files.append(file)
        self._take_writer(file)

    def _read(self, news: list[tuple[Unit, Path, int]]) -> list[Segment]:
        if self._eager and sum(size - unit.start for unit, _, size in news) >= _DEALT_BYTES:
            from orchestrator.results.fold import parallel

            if parallel.is_alone():
                return parallel.read(self._table, parallel.deal(news, parallel.num_processes(self._table)))
        return [self._table.read(*unit) for unit, _, _ in news]

    def _take(self, stretches: list[Segment]) -> None:
        self._busy = None
        self._counts.clear()
        by_file: dict[int, list[Segment]] = {}
        for one in sorted(stretches, key=lambda one: (one.number, one.start)):
            by_file.setdefault(one.number, []).append(one)
        for number, its in by_file.items():
            file, before = self._files[number], self._files[number].offset
            self.num_changes += file.take(its)
            if file.beyond:
                # Before its hole is filled, the file may lose such lines again, and nothing of the file would tell.
                self._is_savable = False
            self._num_unsaved += file.offset - before
            if any(one.writer for one in its):
                self._take_writer(file)
            for key in [key for key in file.open if self._table.is_closed(key)]:
                del file.open[key]

    def _take_writer(self, file: RecordFile) -> None:
        if file.writer:
            self._restarts[file.job] = max(as_index(file.writer.get("restarts")), self._restarts.get(file.job, 0))
        if isinstance(before := file.writer.get("continues"), str):
            self._continued[before] = file.name

    # The cache

    def _recall(self, seen: Mapping[str, Seen]) -> None:
        from orchestrator.results.fold import cache

        known = cache.load(self._paths, self._table, self._leaders, seen)
        if known is None:
            self._begin()
        for file in known or ():
            self._add(file)
        self.num_changes += bool(known)

    def _save(self, seen: Mapping[str, Seen]) -> None:
        if len(self.indices) < self.num_trials or not self._is_savable:
            return
        from orchestrator.results.fold import cache

        cache.save(self._paths, self._files, self._table, self._leaders, seen)
        self._num_unsaved = 0

    # What a person asks

    def _row(self, trial: int) -> int:
        if trial not in self.indices:
            raise IndexError(f"trial {trial} has no row in a fold of {self.indices}")
        return trial - self.indices.start

    @property
    def values(self) -> Sequence[float]:
        """The objective of each kept outcome, by row: that of trial `indices[row]`. 0.0 where there is none."""
        return cast("Sequence[float]", self._table.rows.values)

    def value(self, trial: int) -> float:
        """The objective of the kept outcome of a trial; 0.0 where there is none."""
        return self._table.rows.values[self._row(trial)]

    def best(self, metric: Metric, top: int) -> list[int]:
        """The `top` best complete trials, best first: by value in the metric's direction, ties by the smaller index."""
        rows = self._leaders.best(1.0 if metric.goal == "minimize" else -1.0, top)
        return [self.indices[row] for row in rows]

    def summary(self, top: int) -> Summary:
        """The Summary of the join: each complete trial's value under its index, and counts of the others."""
        complete, was_long = self._leaders.summary(top)
        if was_long and self._eager:
            self._save(look(self._paths))
        return replace(
            complete,
            num_diverged=complete.num_diverged + self.count(Status.DIVERGED),
            num_pruned=self.count(Status.PRUNED),
            num_failed=self.count(Status.FAILED),
        )

    @property
    def seen(self) -> dict[str, int]:
        """Writer id -> byte offset up to which every line of its file was read, intact and contiguous."""
        return {file.name: file.offset for file in self._files}

    def status(self, trial: int) -> Status | None:
        """What counts for a trial; None while there is no outcome."""
        return STATUSES[self._table.rows.status[self._row(trial)]]

    def count(self, status: Status) -> int:
        """How many trials came to `status`."""
        return self._count(STATUSES.index(status))

    @property
    def num_missing(self) -> int:
        """How many trials have no outcome."""
        return self._count(0)

    def _count(self, code: int) -> int:
        if code not in self._counts:
            self._counts[code] = self._table.rows.count(code)
        return self._counts[code]

    def missing(self) -> list[int]:
        """Trials without an outcome, in order."""
        return self._table.rows.trials(0)

    def trials(self, status: Status) -> list[int]:
        """Trials that came to `status`, in order."""
        return self._table.rows.trials(STATUSES.index(status))

    def outcome(self, trial: int) -> JsonObject | None:
        """The kept outcome record of a trial, read back from its file."""
        if self.status(trial) is None:
            return None
        return self._table.record(self._table.rows.where[self._row(trial)])

    def payload(self, trial: int) -> JsonObject:
        """The payload of the kept outcome of a trial; empty without an outcome."""
        payload = (self.outcome(trial) or {}).get("payload")
        return payload if isinstance(payload, dict) else {}

    def next_attempt(self, trial: int) -> int:
        """The number that the next attempt at a trial gets: one more than any that was started."""
        self._row(trial)
        return self._table.next_attempt.get(trial) or int(bool(self._table.rows.marks[trial] & STARTED))

    def _at_work(self) -> list[tuple[RecordFile, list[int]]]:
        """The files that have starts that had begun and neither finished nor gave up, with the keys of these."""
        if self._busy is None:
            # Of a file and a copy of it under another name, the one that knows more.
            files = sorted(self._files, key=lambda file: file.offset)
            found = {file.author: (file, keys) for file in files if (keys := file.running(self._table.is_closed))}
            self._busy = list(found.values())
        return self._busy

    def charges(self, trial: int) -> Counter[Cause]:
        """How often attempts at a trial ended without an outcome, by cause.

        An attempt that was running when its writer fell silent counts as unknown; but nothing if the writer's job is
        seen to have been requeued, and as its notice if that was of a preemption, a cancel or the time limit.
        An attempt that had not begun costs nothing. All this is read from records, so every reader counts alike.
        """
        found = self._ended(trial)
        for file, keys in self._at_work():
            lost = sum(trial_of(key) == trial for key in keys)
            if lost and not self._was_requeued(file):
                found[_silenced_by(file)] += lost
        return found

    def _ended(self, trial: int) -> Counter[Cause]:
        """How often attempts at a trial ended by each cause; once, if a file was copied under another name."""
        found: dict[tuple[int, str], Cause] = {}
        for (attempt, number), cause in self._table.ends.get(trial, {}).items():
            who = attempt, self._files[number].author
            found[who] = min(cause, found.get(who, cause))
        return Counter(found.values())

    def _was_requeued(self, file: RecordFile) -> bool:
        """Whether a later run of the job of this file's writer is seen."""
        return file.job[1] is not None and self._restarts.get(file.job, 0) > as_index(file.writer.get("restarts"))

    def authors(self, trial: int) -> list[JsonObject]:
        """The writer lines of the files that hold an outcome of a trial, kept or not."""
        if self.status(trial) is None:
            return []
        return [self._writer(where) for where in self._outcomes(trial)]

    def _outcomes(self, trial: int) -> list[int]:
        """The places of all outcomes of a trial that has one."""
        return sorted({self._table.rows.where[self._row(trial)]} | self._table.rivals.of(trial))

    def _writer(self, where: int) -> JsonObject:
        return self._files[at(where)[0]].writer

    def latest(self, writer: str) -> str:
        """The id of the file in which the process of `writer` goes on, if it had to abandon that one."""
        seen = {writer}
        while (after := self._continued.get(writer)) is not None and after not in seen:
            seen.add(writer := after)
        return writer

    def running(self) -> dict[int, list[JsonObject]]:
        """Trial -> writer lines of the processes that started it and neither finished nor gave up; each may be dead."""
        found: dict[int, list[JsonObject]] = {}
        for file, keys in sorted(self._at_work(), key=lambda one: one[0].name):
            for trial in map(trial_of, keys):
                if trial in self.indices and self.status(trial) is None:
                    found.setdefault(trial, []).append(file.writer)
        return found

    def retries(self) -> Counter[Cause]:
        """How often any attempt ended without an outcome, by cause."""
        return sum(map(self._ended, self._table.ends), Counter[Cause]())

    @property
    def has_retried(self) -> bool:
        """Whether any trial has been started more than once."""
        return bool(self._table.next_attempt)

    def attempts(self, trial: int) -> int:
        """How often a trial was begun; at least 1 once it has an outcome."""
        started = [attempt_key(trial, number) for number in range(self.next_attempt(trial))]
        unended = {key for key in started if not self._table.is_closed(key)}
        if unended:
            unended.intersection_update(key for _, keys in self._at_work() for key in keys)
        begun = sum(map(self._table.has_begun, started)) + len(unended)
        return max(begun, int(self.status(trial) is not None))

    @property
    def disagreements(self) -> list[Disagreement]:
        """Trials with outcomes that contradict the kept one, in order.

        Two payloads of one status contradict each other, and so do complete and diverged. No contradiction is a failed
        trial that completed when it was tried again or failed in other words, nor a model that only one has: which
        worker keeps one depends on what else it ran.
        """
        found = (self._disagreement(trial) for trial in sorted(self._table.rivals.unequal))
        return [disagreement for disagreement in found if disagreement is not None]

    def _disagreement(self, trial: int) -> Disagreement | None:
        status = self.status(trial)
        if status is Status.FAILED:
            return None
        comparable = _RESULTS if status in _RESULTS else {status}
        found: list[tuple[int, tuple[bytes, str], str]] = []
        for where in self._outcomes(trial):
            line = self._table.record(where)
            status = Status(str(line["status"]))
            if status in comparable:
                host = str(self._writer(where).get("host", "unknown host"))
                found.append((STATUSES.index(status), order(line["payload"]), host))
        kept, *others = sorted(found)
        other = next((one[2] for one in others if _differ(kept, one)), None)
        return None if other is None else Disagreement(trial, (min(kept[2], other), max(kept[2], other)))

    @property
    def num_bad_lines(self) -> int:
        """Lines that were not intact at the last look: torn by a crash, or not visible yet."""
        return sum(file.bad for file in self._files)

    @property
    def unreadable(self) -> list[tuple[Path, str]]:
        """Record files that could not be read at the last look, and why."""
        return [(file.path, file.fault) for file in self._files if file.fault]

    @property
    def has_begun(self) -> bool:
        """Whether any attempt at any trial has begun."""
        marks = self._table.rows.marks[self.indices.start : self.indices.stop].tobytes()
        later = (key for key, begun in self._table.closed.items() if begun)
        running = (key for _, keys in self._at_work() for key in keys)
        return 1 in marks.translate(_HAS_BEGUN) or any(trial_of(key) in self.indices for key in chain(later, running))

    @property
    def seconds(self) -> float:
        """How long the kept outcomes took, in seconds, added up."""
        return sum(self._table.rows.seconds.tolist())

    def writers(self) -> dict[str, JsonObject]:
        """Writer id -> the first line of its file."""
        return {file.name: file.writer for file in self._files}

    def notices(self) -> list[tuple[JsonObject, JsonObject]]:
        """(writer line, notice) of every notice."""
        return [(file.writer, line) for file in self._files for line in file.notices.values()]


def _size(seen: Mapping[str, Seen], file: RecordFile) -> int:
    found = seen.get(file.path.name)
    return found.size if found else 0


def _silenced_by(file: RecordFile) -> Cause:
    """What ended a writer that fell silent: its last notice to leave; one to go on takes none of these back."""
    told = (str(file.notices[offset].get("action")).partition(":")[0] for offset in sorted(file.notices, reverse=True))
    return next((Cause(cause) for cause in told if cause in _ENDED_BY_SLURM), Cause.UNKNOWN)


def _differ(one: tuple[int, tuple[bytes, str], str], other: tuple[int, tuple[bytes, str], str]) -> bool:
    """Whether two outcomes, by rank, order and host, contradict each other."""
    (measured, model), (its_measured, its_model) = one[1], other[1]
    models_differ = NO_MODEL not in (model, its_model) and model != its_model
    return one[0] != other[0] or measured != its_measured or models_differ
