"""Which of a trial's reports counts, and what the trial came to: one rule for jobs and for mere programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from orchestrator.config.spec import Metric
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.results.records import Status

__all__ = ["Diverged", "NoResult", "Objective"]


class Diverged(Exception):
    """The objective became NaN or infinite; ends the trial. Jobs don't catch it."""


class NoResult(Exception):
    """The objective was never reported; the text says what was."""


@dataclass(frozen=True, slots=True)
class _Report:
    value: float
    step: int
    metrics: JsonObject


class Objective:
    """Takes a trial's reports.

    By `metric.at`, the last report of the objective counts or the best one, the earlier of two equal ones. An objective
    that is NaN or infinite ends the trial as diverged at that step, whatever was reported before.

    Args:
        metric: name, direction, and which report counts.
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._counts: _Report | None = None
        self._seen: set[str] = set()

    def take(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take a report; returns whether it is the one that counts now.

        Raises:
            Diverged: the objective is NaN or infinite.
        """
        self._seen.update(metrics)
        if self._counts is not None and not math.isfinite(self._counts.value):
            raise Diverged(f"{self._metric.name} was {self._counts.value} at step {self._counts.step}")
        value = metrics.get(self._metric.name)
        if value is None:
            return False
        if not math.isfinite(value) or self._counts is None or self._replaces(value, self._counts.value):
            self._counts = _Report(value, step, finite(metrics))
            if not math.isfinite(value):
                raise Diverged(f"{self._metric.name} is {value} at step {step}")
            return True
        return False

    def _replaces(self, value: float, than: float) -> bool:
        return self._metric.at == "last" or self.improves(value, than)

    def improves(self, value: float, than: float) -> bool:
        """Whether `value` is better than `than`."""
        return value < than if self._metric.goal == "minimize" else value > than

    @property
    def value(self) -> float | None:
        """The objective as it counts so far; NaN or infinite once it diverged."""
        return None if self._counts is None else self._counts.value

    def to_tree(self) -> JsonObject:
        """All that it has taken, as plain values."""
        counts, seen = self._counts, list[Json](sorted(self._seen))
        return {"counts": None if counts is None else [counts.value, counts.step, counts.metrics], "seen": seen}

    def take_tree(self, tree: JsonObject) -> None:
        """Go on from what `to_tree` gave."""
        counts = cast("tuple[float, int, JsonObject] | None", tree["counts"])
        self._counts = None if counts is None else _Report(*counts)
        self._seen = set(cast("list[str]", tree["seen"]))

    def outcome(self) -> tuple[Status, JsonObject]:
        """Status and payload, when the trial has ended.

        Raises:
            NoResult: the objective was never reported.
        """
        counts = self._counts
        if counts is None:
            raise NoResult(self._nothing())
        if not math.isfinite(counts.value):
            return Status.DIVERGED, {"metric": self._metric.name, "step": counts.step, "metrics": counts.metrics}
        return Status.COMPLETE, {"value": counts.value, "step": counts.step, "metrics": counts.metrics, "model": None}

    def _nothing(self) -> str:
        if not self._seen:
            return f"no result: the job ended without a report of {self._metric.name!r}"
        return f"no result: the job never reported {self._metric.name!r}; it reported {', '.join(sorted(self._seen))}"


def finite(metrics: Mapping[str, float]) -> JsonObject:
    """Metrics as they go into a record: NaN and infinity become null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
