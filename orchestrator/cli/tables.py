"""What a person reads: answers as text, aligned, without colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from orchestrator.core.atomic import Json, JsonObject
from orchestrator.sweep import Best, JobStatus, Standing, Sweep

if TYPE_CHECKING:
    from orchestrator.results.curves import Curve
    from orchestrator.results.effects import Effect, Level
    from orchestrator.stats.statistics import Statistics

__all__ = [
    "best",
    "curves",
    "effects",
    "number",
    "path",
    "plural",
    "standing",
    "standing_json",
    "summary",
    "table",
    "times",
]

_STEPS = 40
"""Rows of curves that a person is shown, all curves together."""


def number(value: Json) -> str:
    """A number as a person reads it: six significant digits; others as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def plural(count: int, noun: str) -> str:
    """`1 trial`, `2 trials`, `1,000 trials`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def path(found: Path) -> str:
    """A path as short as it can be typed here: relative to the working folder when it is inside."""
    here = Path.cwd()
    return str(found.relative_to(here) if found.is_relative_to(here) else found)


def table(rows: Iterable[Sequence[str]], *, head: Sequence[str] | None = None, indent: str = "  ") -> str:
    """Rows as aligned columns, those of numbers to the right, under a head if there is one."""
    body = [list(row) for row in rows]
    lines = body if head is None else [list(head), *body]
    columns = [_column(cells, body) for cells in zip(*lines, strict=True)]
    return "\n".join(f"{indent}{'  '.join(line)}".rstrip() for line in zip(*columns, strict=True))


def _column(cells: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    width = max(map(len, cells))
    to_right = all(map(_is_number, cells[-len(body) :])) if body else False
    return [cell.rjust(width) if to_right else cell.ljust(width) for cell in cells]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("null", "")
    return True


def best(found: list[Best], metric: str) -> str:
    """The best trials as a table: rank, trial, value, parameters that differ, model."""
    if not found:
        return "  no trial is complete yet"
    others = list(dict.fromkeys(name for one in found for name in one.metrics if name != metric))
    names = list(dict.fromkeys(name for one in found for name in one.params))
    head = ["#", "trial", metric, *others, *names]
    rows = [
        [
            *(str(rank), one.trial, number(one.value)),
            *(number(one.metrics.get(name)) for name in others),
            *(number(one.params.get(name)) for name in names),
        ]
        for rank, one in enumerate(found, 1)
    ]
    text = table(rows, head=head)
    return text if found[0].model is None else f"{text}\n  best model: {path(found[0].model)}"


def summary(sweep: Sweep) -> str:
    """The summary of a sweep's objective."""
    found = sweep.summary()
    quantiles = found["quantiles"]
    assert isinstance(quantiles, dict)
    metric = sweep.plan.spec.metric
    counts = [f"{found['count']} of {found['planned']} complete"]
    counts += [f"{found[key]} {key}" for key in ("diverged", "pruned", "failed", "missing") if found[key]]
    lines = [f"{metric.name} ({metric.goal}): {', '.join(counts)}"]
    if found["count"]:
        names = ["min", "p05", "p25", "p50", "p75", "p95", "max"]
        values = [found["min"], *(quantiles[name] for name in names[1:-1]), found["max"]]
        lines.append(table([[number(value) for value in values]], head=names))
        lines.append(f"  mean {number(found['mean'])}, standard deviation {number(found['std'])}")
    return "\n".join(lines)


_NUMBERS = ("mean", "std", "min", "p50", "max")


def _numbers(found: Statistics) -> list[str]:
    return [number(value) for value in (found.mean, found.std, found.min, found.quantiles["p50"], found.max)]


def _level(level: Level) -> str:
    """A parameter's value, or from where to where its values go."""
    return " to ".join(map(number, level)) if isinstance(level, tuple) else number(level)


def effects(sweep: Sweep, found: list[Effect]) -> str:
    """The objective by the values of parameters, a row a group; `found` is not empty."""
    metric, by = sweep.plan.spec.metric, list(found[0].values)
    others = [name for name in ("diverged", "pruned", "failed", "missing") if any(_others(one)[name] for one in found)]
    rows = [
        [
            *map(_level, one.values.values()),
            str(one.statistics.count),
            *_numbers(one.statistics),
            str(one.statistics.top[0].key) if one.statistics.top else "null",
            *(str(_others(one)[name]) for name in others),
        ]
        for one in found
    ]
    head = [*by, "complete", *_NUMBERS, "best trial", *others]
    return f"{metric.name} ({metric.goal}) by {', '.join(by)}\n{table(rows, head=head)}"


def _others(one: Effect) -> dict[str, int]:
    found = one.statistics
    return {"diverged": found.diverged, "pruned": found.pruned, "failed": found.failed, "missing": one.missing}


