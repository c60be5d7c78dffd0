"""How often a trial is tried again, by what ended the attempts before, and what is said of one that was given up."""

from __future__ import annotations

from collections import Counter

from orchestrator.config.spec import Retries
from orchestrator.results.records import Cause

__all__ = ["given_up", "spent"]


def budget(retries: Retries, cause: Cause) -> int | None:
    """How often an attempt may end by `cause`; None for causes that are never the trial's fault."""
    budgets = {
        Cause.ERROR: retries.error,
        Cause.SIGNAL: retries.signal,
        Cause.MEMORY: retries.memory,
        Cause.TIMEOUT: retries.timeout,
        Cause.UNKNOWN: retries.unknown,
    }
    return budgets.get(cause)


def spent(retries: Retries, charges: Counter[Cause]) -> Cause | None:
    """A cause by which more attempts have ended than its budget allows; None when there is none."""
    budgets = ((cause, budget(retries, cause)) for cause in charges)
    return next((cause for cause, most in budgets if most is not None and charges[cause] > most), None)


def given_up(cause: Cause, times: int, detail: str) -> str:
    """Why a trial failed that was tried `times` times too often, and what helps where something does."""
    if cause is Cause.TIMEOUT:
        return (
            f"timed out {times} time{'s' if times > 1 else ''}; `orc resume --failed --set slurm.time=...` gives more"
        )
    if cause is Cause.MEMORY:
        return f"{detail}: out of memory; `orc resume --failed --set slurm.mem=...` gives more"
    return detail
