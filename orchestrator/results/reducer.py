"""The reducer: all records to `summary.json`, and the models that rank.

    python -P -m orchestrator.results.reducer --dir SWEEP --submission TOKEN
    ... --ranges R --fan-in F --level L --number K       one reducer of a tree, below its root
    ... --ranges R --fan-in F                            the root

It trusts records, never the state of jobs. With trials missing it looks again until `visibility_s` has passed, since a
network file system can show a file a minute late; then it writes what there is, `missing` above 0, and exits 4. Running
it again, or twice at once, gives the same bytes: after the rename it looks again and repeats if more has become
visible. It clears away the checkpoints of trials that have an outcome, whose worker may have been killed before it
could; what other reducers have left, and what killed processes have left beside the summary a while ago; and, with
nothing of the sweep alive, the temporary files of killed workers.

A tree of reducers (`results.reduction_tree`), or several ranks of one (`worker.reducer_ranks`), do the same for ranges
of the trials and merge what they have: the summary is a function of plan and outcomes, so its bytes are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import orjson

from orchestrator.config.plan import PlanFile
from orchestrator.core import atomic, scratch
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import OrcError, TrialsFailed
from orchestrator.results import records
from orchestrator.results.fold import Fold
from orchestrator.results.reduction_tree import parts
from orchestrator.results.reduction_tree.reduction import ranked
from orchestrator.results.reduction_tree.share import Share
from orchestrator.results.reduction_tree.tree import Tree
from orchestrator.stats.summary import Summary

__all__ = [
    "ALONE",
    "Company",
    "arguments",
    "finish",
    "is_reduced",
    "main",
    "reduce",
    "reduce_part",
    "run",
    "summarize",
    "summary_json",
]

SCHEMA = 1
_LOOK_S = 1.0
_REPEATS = 10
_OLD_S = 60.0
"""Age of a temporary file beside the summary at which nobody is still writing it, by the file system's clock."""
_DESERTED_S = 3600.0
"""Age of a folder where ranks meet at which none is still expected there."""


def summarize(fold: Fold, top: int) -> Summary:
    """The Summary of a sweep: each complete trial's value under its index, and counts of the others."""
    return fold.summary(top)


def summary_json(plan: PlanFile, fold: Fold) -> JsonObject:
    """What `summary.json` and `orc summary --json` hold: a function of plan and kept outcomes."""
    return finish(plan, summarize(fold, plan.spec.reduce.top))


