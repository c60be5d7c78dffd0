"""What killed supervisors of a sweep have left running on this machine: ended by the next command of that sweep.

leftovers.end(paths, say)       True when nothing is left; says what it ended, and what it could not end
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.core.procfs import boot_id
from orchestrator.slurm import ledger

if TYPE_CHECKING:
    from orchestrator.core.paths import SweepPaths

__all__ = ["end"]


def end(paths: SweepPaths, say: Callable[[str], None]) -> bool:
    """End processes of this sweep's trials that no supervisor looks after any more.

    Only submissions to this machine, since it was booted, are looked at: what runs in a Slurm job is Slurm's to end.

    Args:
        paths: of the sweep.
        say: told of each process that was ended or could not be.

    Returns:
        Whether nothing is left.
    """
    tokens = _tokens(paths)
    if not tokens:
        return True
    from orchestrator.core import process_tree

    ended, remaining, _ = process_tree.end_left(tokens)
    if ended:
        from orchestrator.core import scratch

        scratch.clear()
    for what in ended:
        say(f"{paths.id}: ended what a killed supervisor had left running: {what}")
    for what in remaining:
        say(f"{paths.id}: still running, although killed: {what}")
    return not remaining


def _tokens(paths: SweepPaths) -> list[str]:
    """Of the submissions to this machine, since it was booted, that may have started something."""
    boot = boot_id()
    return [
        submission.token
        for submission in ledger.submissions(paths)
        if submission.on == "local"
        and any(part.is_in_doubt or (part.process and part.process.boot_id == boot) for part in submission.parts)
    ]
