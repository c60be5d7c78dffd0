"""Asking the lab's own Slurm. A Slurm that does not answer has nothing to say: these never raise."""

from __future__ import annotations

import os
import subprocess

from orchestrator.slurm.lab.config import LabFiles

__all__ = ["ask", "environment", "job_ids", "node_states"]

_LIMIT_S = 20.0


def environment(files: LabFiles) -> dict[str, str]:
    """What makes Slurm's programs, daemons and commands alike, belong to this lab."""
    return {"SLURM_CONF": str(files.slurm_conf)}


def ask(files: LabFiles, *argv: str) -> list[str]:
    """Output of one of Slurm's commands as lines; empty when it fails."""
    env = {**os.environ, **environment(files)}
    try:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except (subprocess.TimeoutExpired, OSError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def node_states(files: LabFiles) -> dict[str, str]:
    """Node name -> state in Slurm's word, such as `idle`; `idle*` does not answer."""
    lines = ask(files, "sinfo", "-h", "-N", "-o", "%N|%T")
    return dict(line.split("|", 1) for line in sorted(lines))


def job_ids(files: LabFiles) -> list[str]:
    """Ids of the jobs that wait or run, one for a whole array."""
    return sorted(set(ask(files, "squeue", "-h", "-o", "%F")))
