"""The classic case at full size: 100 blocks of 10, on a real Slurm and on this machine, to the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from on_lab import Slurm

from orchestrator.cli.init import folder

JOB = folder() / "digits_mlp.yaml"


def orc(slurm: Slurm, cwd: Path, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *argv],
        cwd=cwd,
        env=slurm.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.soak
def test_a_thousand_trials_on_slurm_give_the_bytes_of_one_two_and_three_local_workers(
    tmp_path: Path, slurm: Slurm
) -> None:
    sweep = orc(slurm, tmp_path, "submit", str(JOB))
    reduced = tmp_path / "runs" / sweep / "summary.json"
    slurm.wait_for(lambda: reduced.exists() and not json.loads(reduced.read_bytes())["missing"], limit_s=1800)
    for workers in (1, 2, 3):
        orc(slurm, tmp_path, "run", str(JOB), "--workers", str(workers), "--dir", f"local{workers}")
        assert (tmp_path / f"local{workers}" / sweep / "summary.json").read_bytes() == reduced.read_bytes()
    assert json.loads(reduced.read_bytes())["count"] == 1000
