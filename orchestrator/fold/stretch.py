"""Record files, and what was read in a stretch of one."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple, cast

from orchestrator.paths import SweepPaths
from orchestrator.records import as_index
from orchestrator.store import Json, JsonObject

__all__ = [
    "NUM_ATTEMPTS", "RecordFile", "Seen", "Stretch", "Unit",
    "attempt_key", "attempt_of", "lines", "look", "opened", "trial_of",
]  # fmt: skip

NUM_ATTEMPTS: Final = 1 << 20
"""An attempt has a lower number; far more than any trial is given."""

_TRIAL_BITS: Final = 40
_CHUNK: Final = 1 << 20
_LONGEST: Final = 16 << 20
"""A line that is longer, in bytes, is none of ours."""
_IS_RECORD_FILE: Final = re.compile(r"[0-9a-f]{32}\.jsonl").fullmatch


def attempt_key(trial: int, attempt: int) -> int:
    """One start of a trial as one integer: the trial's index itself for attempt 0."""
    return attempt << _TRIAL_BITS | trial


def trial_of(key: int) -> int:
    """The trial of an `attempt_key`."""
    return key & ((1 << _TRIAL_BITS) - 1)


def attempt_of(key: int) -> int:
    """The attempt of an `attempt_key`."""
    return key >> _TRIAL_BITS


class Seen(NamedTuple):
    """A record file as a folder shows it.

    Args:
        size: in bytes.
        changed_ns: when it was last written to, by the clock of the file system.
    """

    size: int
    changed_ns: int


def look(paths: SweepPaths) -> dict[str, Seen]:
    """The record files that are there, by name: regular files that are called like one; whatever else is there is none.

    Raises:
        FileNotFoundError: there is no folder of records.
    """
    found: dict[str, Seen] = {}
    with os.scandir(paths.records) as entries:
        for entry in entries:
            if _IS_RECORD_FILE(entry.name) and entry.is_file(follow_symlinks=False):
                state = entry.stat(follow_symlinks=False)
                found[entry.name] = Seen(size=state.st_size, changed_ns=state.st_mtime_ns)
    return found


class Unit(NamedTuple):
    """Bytes of a record file to read, from the begin of a line: up to the begin of another one, or all there are."""

    number: int
    start: int
    stop: int | None = None


@dataclass(slots=True)
class Stretch:
    """What was read of one file, from byte `start` on.

    Args:
        number: the file's.
        start: where reading began, at the begin of a line.
        end: up to there, every line is intact.
        stop: up to there, complete lines were read.
        num_lines: how many intact lines there are up to `end`.
        beyond: how many intact lines there are after it.
        bad: lines that are not intact.
        holes: differs, but for bad luck, where other lines are not intact.
        fault: why it can't be read; empty if it can.
        writer: the writer line, if it was among them.
        notices: offset -> notice.
        open: starts without outcome or end here: `attempt_key` -> offset.
    """

    number: int
    start: int
    end: int = 0
    stop: int = 0
    num_lines: int = 0
    beyond: int = 0
    bad: int = 0
    holes: int = 0
    fault: str = ""
    writer: JsonObject = field(default_factory=dict)
    notices: dict[int, JsonObject] = field(default_factory=dict)
    open: dict[int, int] = field(default_factory=dict)

    def extend(self, block: list[bytes], bad: list[int], start: int, stop: int) -> None:
        """Count the lines of a block from `start` to `stop`, of which those at the offsets `bad` are not intact."""
        good = len(block) - len(bad)
        if self.bad:
            self.beyond += good
        elif bad:
            before = sum(end < bad[0] + 1 for end in accumulate(map(_size, block), initial=start)) - 1
            self.end, self.num_lines = bad[0], self.num_lines + before
            self.beyond = good - before
        else:
            self.end, self.num_lines = stop, self.num_lines + good
        self.bad += len(bad)
        for offset in bad:
            self.holes = zlib.crc32(b"%d," % offset, self.holes)
        self.stop = stop

    def to_json(self) -> JsonObject:
        """As plain JSON."""
        return {
            **{name: getattr(self, name) for name in _COUNTS},
            "fault": self.fault,
            "writer": self.writer,
            "notices": [[offset, line] for offset, line in self.notices.items()],
            "open": [[key, offset] for key, offset in self.open.items()],
        }

    @classmethod
    def from_json(cls, value: JsonObject) -> Stretch:
        """The stretch of which `value` is the `to_json`."""
        return cls(
            **{name: cast("int", value[name]) for name in _COUNTS},
            fault=cast("str", value["fault"]),
            writer=cast("JsonObject", value["writer"]),
            notices=dict(cast("list[tuple[int, JsonObject]]", value["notices"])),
            open=dict(cast("list[tuple[int, int]]", value["open"])),
        )


