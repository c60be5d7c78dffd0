"""Record files, and what was read in a stretch of one."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from itertools import accumulate, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, cast
from zlib import crc32

from orchestrator.core.atomic import LONGEST, Json, JsonObject
from orchestrator.results.records import as_index

__all__ = [
    "NUM_ATTEMPTS", "RecordFile", "Segment", "Unit",
    "attempt_key", "attempt_of", "lines", "opened", "tail", "trial_of",
]  # fmt: skip

NUM_ATTEMPTS: Final = 1 << 20
"""An attempt has a lower number; far more than any trial is given."""

_TRIAL_BITS: Final = 40
_CHUNK: Final = 1 << 20
_LONGEST: Final = LONGEST


def attempt_key(trial: int, attempt: int) -> int:
    """One start of a trial as one integer: the trial's index itself for attempt 0."""
    return attempt << _TRIAL_BITS | trial


def trial_of(key: int) -> int:
    """The trial of an `attempt_key`."""
    return key & ((1 << _TRIAL_BITS) - 1)


def attempt_of(key: int) -> int:
    """The attempt of an `attempt_key`."""
    return key >> _TRIAL_BITS


class Unit(NamedTuple):
    """Bytes of a record file to read, from the begin of a line: up to the begin of another one, or all there are."""

    number: int
    start: int
    stop: int | None = None


Run: TypeAlias = "tuple[int, int]"
"""From a byte to before another one."""


@dataclass(slots=True, kw_only=True)
class _Known:
    """What is known of a record file, or of a part of it.

    Args:
        stop: up to there, complete lines were read.
        num_lines: how many intact lines there are before the first one that is not.
        beyond: how many there are after that.
        bad: lines that are not intact.
        runs: where the intact lines after the first bad one are, in order.
        fault: why it can't be read; empty if it can.
        writer: the writer line, if it was among them.
        notices: offset -> notice.
        open: starts without outcome or end here: `attempt_key` -> offset.
    """

    stop: int = 0
    num_lines: int = 0
    beyond: int = 0
    bad: int = 0
    runs: list[Run] = field(default_factory=list)
    fault: str = ""
    writer: JsonObject = field(default_factory=dict)
    notices: dict[int, JsonObject] = field(default_factory=dict)
    open: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Segment(_Known):
    """What was read of one file, from byte `start` on.

    Args:
        number: the file's.
        start: where reading began, at the begin of a line.
        end: up to there, every line is intact.
    """

    number: int
    start: int
    end: int = 0

    def extend(self, block: list[bytes], bad: list[int], start: int, stop: int) -> None:
        """Count the lines of a block from `start` to `stop`, of which those at the offsets `bad` are not intact."""
        if bad or self.bad:
            self._extend_beyond(block, bad, start, stop)
        else:
            self.end, self.num_lines = stop, self.num_lines + len(block)
        self.bad += len(bad)
        self.stop = stop

    def _extend_beyond(self, block: list[bytes], bad: list[int], start: int, stop: int) -> None:
        good = len(block) - len(bad)
        after = dict(pairwise(accumulate(map(_size, block), initial=start))) if bad else {}
        edges = [start, *(edge for offset in bad for edge in (offset, after[offset])), stop]
        runs = [*zip(edges[::2], edges[1::2], strict=True)]
        if not self.bad:
            num_before = [*after].index(bad[0])
            self.end, self.num_lines = bad[0], self.num_lines + num_before
            good -= num_before
            del runs[0]
        self.beyond += good
        self.runs += runs

    def to_json(self) -> JsonObject:
        """As plain JSON."""
        return {
            **{name: getattr(self, name) for name in _COUNTS},
            "runs": [[*run] for run in self.runs],
            "fault": self.fault,
            "writer": self.writer,
            "notices": [[offset, line] for offset, line in self.notices.items()],
            "open": [[key, offset] for key, offset in self.open.items()],
        }

    @classmethod
    def from_json(cls, value: JsonObject) -> Segment:
        """The stretch of which `value` is the `to_json`."""
        return cls(
            **{name: cast("int", value[name]) for name in _COUNTS},
            runs=[(first, last) for first, last in cast("list[list[int]]", value["runs"])],
            fault=cast("str", value["fault"]),
            writer=cast("JsonObject", value["writer"]),
            notices=dict(cast("list[tuple[int, JsonObject]]", value["notices"])),
            open=dict(cast("list[tuple[int, int]]", value["open"])),
        )


_COUNTS: Final = ("number", "start", "end", "stop", "num_lines", "beyond", "bad")


def _size(line: bytes) -> int:
    return len(line) + 1


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Runs in order, those that meet made one, without those of nothing."""
    found: list[Run] = []
    for first, last in runs:
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], last
        elif first < last:
            found.append((first, last))
    return found


def _holds(runs: list[Run], run: Run) -> bool:
    """Whether all of a run is in one of others, which are in order."""
    at = bisect_right(runs, run[0], key=itemgetter(0)) - 1
    return at >= 0 and run[1] <= runs[at][1]


@dataclass(slots=True)
class RecordFile(_Known):
    """What is known of one record file.

    Args:
        path: where it is.
        offset: up to there, every line was intact.
        has_lost: lines that were intact beyond a hole, and counted, were not so when it was last read.
    """

    path: Path
    offset: int = 0
    has_lost: bool = False

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

    def take(self, stretches: list[Segment]) -> bool:
        """Take over what was read from `offset` on, in stretches that follow each other.

        Returns whether other lines count than before.
        """
        before = self.offset, self.beyond, self.bad, self.runs, self.fault
        self.beyond = self.bad = 0
        self.fault = ""
        runs: list[Run] = []
        for one in stretches:
            if self.bad:
                self.beyond += one.num_lines + one.beyond
                runs += [(one.start, one.end), *one.runs]
            else:
                self.offset, self.beyond = one.end, one.beyond
                self.num_lines += one.num_lines
                runs += one.runs
            self.bad += one.bad
            self.stop, self.fault = one.stop, one.fault or self.fault
            self._take_rare(one)
        if not self.fault:  # what can't be read now is not gone
            self._take_runs(_joined(runs))
        return before != (self.offset, self.beyond, self.bad, self.runs, self.fault)

    def _take_runs(self, runs: list[Run]) -> None:
        now = [(0, self.offset), *runs]
        self.has_lost = not all(_holds(now, run) for run in self.runs)
        self.runs = runs

    def _take_rare(self, one: Segment) -> None:
        self.writer = one.writer or self.writer
        self.notices.update(one.notices)
        for key, offset in one.open.items():
            # Starts may become visible in another order than they were written in.
            self.open[key] = min(offset, self.open.get(key, offset))

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


def tail(path: Path, offset: int, num_bytes: int) -> int:
    """A checksum of the last bytes of a file before `offset`, `num_bytes` at most: tells it from another file.

    Raises:
        OSError: it can't be read, or does not reach `offset`.
    """
    begin = max(0, offset - num_bytes)
    with opened(path) as file:
        file.seek(begin)
        data = file.read(offset - begin)
    if len(data) < offset - begin:
        raise OSError(f"{path} has fewer than {offset} bytes")
    return crc32(data)


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
