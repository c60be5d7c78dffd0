"""What a sweep would do, shown without writing or submitting anything."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli import tables
from orchestrator.config.spec import Launch
from orchestrator.core.paths import SweepPaths
from orchestrator.slurm import submission as handover
from orchestrator.slurm.ledger import Submission, SubmissionPart

if TYPE_CHECKING:
    from orchestrator.cli.prepare import PreparedSweep
    from orchestrator.config.plan import SweepPlan
    from orchestrator.core.atomic import JsonObject

__all__ = ["as_json", "scripts", "text"]

_SHOWN = 5
_NO_TOKEN = "0" * 32


def as_json(taken: PreparedSweep) -> JsonObject:
    """What `orc plan --json` shows: the sweep's id, and every trial."""
    return {"sweep": taken.plan.id, "trials": [trial.to_json() for trial in taken.plan]}


def text(taken: PreparedSweep) -> str:
    """The sweep in a few lines: how many trials in how many blocks, and the first of them."""
    plan, spec = taken.plan, taken.plan.spec
    size, count = plan.blocks
    lines = [
        f"{plan.id}: {tables.plural(plan.num_trials, 'trial')} ({spec.method}), "
        f"{tables.plural(count, 'block')} of {size}",
        f"  {spec.metric.goal} {spec.metric.name}, seed {spec.seed}, {_width(spec.launch)} a trial",
        f"  code: {tables.plural(len(taken.snapshot.files), 'file')} of {tables.path(taken.root)}",
        *([_packs(plan)] if spec.launch.pack > 1 else []),
        *(f"  left out of the code: {line}" for line in taken.snapshot.skipped),
    ]
    first = list(islice(plan, _SHOWN))
    if first:
        names = list(dict.fromkeys(name for trial in first for name in trial.params))
        rows = [[trial.trial, *(tables.number(trial.params.get(name)) for name in names)] for trial in first]
        lines.append(tables.table(rows, head=["trial", *names]))
    if plan.num_trials > _SHOWN:
        lines.append(f"  ... and {plan.num_trials - _SHOWN:,} more; --json shows all")
    return "\n".join(lines)


def _packs(plan: SweepPlan) -> str:
    """How many packs there are, and what keeps trials apart."""
    sizes = [len(pack) for pack in plan.packs()]
    least, most = min(sizes, default=0), max(sizes, default=0)
    found = f"{tables.plural(len(sizes), 'pack')} of {most if least == most else f'{least} to {most}'} trials"
    apart = [name for name in plan.packed_by if name in plan.spec.parameters]
    by = f"; trials of a pack have equal {', '.join(apart)}" if apart else ""
    return f"  packs of up to {plan.spec.launch.pack}: {found}{by}"


def _width(launch: Launch) -> str:
    threads = tables.plural(launch.cpus, "thread")
    return threads if launch.num_ranks == 1 else f"{tables.plural(launch.num_ranks, 'rank')} of {threads}"


def scripts(taken: PreparedSweep, runs: Path) -> str:
    """The sbatch scripts that a submission would hand over, one array of workers and the reducers."""
    plan = taken.plan
    workers = SubmissionPart(what="workers-0", num_workers=plan.blocks.num_blocks)
    parts = (workers, *handover.reducers(plan.spec, plan.num_trials))
    submission = Submission(token=_NO_TOKEN, epoch=0, on="slurm", host="", parts=parts)
    paths = SweepPaths(runs / plan.id)
    requests = (handover.request(paths, plan.spec, submission, part) for part in parts)
    return "\n".join(handover.render(request).decode() for request in requests)
