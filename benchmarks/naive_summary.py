"""The summary that one writes first: float sums, a rank's share from DistributedSampler, an accumulator a writer.

    naive = validate(losses, world=4)
    naive = sweep([[Line(0, 0.31), Line(1, 0.28)], [Line(2, None)]])
    naive.mean, naive.std, naive.best

Nothing here is a straw man: each piece is what tutorials show. `benchmarks/summary_checks.py` holds it against
`orchestrator.Summary`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Line", "Naive", "sweep", "validate"]


class Line(NamedTuple):
    """What a writer says of a trial: its value, None if it failed."""

    trial: int
    value: float | None


@dataclass(slots=True)
class Naive:
    """Running sums in float64."""

    count: int = 0
    failed: int = 0
    total: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    best: int | None = None

    def add(self, value: float, key: int) -> None:
        """One more value."""
        self.count += 1
        self.total += value
        self.squares += value * value
        if value < self.least:
            self.least, self.best = value, key

    def merge(self, other: Naive) -> None:
        """Another rank's or writer's."""
        self.count += other.count
        self.failed += other.failed
        self.total += other.total
        self.squares += other.squares
        if other.least < self.least:
            self.least, self.best = other.least, other.best

    @property
    def mean(self) -> float:
        """The mean."""
        return self.total / self.count

    @property
    def std(self) -> float:
        """The population standard deviation, by the mean of the squares less the square of the mean."""
        # The clip is there because the difference comes out below 0 now and then.
        return math.sqrt(max(0.0, self.squares / self.count - self.mean * self.mean))


def validate(losses: Sequence[float], world: int) -> Naive:
    """A validation pass over the ranks: each sums its share, then the sums are added up."""
    from torch.utils.data import DistributedSampler

    whole = Naive()
    for rank in range(world):
        share = Naive()
        for index in DistributedSampler(losses, num_replicas=world, rank=rank, shuffle=False):
            share.add(losses[index], index)
        whole.merge(share)
    return whole


def sweep(files: Sequence[Sequence[Line]]) -> Naive:
    """A sweep: each writer sums up what it saw, then the sums are added up in the order in which they are found."""
    whole = Naive()
    for lines in files:
        part = Naive()
        for line in lines:
            if line.value is None:
                part.failed += 1
            else:
                part.add(line.value, line.trial)
        whole.merge(part)
    return whole