_COUNTS: Final = ("number", "start", "end", "stop", "num_lines", "beyond", "bad", "holes")


def _size(line: bytes) -> int:
    return len(line) + 1


@dataclass(slots=True)
class RecordFile:
    """What is known of one record file.

    Args:
        path: where it is.
        offset: up to there, every line was intact.
        num_lines: how many.
        stop: up to there, complete lines were read.
        beyond: how many intact lines there are after `offset`.
        bad, holes, fault, writer, notices, open: as of a `Stretch`.
    """

    path: Path
    offset: int = 0
    num_lines: int = 0
    stop: int = 0
    beyond: int = 0
    bad: int = 0
    holes: int = 0
    fault: str = ""
    writer: JsonObject = field(default_factory=dict)
    notices: dict[int, JsonObject] = field(default_factory=dict)
    open: dict[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The writer's id, by the name of the file."""
        return self.path.name.removesuffix(".jsonl")

    @property
    def author(self) -> str:
        """The writer's id, by its own word: that of a copy under another name is the original's."""
        return str(self.writer.get("writer", self.name))

    @property
    def job(self) -> tuple[Json, Json]:
        """Submission and job, which all runs of a requeued job share."""
        return self.writer.get("submission"), self.writer.get("job")

    def take(self, stretches: list[Stretch]) -> bool:
        """Take over what was read from `offset` on, in stretches that follow each other.

        Returns whether other lines count than before.
        """
        before = self.offset, self.beyond, self.bad, self.holes, self.fault
        self.beyond = self.bad = self.holes = 0
        self.fault = ""
        for one in stretches:
            if self.bad:
                self.beyond += one.num_lines + one.beyond
            else:
                self.offset, self.beyond = one.end, one.beyond
                self.num_lines += one.num_lines
            self.bad += one.bad
            self.holes += one.holes
            self.stop, self.fault = one.stop, one.fault or self.fault
            self.writer = one.writer or self.writer
            self.notices.update(one.notices)
            for key, offset in one.open.items():
                # Starts may become visible in another order than they were written in.
                self.open[key] = min(offset, self.open.get(key, offset))
        return before != (self.offset, self.beyond, self.bad, self.holes, self.fault)

    def running(self, is_closed: Callable[[int], bool]) -> list[int]:
        """The starts without outcome or end that had begun: starts are written in the order in which they run.

        What `is_closed` may have been so in another file, if its writer had to abandon this one.
        """
        if not self.open:
            return []
        slots = max(1, as_index(self.writer.get("slots")))
        written = sorted(self.open, key=self.open.__getitem__)
        return [key for key in written if not is_closed(key)][:slots]


def opened(path: Path) -> FileIO:
    """A regular file to read, without a buffer; never what its name links to, and never something that one waits for.

    Raises:
        OSError: it can't be opened.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.fdopen(os.open(path, flags), "rb", buffering=0)


def lines(path: Path, start: int, stop: int | None) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a file from byte `start` up to `stop` or its end, without newlines, many at a time.

    Gives (offset of the first one, lines). A last line that is incomplete, and one that is far too long, is given as an
    empty one, which is never intact. A missing file has none.

    Raises:
        OSError: the file can't be read.
    """
    try:
        file = opened(path)
    except FileNotFoundError:
        return
    rest, is_long = b"", False
    with file:
        file.seek(start)
        first = at = start
        while data := file.read(_CHUNK if stop is None else min(_CHUNK, stop - at)):
            at += len(data)
            if is_long:
                _, newline, data = data.partition(b"\n")
                is_long, first = not newline, at - len(data)
            found = (rest + data).split(b"\n")
            rest = found.pop()
            if found:
                yield first, found
            first = at - len(rest)
            if len(rest) > _LONGEST:
                yield first, [b""]
                rest, is_long = b"", True
    if rest:
        yield first, [b""]
