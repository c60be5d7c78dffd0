"""The real `orc`, as a process, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

HALF = 'echo "trial $ORC_TRIAL"; echo "{\\"val_loss\\": $ORC_TRIAL.5, \\"other\\": 1}" >> $ORC_REPORT'
"""A shell script whose trial i gives i + 0.5."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return orjson.loads(self.out)


@dataclass(frozen=True, slots=True)
class Orc:
    """Runs `orc` in `folder`, without a word of Slurm or of a sweep from outside.

    Args:
        folder: the working folder; their home, too.
        variables: go over this process's environment.
    """

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ORC_", "SLURM", "SBATCH"))}
        return kept | {"HOME": str(self.folder)} | self.variables

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def sweeps(self) -> list[str]:
        return sorted(path.name for path in self.runs.glob("*") if path.name != ".gitignore")

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        argv = [sys.executable, "-P", "-m", "orchestrator", *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(argv, cwd=self.folder, env=self.environment, **(pipes | options))

    def __call__(self, *arguments: str, expect: int | None = 0, **options: Any) -> Said:
        with self.start(*arguments, **options) as process:
            out, err = process.communicate(timeout=120)
        assert expect is None or process.returncode == expect, f"{arguments}: {process.returncode}: {out}{err}"
        assert "Traceback" not in err
        return Said(process.returncode, out, err)

    def write(self, name: str = "sweep.yaml", **keys: object) -> str:
        """A sweep file: of a shell script over x = 0, 1, 2, unless `keys` say otherwise; returns its name."""
        given: dict[str, object] = {
            "command": ["sh", "-c", HALF],
            "method": "grid",
            "parameters": {"x": {"values": [0, 1, 2]}},
            **keys,
        }
        if "program" in keys:
            del given["command"]
        (self.folder / name).write_text(yaml.safe_dump(given))
        return name
