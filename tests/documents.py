"""README.md and docs/*.md as something to run: their fenced blocks, and what a comment before a block says of it.

<!-- file: NAME -->          the block is the content of a file
<!-- slurm -->               needs a Slurm
<!-- exit CODE -->           ends with that exit code
<!-- not run: REASON -->     is not run
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: its kind, its text, and what stands before it."""

    kind: str
    text: str
    mark: str
    line: int

    @property
    def commands(self) -> list[str]:
        return [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]

    @property
    def output(self) -> list[str]:
        return [line for line in self.text.splitlines() if not line.startswith("$ ")]

    @property
    def file(self) -> str | None:
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None

    @property
    def exit_code(self) -> int:
        return int(self.mark.removeprefix("exit ")) if self.mark.startswith("exit ") else 0


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(kind=found["kind"], text=found["text"], mark=found["mark"] or "", line=line)


@dataclass(frozen=True, slots=True)
class Reader:
    """Somebody who does what a document says, in a folder of their own, with few trials.

    Args:
        folder: an empty one; their home, too.
        variables: go over this process's environment.
    """

    folder: Path
    variables: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ORC_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return kept | {"HOME": str(self.folder), "PATH": path} | self.variables

    def run(self, *argv: str, expect: int = 0) -> str:
        done = subprocess.run(
            argv,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == expect, f"{argv} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def do(self, block: Block) -> str:
        if block.file:
            (self.folder / block.file).write_text(block.text)
            return ""
        if block.kind == "python":
            return self.run(sys.executable, "-c", block.text)
        script = "\n".join(block.commands).replace("run_cap=20", "run_cap=3")
        return self.run("bash", "-ec", script, expect=block.exit_code)
