"""Stand-ins for Slurm's commands, as executable files that go first on PATH."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


class FakeSlurm:
    """The scene that `fake_slurm.py` plays, and what it wrote down."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        monkeypatch.setenv("FAKE_SLURM", str(root))
        monkeypatch.setenv("PATH", f"{FOLDER}{os.pathsep}{os.environ['PATH']}")

    def will(self, command: str, *todo: str) -> None:
        (self.root / f"{command}.todo").write_text("\n".join(todo))

    def set(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    @property
    def calls(self) -> list[dict[str, object]]:
        path = self.root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def commands(self) -> list[str]:
        return [str(call["command"]) for call in self.calls]

    def argv(self, command: str) -> list[list[str]]:
        return [list(call["argv"]) for call in self.calls if call["command"] == command]

    @property
    def jobs(self) -> list[dict[str, object]]:
        path = self.root / "jobs.json"
        return json.loads(path.read_text()) if path.exists() else []

    @jobs.setter
    def jobs(self, jobs: list[dict[str, object]]) -> None:
        (self.root / "jobs.json").write_text(json.dumps(jobs))
