"""The reducer: all records to `summary.json`, and the models that rank.

    python -P -m orchestrator.reducer --dir SWEEP --submission TOKEN

It trusts records, never the state of jobs. With trials missing it looks again until `visibility_s` has passed, since a
network file system can show a file a minute late; then it writes what there is, `missing` above 0, and exits 4. Running
it again, or twice at once, gives the same bytes: after the rename it looks again and repeats if more has become
visible. It clears away the checkpoints of trials that have an outcome, whose worker may have been killed before it
could; and, with nothing of the sweep alive, the temporary files that killed writers left.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator import models, store
from orchestrator.errors import OrcError, TrialsFailed
from orchestrator.fold import Fold
from orchestrator.paths import SweepPaths
from orchestrator.plan import PlanFile
from orchestrator.records import Status
from orchestrator.store import Json, JsonObject
from orchestrator.summary import Summary

__all__ = ["is_reduced", "main", "reduce", "summarize", "summary_json"]

SCHEMA = 1
_LOOK_S = 1.0
_REPEATS = 10
_OLD_S = 60.0
"""Age of a temporary file beside the summary at which nobody is still writing it, by the file system's clock."""


def summarize(fold: Fold, top: int) -> Summary:
    """The Summary of a sweep: each complete trial's value under its index, and counts of the others."""
    values = fold.values
    complete = (Summary.of(values[i], key=i, top=top) for i in fold.trials(Status.COMPLETE))
    return (
        Summary.merge_all(complete, start=Summary.empty(top=top))
        .merge(Summary.diverged(fold.count(Status.DIVERGED), top=top))
        .merge(Summary.pruned(fold.count(Status.PRUNED), top=top))
        .merge(Summary.failed(fold.count(Status.FAILED), top=top))
    )


def summary_json(plan: PlanFile, fold: Fold) -> JsonObject:
    """What `summary.json` and `orc summary --json` hold: a function of plan and kept outcomes."""
    spec = plan.spec
    found = summarize(fold, spec.reduce.top).compute()
    ranked = models.best(fold, spec.metric, spec.reduce.top)
    quantiles: dict[str, Json] = dict(found.quantiles)
    top: list[Json] = [{"index": i, "value": fold.values[i], "params": plan.trial(i).params} for i in ranked]
    return {
        "schema": SCHEMA,
        "sweep": plan.id,
        "metric": spec.metric.name,
        "goal": spec.metric.goal,
        "planned": plan.num_trials,
        "missing": fold.num_missing,
        "count": found.count,
        "min": found.min,
        "max": found.max,
        "mean": found.mean,
        "std": found.std,
        "sum": found.sum,
        "quantiles": quantiles,
        "diverged": found.diverged,
        "failed": found.failed,
        "pruned": found.pruned,
        "top": top,
    }


def reduce(
    paths: SweepPaths,
    *,
    wait_s: float | None = None,
    alone: bool = True,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Fold, write the summary, let go of models that don't rank. Returns the exit code.

    Args:
        paths: the sweep.
        wait_s: how long to look for missing trials; None takes the sweep's `reduce.visibility_s`.
        alone: no worker of the sweep is alive.
        sleep: waits between looks.
        clock: monotonic.

    Raises:
        OrcError: the summary can't be written.
    """
    plan = PlanFile.open(paths.plan)
    fold = Fold(paths, plan.num_trials)
    patience = plan.spec.reduce.visibility_s if wait_s is None else wait_s
    _await_records(fold, clock() + patience, sleep, clock)
    _write(paths, plan, fold)
    models.prune(paths, fold, plan.spec.metric, plan.spec.reduce.top, alone=alone and not fold.num_missing)
    _clear_checkpoints(paths, fold)
    if alone:
        _clear_away(paths)
    return TrialsFailed.exit_code if fold.num_missing or fold.count(Status.FAILED) else 0


def is_reduced(paths: SweepPaths, plan: PlanFile, fold: Fold) -> bool:
    """Whether `summary.json` is there and says what the records say now."""
    try:
        return paths.summary.read_bytes() == _summary_bytes(plan, fold)
    except FileNotFoundError:
        return False


def _summary_bytes(plan: PlanFile, fold: Fold) -> bytes:
    return store.canonical(summary_json(plan, fold)) + b"\n"


def _write(paths: SweepPaths, plan: PlanFile, fold: Fold) -> None:
    """Write the summary until nothing that has become visible meanwhile changes it.

    Beside busy workers that may never be, so it ends after `_REPEATS`: whoever finishes their work reduces, too.
    """
    data = _summary_bytes(plan, fold)
    for _ in range(_REPEATS):
        store.write(paths.summary, data)
        if not fold.update():
            return
        data, before = _summary_bytes(plan, fold), data
        if data == before:
            return


def _clear_checkpoints(paths: SweepPaths, fold: Fold) -> None:
    for folder in paths.checkpoints.iterdir():
        trial = int(folder.name) if folder.name.isdecimal() else fold.num_trials
        if trial < fold.num_trials and fold.status(trial) is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _clear_away(paths: SweepPaths) -> None:
    """Remove what killed writers left; beside the summary only what is old, as another reducer may be at work."""
    old = paths.summary.stat().st_mtime - _OLD_S
    for path in store.temporaries(paths.root):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < old:
                path.unlink()
    for path in (*store.temporaries(paths.models), *store.temporaries(paths.claims)):
        path.unlink(missing_ok=True)


def _await_records(fold: Fold, until: float, sleep: Callable[[float], None], clock: Callable[[], float]) -> None:
    fold.update()
    while fold.num_missing and clock() < until:
        sleep(_LOOK_S)
        fold.update()


def main(arguments: list[str] | None = None) -> int:
    """Entry of the process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="orchestrator.reducer")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--submission", required=True)
    options = parser.parse_args(arguments)
    paths = SweepPaths(options.dir.absolute())
    try:
        code = reduce(paths, alone=False)
    except OrcError as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        return error.exit_code
    if code:
        print(f"orchestrator: some trials failed or are missing; `orc status {paths.id}` tells which", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