def curves(metric: str, found: list[Curve]) -> str:
    """A metric by step, a row a step, those of one group after those of another; of many steps, some."""
    by, most = list(found[0].values), max(2, _STEPS // len(found))
    rows = [
        [*map(_level, curve.values.values()), str(step), str(one.count), *_numbers(one), str(one.diverged)]
        for curve in found
        for step, one in _some(list(curve.steps.items()), most)
    ]
    text = f"{metric} by {', '.join([*by, 'step'])}\n{table(rows, head=[*by, 'step', 'trials', *_NUMBERS, 'diverged'])}"
    num_steps = sum(len(curve.steps) for curve in found)
    return text if num_steps == len(rows) else f"{text}\n  {len(rows)} of {num_steps:,} steps; --json has them all"


def _some(items: list[tuple[int, Statistics]], most: int) -> list[tuple[int, Statistics]]:
    """All items, or as many as asked for: the first, the last, and those between at equal distances."""
    if len(items) <= most:
        return items
    return [items[place * (len(items) - 1) // (most - 1)] for place in range(most)]


def times(sweep: Sweep) -> str:
    """How long the trials themselves took."""
    total, done = sweep.fold.seconds, sweep.plan.num_trials - sweep.fold.num_missing
    if not done:
        return "  no trial has ended"
    each = total / done
    shown = f"{1000 * each:.0f} ms" if each < 1 else f"{each:.2f} s"
    return f"  the trials themselves took {total:.1f} s, {shown} each"


def standing_json(sweep: Sweep, found: Standing) -> JsonObject:
    """What `orc status --json` shows."""
    top = sweep.best(1)
    jobs: list[Json] | None = None if found.jobs is None else [asdict(one) for one in found.jobs]
    disagreements: list[Json] = [{"trial": trial, "hosts": list(hosts)} for trial, hosts in found.disagreements]
    failures: list[Json] = [{"error": text, "first": first, "count": count} for text, first, count in found.failures]
    return {
        "sweep": sweep.id,
        "dir": str(sweep.paths.root),
        "trials": dict(found.trials),
        "retries": dict(found.retries),
        "saved": dict(found.interruptions.saved),
        "resumed": [asdict(one) for one in found.interruptions.resumptions],
        "failures": failures,
        "disagreements": disagreements,
        "bad_lines": found.bad_lines,
        "unreadable": [*found.unreadable],
        "mixed": list(found.mixed),
        "jobs": jobs,
        "best": top[0].to_json() if top else None,
    }


def _retries(found: Standing) -> list[str]:
    saved = found.interruptions.saved
    causes = [
        f"{number} {cause}" + (f" ({saved[cause]} saved)" if saved.get(cause) else "")
        for cause, number in found.retries.items()
    ]
    lines = [f"  attempts that ended without an outcome: {', '.join(causes)}"] if causes else []
    went_on = [one.lost for one in found.interruptions.resumptions if one.step]
    anew = [one.lost for one in found.interruptions.resumptions if not one.step and one.lost]
    if went_on:
        lines.append(f"  {plural(len(went_on), 'attempt')} went on from a checkpoint; {_twice(sum(went_on))}")
    if anew:
        lines.append(f"  {plural(len(anew), 'attempt')} began anew, since nothing was saved; {_twice(sum(anew))}")
    return lines


def _twice(lost: int) -> str:
    return (
        "no step was done twice" if not lost else f"{plural(lost, 'step')} {'was' if lost == 1 else 'were'} done twice"
    )


def _failures(sweep: Sweep, found: Standing) -> list[str]:
    lines = [
        f"  failed: {number} x {text} (first: trial {index}; `orc logs {index} {sweep.id}`)"
        for text, index, number in found.failures
    ]
    return [*lines, f"  `orc resume --failed {sweep.id}` runs failed trials again"] if lines else []


def _doubts(found: Standing) -> list[str]:
    lines = [
        f"  disagreement: trial {trial} gave different results on {' and '.join(hosts)}"
        for trial, hosts in found.disagreements
    ]
    if found.bad_lines:
        lines.append(f"  {found.bad_lines} lines of records are torn or not visible yet; the rest counts")
    if found.unreadable:
        number = plural(len(found.unreadable), "record file")
        lines.append(f"  {number} can't be read, so trials may be missing that are done: {found.unreadable[0]}")
    return lines + [f"  mixed hardware or versions: bytes not promised ({text})" for text in found.mixed]


def _whole(one: JobStatus) -> str:
    """A job as Slurm's commands take it: an element of an array with its array."""
    return f"{one.job}_{one.task}" if one.task.isdigit() else one.job


def _jobs(sweep: Sweep, found: Standing) -> list[str]:
    if found.jobs is None:
        return [f"  jobs: unknown, {found.note}"]
    lines = [] if not found.jobs else [table([[one.job, one.task, one.state, one.reason] for one in found.jobs])]
    lines += [
        f"  {_whole(one)} is held; `scontrol release {_whole(one)}` lets it go"
        for one in found.jobs
        if "held" in one.reason.lower()
    ]
    away = dict.fromkeys(nodes for one in found.jobs if (nodes := one.reason.partition("UnavailableNodes:")[2]))
    lines += [f"  {nodes}: drained or down, so what needs it waits; `sinfo -R` says why" for nodes in away]
    undone = found.trials["waiting"] + found.trials["running"] + found.trials["cancelled"]
    if undone and not found.jobs:
        lines.append(f"  nothing of it is running; `orc resume {sweep.id}` goes on")
    elif undone and all(one.state == "elsewhere" for one in found.jobs):
        lines.append(f"  whether it still runs can't be seen from here; `orc resume {sweep.id}` finds out")
    return lines


def standing(sweep: Sweep, found: Standing) -> str:
    """Where a sweep stands, in one screen."""
    counts = ", ".join(f"{number} {name}" for name, number in found.trials.items() if number)
    lines = [f"{sweep.id}: {counts or 'no trials'}", f"  in {path(sweep.paths.root)}"]
    lines += _retries(found) + _failures(sweep, found) + _doubts(found) + _jobs(sweep, found)
    top = sweep.best(1)
    if top:
        lines.append(f"  best so far: trial {top[0].index}, {sweep.plan.spec.metric.name} {number(top[0].value)}")
    return "\n".join(lines)
