"""Running a sweep on this machine to its end, and going on with one that was stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import ledger, local, submit
from orchestrator.errors import OrcError, Preempted, ProgramError, UsageError
from orchestrator.records import Status
from orchestrator.sweep import Sweep
from orchestrator.watch import watch

if TYPE_CHECKING:
    from orchestrator.intake import Intake
    from orchestrator.store import Json
    from orchestrator.submit import Receipt

__all__ = ["resume", "run"]

_STOP_S = 30.0
_SHOWN_BYTES = 4000


def run(taken: Intake, runs: Path, *, workers: int | None) -> Sweep:
    """Run all trials here and return when none is left; one that was run before goes on where it stopped.

    Raises:
        ProgramError: the program can't be imported; nothing of the sweep is left then.
        Preempted: interrupted from the keyboard; the workers are stopped, and the same command goes on.
        OrcError: the workers could not do their work; carries what they said last.
    """
    is_new = not (runs / taken.plan.id).exists()
    sweep = Sweep(taken.store(runs))
    process = _process(sweep, taken, workers)
    if process is None:
        return sweep
    try:
        watch(sweep, process)
    except KeyboardInterrupt:
        local.stop(process, grace_s=_STOP_S)
        text = f"{sweep.id}: stopped; the same command goes on, `orc best {sweep.id}` shows what there is"
        raise Preempted(text) from None
    _check_end(sweep, is_new=is_new)
    return sweep


def _process(sweep: Sweep, taken: Intake, workers: int | None) -> local.Process | None:
    """The process that works on the sweep: one that is there already, or a new one; None when nothing is left to do."""
    if not sweep.fold.num_missing and sweep.paths.summary.exists():
        return None
    if ledger.current(sweep.paths) is None:
        receipt = submit.submit(sweep.paths, taken.plan, on="local", workers=workers)
    else:
        receipt = submit.resubmit(sweep.paths, sweep.plan, missing=sweep.fold.num_missing, on="local", workers=workers)
    others = [one for one in receipt.alive if one.process is None]
    if others:
        raise UsageError(f"{sweep.id}: jobs of it are on Slurm ({others[0].job}); `orc status`, or `orc cancel` first")
    if receipt.alive:
        return receipt.alive[0].process
    assert receipt.submission is not None
    return receipt.submission.parts[0].process


def _check_end(sweep: Sweep, *, is_new: bool) -> None:
    """The process has ended: when it could not even begin, say why."""
    if not sweep.fold.num_missing:
        return
    said = _last_words(sweep)
    if not sweep.fold.has_starts and "can't be imported" in said:
        if is_new:
            shutil.rmtree(sweep.paths.root)
        raise ProgramError(said)
    if not sweep.fold.has_starts or "orchestrator:" in said:
        raise OrcError(f"{sweep.id}: the workers ended early:\n{said}")


def _last_words(sweep: Sweep) -> str:
    """The end of the supervisor's own log."""
    now = ledger.current(sweep.paths)
    logs = sorted(sweep.paths.logs.glob("local-*.log"), key=lambda path: path.stat().st_mtime_ns)
    if now is None or not logs:
        return ""
    return logs[-1].read_bytes()[-_SHOWN_BYTES:].decode(errors="replace").strip()


def resume(sweep: Sweep, *, failed: bool, settings: list[str], on: str | None, workers: int | None) -> Receipt | None:
    """Submit what is missing; None when nothing is.

    Args:
        sweep: up to date.
        failed: failed trials count as missing.
        settings: `slurm.key=value` arguments; they can't change results.
        on: `slurm` or `local`; None as before.
        workers: at most; None for as many as it takes.

    Raises:
        UsageError: a setting that could change results, or none of sbatch's.
        SlurmUnreachable, SbatchRejected: as for submitting.
    """
    missing = sweep.fold.num_missing + (sweep.fold.count(Status.FAILED) if failed else 0)
    if not missing and sweep.paths.summary.exists():
        return None
    return submit.resubmit(
        sweep.paths,
        sweep.plan,
        missing=missing,
        on="local" if on == "local" else "slurm" if on == "slurm" else None,
        workers=workers,
        settings=_settings(settings),
        retry_failed=failed,
    )


def _settings(given: list[str]) -> dict[str, Json]:
    from orchestrator.sweepfile.options import option_fault

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
