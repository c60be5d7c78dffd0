"""Watching a sweep until it ends, with progress on stderr: a bar on a terminal, a line now and then elsewhere.

watch(sweep, lambda: not process.alive())
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.cli import tables
from orchestrator.sweep import Sweep

__all__ = ["watch"]

_POLL_S = 0.02
_LOOK_S = 0.5
_SAY_S = 30.0

Update = Callable[[int], None]


def watch(sweep: Sweep, is_over: Callable[[], bool]) -> None:
    """Return when `is_over`, which is asked some fifty times a second; meanwhile show how many trials have ended."""
    with _progress(sweep) as update:
        looked = -_LOOK_S
        while not is_over():
            if time.monotonic() - looked >= _LOOK_S:
                update(_ended(sweep))
                looked = time.monotonic()
            time.sleep(_POLL_S)
        update(_ended(sweep))


def _ended(sweep: Sweep) -> int:
    return sweep.plan.num_trials - sweep.refresh().fold.num_missing


@contextmanager
def _progress(sweep: Sweep) -> Iterator[Update]:
    if not sys.stderr.isatty():
        yield _lines(sweep)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=30),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} trials"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sweep.plan.num_trials)
        yield lambda done: bar.update(task, completed=done, description=_best(sweep))


def _best(sweep: Sweep) -> str:
    top = sweep.best(1)
    return f"{sweep.plan.spec.metric.name} {tables.number(top[0].value)}" if top else ""


def _lines(sweep: Sweep) -> Update:
    """A line every half a minute, for logs."""
    said = time.monotonic()

    def update(done: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _SAY_S:
            said = time.monotonic()
            print(f"{sweep.id}: {done:,} of {sweep.plan.num_trials:,} trials", file=sys.stderr, flush=True)

    return update
