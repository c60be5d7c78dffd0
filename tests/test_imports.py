"""What commands load: answers come at once because nothing heavy is imported for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Orc

HEAVY = {"torch", "numpy", "pandas", "pydantic", "jinja2", "optuna", "matplotlib", "submitit", "sklearn", "yaml"}
SHOW = """
import atexit, sys
atexit.register(lambda: print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr))
from orchestrator.__main__ import main
sys.argv[0] = "orc"
main()
"""
READING = [
    ["--help"],
    ["best", "--help"],
    ["status"],
    ["status", "--json"],
    ["best"],
    ["best", "--top", "3", "--json"],
    ["summary"],
    ["summary", "--json"],
    ["summary", "--by", "x", "--by", "x"],
    ["summary", "--curve", "val_loss", "--by", "x", "--json"],
    ["logs", "0"],
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a finished sweep of three trials lies."""
    orc = Orc(tmp_path_factory.mktemp("done"))
    orc("run", orc.write())
    return orc.runs


def loaded(runs: Path, *arguments: str, **variables: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SHOW, *arguments],
        env={"PATH": "/usr/bin:/bin", "ORC_DIR": str(runs), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_reading_imports_nothing_heavy(arguments: list[str], runs: Path) -> None:
    assert not loaded(runs, *arguments) & (HEAVY | {"rich"})


@pytest.mark.parametrize("words", ["orc be", "orc best s", "orc lab "])
def test_completion_imports_nothing_heavy(words: str, runs: Path) -> None:
    count = str(len(words.split(" ")) - 1)
    assert not loaded(runs, _ORC_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=count) & (HEAVY | {"rich"})


def test_what_slurm_starts_imports_nothing_heavy() -> None:
    code = "import sys, orchestrator.supervisor.main, orchestrator.results.reducer; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & (HEAVY | {"rich", "click"})


def test_the_package_itself_imports_nothing() -> None:
    code = "import sys; before = set(sys.modules); import orchestrator; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    assert tops - sys.stdlib_module_names == {"orchestrator"}


def test_every_public_name_can_be_had() -> None:
    code = "import orchestrator as orc; print([getattr(orc, name) for name in sorted(orc.__all__)])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert [done.stdout.count(kind) for kind in ("<class ", "<module ", "<function ")] == [9, 3, 10]
