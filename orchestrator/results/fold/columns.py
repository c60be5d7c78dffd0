"""Rows: what is kept of every trial, 22 bytes each, as columns over one buffer.

    rows = Rows(num_trials, range(num_trials))
    rows.status[row], rows.where[row], rows.values[row], rows.seconds[row]     row = trial - trials.start
    rows.marks[trial]                                                          of every trial of the plan

A row that is not set is zero in every column, so disjoint rows join by a plain OR of their bytes. One buffer can be
shared with a child process, or be written to a file and read back, as it is.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from collections.abc import Iterator
from itertools import compress
from typing import Final, cast

from orchestrator.results.records import Status

__all__ = ["BEGUN", "CLOSED", "COMPLETE", "STARTED", "STATUSES", "Columns", "at", "place"]

STATUSES: Final = (None, Status.COMPLETE, Status.DIVERGED, Status.PRUNED, Status.FAILED)
"""What a number in the column `status` means; of two that are not 0, the smaller one counts."""
COMPLETE: Final = 1

STARTED: Final = 1
CLOSED: Final = 2
BEGUN: Final = 4
"""Marks of a trial's attempt 0: it has a start; it has an outcome or an end; it had begun before that."""

_OFFSET_BITS: Final = 40
_SEGMENT: Final = 1 << 13
_HUGE: Final = 4 << 20
"""Bytes from which large pages are asked for, where the system has any."""
_IS_SET: Final = bytes(map(bool, range(256)))


def place(number: int, offset: int) -> int:
    """Where a line is, as one integer: the number of its file and its byte offset, which is below 2**40."""
    return number << _OFFSET_BITS | offset


def at(where: int) -> tuple[int, int]:
    """File number and offset of a `place`."""
    return where >> _OFFSET_BITS, where & ((1 << _OFFSET_BITS) - 1)


class Columns:
    """The columns.

    Args:
        num_trials: how many trials the plan has.
        trials: those that have a row, consecutive.
        shared: what children that are forked write is seen here.
    """

    __slots__ = ("_trials", "buffer", "marks", "num_trials", "seconds", "status", "values", "where")

    def __init__(self, num_trials: int, trials: range, *, shared: bool = False) -> None:
        self.num_trials, self._trials = num_trials, trials
        num = len(trials)
        flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        # Zero pages: one that is never written to takes no memory.
        memory = mmap.mmap(-1, 21 * num + num_trials or 1, flags=flags)
        if not shared and len(memory) >= _HUGE:
            # To be given pages one by one takes longer than to read them all from a cache.
            with contextlib.suppress(AttributeError, OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(memory)[: 21 * num + num_trials]
        self.where: memoryview[int] = self.buffer[: 8 * num].cast("q")
        self.values: memoryview[float] = self.buffer[8 * num : 16 * num].cast("d")
        self.seconds: memoryview[float] = self.buffer[16 * num : 20 * num].cast("f")
        self.status = self.buffer[20 * num : 21 * num]
        self.marks = self.buffer[21 * num :]

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return len(self.buffer)

    def narrowed(self, trials: range) -> Columns:
        """A copy with the rows of `trials` only."""
        found = Columns(self.num_trials, trials)
        part = slice(trials.start - self._trials.start, trials.stop - self._trials.start)
        for mine, other in zip(self._columns, found._columns, strict=True):
            other[:] = mine[part]
        found.marks[:] = self.marks
        return found

    @property
    def _columns(self) -> tuple[memoryview[float], ...]:
        return cast("tuple[memoryview[float], ...]", (self.where, self.values, self.seconds, self.status))

    def count(self, code: int) -> int:
        """How many rows have a status."""
        return self.status.tobytes().count(code)

    def trials(self, code: int) -> list[int]:
        """Indices of the trials with a status, in order."""
        status = self.status.tobytes()
        if code not in status:
            return []
        return list(compress(self._trials, status.translate(bytes(other == code for other in range(256)))))

    def clear(self, row: int) -> None:
        """Make a row what it is when it is not set."""
        self.where[row], self.values[row], self.seconds[row], self.status[row] = 0, 0.0, 0.0, 0

    def shared_with(self, other: Columns) -> Iterator[int]:
        """The rows that are set both here and there, in order."""
        for start in range(0, len(self.status), _SEGMENT):
            mine, its = (one.status[start : start + _SEGMENT].tobytes().translate(_IS_SET) for one in (self, other))
            if 1 in mine and 1 in its:
                both = (int.from_bytes(mine, "little") & int.from_bytes(its, "little")).to_bytes(len(mine), "little")
                yield from (start + found.start() for found in re.finditer(b"\1", both))

    def take(self, other: Columns) -> None:
        """Take over the rows of `other`, none of which may be set here, and its marks."""
        for start in range(0, len(self.status), _SEGMENT):
            part = slice(start, start + _SEGMENT)
            if _is_empty(other.status[part]):
                continue
            if not _is_empty(self.status[part]):
                self._unite(other, start, min(start + _SEGMENT, len(self.status)))
            else:
                for mine, its in zip(self._columns, other._columns, strict=True):
                    mine[part] = its[part]
        _unite(self.marks, other.marks)

    def _unite(self, other: Columns, start: int, stop: int) -> None:
        num = len(self.status)
        for base, width in ((0, 8), (8 * num, 8), (16 * num, 4), (20 * num, 1)):
            part = slice(base + width * start, base + width * stop)
            _unite(self.buffer[part], other.buffer[part])


def _is_empty(status: memoryview[int]) -> bool:
    return status.tobytes().count(0) == len(status)


def _unite(mine: memoryview[int], its: memoryview[int]) -> None:
    """OR the bytes of `its` into `mine`; as one long integer, which is quicker than any loop."""
    both = int.from_bytes(mine, "little") | int.from_bytes(its, "little")
    mine[:] = both.to_bytes(len(mine), "little")
