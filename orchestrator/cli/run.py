"""Running a sweep on this machine to its end, watching one on Slurm, and going on with one that was stopped."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli import tables
from orchestrator.cli.progress import watch
from orchestrator.config.plan import PlanFile
from orchestrator.core import process_tree
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process import Process
from orchestrator.errors import FolderError, OrcError, Preempted, ProgramError, SlurmUnreachable, UsageError
from orchestrator.results import reducer
from orchestrator.results.records import Status
from orchestrator.slurm import jobs, ledger, leftovers, submit
from orchestrator.slurm.resubmit import Resubmitter, end_waits
from orchestrator.sweep import Sweep

if TYPE_CHECKING:
    from orchestrator.cli.prepare import PreparedSweep
    from orchestrator.core.atomic import Json
    from orchestrator.slurm.jobs import Live
    from orchestrator.slurm.submit import Receipt

__all__ = ["follow", "hand_over", "other_code", "resume", "run"]

_STOP_S = 30.0
_SHOWN_BYTES = 4000
_SHOWN_CHANGES = 8
_LOOK_S = 1.0


def run(taken: PreparedSweep, runs: Path, *, workers: int | None) -> Sweep:
    """Run all trials here and return when none is left; one that was run before goes on where it stopped.

    Raises:
        ProgramError: the program can't be imported; nothing of the sweep is left then.
        Preempted: interrupted from the keyboard; the workers are stopped, and the same command goes on.
        OrcError: the workers could not do their work; carries what they said last.
    """
    is_new = not (runs / taken.plan.id).exists()
    _warn_of_other_code(taken, runs, is_new=is_new)
    sweep = Sweep(taken.store(runs))
    leftovers.end(sweep.paths, _say)
    process = _process(sweep, taken, workers)
    if process is None:
        _reduce(sweep)
        return sweep
    ended = sweep.plan.num_trials - sweep.fold.num_missing
    already = f", {ended:,} of them done already" if ended else ""
    _say(f"{sweep.id}: {tables.plural(sweep.plan.num_trials, 'trial')}{already}, in {tables.path(sweep.paths.root)}")
    try:
        watch(sweep, lambda: not process.alive())
    except KeyboardInterrupt:
        _say("stopping the workers")
        process.stop(grace_s=_STOP_S)
        leftovers.end(sweep.paths, _say)
        text = f"{sweep.id}: stopped; the same command goes on, `orc best {sweep.id}` shows what there is"
        raise Preempted(text) from None
    leftovers.end(sweep.paths, _say)
    _check_end(sweep, taken, is_new=is_new)
    _reduce(sweep)
    return sweep


def _reduce(sweep: Sweep) -> None:
    """With no trial missing, see to it that `summary.json` says what the records say."""
    if sweep.fold.num_missing or reducer.is_reduced(sweep.paths, sweep.plan, sweep.fold):
        return
    try:
        alone = not jobs.live(sweep.paths)
    except SlurmUnreachable:
        alone = False
    reducer.reduce(sweep.paths, wait_s=0.0, alone=alone)


def other_code(taken: PreparedSweep, runs: Path) -> tuple[str, list[str]] | None:
    """The newest sweep that differs from this one in code only: its id, and a line for each file that differs."""
    from orchestrator.config.snapshot import Manifest

    plans = [path for path in runs.glob(f"{taken.plan.spec.name}-*/plan.jsonl") if path.parent.name != taken.plan.id]
    for path in sorted(plans, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with suppress(FolderError):
            if PlanFile.open(path).spec.identity() == taken.plan.spec.identity():
                changes = Manifest.read(SweepPaths(path.parent).code).changes(taken.snapshot.manifest)
                return path.parent.name, changes
    return None


def _warn_of_other_code(taken: PreparedSweep, runs: Path, *, is_new: bool) -> None:
    """Whoever meant to go on with an earlier sweep must learn that this is another one, and why."""
    if not is_new or (found := other_code(taken, runs)) is None:
        return
    before, changes = found
    more = len(changes) - _SHOWN_CHANGES
    named = [*changes[:_SHOWN_CHANGES], *([f"{more:,} more"] if more > 0 else [])]
    _say(
        f"{taken.plan.id}: a new sweep, which begins with its first trial: the sweep file is that of {before}, but the "
        f"code differs: {', '.join(named)}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _process(sweep: Sweep, taken: PreparedSweep, workers: int | None) -> Process | None:
    """The process that works on the sweep: one that is there already, or a new one; None when nothing is left to do."""
    if not sweep.fold.num_missing:
        return None
    if ledger.current(sweep.paths) is None:
        receipt = submit.submit(sweep.paths, taken.plan, on="local", workers=workers)
    else:
        receipt = _resubmit(sweep, missing=sweep.fold.num_missing, on="local", workers=workers)
    for one in receipt.alive:
        if one.process is None:
            raise UsageError(f"{sweep.id}: jobs of it are on Slurm ({one.job}); `orc status`, or `orc cancel` first")
        if one.is_elsewhere:
            raise UsageError(
                f"{sweep.id}: process {one.job} on {one.reason} works on it; watch it there, or see `orc status`"
            )
    if receipt.alive:
        return receipt.alive[0].process
    assert receipt.submission is not None
    return receipt.submission.parts[0].process


def _resubmit(
    sweep: Sweep,
    *,
    missing: int,
    on: ledger.On | None,
    workers: int | None,
    settings: dict[str, Json] | None = None,
    retry_failed: bool = False,
    force: bool = False,
) -> Receipt:
    """As `submit.resubmit`; where only processes of other machines keep it from beginning, find out if they live."""

    def hand_over(*, force: bool) -> Receipt:
        return submit.resubmit(
            sweep.paths,
            sweep.plan,
            missing=missing,
            on=on,
            workers=workers,
            settings=settings,
            retry_failed=retry_failed,
            force=force,
        )

    receipt = hand_over(force=force)
    if not receipt.alive or not all(one.is_elsewhere for one in receipt.alive):
        return receipt
    return hand_over(force=True) if _is_silent(sweep, receipt.alive) else receipt


def _is_silent(sweep: Sweep, others: Sequence[Live]) -> bool:
    """Whether processes that can't be seen from here write nothing for a whole lease, by our own clock."""
    lease_s = sweep.plan.spec.launch.lease_s
    where = ", ".join(f"process {one.job} on {one.reason}" for one in others)
    _say(f"{sweep.id}: {where} may still be at work; waiting {lease_s:g} s for a word of it (--force doesn't wait)")
    tokens = {one.token for one in others}
    before, began = _written(sweep, tokens), time.monotonic()
    while time.monotonic() - began < lease_s:
        time.sleep(min(_LOOK_S, lease_s / 4))
        if _written(sweep, tokens) != before:
            return False
    return True


