"""Effects: what a parameter does to the objective, as a Summary of the trials that share its value.

    groups = group(plan, ["lr", "opt.momentum"])    which trials share their values: a function of the plan alone
    found = summarize(fold, groups, top=10)         a SummaryMap, which merges with that of other trials
    effects(fold, groups, goal="minimize", top=10)  its numbers, group after group

A parameter that is drawn from a range hardly ever has a value twice, so its values are cut into a few ranges that hold
about as many trials each.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias, cast

from orchestrator.core.atomic import Json, JsonObject, canonical
from orchestrator.core.text import did_you_mean
from orchestrator.errors import UsageError
from orchestrator.results.records import Status
from orchestrator.stats.containers import SummaryMap
from orchestrator.stats.statistics import Statistics
from orchestrator.stats.summary import Summary

if TYPE_CHECKING:
    from orchestrator.config.plan import PlanFile
    from orchestrator.results.fold import Fold

__all__ = [
    "MOST_VALUES",
    "NUM_RANGES",
    "Effect",
    "Groups",
    "Level",
    "Range",
    "Values",
    "effects",
    "group",
    "of_values",
    "summarize",
    "values_json",
]

MOST_VALUES: Final = 20
"""Values of a parameter drawn from a range that are still shown one by one."""
NUM_RANGES: Final = 10


class Range(NamedTuple):
    """Values of a parameter between two that occur, both included."""

    low: float
    high: float


Level: TypeAlias = "Json | Range"
Values: TypeAlias = "Mapping[str, Level]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The trials of a plan in groups, by the values of parameters.

    Args:
        values: of each group, what its trials share, by name of the parameter; ascending.
        places: of each trial, the place of its group in `values`.
    """

    values: tuple[Values, ...]
    places: tuple[int, ...]

    @property
    def labels(self) -> list[str]:
        """A text for each group that no other has, and that is the same in every plan: its values as JSON."""
        return [canonical(values_json(values)).decode() for values in self.values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What the trials of one group came to.

    Args:
        values: what they share, by name of the parameter.
        planned: how many there are.
        missing: how many of them have no outcome.
        statistics: of the objective over those that are complete, with the numbers of the others.
    """

    values: Values
    planned: int
    missing: int
    statistics: Statistics

    def to_json(self) -> JsonObject:
        """As `orc summary --by NAME --json` shows it: the keys of a summary, and `values`."""
        found = self.statistics.to_json()
        kept = {name: found[name] for name in _KEYS}
        top: list[Json] = [{"index": one.key, "value": one.value} for one in self.statistics.top]
        return {
            "values": values_json(self.values),
            "planned": self.planned,
            "missing": self.missing,
            **kept,
            "top": top,
        }


_KEYS: Final = ("count", "min", "max", "mean", "std", "sum", "quantiles", "diverged", "failed", "pruned")


def values_json(values: Values) -> JsonObject:
    """What a group shares as JSON; a range is an object of `from` and `to`."""
    return {
        name: {"from": level.low, "to": level.high} if isinstance(level, Range) else level
        for name, level in values.items()
    }


# Which trials share their values


@dataclass(frozen=True, slots=True)
class _Axis:
    """A parameter: its levels, ascending, and the place of each trial's among them."""

    name: str
    levels: Sequence[Level]
    places: list[int]


def group(plan: PlanFile, names: Iterable[str]) -> Groups:
    """The trials of `plan` by the values of the parameters `names`; one that is named twice counts once.

    Args:
        plan: the sweep's plan.
        names: parameters, nested ones by dotted path.

    Raises:
        UsageError: there is no such parameter; says which there are.
    """
    from orchestrator.config.distributions import infer, leaves

    parameters = {".".join(path): (path, config) for path, config in leaves(plan.spec.parameters)}
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name not in parameters:
            raise _unknown(plan, name, list(parameters))
    columns = _columns(plan, [parameters[name][0] for name in chosen])
    return _crossed(
        [
            _axis(name, column, is_drawn=infer(parameters[name][1]) not in _LISTED)
            for name, column in zip(chosen, columns, strict=True)
        ],
        plan.num_trials,
    )


_LISTED: Final = ("constant", "categorical", "categorical_w_probabilities")


def _unknown(plan: PlanFile, name: str, known: list[str]) -> UsageError:
    nested = [other for other in known if other.startswith(f"{name}.")]
    hint = f"; it holds {', '.join(nested)}" if nested else did_you_mean(name, known)
    return UsageError(f"{plan.id}: no parameter {name!r}; there are {', '.join(known)}{hint}")


def _columns(plan: PlanFile, paths: Sequence[tuple[str, ...]]) -> list[list[Json]]:
    """The values of some parameters, those of every trial in order."""
    columns: list[list[Json]] = [[] for _ in paths]
    for trial in plan.trials() if paths else ():
        for path, column in zip(paths, columns, strict=True):
            value: Json = trial.params
            for name in path:
                value = cast("JsonObject", value)[name]
            column.append(value)
    return columns


def _axis(name: str, column: list[Json], *, is_drawn: bool) -> _Axis:
    texts = list(map(canonical, column))
    distinct = dict(zip(texts, column, strict=True))
    if is_drawn and len(distinct) > MOST_VALUES:
        return _cut(name, cast("list[float]", column))
    ordered = sorted(distinct, key=lambda text: _order(distinct[text]))
    places = {text: place for place, text in enumerate(ordered)}
    return _Axis(name, [distinct[text] for text in ordered], [places[text] for text in texts])


def _order(value: Json) -> tuple[int, float, bytes]:
    """Where a value stands among others: null, false, true, numbers, the rest by its JSON."""
    if value is None or isinstance(value, bool):
        return int(value is not None), float(bool(value)), b""
    return (2, value, canonical(value)) if isinstance(value, (int, float)) else (3, 0.0, canonical(value))


def _cut(name: str, column: list[float]) -> _Axis:
    """Ranges that hold about as many trials each; trials of one value are in one range."""
    ordered = sorted(column)
    starts = sorted({ordered[len(ordered) * place // NUM_RANGES] for place in range(NUM_RANGES)})
    ends = [ordered[bisect_left(ordered, start) - 1] for start in starts[1:]] + ordered[-1:]
    levels = [Range(*ends) for ends in zip(starts, ends, strict=True)]
    return _Axis(name, levels, [bisect_right(starts, value) - 1 for value in column])


def _crossed(axes: Sequence[_Axis], num_trials: int) -> Groups:
    """The groups that occur of all combinations of levels."""
    combinations = list(zip(*(axis.places for axis in axes), strict=True)) if axes else [()] * num_trials
    distinct = sorted(set(combinations))
    places = {combination: place for place, combination in enumerate(distinct)}
    values = tuple(
        {axis.name: axis.levels[level] for axis, level in zip(axes, combination, strict=True)}
        for combination in distinct
    )
    return Groups(values=values, places=tuple(map(places.__getitem__, combinations)))


# What they came to


def summarize(fold: Fold, groups: Groups, top: int) -> SummaryMap[Summary]:
    """The Summary of each group under its label, as the sweep's own: complete values, and counts of the others.

    Of a fold that has only a range of the trials, it is theirs; those of all ranges merge to that of the sweep.
    """
    trials: list[dict[Status, list[int]]] = [{status: [] for status in Status} for _ in groups.values]
    for status in Status:
        for trial in fold.trials(status):
            trials[groups.places[trial]][status].append(trial)
    return SummaryMap.of(
        (label, _summary(fold, found, top)) for label, found in zip(groups.labels, trials, strict=True)
    )


def _summary(fold: Fold, trials: Mapping[Status, list[int]], top: int) -> Summary:
    complete = trials[Status.COMPLETE]
    return Summary.merge_all(
        [
            of_values([fold.value(trial) for trial in complete], complete, top),
            Summary.diverged(len(trials[Status.DIVERGED]), top=top),
            Summary.pruned(len(trials[Status.PRUNED]), top=top),
            Summary.failed(len(trials[Status.FAILED]), top=top),
        ]
    )


def of_values(values: Sequence[float], keys: Sequence[int], top: int) -> Summary:
    """The Summary of values under their keys; NumPy, which takes a while to import, is left alone for few of them."""
    if len(values) >= _MANY:
        return Summary.of_samples(values, keys=keys, top=top)
    ones = (Summary.of(value, key=key, top=top) for value, key in zip(values, keys, strict=True))
    return Summary.merge_all(ones, start=Summary.empty(top=top))


_MANY: Final = 10_000


def effects(fold: Fold, groups: Groups, *, goal: Literal["minimize", "maximize"], top: int) -> list[Effect]:
    """What each group came to, in the order of the groups."""
    found = summarize(fold, groups, top)
    planned = Counter(groups.places)
    missing = Counter(groups.places[trial] for trial in fold.missing())
    return [
        Effect(values=values, planned=planned[place], missing=missing[place], statistics=found[label].compute(goal))
        for place, (values, label) in enumerate(zip(groups.values, groups.labels, strict=True))
    ]
