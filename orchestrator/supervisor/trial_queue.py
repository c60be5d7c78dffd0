"""Which trials this worker runs next: its own block, then whatever nobody has, then what a lost worker left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from orchestrator.core.atomic import JsonObject
from orchestrator.results.claims import Block, Claims, WriterWatch
from orchestrator.results.fold import Fold
from orchestrator.results.records import Cause, Status

__all__ = ["Assignment", "GoneWriters", "PendingTrial", "TrialQueue"]


@dataclass(slots=True)
class PendingTrial:
    """A trial that may start now.

    Args:
        trial: its index.
        attempt: number of this attempt, from 0.
        charges: earlier attempts that ended without an outcome, by cause.
    """

    trial: int
    attempt: int = 0
    charges: Counter[Cause] = field(default_factory=Counter)


class Assignment:
    """What one slot works on at a time: a trial, or a pack.

    Args:
        pack: the trials that train together, each at its place; of a trial alone, itself.
        ready: those of them that have no outcome. The others train along, since the bits of each depend on how many
            there are, but nothing is written of them.

    Attributes:
        attempt: the highest of any of the trials' attempts.
        open: by trial, those that still have no outcome.
    """

    __slots__ = ("attempt", "open", "pack")

    def __init__(self, pack: tuple[int, ...], ready: Iterable[PendingTrial]) -> None:
        self.pack = pack
        self.open = {one.trial: one for one in ready}
        self.attempt = max(one.attempt for one in self.open.values())

    @property
    def lead(self) -> int:
        """The first trial, whose name stands for all."""
        return self.pack[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoneWriters:
    """Which writers are known to be gone, so that their blocks need no lease.

    Args:
        submission: our own token.
        job: our own job in Slurm's words; None outside of Slurm.
        restarts: how often Slurm has requeued it.
        superseded: tokens of submissions that were seen dead when ours was made.
        retry_failed: failed trials of those submissions are run again.
    """

    submission: str
    job: str | None
    restarts: int
    superseded: frozenset[str]
    retry_failed: bool = False

    def was_requeued(self, writer: JsonObject) -> bool:
        """Whether `writer`, the first line of a record file, is an earlier run of our own job."""
        return (
            self.job is not None
            and (writer.get("submission"), writer.get("job")) == (self.submission, self.job)
            and int(str(writer.get("restarts", 0))) < self.restarts
        )

    def is_gone(self, writer: JsonObject) -> bool:
        """Whether `writer` can't be at work any more, for all we know."""
        return writer.get("submission") in self.superseded or self.was_requeued(writer)


class TrialQueue:
    """Blocks of trials for one worker.

    Args:
        blocks: the sweep's blocks.
        worker: this worker's number; it begins with the block of that number, so that workers don't race for the first
            one.
        claims: where blocks are claimed, in this writer's name.
        fold: read when a block changes hands.
        growth: watches other writers.
        succession: who is known to be gone.
    """

    def __init__(
        self,
        blocks: list[Block],
        worker: int,
        *,
        claims: Claims,
        fold: Fold,
        growth: WriterWatch,
        succession: GoneWriters,
    ) -> None:
        begin = worker % len(blocks) if blocks else 0
        self._blocks = blocks[begin:] + blocks[:begin]
        self._claims = claims
        self._fold = fold
        self._growth = growth
        self._succession = succession
        self._mine: set[Block] = set()
        self._seen = claims.newest()
        self._position = 0

    def next(self) -> list[PendingTrial]:
        """The trials of one more block, claimed; empty when there is nothing to do that isn't someone else's."""
        self._growth.look()
        return self._untouched() or self._left_behind()

    def is_sweep_done(self) -> bool:
        """Whether every trial, whoever ran it, is seen to have an outcome."""
        self._fold.update()
        return not self._fold.num_missing

    def has_outcome(self, trial: int) -> bool:
        """Whether a trial, whoever ran it, is seen to have an outcome."""
        self._fold.update()
        return self._fold.status(trial) is not None

    def _untouched(self) -> list[PendingTrial]:
        while self._position < len(self._blocks):
            block = self._blocks[self._position]
            self._position += 1
            if (block.first, block.last) in self._seen:
                continue
            if self._claims.take(block, 0):
                self._mine.add(block)
                return [PendingTrial(trial) for trial in block.trials]
            self._seen = self._claims.newest()
        return []

    def _left_behind(self) -> list[PendingTrial]:
        self._fold.update()
        newest = self._claims.newest()
        for block in self._blocks:
            due = [trial for trial in block.trials if self._is_due(trial)]
            epoch = newest.get((block.first, block.last), -1)
            if due and block not in self._mine and self._may_take(block, epoch) and self._claims.take(block, epoch + 1):
                self._mine.add(block)
                return [self._ready(trial) for trial in due]
        return []

    def _may_take(self, block: Block, epoch: int) -> bool:
        holder = self._fold.latest(self._claims.holder(block, epoch))
        if self._succession.is_gone(self._fold.writers().get(holder, {})):
            return True
        return self._growth.silent(holder)

    def _is_due(self, trial: int) -> bool:
        status = self._fold.status(trial)
        if status is not Status.FAILED or not self._succession.retry_failed:
            return status is None
        # One that has failed under us as well was tried again already, whichever of the outcomes is the kept one.
        return all(writer.get("submission") in self._succession.superseded for writer in self._fold.authors(trial))

    def _ready(self, trial: int) -> PendingTrial:
        charges = self._fold.charges(trial)
        if self._succession.retry_failed:
            charges.clear()
        return PendingTrial(trial, self._fold.next_attempt(trial), charges)

    def __iter__(self) -> Iterator[list[PendingTrial]]:
        """Blocks until none is left."""
        while ready := self.next():
            yield ready
