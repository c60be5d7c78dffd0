"""Models: the weights that are kept because they rank, and how those that don't are let go.

A model is deleted only when its own record is durable and `top` kept complete outcomes beat it, so no crash can leave
the sweep without a model that ranks.
"""

from __future__ import annotations

import bisect
import contextlib
import heapq
from pathlib import Path

from orchestrator.fold import Fold
from orchestrator.paths import SweepPaths
from orchestrator.records import Status
from orchestrator.spec import Metric

__all__ = ["Podium", "best", "prune"]


def rank_key(metric: Metric, value: float, index: int) -> tuple[float, int]:
    """Sorts trials best first: by value in the metric's direction, ties by the smaller index."""
    return (value if metric.goal == "minimize" else -value, index)


def best(fold: Fold, metric: Metric, top: int) -> list[int]:
    """The indices of the `top` best complete trials, best first."""
    return heapq.nsmallest(top, fold.trials(Status.COMPLETE), key=lambda i: rank_key(metric, fold.values[i], i))


class Podium:
    """The best trials that one writer has completed itself, and the models that they pushed out.

    Args:
        metric: the objective.
        top: how many rank.
    """

    def __init__(self, metric: Metric, top: int) -> None:
        self._metric = metric
        self._top = top
        self._ranked: list[tuple[tuple[float, int], str]] = []

    @property
    def bar(self) -> float | None:
        """The value that a trial must at least equal to rank here; None while every trial ranks."""
        if len(self._ranked) < self._top:
            return None
        value = self._ranked[-1][0][0]
        return value if self._metric.goal == "minimize" else -value

    def add(self, index: int, value: float, sha256: str) -> list[tuple[int, str]]:
        """Rank a completed trial whose model is `sha256`; returns (index, sha256) of the models that no longer rank."""
        bisect.insort(self._ranked, (rank_key(self._metric, value, index), sha256))
        out, self._ranked = self._ranked[self._top :], self._ranked[: self._top]
        return [(key[1], sha) for key, sha in out]


def prune(paths: SweepPaths, fold: Fold, metric: Metric, top: int, *, alone: bool) -> int:
    """Delete the models that don't rank any more; returns how many.

    Args:
        paths: the sweep.
        fold: up to date; only outcomes in it decide.
        metric: the objective.
        top: how many models are kept.
        alone: no worker of the sweep is alive, so a model without a record will never get one.
    """
    wanted = {i: _model_of(fold, i) for i in best(fold, metric, top)}
    removed = 0
    for path in sorted(paths.models.glob("*.safetensors")):
        if _is_beaten(path, fold, wanted, alone=alone):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _is_beaten(path: Path, fold: Fold, wanted: dict[int, str | None], *, alone: bool) -> bool:
    index, _, sha256 = path.stem.partition("-")
    if not index.isdigit() or int(index) >= fold.num_trials:
        return False
    trial = int(index)
    kept = wanted.get(trial)
    if kept is not None and kept.startswith(sha256):
        return False
    recorded = (_model_of(fold, trial) or "").startswith(sha256)
    return alone or (recorded and trial not in wanted)


def _model_of(fold: Fold, trial: int) -> str | None:
    model = fold.payload(trial).get("model")
    return model if isinstance(model, str) else None


def remove(paths: SweepPaths, models: list[tuple[int, str]]) -> None:
    """Delete models given as (index, sha256); one that is gone already is no error."""
    for index, sha256 in models:
        with contextlib.suppress(FileNotFoundError):
            paths.model(index, sha256).unlink()
