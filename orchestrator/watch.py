"""Watching a sweep of this machine until it ends, with progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator import local
from orchestrator.sweep import Sweep

__all__ = ["watch"]

_POLL_S = 0.02
_LOOK_S = 0.5
_SAY_S = 30.0

Update = Callable[[int], None]


def watch(sweep: Sweep, process: local.Process) -> None:
    """Return when `process` has ended; meanwhile show how many trials have an outcome."""
    with _progress(sweep) as update:
        looked = time.monotonic()
        while local.alive(process):
            time.sleep(_POLL_S)
            if time.monotonic() - looked >= _LOOK_S:
                update(sweep.plan.num_trials - sweep.refresh().fold.num_missing)
                looked = time.monotonic()
        update(sweep.plan.num_trials - sweep.refresh().fold.num_missing)


@contextmanager
def _progress(sweep: Sweep) -> Iterator[Update]:
    if not sys.stderr.isatty():
        yield _lines(sweep)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(sweep.id, total=sweep.plan.num_trials)
        yield lambda done: bar.update(task, completed=done)


def _lines(sweep: Sweep) -> Update:
    """A line every half a minute, for logs."""
    said = time.monotonic()

    def update(done: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _SAY_S:
            said = time.monotonic()
            print(f"{sweep.id}: {done} of {sweep.plan.num_trials} trials", file=sys.stderr, flush=True)

    return update
