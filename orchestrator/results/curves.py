"""Curves: a metric by step, as a Summary of the trials that reported the step.

    points = read(paths, num_trials, "val_loss")    one value a trial and step, from all reports
    summarize(points)[300].compute().mean           a SummaryMap: step -> Summary, with trials as keys
    curves(points, groups)                          a curve for each group of trials, as plain numbers

A step of a trial may be reported more than once: by an attempt that was preempted and by the one after it, by two live
copies of a worker, by a file that becomes visible late. So reports are joined before they are merged, by a rule under
which neither their order nor a repetition matters. Per trial and step, the latest attempt counts; of one attempt, what
its process reported last, in whichever of its files; of two processes at one attempt that contradict each other, a
finite value before none, then the smaller sha256 of the value, which favours neither good nor bad ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias, cast

import orjson

from orchestrator.core import atomic
from orchestrator.core.text import did_you_mean
from orchestrator.errors import NothingMatched
from orchestrator.results import records
from orchestrator.results.effects import of_values, values_json
from orchestrator.results.fold.segment import lines, opened
from orchestrator.stats.containers import SummaryMap
from orchestrator.stats.statistics import Statistics
from orchestrator.stats.summary import TOP, Summary

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.core.atomic import Json, JsonObject
    from orchestrator.core.paths import SweepPaths
    from orchestrator.results.effects import Groups, Values

__all__ = ["Curve", "Point", "Points", "curves", "join", "read", "summarize"]

_REPORT: Final = b'{"kind":"report"'
_WRITER: Final = b'{"kind":"writer"'
_HEAD: Final = 1 << 14
"""Bytes in which a writer line ends."""
_STEPS: Final = range(-(2**63), 2**63)


class Point(NamedTuple):
    """What an attempt reported at a step: the metric's value, None where it was NaN or infinite."""

    attempt: int
    value: float | None


class Curve(NamedTuple):
    """A metric by step, over the trials of one group.

    Args:
        values: what these trials share, by name of the parameter.
        steps: ascending; each step's numbers are of the trials that reported it.
    """

    values: Values
    steps: dict[int, Statistics]

    def to_json(self) -> JsonObject:
        """As `orc summary --curve NAME --json` shows it."""
        steps = [(step, found.to_json()) for step, found in self.steps.items()]
        return {
            "values": values_json(self.values),
            "steps": [{"step": step, **{name: found[name] for name in _KEYS}} for step, found in steps],
        }


_KEYS: Final = ("count", "min", "max", "mean", "std", "quantiles", "diverged")

Points: TypeAlias = "dict[tuple[int, int], Point]"
"""Trial and step -> what counts for them."""


def read(paths: SweepPaths, num_trials: int, metric: str) -> Points:
    """The values of a metric that count, of all trials, whatever became of them.

    Raises:
        NothingMatched: no report has the metric; says which there are.
    """
    points: Points = {}
    for files in _writers(paths):
        join(points, _of_writer(files, num_trials, metric))
    if not points:
        raise _unknown(paths, metric)
    return points


def join(points: Points, more: Mapping[tuple[int, int], Point]) -> None:
    """Take the points of another writer into `points`: in any order, and as often as you like."""
    for where, point in more.items():
        kept = points.get(where)
        if kept is None or _wins(point, kept):
            points[where] = point


def _wins(point: Point, kept: Point) -> bool:
    if point.attempt != kept.attempt or point.value == kept.value:
        return point.attempt > kept.attempt
    return _order(point.value) < _order(kept.value)


def _order(value: float | None) -> tuple[bool, bytes]:
    return value is None, hashlib.sha256(atomic.canonical(value)).digest()


