"""Files that are no longer needed, removed once the outcomes that make them so are on the disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

from orchestrator.core.paths import SweepPaths
from orchestrator.results import top_models
from orchestrator.results.records import RecordWriter
from orchestrator.supervisor.trial_queue import PendingTrial
from orchestrator.worker import command_reports

__all__ = ["Removals"]


@dataclass(slots=True)
class Removals:
    """What to remove.

    Args:
        models: (trial, sha256) of models that don't rank any more.
        checkpoints: trials whose checkpoints are needed no more.
        reports: attempts at a command whose report files are needed no more.
    """

    models: list[tuple[int, str]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    reports: list[PendingTrial] = field(default_factory=list)

    def carry_out(self, paths: SweepPaths, writer: RecordWriter) -> None:
        """Remove it all, unless an outcome still waits for the disk: then nothing, until the next call."""
        if not (self.models or self.checkpoints or self.reports) or writer.is_dirty:
            return
        top_models.remove(paths, self.models)
        for trial in self.checkpoints:
            shutil.rmtree(paths.checkpoint(trial), ignore_errors=True)
        for pending in self.reports:
            command_reports.forget(paths, pending.trial, pending.attempt)
        self.models, self.checkpoints, self.reports = [], [], []
