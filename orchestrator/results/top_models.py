"""Models: the weights that are kept because they rank, and how those that don't are let go.

A model is deleted only when its own record is durable and `top` kept complete outcomes beat it, so no crash can leave
the sweep without a model that ranks.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.config.spec import Metric
from orchestrator.core.paths import SweepPaths
from orchestrator.results.fold import Fold

__all__ = ["TopModels", "best", "let_go", "model_of", "prune", "remove"]


def rank_key(metric: Metric, value: float, index: int) -> tuple[float, int]:
    """Sorts trials best first: by value in the metric's direction, ties by the smaller index."""
    return (value if metric.goal == "minimize" else -value, index)


def best(fold: Fold, metric: Metric, top: int) -> list[int]:
    """The indices of the `top` best complete trials, best first."""
    return fold.best(metric, top)


class TopModels:
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
        """Rank a completed trial whose model is `sha256`; returns (index, sha256) of the models that no longer rank.

        A trial that ranks already has one place still, by what is said of it last. Its earlier model is not returned:
        which of the two counts is for the join to say.
        """
        self._ranked = [one for one in self._ranked if one[0][1] != index]
        bisect.insort(self._ranked, (rank_key(self._metric, value, index), sha256))
        out, self._ranked = self._ranked[self._top :], self._ranked[: self._top]
        return [(key[1], sha) for key, sha in out]


def prune(paths: SweepPaths, fold: Fold, metric: Metric, top: int, *, alone: bool) -> int:
    """Delete the models that don't rank any more; returns how many.

    Args:
        paths: the sweep.
        fold: up to date, of all trials; only outcomes in it decide.
        metric: the objective.
        top: how many models are kept.
        alone: no worker of the sweep is alive, so a model without a record will never get one.
    """
    ranked = {i: model_of(fold, i) for i in best(fold, metric, top)}
    return let_go(paths, range(fold.num_trials), ranked, lambda trial: model_of(fold, trial), alone=alone)


def let_go(
    paths: SweepPaths,
    trials: range,
    ranked: Mapping[int, str | None],
    recorded: Callable[[int], str | None],
    *,
    alone: bool,
) -> int:
    """Delete the models of `trials` that don't rank; returns how many.

    Args:
        paths: the sweep.
        trials: whose models these are; those of others stay.
        ranked: the best of them, with the sha256 of their models. As many trials as are kept, or all that are complete.
        recorded: gives the sha256 in a trial's kept outcome.
        alone: no worker of the sweep is alive.
    """
    beaten = [path for path in paths.models.glob("*.safetensors") if _is_beaten(path, trials, ranked, recorded, alone)]
    for path in sorted(beaten):
        path.unlink(missing_ok=True)
    return len(beaten)


def _is_beaten(
    path: Path, trials: range, ranked: Mapping[int, str | None], recorded: Callable[[int], str | None], alone: bool
) -> bool:
    index, _, sha256 = path.stem.partition("-")
    if not index.isdecimal() or (trial := int(index)) not in trials:
        return False
    if (ranked.get(trial) or _NONE).startswith(sha256):
        return False
    # A trial that ranks has no other model recorded than the one that was compared above.
    return alone or (recorded(trial) or _NONE).startswith(sha256)


_NONE = "-"  # which no digest begins with


def model_of(fold: Fold, trial: int) -> str | None:
    """The sha256 of the model in the kept outcome of a trial."""
    model = fold.payload(trial).get("model")
    return model if isinstance(model, str) else None


def remove(paths: SweepPaths, models: list[tuple[int, str]]) -> None:
    """Delete models given as (index, sha256); one that is gone already is no error."""
    for index, sha256 in models:
        with contextlib.suppress(FileNotFoundError):
            paths.model(index, sha256).unlink()
