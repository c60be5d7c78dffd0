"""Reduction: what a reducer knows of some ranges of trials, as a monoid over disjoint ranges.

    one = Reduction.of(fold, range(0, 100), plan.spec.metric, top=10)
    one.merge(other).summary                       of both ranges; in any order and grouping the same
    Reduction.merge_all(parts).num_missing

Records are joined before anything is merged: a range is folded from all writers. So a trial that several writers have
an outcome of counts once, and ranges that have a trial in common don't merge.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, TypeAlias

from orchestrator.config.spec import Metric
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.results.fold import Fold
from orchestrator.results.top_models import model_of
from orchestrator.stats.summary import Summary

__all__ = ["Goal", "Reduction", "ranked"]

SCHEMA: Final = 1

Goal: TypeAlias = Literal["minimize", "maximize"]
Span: TypeAlias = tuple[int, int]


def ranked(summary: Summary, goal: Goal) -> list[int]:
    """The trials that rank, best first."""
    return [key for _, key in (summary.low if goal == "minimize" else summary.high)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """What is known of some trials.

    Args:
        goal: direction of the objective; it belongs to the type.
        spans: the trials, as ascending pairs of the first one and the one after the last; no two touch.
        summary: of the kept outcomes, values under their trial's index.
        models: sha256 of the model of each trial that ranks here; None where none was kept.
        seen: writer id to the offset, in bytes, up to which every line of its file is in here.
    """

    goal: Goal
    spans: tuple[Span, ...]
    summary: Summary
    models: dict[int, str | None]
    seen: dict[str, int]

    def __hash__(self) -> int:
        return hash((self.goal, self.spans, self.summary))

    @classmethod
    def empty(cls, goal: Goal, top: int) -> Reduction:
        """The identity: of no trial."""
        return cls(goal=goal, spans=(), summary=Summary.empty(top=top), models={}, seen={})

    @classmethod
    def of(cls, fold: Fold, trials: range, metric: Metric, top: int) -> Reduction:
        """Of `trials`, which are those that `fold` holds."""
        if not trials:
            return cls.empty(metric.goal, top)
        summary = fold.summary(top)
        return cls(
            goal=metric.goal,
            spans=((trials.start, trials.stop),),
            summary=summary,
            models={index: model_of(fold, index) for index in ranked(summary, metric.goal)},
            seen=dict(fold.seen),
        )

    @property
    def num_missing(self) -> int:
        """How many of the trials have no outcome."""
        found = self.summary
        known = found.count + found.num_diverged + found.num_failed + found.num_pruned
        return sum(stop - start for start, stop in self.spans) - known

    def merge(self, other: Reduction) -> Reduction:
        """The reduction of both sets of trials, which must be disjoint.

        Raises:
            ValueError: they have a trial in common, another goal, or keep another number of trials that rank.
        """
        return Reduction.merge_all((self, other))

    @staticmethod
    def merge_all(reductions: Iterable[Reduction]) -> Reduction:
        """Equal to merging them one after the other; at least one.

        Raises:
            ValueError: as `merge`.
        """
        given = list(reductions)
        if len({one.goal for one in given}) != 1:
            raise ValueError(f"reductions of one goal merge, found {[one.goal for one in given]}")
        goal, summary = given[0].goal, Summary.merge_all(one.summary for one in given)
        models = {index: model for one in given for index, model in one.models.items()}
        return Reduction(
            goal=goal,
            spans=_joined(span for one in given for span in one.spans),
            summary=summary,
            models={index: models[index] for index in ranked(summary, goal)},
            seen=_seen_by_all([one.seen for one in given if one.spans]),
        )

    def to_json(self) -> JsonObject:
        """Plain JSON, which `from_json` reads."""
        models: list[Json] = [[index, model] for index, model in sorted(self.models.items())]
        return {
            "schema": SCHEMA,
            "goal": self.goal,
            "spans": [list(span) for span in self.spans],
            "summary": self.summary.to_json(),
            "models": models,
            "seen": {**self.seen},
        }

    @classmethod
    def from_json(cls, value: Json) -> Reduction:
        """The reduction of which `value` is the `to_json`.

        Raises:
            ValueError: `value` is of another schema or damaged.
        """
        match value:
            case {
                "schema": 1,
                "goal": "minimize" | "maximize" as goal,
                "spans": list(spans),
                "summary": summary,
                "models": list(models),
                "seen": dict(seen),
            }:
                found = cls(
                    goal=goal,
                    spans=_joined(map(_span, spans)),
                    summary=Summary.from_json(summary),
                    models=dict(map(_model, models)),
                    seen={name: _offset(offset) for name, offset in seen.items()},
                )
                _check(found)
                return found
        raise ValueError(f"no reduction of schema {SCHEMA}: {value!r}")


def _check(found: Reduction) -> None:
    """Raises ValueError where the parts contradict each other, as no merge could make them."""
    best = ranked(found.summary, found.goal)
    if found.models.keys() != set(best):
        raise ValueError(f"models: expected those of the trials {best}, which rank, found {sorted(found.models)}")
    keys = {key for _, key in (*found.summary.low, *found.summary.high)}
    if foreign := sorted(key for key in keys if not any(start <= key < stop for start, stop in found.spans)):
        raise ValueError(f"summary: expected values of trials in {found.spans}, found {foreign}")
    if found.num_missing < 0:
        raise ValueError(f"summary: found {-found.num_missing} outcomes more than trials in {found.spans}")


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The spans in order, those that touch made one."""
    ordered = sorted(spans)
    if any(one[1] > other[0] for one, other in pairwise(ordered)):
        raise ValueError(f"reductions of disjoint trials merge, found {ordered}")
    starts = [span[0] for at, span in enumerate(ordered) if not at or ordered[at - 1][1] != span[0]]
    stops = [span[1] for at, span in enumerate(ordered, 1) if at == len(ordered) or ordered[at][0] != span[1]]
    return tuple(zip(starts, stops, strict=True))


def _seen_by_all(seen: list[dict[str, int]]) -> dict[str, int]:
    if not seen:
        return {}
    common = set(seen[0]).intersection(*seen[1:])
    return {name: min(one[name] for one in seen) for name in sorted(common)}


def _span(value: Json) -> Span:
    match value:
        case [int(start), int(stop)] if 0 <= start < stop:
            return start, stop
    raise ValueError(f"no range of trials: {value!r}")


def _model(value: Json) -> tuple[int, str | None]:
    match value:
        case [int(index), str() | None as model]:
            return index, model
    raise ValueError(f"no trial with its model: {value!r}")


def _offset(value: Json) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"no offset: {value!r}")
    return value
