"""Table: the join of lines, in flat memory.

Trials have fixed columns (`rows`); what is rare is in dicts: attempts after the first, ends, and trials with more than
one outcome. A table is a value of a commutative, idempotent monoid: two of them `join`, whatever lines each has read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final, cast
from zlib import crc32

import orjson

from orchestrator.core import atomic
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.errors import FolderError
from orchestrator.results.fold.columns import BEGUN, CLOSED, COMPLETE, STARTED, STATUSES, Columns, at, place
from orchestrator.results.fold.line_cache import LineCache, payload_text
from orchestrator.results.fold.other_outcomes import OtherOutcomes
from orchestrator.results.fold.segment import NUM_ATTEMPTS, RecordFile, Segment, attempt_key, attempt_of, lines
from orchestrator.results.records import Cause, as_index

__all__ = ["Table", "Vanished", "order"]

_CODES: Final = {status.value: code for code, status in enumerate(STATUSES) if status is not None}
_ENDED: Final = CLOSED | BEGUN
_CRC: Final = b',"crc":'
_OUTCOME: Final = b'{"kind":"outcome"'
_HEAD: Final = len(_OUTCOME)
_SKIPPED: Final = (b'{"kind":"report"', b'{"kind":"beat"', b'{"kind":"at"', b'{"kind":"resume"')


class Vanished(FolderError):
    """A line that was read is no longer there."""


class Table:
    """What lines say of trials.

    Args:
        files: the record files by number; grows.
        num_trials: how many trials the plan has; lines of others are ignored.
        trials: those that have a row.
        rows: where the rows are kept; new ones by default.
    """

    def __init__(
        self, files: Sequence[RecordFile], num_trials: int, trials: range, *, rows: Columns | None = None
    ) -> None:
        self._files = files
        self.num_trials = num_trials
        self.trials = trials
        self.rows = Columns(num_trials, trials) if rows is None else rows
        self.next_attempt: dict[int, int] = {}
        """Where it is above 1."""
        self.closed: dict[int, bool] = {}
        """Attempts after the first with an outcome or an end, and whether they had begun."""
        self.ends: dict[int, dict[tuple[int, int], Cause]] = {}
        """Trial -> (attempt, file number) -> cause. Two live copies can number attempts alike: each is charged."""
        self.rivals = OtherOutcomes()
        self._lookback = LineCache(files)
        self.changed: list[int] | None = None
        """Rows in the order in which they were set, once somebody wants to know."""
        self.num_replaced = 0
        """How often a complete trial's outcome gave way to another one."""

    # Reading

    def read(self, number: int, start: int, stop: int | None = None) -> Segment:
        """Take the lines of a file from byte `start` up to `stop` or its end.

        Raises:
            FolderError: an intact line is not of this version; names it.
        """
        found = Segment(number, start, start, stop=start)
        self._lookback.forget()
        try:
            for offset, block in lines(self._files[number].path, start, stop):
                self._take_block(found, block, offset)
        except OSError as error:
            found.fault = error.strerror or str(error)
        return found

    def _take_block(self, found: Segment, block: list[bytes], offset: int) -> None:
        """Take lines that follow those that were found; the first one is at `offset`.

        Every line of a sweep comes through this loop, so it is flat and its names are local. Most lines are the first
        outcome of their trial, of its attempt 0; whatever is not exactly that goes to `_take`.
        """
        rows, loads, codes, opened, take = self.rows, orjson.loads, _CODES, found.open, self._take
        status, wheres, values, seconds, marks = rows.status, rows.where, rows.values, rows.seconds, rows.marks
        first, num, changed = self.trials.start, len(self.trials), self.changed
        start, file = offset, place(found.number, 0)
        bad: list[int] = []
        for line in block:
            # As store.intact, without the call.
            body, is_checked, tail = line.rpartition(_CRC)
            if tail != b"%d}" % crc32(body) or not is_checked:
                bad.append(offset)
            elif line[:_HEAD] == _OUTCOME:
                try:
                    record = loads(line)
                    trial = record["trial"]
                    row = trial - first
                    if record["attempt"] == 0 and 0 <= row < num and not status[row]:
                        code = codes[record["status"]]
                        # Adding zero makes -0.0, which is the same value, the same number.
                        values[row] = record["payload"]["value"] + 0.0
                        seconds[row] = record["seconds"]
                        wheres[row] = file + offset
                        status[row] = code
                        marks[trial] |= _ENDED
                        if opened:
                            opened.pop(trial, None)
                        if changed is not None:
                            changed.append(row)
                    else:
                        take(found, offset, line)
                except (KeyError, TypeError, ValueError, OverflowError):
                    take(found, offset, line)
            elif not line.startswith(_SKIPPED):
                take(found, offset, line)
            offset += len(line) + 1
        found.extend(block, bad, start, offset)

    def _take(self, found: Segment, offset: int, data: bytes) -> None:
        try:
            line = orjson.loads(data)
            kind = line.get("kind")
            if kind == "writer":
                found.writer = _writer(line)
            elif kind == "notice":
                found.notices[offset] = line
            elif 0 <= as_index(line.get("trial")) < self.num_trials:
                self._take_trial(found, offset, kind, line)
        except (ValueError, KeyError, OverflowError, TypeError, AttributeError) as error:
            raise FolderError(
                f"{self._files[found.number].path}: a record at byte {offset} is not one of this version "
                f"({type(error).__name__}: {error}); read the sweep with the version that ran it"
            ) from error

    def _take_trial(self, found: Segment, offset: int, kind: Json, line: JsonObject) -> None:
        if kind not in ("outcome", "start", "end"):
            return
        trial, attempt = as_index(line["trial"]), as_index(line.get("attempt"))
        if not 0 <= attempt < NUM_ATTEMPTS:
            raise ValueError(f"attempt {line.get('attempt')!r}")
        if kind == "outcome":
            if trial in self.trials:
                self._take_outcome(place(found.number, offset), trial, line)
            self._close(found, trial, attempt, begun=True)
        elif kind == "start":
            self._take_start(found, offset, trial, attempt)
        else:
            if line.get("begun", True):
                cause = Cause(str(line["cause"]))
                if trial in self.trials:
                    self._take_end(trial, (attempt, found.number), cause)
            self._close(found, trial, attempt, begun=line.get("begun") is not False)

    def _take_start(self, found: Segment, offset: int, trial: int, attempt: int) -> None:
        if attempt == 0:
            self.rows.marks[trial] |= STARTED
        elif attempt > 0:
            self.next_attempt[trial] = max(attempt + 1, self.next_attempt.get(trial, 0))
        key = attempt_key(trial, attempt)
        if not self.is_closed(key):
            found.open[key] = min(offset, found.open.get(key, offset))

    def _close(self, found: Segment, trial: int, attempt: int, *, begun: bool) -> None:
        if attempt == 0:
            self.rows.marks[trial] |= CLOSED | BEGUN if begun else CLOSED
            found.open.pop(trial, None)
        else:
            key = attempt_key(trial, attempt)
            self.closed[key] = self.closed.get(key, False) or begun
            found.open.pop(key, None)

    def is_closed(self, key: int) -> bool:
        """Whether an attempt, by its `attempt_key`, has an outcome or an end."""
        return bool(self.rows.marks[key] & CLOSED) if attempt_of(key) == 0 else key in self.closed

    def has_begun(self, key: int) -> bool:
        """Whether an attempt that is closed had begun."""
        return bool(self.rows.marks[key] & BEGUN) if attempt_of(key) == 0 else self.closed.get(key, False)

    # The join

    def _take_outcome(self, where: int, trial: int, line: JsonObject) -> None:
        rows, row = self.rows, trial - self.trials.start
        code, value = _result(line)
        if kept := rows.status[row]:
            if not self._replaces(trial, (code, where), (kept, rows.where[row])):
                return
            self.num_replaced += kept == COMPLETE
        took = line.get("seconds")
        rows.status[row] = code
        rows.where[row] = where
        rows.values[row] = value
        rows.seconds[row] = took if isinstance(took, (int, float)) else 0.0
        if self.changed is not None:
            self.changed.append(row)

    def _replaces(self, trial: int, new: tuple[int, int], kept: tuple[int, int]) -> bool:
        """Whether an outcome of a trial, as (status, place), counts rather than the kept one; the other is a rival."""
        if new[1] == kept[1] or (trial, new[1]) in self.rivals:
            return False
        wins = self._wins(trial, new, kept)
        self.rivals.add(trial, kept[1] if wins else new[1])
        return wins

    def _wins(self, trial: int, new: tuple[int, int], kept: tuple[int, int]) -> bool:
        (code, where), (its_code, its_place) = new, kept
        text = payload_text(self._lookback.line(where)) if code == its_code else b""
        if text and text == payload_text(self._lookback.line(its_place)):
            return self._by_place(where) < self._by_place(its_place)
        self.rivals.unequal.add(trial)
        return code < its_code if code != its_code else self._rank(where) < self._rank(its_place)

    def _by_place(self, where: int) -> tuple[str, int]:
        number, offset = at(where)
        return self._files[number].path.name, offset

    def _rank(self, where: int) -> tuple[bytes, str, str, int]:
        """Sorts outcomes of one status: by payload; equal ones by place, so that every order of reading keeps one."""
        return *order(self.record(where)["payload"]), *self._by_place(where)

    def record(self, where: int) -> JsonObject:
        """A line, read back from its place.

        Raises:
            Vanished: it is no longer there.
        """
        for _ in range(2):
            if line := atomic.unchecked(self._lookback.line(where)):
                return line
            # Its neighbours may have been read before it was visible.
            self._lookback.forget()
        number, offset = at(where)
        raise Vanished(
            f"{self._files[number].path}: the record at byte {offset} was read, and is no longer there; try again"
        )

    def twin(self) -> Table:
        """An empty table for the same trials, whose rows a child process can fill."""
        return Table(self._files, self.num_trials, self.trials, rows=Columns(self.num_trials, self.trials, shared=True))

    def join(self, other: Table) -> None:
        """Take over what another table over the same files and trials has seen; `changed`, and the other, are lost."""
        self.changed = None
        self._lookback.forget()
        for row in self.rows.shared_with(other.rows):
            new, kept = (other.rows.status[row], other.rows.where[row]), (self.rows.status[row], self.rows.where[row])
            loser = self if self._replaces(self.trials.start + row, new, kept) else other
            loser.rows.clear(row)
        self.rows.take(other.rows)
        self.rivals.join(other.rivals)
        for trial, attempt in other.next_attempt.items():
            self.next_attempt[trial] = max(attempt, self.next_attempt.get(trial, 0))
        for key, begun in other.closed.items():
            self.closed[key] = begun or self.closed.get(key, False)
        for trial, ends in other.ends.items():
            for who, cause in ends.items():
                self._take_end(trial, who, cause)

    def _take_end(self, trial: int, who: tuple[int, int], cause: Cause) -> None:
        """An attempt ends once; where two lines say how, the same one is kept in whatever order they are read."""
        ends = self.ends.setdefault(trial, {})
        ends[who] = min(cause, ends.get(who, cause))

    # What is rare, as JSON

    def to_json(self) -> JsonObject:
        """All but the rows."""
        return {
            "next_attempt": [[trial, number] for trial, number in self.next_attempt.items()],
            "closed": [[key, begun] for key, begun in self.closed.items()],
            "ends": [[trial, [[*who, cause] for who, cause in ends.items()]] for trial, ends in self.ends.items()],
            "rivals": self.rivals.to_json(),
        }

    def take_json(self, value: JsonObject) -> None:
        """Take over what `to_json` gave, for the trials that have a row."""
        kept = self.trials
        self.next_attempt = dict(cast("list[tuple[int, int]]", value["next_attempt"]))
        self.closed = dict(cast("list[tuple[int, bool]]", value["closed"]))
        self.rivals = OtherOutcomes.from_json(cast("JsonObject", value["rivals"]), kept)
        ends = cast("list[tuple[int, list[tuple[int, int, str]]]]", value["ends"])
        self.ends = {
            trial: {(attempt, number): Cause(cause) for attempt, number, cause in its}
            for trial, its in ends
            if trial in kept
        }


