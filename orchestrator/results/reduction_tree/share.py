"""A reducer's share: the trials that it answers for, from the parts of others and from records.

    share = Share(paths, plan, tree, tree.root)
    share.update()                   read what is new; call it again at any time
    share.reduction                  of all its trials
    share.let_go(alone=False)        models that are beaten, checkpoints of trials that are done

A part that is missing, damaged or behind the records is never used: its trials are taken from the parts below it, and
at last from the records. So a tree of reducers saves work, and decides nothing.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator.config.plan import PlanFile
from orchestrator.core.paths import SweepPaths
from orchestrator.results import top_models
from orchestrator.results.fold import Fold
from orchestrator.results.reduction_tree import parts
from orchestrator.results.reduction_tree.parts import Look, PartialReduction
from orchestrator.results.reduction_tree.reduction import Reduction
from orchestrator.results.reduction_tree.tree import Node, Tree

__all__ = ["Share"]


class Share:
    """What one reducer knows of its trials.

    Args:
        paths: the sweep.
        plan: of the sweep.
        tree: of its reducers.
        node: the reducer.
    """

    def __init__(self, paths: SweepPaths, plan: PlanFile, tree: Tree, node: Node) -> None:
        self._paths = paths
        self._plan = plan
        self._tree = tree
        self._trials = node.trials
        self._parts: dict[Node, PartialReduction] = {}
        self._folds: list[tuple[range, Fold]] = []
        self._gather(tree.children(node) or [node], Look(paths))
        self._reduction: Reduction | None = None

    # Reading

    def update(self) -> bool:
        """Read what has become visible; whether there was anything."""
        look = Look(self._paths)
        old = [node for node, part in self._parts.items() if not look.bears_out(part)]
        for node in old:
            del self._parts[node]
        self._gather((child for node in old for child in self._tree.children(node) or [node]), look)
        before = self._num_changes()
        for _, fold in self._folds:
            fold.update()
        is_new = bool(old) or self._num_changes() != before
        if is_new:
            self._reduction = None
        return is_new

    def _num_changes(self) -> int:
        return sum(fold.num_changes for _, fold in self._folds)

    def _gather(self, nodes: Iterable[Node], look: Look) -> None:
        """Take the trials of `nodes` from parts as far as they are current, and from records where there are none."""
        left = [node.trials for each in nodes for node in self._without_parts(each, look) if node.trials]
        planned = self._plan.num_trials
        for trials in _grouped(left, self._tree.fan_in):
            wanted = None if len(trials) == planned else trials
            self._folds.append((trials, Fold(self._paths, planned, trials=wanted, eager=True)))

    def _without_parts(self, node: Node, look: Look) -> list[Node]:
        """The ranges below `node` that no part covers; the parts of the others are taken."""
        part = parts.read(self._paths, self._plan, node.trials) if self._tree.levels and node.trials else None
        if part is not None and look.bears_out(part):
            self._parts[node] = part
            return []
        if node.level == 0:
            return [node]
        return [leaf for child in self._tree.children(node) for leaf in self._without_parts(child, look)]

    @property
    def reduction(self) -> Reduction:
        """Of all trials of the share, as of the last update."""
        if self._reduction is None:
            metric, top = self._plan.spec.metric, self._plan.spec.reduce.top
            folded = (Reduction.of(fold, trials, metric, top) for trials, fold in self._folds)
            empty = Reduction.empty(metric.goal, top)
            self._reduction = Reduction.merge_all([empty, *(part.reduction for part in self._parts.values()), *folded])
        return self._reduction

    # Letting go

    def let_go(self, ranked: Mapping[int, str | None], *, alone: bool) -> None:
        """Delete what nobody needs any more.

        Args:
            ranked: the trials of the share that rank in the whole of what is known, with their models.
            alone: no worker of the sweep is alive, so a model without a record will never get one.
        """
        top_models.let_go(self._paths, self._trials, ranked, self._recorded, alone=alone)
        with contextlib.suppress(FileNotFoundError):
            for path in self._paths.checkpoints.iterdir():
                trial = path.name.partition(".")[0]
                if trial.isdecimal() and all(map(self._is_done, self._plan.pack(int(trial)))):
                    _remove(path)

    def _recorded(self, trial: int) -> str | None:
        """The model of the kept outcome of a trial, where that is known here. Of parts, only those that ranked are."""
        for part in self._parts.values():
            if trial in part.reduction.models:
                return part.reduction.models[trial]
        fold = self._fold_of(trial)
        return None if fold is None else top_models.model_of(fold, trial)

    def _is_done(self, trial: int) -> bool:
        fold = self._fold_of(trial)
        return fold is not None and fold.status(trial) is not None

    def _fold_of(self, trial: int) -> Fold | None:
        return next((fold for trials, fold in self._folds if trial in trials), None)


def _remove(path: Path) -> None:
    """A trial's checkpoints, or what its program has reported."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _grouped(ranges: list[range], most: int) -> list[range]:
    """The ranges, up to `most` neighbours made one: each costs a pass over all records, and memory for its rows."""
    found: list[range] = []
    num_joined = 0
    for one in ranges:
        if found and found[-1].stop == one.start and num_joined < most:
            found[-1] = range(found[-1].start, one.stop)
            num_joined += 1
        else:
            found.append(one)
            num_joined = 1
    return found
