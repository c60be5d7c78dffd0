"""The tree of reducers: which trials each of them answers for. Pure.

    tree = Tree.of(plan.num_trials, spec.reduce)
    tree.levels                      (40, 3): 40 ranges of trials, 3 reducers that merge them, and the root
    tree.children(tree.node(1, 2))   the ranges that the last of those 3 merges
    tree.root

Where there are at most `fan_in` ranges there are no levels: the root is a range itself, and holds every trial. The
shape decides who does the work, never what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.spec import Reduce

__all__ = ["Node", "Tree"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One reducer.

    Args:
        level: 0 for a reducer of records; above, of what the level below has written.
        number: its place in the level, from 0.
        trials: what it answers for.
    """

    level: int
    number: int
    trials: range


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """All reducers of a sweep.

    Args:
        num_trials: of the plan.
        num_ranges: into how many ranges of nearly equal length the trials are cut.
        fan_in: how many reducers one reducer merges at most, at least 2.
    """

    num_trials: int
    num_ranges: int = 1
    fan_in: int = 16

    @classmethod
    def of(cls, num_trials: int, reduce: Reduce, most: int | None = None) -> Tree:
        """As the sweep file has it; with `most`, of that many ranges at most."""
        wanted = max(1, -(-num_trials // reduce.trials_per_range))
        return cls(num_trials=num_trials, num_ranges=min(wanted, most or wanted), fan_in=reduce.fan_in)

    @property
    def levels(self) -> tuple[int, ...]:
        """How many reducers each level below the root has, the ranges first; empty where the root needs none."""
        if self.num_ranges <= self.fan_in:
            return ()
        found = [self.num_ranges]
        while found[-1] > self.fan_in:
            found.append(-(-found[-1] // self.fan_in))
        return tuple(found)

    @property
    def root(self) -> Node:
        """The reducer that writes the summary."""
        return Node(level=len(self.levels), number=0, trials=range(self.num_trials))

    def node(self, level: int, number: int) -> Node:
        """A reducer by its place; one beyond the end of its level answers for no trial."""
        width = self.fan_in**level
        start, stop = (self._first_trial(min(at * width, self.num_ranges)) for at in (number, number + 1))
        return Node(level=level, number=number, trials=range(start, stop))

    def children(self, node: Node) -> list[Node]:
        """The reducers whose work `node` merges; none for a range."""
        if node.level == 0:
            return []
        first = node.number * self.fan_in
        last = min(first + self.fan_in, self.levels[node.level - 1])
        return [self.node(node.level - 1, number) for number in range(first, last)]

    def _first_trial(self, of_range: int) -> int:
        return of_range * self.num_trials // self.num_ranges
