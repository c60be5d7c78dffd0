"""Reading much at once: record files, and stretches of long ones, dealt to processes.

Each child that is forked fills a table of its own in memory that it shares with its parent, and sends what is rare
through a pipe as JSON; the parent does a share itself and joins. It also reads the share of a child that can't be had
or fails in any way, so an error is raised where it belongs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

import orjson

from orchestrator.core.atomic import Json
from orchestrator.results.fold.segment import Segment, Unit, opened
from orchestrator.results.fold.table import Table

__all__ = ["Child", "answer", "deal", "is_alone", "num_processes", "read"]

_MOST_PROCESSES: Final = 8
_MEMORY: Final = 32 << 20
"""What the tables of all children may take, in bytes; one child is always allowed."""
_LOOK: Final = 1 << 16


def is_alone() -> bool:
    """Whether this process has no other thread, so that a fork of it can hold no lock that nobody releases."""
    try:
        return len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208 (only their number is needed)
    except OSError:
        return False


def num_processes(table: Table) -> int:
    """How many processes may read for this table."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, _MOST_PROCESSES, 1 + max(1, _MEMORY // max(1, table.rows.num_bytes)))


def deal(units: list[tuple[Unit, Path, int]], num_shares: int) -> list[list[Unit]]:
    """Units, each with its file's path and size, as shares of about equal size; long files are cut between lines."""
    room = -(-sum(max(0, size - unit.start) for unit, _, size in units) // num_shares)
    shares: list[list[Unit]] = [[]]
    left = room
    for unit, path, size in units:
        start = unit.start
        while len(shares) < num_shares and size - start > left:
            # A share may have taken a little more than its room, up to the end of a line or of a file.
            cut = _next_line(path, start + left, size) if left > 0 else start
            if cut is None:
                break
            if cut > start:
                shares[-1].append(Unit(unit.number, start, cut))
            shares.append([])
            start, left = cut, room
        shares[-1].append(Unit(unit.number, start))
        left -= size - start
    return shares


def _next_line(path: Path, offset: int, size: int) -> int | None:
    """Where the first line begins that begins after `offset`; None if there is none in sight."""
    try:
        with opened(path) as file:
            file.seek(offset)
            found = file.read(_LOOK).find(b"\n")
    except OSError:
        return None
    return offset + found + 1 if 0 <= found < size - offset - 1 else None


def read(table: Table, shares: list[list[Unit]]) -> list[Segment]:
    """Read all shares into `table`, each of them but the first in a child.

    Raises:
        FolderError: as `Table.read`.
    """
    children: list[Child] = []
    mine = [*shares[0]]
    try:
        for share in shares[1:]:
            if (child := Child.start(table, share)) is None:
                mine += share
            else:
                children.append(child)
        found = [table.read(*unit) for unit in mine]
        while children:
            answer = children[-1].finish()
            child = children.pop()
            if answer is None:
                found += [table.read(*unit) for unit in child.share]
            else:
                found += child.take(table, answer)
        return found
    finally:
        for child in children:
            child.stop()


@dataclass(frozen=True, slots=True)
class Child:
    """A process that reads a share into a table of its own."""

    pid: int
    pipe: BinaryIO
    table: Table
    share: list[Unit]

    @classmethod
    def start(cls, table: Table, share: list[Unit]) -> Child | None:
        """Fork it; None if the machine has no memory, no pipe or no process to spare."""
        try:
            twin = table.twin()
            reading, writing = os.pipe()
        except OSError:
            return None
        try:
            pid = os.fork()
        except OSError:
            os.close(reading)
            os.close(writing)
            return None
        if not pid:
            _serve(twin, share, writing)
        os.close(writing)
        return cls(pid, os.fdopen(reading, "rb"), twin, share)

    def finish(self) -> bytes | None:
        """What it sends before it ends, which is waited for; None if it failed."""
        with self.pipe:
            answer = self.pipe.read()
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:  # somebody has told the kernel that nobody asks for children
            return None
        return None if status else answer

    def take(self, table: Table, answer: bytes) -> list[Segment]:
        """Join what it has read."""
        rare, stretches = orjson.loads(answer)
        self.table.take_json(rare)
        table.join(self.table)
        return [Segment.from_json(one) for one in stretches]

    def stop(self) -> None:
        """End it before it has finished."""
        self.pipe.close()
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def answer(table: Table, share: list[Unit]) -> bytes:
    """Read a share into an empty table; what is to be said of it besides its rows."""
    stretches: list[Json] = [table.read(*unit).to_json() for unit in share]
    return orjson.dumps([table.to_json(), stretches])


def _serve(table: Table, share: list[Unit], pipe: int) -> NoReturn:
    """A child's life. It leaves by the shortest way: what its parent has set up to be done at exit is its parent's."""
    status = 1
    try:
        gc.disable()  # It would touch, and so copy, every page of the parent's objects.
        with os.fdopen(pipe, "wb") as file:
            file.write(answer(table, share))
        status = 0
    finally:
        os._exit(status)