def finish(plan: PlanFile, summary: Summary) -> JsonObject:
    """What `summary.json` holds, from the Summary of all trials under their indices."""
    metric = plan.spec.metric
    found = summary.compute(metric.goal)
    quantiles: dict[str, Json] = dict(found.quantiles)
    top: list[Json] = [
        {"index": one.key, "value": one.value, "params": plan.trial(one.key).params} for one in found.top
    ]
    return {
        "schema": SCHEMA,
        "sweep": plan.id,
        "metric": metric.name,
        "goal": metric.goal,
        "planned": plan.num_trials,
        "missing": plan.num_trials - _num_known(summary),
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


def _num_known(summary: Summary) -> int:
    return summary.count + summary.num_diverged + summary.num_failed + summary.num_pruned


class Company(Protocol):
    """Those who reduce together, each its own part of the trials: `distributed.control_group.Group`, or `ALONE`."""

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def world_size(self) -> int: ...  # noqa: D102
    def reduce(self, value: Summary) -> Summary:
        """The merge of everyone's value, the same for everyone."""
        ...

    def barrier(self) -> None:
        """Return once everyone has come here."""
        ...


class _Alone:
    # What `dist.Group.alone()` is, without torch, which a reducer can do without.
    rank, world_size = 0, 1

    def reduce(self, value: Summary) -> Summary:
        return value

    def barrier(self) -> None:
        pass


ALONE: Company = _Alone()


def reduce(
    paths: SweepPaths,
    *,
    wait_s: float | None = None,
    alone: bool = True,
    tree: Tree | None = None,
    company: Company = ALONE,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Fold, write the summary, let go of models that don't rank. Returns the exit code.

    Args:
        paths: the sweep.
        wait_s: how long to look for missing trials; None takes the sweep's `reduce.visibility_s`.
        alone: no worker of the sweep is alive.
        tree: of which this is the root; None where there is no other reducer.
        company: the ranks of this reducer, which all call this at once; without a tree. The first one writes.
        sleep: waits between looks.

    Raises:
        OrcError: the summary can't be written.
    """
    plan = PlanFile.open(paths.plan)
    tree = tree or Tree(num_trials=plan.num_trials, num_ranges=company.world_size, fan_in=max(2, company.world_size))
    share = Share(paths, plan, tree, tree.node(0, company.rank) if company.world_size > 1 else tree.root)
    summary = _await_records(share, company, plan.num_trials, _num_looks(plan, wait_s), sleep)
    summary = _write(paths, plan, share, company, summary)
    is_whole = _num_known(summary) == plan.num_trials
    _let_go(plan, share, summary, alone=alone and is_whole)
    if company.rank == 0:
        parts.clear(paths)
        _clear_away(paths, alone=alone)
    company.barrier()
    return TrialsFailed.exit_code if summary.num_failed or not is_whole else 0


def reduce_part(
    paths: SweepPaths,
    tree: Tree,
    level: int,
    number: int,
    *,
    wait_s: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """What one reducer of a tree does below its root: its part file, without the models that don't rank in it.

    The part comes last: where it is, nothing is left to let go of. One that is started again after the root has seen
    every trial does nothing: nobody would use its part, or remove it.

    Raises:
        OrcError: the part can't be written.
    """
    plan = PlanFile.open(paths.plan)
    node = tree.node(level, number)
    if not node.trials or _is_done(paths, plan):
        return
    share = Share(paths, plan, tree, node)
    # Those above wait for no record: what was missing here is looked for again by the root.
    num_looks = 0 if level else _num_looks(plan, wait_s)
    _await_records(share, ALONE, len(node.trials), num_looks, sleep)
    _let_go(plan, share, share.reduction.summary, alone=False)
    if not _is_done(paths, plan):
        parts.write(paths, plan, share.reduction)


def _is_done(paths: SweepPaths, plan: PlanFile) -> bool:
    """Whether `summary.json` has every trial, and nothing was written among the records since."""
    try:
        found = orjson.loads(paths.summary.read_bytes())
        written_ns = paths.summary.stat().st_mtime_ns
    except (FileNotFoundError, ValueError):
        return False
    if not isinstance(found, dict) or (found.get("sweep"), found.get("missing")) != (plan.id, 0):
        return False
    changed_ns = max((seen.changed_ns for seen in records.look(paths).values()), default=0)
    return max(changed_ns, paths.records.stat().st_mtime_ns) <= written_ns


def is_reduced(paths: SweepPaths, plan: PlanFile, fold: Fold) -> bool:
    """Whether `summary.json` is there and says what the records say now."""
    try:
        return paths.summary.read_bytes() == _bytes(summary_json(plan, fold))
    except FileNotFoundError:
        return False


def _bytes(summary: JsonObject) -> bytes:
    return atomic.canonical(summary) + b"\n"


def _num_looks(plan: PlanFile, wait_s: float | None) -> int:
    return math.ceil((plan.spec.reduce.visibility_s if wait_s is None else wait_s) / _LOOK_S)


def _await_records(
    share: Share, company: Company, num_trials: int, num_looks: int, sleep: Callable[[float], None]
) -> Summary:
    """The Summary of so many trials, or of what is visible after so many looks: ranks' clocks would not agree."""
    for at_look in range(num_looks + 1):
        if at_look:
            sleep(_LOOK_S)
        share.update()
        summary = company.reduce(share.reduction.summary)
        if _num_known(summary) == num_trials:
            break
    return summary


def _write(paths: SweepPaths, plan: PlanFile, share: Share, company: Company, summary: Summary) -> Summary:
    """Write the summary until nothing that has become visible meanwhile changes it; returns the last that is known.

    Beside busy workers that may never be, so it ends after `_REPEATS`: whoever finishes their work reduces, too.
    """
    for _ in range(_REPEATS):
        if company.rank == 0:
            atomic.write(paths.summary, _bytes(finish(plan, summary)))
        company.barrier()
        share.update()
        before, summary = summary, company.reduce(share.reduction.summary)
        if summary == before:
            break
    return summary


def _let_go(plan: PlanFile, share: Share, summary: Summary, *, alone: bool) -> None:
    """Let go of what is beaten by those who rank in `summary`, which is of more trials than the share's, maybe."""
    best = set(ranked(summary, plan.spec.metric.goal))
    known = share.reduction.models
    share.let_go({index: model for index, model in known.items() if index in best}, alone=alone)


def _clear_away(paths: SweepPaths, *, alone: bool) -> None:
    """Remove what killed processes left; beside the summary only what is old, as others may be at work."""
    now = paths.summary.stat().st_mtime
    for path in atomic.temporaries(paths.root):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < now - _OLD_S:
                path.unlink()
    for folder in paths.root.glob(paths.rendezvous("*").name):
        with contextlib.suppress(FileNotFoundError):
            if folder.stat().st_mtime < now - _DESERTED_S:
                shutil.rmtree(folder, ignore_errors=True)
    if alone:
        for path in (*atomic.temporaries(paths.models), *atomic.temporaries(paths.claims)):
            path.unlink(missing_ok=True)


def arguments(prog: str) -> argparse.ArgumentParser:
    """What every process that reduces is told."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--submission", required=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry of the process; returns its exit code."""
    parser = arguments("orchestrator.results.reducer")
    parser.add_argument("--ranges", type=int, default=1)
    parser.add_argument("--fan-in", type=int, default=2)
    parser.add_argument("--level", type=int)
    parser.add_argument("--number", type=int)
    given = parser.parse_args(argv)
    paths = SweepPaths(given.dir.absolute())
    scratch.clear()  # the workers are over, and those that were killed could not
    return run(paths, lambda: _reduce(paths, given.ranges, given.fan_in, given.level, given.number))


def _reduce(paths: SweepPaths, num_ranges: int, fan_in: int, level: int | None, number: int | None) -> int:
    num_trials = PlanFile.open(paths.plan).num_trials
    tree = Tree(num_trials=num_trials, num_ranges=min(num_ranges, num_trials), fan_in=fan_in)
    if level is None or number is None or level >= len(tree.levels):
        return reduce(paths, alone=False, tree=tree)
    reduce_part(paths, tree, level, number)
    return 0


def run(paths: SweepPaths, work: Callable[[], int]) -> int:
    """The exit code of `work`, with a word to the reader where it is not 0."""
    try:
        code = work()
    except OrcError as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        return error.exit_code
    if code:
        print(f"orchestrator: some trials failed or are missing; `orc status {paths.id}` tells which", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