def _writers(paths: SweepPaths) -> list[list[Path]]:
    """The record files of each process: more than one if it had to abandon some, then in the order of its writing."""
    files = {path.stem: path for path in records.files(paths)}
    before = {name: _continued(path) for name, path in files.items()}
    after = {first: name for name, first in before.items() if first in files}
    found: list[list[Path]] = []
    done: set[str] = set()
    # What continues no file is gone through first; others are left only if two say that they continue the same one.
    for name in sorted(files, key=lambda name: before[name] in files):
        its: list[Path] = []
        at = name
        while at in files and at not in done:
            done.add(at)
            its.append(files[at])
            at = after.get(at, "")
        if its:
            found.append(its)
    return found


def _continued(path: Path) -> str:
    """The writer id of the file that a record file continues; empty if it continues none."""
    try:
        with opened(path) as file:
            first = file.read(_HEAD).partition(b"\n")[0]
    except OSError:
        return ""
    writer = atomic.unchecked(first) if first.startswith(_WRITER) else None
    return str(writer.get("continues", "")) if writer else ""


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a record file; none, if it can't be read."""
    with suppress(OSError):
        for _, block in lines(path, 0, None):
            yield from block


def _reports(path: Path, holding: bytes) -> Iterator[JsonObject]:
    """The reports of a record file whose line holds some bytes."""
    for line in _lines(path):
        if line.startswith(_REPORT) and holding in line and atomic.intact(line):
            yield orjson.loads(line)


def _of_writer(files: list[Path], num_trials: int, metric: str) -> Points:
    points: Points = {}
    for report in chain.from_iterable(_reports(path, atomic.canonical(metric)) for path in files):
        trial, attempt, step, metrics = (report.get(key) for key in ("trial", "attempt", "step", "metrics"))
        if not (isinstance(trial, int) and isinstance(attempt, int) and isinstance(step, int) and step in _STEPS):
            continue
        if isinstance(metrics, dict) and metric in metrics and 0 <= trial < num_trials:
            kept = points.get((trial, step))
            if kept is None or attempt >= kept.attempt:
                points[trial, step] = Point(attempt, _number(metrics[metric]))
    return points


def _number(value: Json) -> float | None:
    # -0.0 would be another JSON text than 0.0, and is the same value.
    return float(value) + 0.0 if isinstance(value, (int, float)) else None


def _unknown(paths: SweepPaths, metric: str) -> NothingMatched:
    known: dict[str, None] = {}
    for path in records.files(paths):
        for report in _reports(path, b'"metrics"'):
            found = report.get("metrics")
            known.update(dict.fromkeys(found if isinstance(found, dict) else ()))
    if not known:
        return NothingMatched(f"{paths.id}: no trial has reported anything yet; `orc status {paths.id}` tells more")
    reported = ", ".join(sorted(known))
    return NothingMatched(
        f"{paths.id}: no trial has reported {metric!r}; reported: {reported}{did_you_mean(metric, known)}"
    )


def summarize(points: Mapping[tuple[int, int], Point], top: int = TOP) -> SummaryMap[Summary]:
    """The Summary of each step, keyed by trial; a value that was NaN or infinite counts as diverged."""
    steps: dict[int, list[tuple[int, float | None]]] = {}
    for (trial, step), point in points.items():
        steps.setdefault(step, []).append((trial, point.value))
    return SummaryMap.of((step, _summary(found, top)) for step, found in steps.items())


def _summary(found: list[tuple[int, float | None]], top: int) -> Summary:
    finite = [(trial, value) for trial, value in found if value is not None]
    values, trials = [value for _, value in finite], [trial for trial, _ in finite]
    return of_values(values, trials, top).merge(Summary.diverged(len(found) - len(finite), top=top))


def curves(points: Points, groups: Groups, *, goal: Literal["minimize", "maximize"]) -> list[Curve]:
    """A curve for each group, in their order; `goal` says which end of each step is its top."""
    parts: list[Points] = [{} for _ in groups.values]
    for (trial, step), point in points.items():
        parts[groups.places[trial]][trial, step] = point
    return [
        Curve(values, {cast("int", step): found.compute(goal) for step, found in summarize(part).entries})
        for values, part in zip(groups.values, parts, strict=True)
    ]
