"""Slurm's commands on a lab, for tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.process import poll
from orchestrator.slurm.lab import Lab

__all__ = ["Slurm"]


@dataclass(frozen=True, slots=True)
class Slurm:
    """Slurm's commands on one lab."""

    lab: Lab

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process that talks to the lab, and to no other Slurm."""
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SRUN_"))}
        return outer | self.lab.env()

    def run(self, *argv: str, cwd: Path | None = None) -> str:
        """Standard output of a command, without the last newline; it must succeed."""
        done = subprocess.run(argv, env=self.env, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{argv} ended with {done.returncode}: {done.stderr}"
        return done.stdout.rstrip("\n")

    def submit(self, script: Path, *args: str) -> str:
        """Job id of a script that sbatch took; options come before the script. It runs in, and logs to, its folder."""
        return self.run("sbatch", "--parsable", *args, str(script), cwd=script.parent).partition(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says of a job, or of one array element (`12_3`)."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def job_state(self, job: str) -> str:
        """State of a job in Slurm's word, such as RUNNING."""
        # Not from `show`: a job's name or comment may hold words that look like its state.
        return self.run("squeue", "-h", "--states=all", "-j", job, "-o", "%T")

    def wait_for(self, condition: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Return once `condition` holds; fail after `limit_s` seconds, with the queue in the message."""
        assert poll(condition, limit_s, every_s=0.1), f"not within {limit_s} s; the queue: {self.run('squeue')}"

    def wait_for_state(self, job: str, *states: str, limit_s: float = 60.0) -> None:
        """Return once the job is in one of `states`."""
        self.wait_for(lambda: self.job_state(job) in states, limit_s)