def _written(sweep: Sweep, tokens: set[str]) -> dict[str, int]:
    """The sizes of the record files of some submissions."""
    writers = sweep.refresh().fold.writers()
    mine = [name for name, writer in writers.items() if writer.get("submission") in tokens]
    return {name: sweep.paths.record(name).stat().st_size for name in mine}


def _check_end(sweep: Sweep, taken: PreparedSweep, *, is_new: bool) -> None:
    """The process has ended: when it could not even begin, say why."""
    if not sweep.fold.num_missing:
        return
    said = _last_words(sweep)
    if not sweep.fold.has_begun and "can't be imported" in said:
        if is_new:
            shutil.rmtree(sweep.paths.root)
        last = said.splitlines()[-1].removeprefix("orchestrator: ")
        if "import_timeout_s" not in last:
            # Once more in a process of its own, which shows the user's error without our frames around it.
            taken.check_program()
        raise ProgramError(f"{taken.plan.spec.program}: {last}")
    if not sweep.fold.has_begun or "orchestrator:" in said:
        raise OrcError(f"{sweep.id}: the workers ended early:\n{said}")


def _last_words(sweep: Sweep) -> str:
    """The end of what the newest supervisor on this machine printed."""
    now = ledger.current(sweep.paths)
    log = None if now is None else sweep.paths.logs / f"local-{now.token[:8]}.log"
    return log.read_bytes()[-_SHOWN_BYTES:].decode(errors="replace").strip() if log and log.exists() else ""


def hand_over(taken: PreparedSweep, runs: Path, *, on: ledger.On, workers: int | None) -> tuple[Sweep, Receipt]:
    """Check the program, make the sweep's folder, and submit; a folder whose submission never began is not left.

    Raises:
        ProgramError: the program can't be imported.
        UsageError: this is a trial that would submit to its own machine.
        FolderError, SbatchRejected, SlurmUnreachable: as for submitting.
    """
    if on == "local":
        _check_outside_of_trials()
    is_new = not (runs / taken.plan.id).exists()
    _warn_of_other_code(taken, runs, is_new=is_new)
    if is_new:
        taken.check_program()
    paths = taken.store(runs)
    leftovers.end(paths, _say)
    try:
        receipt = submit.submit(paths, taken.plan, on=on, workers=workers)
    except OrcError:
        now = ledger.current(paths)
        if is_new and (now is None or all(part.error is not None or not part.asked for part in now.parts)):
            shutil.rmtree(paths.root)
        raise
    return Sweep(paths), receipt


