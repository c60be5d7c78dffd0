"""The process that Slurm, or this machine, starts. It never imports torch.

    python -P -m orchestrator.supervisor work --dir SWEEP --submission TOKEN [--worker K] [--slots N] [--then-reduce]

On the first node of a job it is the supervisor; on each other node it serves that one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from pathlib import Path

from orchestrator.config.plan import PlanFile
from orchestrator.core import scratch
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process_tree import adopt_orphans
from orchestrator.core.signals import Signals
from orchestrator.core.slurm_env import StepTask
from orchestrator.errors import OrcError, UsageError
from orchestrator.slurm.own_job import touch
from orchestrator.supervisor.loop import Supervisor
from orchestrator.supervisor.node_agent import NodeAgent
from orchestrator.supervisor.node_handshake import call
from orchestrator.supervisor.options import Options, new_local_workers
from orchestrator.supervisor.worker_pool import FAR_S

__all__ = ["main"]


def _reduces_itself(paths: SweepPaths) -> bool:
    """Whether this worker writes summary.json itself: the sweep is small, or its reducers ran before its last trial."""
    plan = PlanFile.open(paths.plan)
    return plan.num_trials <= plan.spec.reduce.trials_per_range or paths.summary.exists()


def _reduce(paths: SweepPaths, *, alone: bool) -> int:
    from orchestrator.results import reducer

    return reducer.reduce(paths, wait_s=0.0, alone=alone)


def _parse(arguments: list[str] | None) -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(prog="orchestrator.supervisor")
    parser.add_argument("verb", choices=["work"])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--submission", required=True)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--then-reduce", action="store_true")
    given = parser.parse_args(arguments)
    paths = SweepPaths(given.dir.absolute())
    options = Options(
        paths=paths,
        submission=given.submission,
        worker=given.worker,
        slots=given.slots,
        seat=StepTask.of(os.environ),
    )
    return options, given.then_reduce


def _go_to_origin(paths: SweepPaths) -> None:
    """Run where the sweep file is, as the user did; a sweep that was moved to another machine runs where it is."""
    with contextlib.suppress(OSError):
        os.chdir(paths.root)
        os.chdir(os.fsdecode(paths.origin.read_bytes()))


def main(arguments: list[str] | None = None, signals: Signals | None = None) -> int:
    """Entry of the process; returns its exit code."""
    signals = signals or Signals()
    os.umask(0o077)
    adopt_orphans()
    options, then_reduce = _parse(arguments)
    if options.seat.rank == 0:
        touch(os.environ.get("ORC_READY"))  # the batch script sends no signal before
        if name := os.environ.get("ORC_NOTICE"):
            signals.add(name)
    _go_to_origin(options.paths)
    try:
        return _work(options, signals, then_reduce=then_reduce)
    except OrcError as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        scratch.clear()


def _work(options: Options, signals: Signals, *, then_reduce: bool) -> int:
    plan = PlanFile.open(options.paths.plan)
    if options.seat.world_size not in (1, plan.spec.launch.nodes):
        raise UsageError(
            f"this job step has {options.seat.world_size} tasks, and launch.nodes is {plan.spec.launch.nodes}: "
            "one supervisor runs on each node"
        )
    if options.seat.rank > 0:
        return _serve_first_node(options, plan, signals)
    supervisor = Supervisor(options, signals)
    code = supervisor.run()
    if code == 0 and then_reduce:
        return _reduce(options.paths, alone=True)
    if code == 0 and supervisor.is_sweep_done() and _reduces_itself(options.paths):
        # The reducer job will do the same, but only once Slurm has started it.
        _reduce(options.paths, alone=False)
    return code


def _serve_first_node(options: Options, plan: PlanFile, signals: Signals) -> int:
    line = call(options.folder, options.seat.rank, within_s=FAR_S)
    if line is None:
        return 0
    NodeAgent(new_local_workers(options, plan), line, signals, silent_s=plan.spec.launch.silent_s).run()
    shutil.rmtree(options.folder, ignore_errors=True)  # as the first node does, unless it was killed
    return 0
