"""Ending a lab: its jobs, its daemons, whatever its jobs have left running, its files."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from orchestrator.core.process import Process, poll, processes_with, processes_writing
from orchestrator.core.procfs import boot_id
from orchestrator.errors import OrcError, UsageError
from orchestrator.slurm.lab.ask import ask, job_ids
from orchestrator.slurm.lab.config import MARK, LabFiles
from orchestrator.slurm.lab.facts import LabFacts
from orchestrator.slurm.lab.start import short_host

__all__ = ["clear"]

_STRAGGLER_LIMIT_S = 10.0


def clear(root: Path, facts: LabFacts | None) -> None:
    """Leave nothing of the lab but its logs. Harmless when there is nothing.

    Without facts (someone has deleted the folder of a running lab) its processes are still found and ended.

    Raises:
        UsageError: the lab runs, or has run, on another machine.
        OrcError: a process would not end; the text names its pid.
    """
    files = LabFiles(root=root, run=facts.run if facts else root / "run")
    if facts is not None:
        if facts.boot != boot_id() and facts.host != short_host():
            raise UsageError(f"{root}: this lab belongs to machine {facts.host}; set ORC_LAB to a folder of this one")
        _cancel_jobs(files, facts)
        _end_daemons(facts)
    _end_stragglers(files)
    _remove_files(files)


def _cancel_jobs(files: LabFiles, facts: LabFacts) -> None:
    controller = facts.daemons.get("slurmctld")
    if controller is None or not controller.alive():
        return
    jobs = job_ids(files)
    if jobs:
        ask(files, "scancel", *jobs)
        poll(lambda: not job_ids(files), facts.options.kill_wait_s + 5, every_s=0.2)


def _end_daemons(facts: LabFacts) -> None:
    latest_first = list(facts.daemons.items())[::-1]
    for name, process in latest_first:
        if name.startswith("slurmd-"):
            process.send(signal.SIGTERM)
    for _, process in latest_first:
        process.end()


def _end_stragglers(files: LabFiles) -> None:
    """Kill what outlives its slurmd: slurmstepd, and processes that a job has detached."""

    def gone() -> bool:
        left = list(_stragglers(files))
        for process in left:
            process.send(signal.SIGKILL)
        return not left

    if not poll(gone, _STRAGGLER_LIMIT_S):
        pids = ", ".join(str(process.pid) for process in _stragglers(files))
        raise OrcError(f"{files.root}: these processes of the lab do not end: {pids}")


def _stragglers(files: LabFiles) -> Iterator[Process]:
    yield from processes_with({f"{MARK}={files.cluster}".encode(), f"SLURM_CLUSTER_NAME={files.cluster}".encode()})
    # Slurm's own helpers write their title over their environment, but each holds its daemon's log open.
    yield from processes_writing(files.logs, program="slurm")


def _remove_folder(folder: Path) -> None:
    try:
        if folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder)
    except FileNotFoundError:
        return


def _remove_files(files: LabFiles) -> None:
    for folder in (files.run, files.root / "run", files.state, files.database):
        _remove_folder(folder)
    confs = (files.slurm_conf, files.cgroup_conf, files.plugstack_conf, files.slurmdbd_conf)
    for file in (*confs, files.munge_key, files.database_sql, files.facts):
        file.unlink(missing_ok=True)
