"""Claims: who works on which block of trials.

A claim is a file created exclusively, `claims/<first>-<last>.<epoch>`, that holds the id of the writer who made it; it
is never deleted or reused. Taking over a block means claiming it with the next epoch. Claims only save work: two live
copies of a trial are harmless by the join.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.core import atomic
from orchestrator.core.paths import SweepPaths
from orchestrator.results import records

__all__ = ["Block", "Claims", "WriterWatch"]


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """Trials `first` to `last`, both included."""

    first: int
    last: int

    @property
    def trials(self) -> range:
        """The indices of the block's trials, in the order in which they run."""
        return range(self.first, self.last + 1)

    @classmethod
    def all(cls, num_trials: int, size: int) -> list[Block]:
        """The blocks of a sweep of `num_trials`, `size` trials each, the last one maybe fewer."""
        return [cls(first, min(first + size, num_trials) - 1) for first in range(0, num_trials, size)]


class Claims:
    """The claims of a sweep, as one writer sees them.

    Args:
        paths: the sweep.
        writer: the id of the writer that claims.
    """

    def __init__(self, paths: SweepPaths, writer: str) -> None:
        self._paths = paths
        self._writer = writer

    def newest(self) -> dict[tuple[int, int], int]:
        """(first, last) -> highest epoch, for every block that was ever claimed; from one listing of the folder."""
        found: dict[tuple[int, int], int] = {}
        for block, epoch in self._listing():
            found[block] = max(epoch, found.get(block, -1))
        return found

    def _listing(self) -> Iterator[tuple[tuple[int, int], int]]:
        for name in os.listdir(self._paths.claims):  # noqa: PTH208 (names are all that is needed; Path objects cost)
            span, _, epoch = name.partition(".")
            first, _, last = span.partition("-")
            if first.isdigit() and last.isdigit() and epoch.isdigit():
                yield (int(first), int(last)), int(epoch)

    def take(self, block: Block, epoch: int) -> bool:
        """Claim `block` with `epoch`; False if someone else has it."""
        return atomic.create(self._paths.claim(block.first, block.last, epoch), self._writer.encode())

    def holder(self, block: Block, epoch: int) -> str:
        """The writer of a claim; empty while its content is not visible."""
        try:
            return self._paths.claim(block.first, block.last, epoch).read_text()
        except FileNotFoundError:
            return ""


class WriterWatch:
    """Watches record files grow, by this process's own monotonic clock: no decision rests on another machine's.

    Args:
        paths: the sweep.
        lease_s: a writer whose file has not grown for this long counts as gone.
    """

    def __init__(self, paths: SweepPaths, lease_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._paths = paths
        self._lease_s = lease_s
        self._clock = clock
        self._seen: dict[str, tuple[int, float]] = {}

    def look(self) -> None:
        """Note the size of every record file, so that time has passed already when somebody asks."""
        for path in records.files(self._paths):
            self.silent(path.stem)

    def silent(self, writer: str) -> bool:
        """Whether the file of `writer` was seen not to grow for `lease_s`; the first look at it starts the time."""
        size = self._size(writer)
        before = self._seen.get(writer)
        if before is None or before[0] != size:
            self._seen[writer] = (size, self._clock())
            return False
        return self._clock() - before[1] >= self._lease_s

    def _size(self, writer: str) -> int:
        try:
            return self._paths.record(writer).stat().st_size
        except FileNotFoundError:
            return -1