def _result(line: JsonObject) -> tuple[int, float]:
    """Status and objective of an outcome; 0.0 where there is none, as one has that is not complete.

    Raises:
        KeyError: it has no payload, or a status that this version does not know.
        ValueError: it is complete, without a finite number.
    """
    code, payload = _CODES[str(line["status"])], line["payload"]
    value = payload.get("value") if isinstance(payload, dict) else None
    if isinstance(value, (int, float)) and math.isfinite(value):
        return code, value + 0.0
    if code == COMPLETE:
        raise ValueError(f"complete, and its value is {value!r}")
    return code, 0.0


def _writer(line: JsonObject) -> JsonObject:
    """A writer line.

    Raises:
        ValueError: what tells writers and jobs apart is no text or number.
    """
    for name in ("writer", "submission", "job"):
        if isinstance(line.get(name), (list, dict)):
            raise ValueError(f"{name} {line[name]!r}")
    return line


def order(payload: Json) -> tuple[bytes, str]:
    """Sorts payloads of one status: by what was measured; of equal ones, those without a model come last."""
    fields = payload if isinstance(payload, dict) else {"payload": payload}
    measured: JsonObject = {name: value for name, value in fields.items() if name != "model"}
    model = fields.get("model")
    return hashlib.sha256(atomic.canonical(measured)).digest(), model if isinstance(model, str) else NO_MODEL


NO_MODEL: Final = "~"
"""Comes after every hexadecimal digit."""