def _check_outside_of_trials() -> None:
    """Return unless this process is a trial's: what that leaves on its machine ends with it.

    Raises:
        UsageError: it is; says what to do instead.
    """
    supervisor = process_tree.supervisor_of(os.environ)
    if supervisor is not None:
        raise UsageError(
            f"this is a trial, of the supervisor with process id {supervisor}, and what it leaves on this machine ends "
            "with it: `orc run` waits for the other sweep, and with --on slurm it is a job of its own"
        )


def follow(
    sweep: Sweep,
    *,
    workers: int | None = None,
    settings: Sequence[str] = (),
    failed: bool = False,
) -> None:
    """Watch a sweep that was handed over until it is done, or until nothing of it is left that may go on.

    What its jobs can't do for themselves is done meanwhile: see `tending`.

    Args:
        sweep: handed over.
        workers: at most, when what was lost is submitted again.
        settings: as for `resume`, for the same.
        failed: it was handed over to try failed trials again.

    Raises:
        Preempted: interrupted from the keyboard; the jobs go on.
        SbatchRejected, FolderError: what was lost could not be submitted again.
    """

    def again() -> Receipt:
        missing = sweep.fold.num_missing + (sweep.fold.count(Status.FAILED) if failed else 0)
        others = _settings(settings)
        return submit.resubmit(
            sweep.paths, sweep.plan, missing=missing, workers=workers, settings=others, retry_failed=failed
        )

    try:
        _say(f"{sweep.id}: watching it to its end; Ctrl-C ends the watching, not the sweep")
        watch(sweep, Resubmitter(sweep, again=again, say=_say, retries=failed).is_over)
        _reduce(sweep)
    except KeyboardInterrupt:
        raise Preempted(
            f"{sweep.id}: no longer watched, but it goes on: `orc status {sweep.id}`, or `orc cancel {sweep.id}`. Jobs "
            f"that are lost from now on are not submitted again: `orc resume --watch {sweep.id}`"
        ) from None


def resume(
    sweep: Sweep, *, failed: bool, settings: list[str], on: ledger.On | None, workers: int | None, force: bool = False
) -> Receipt | None:
    """Submit what is missing; None when nothing is, and then `summary.json` is up to date.

    Args:
        sweep: up to date.
        failed: failed trials count as missing.
        settings: `slurm.key=value` arguments; they can't change results.
        on: `slurm` or `local`; None as before.
        workers: at most; None for as many as it takes.
        force: although something of it is alive, or may be.

    Raises:
        UsageError: a setting that could change results, or none of sbatch's; a trial that would submit to its own
            machine.
        SlurmUnreachable, SbatchRejected: as for submitting.
    """
    missing = sweep.fold.num_missing + (sweep.fold.count(Status.FAILED) if failed else 0)
    others = _settings(settings)
    if not missing:
        _reduce(sweep)
        return None
    before = ledger.current(sweep.paths)
    if (on or (before.on if before else "slurm")) == "local":
        _check_outside_of_trials()
    receipt = _resubmit(
        sweep,
        missing=missing,
        on=on,
        workers=workers,
        settings=others,
        retry_failed=failed,
        force=force,
    )
    started: list[str] = []
    with suppress(SlurmUnreachable):
        started = end_waits(receipt.alive)
    if started:
        note = f"requeued, and started without the wait that Slurm imposes: {', '.join(started)}"
        return replace(receipt, notes=(*receipt.notes, note))
    return receipt


def _settings(given: Sequence[str]) -> dict[str, Json]:
    from orchestrator.config.slurm_options import option_fault

    found: dict[str, Json] = {}
    for one in given:
        key, equals, value = one.partition("=")
        section, _, name = key.partition(".")
        if section != "slurm" or not equals:
            raise UsageError(
                f"--set {one}: only slurm.KEY=VALUE can be set for a sweep that has begun; "
                "anything else would change results"
            )
        fault = option_fault(name)
        if fault:
            raise UsageError(f"--set {one}: slurm.{name}: {fault}")
        found[name] = value
    return found
