"""The wheel as users get it: built, laid out in an empty place, and used there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RENDER = """
from orchestrator.config import spec
from orchestrator.slurm import script
of = spec.SweepSpec(name="x", method="random", parameters={})
request = script.WorkersRequest(spec=of, sweep_id="x-1", root="/r", python="/p", token="0" * 32, num_workers=1)
print(script.__file__)
print(script.render_workers(request))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put on the path: a pure wheel is installed once it is unpacked."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(installed: Path, cwd: Path, *arguments: str) -> str:
    # -P and a path of its own: neither this checkout nor an editable install of it may answer instead.
    setup = f"import sys; sys.path.insert(0, {str(installed)!r}); "
    done = subprocess.run(
        [sys.executable, "-P", "-c", setup + arguments[0], *arguments[1:]],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_file_that_it_needs_and_no_more(wheel: Path) -> None:
    found = names(wheel)
    for folder in ("jobs", "templates"):
        files = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {f"orchestrator/{path}" for path in files if path.suffix != ".pyc"} <= found
    assert "orchestrator/py.typed" in found
    assert {name.split("/")[0].split("-")[0] for name in found} == {"orchestrator", "slurm_orchestrator"}
    assert not [name for name in found if name.endswith(".pyc")]


def test_an_installed_package_finds_its_templates(installed: Path, tmp_path: Path) -> None:
    path, first, *_ = run(installed, tmp_path, RENDER).splitlines()
    assert path == str(installed / "orchestrator" / "slurm" / "script.py")
    assert first == "#!/bin/bash"


@pytest.mark.parametrize("module", ["supervisor", "results.reducer"])
def test_what_slurm_starts_runs_from_an_installed_package(module: str, installed: Path, tmp_path: Path) -> None:
    code = f"sys.argv[0] = 'x'; import runpy; runpy.run_module('orchestrator.{module}', run_name='__main__')"
    assert "--submission" in run(installed, tmp_path, code, "--help")


def test_a_first_sweep_runs_at_once_from_an_installed_package(installed: Path, tmp_path: Path) -> None:
    def orc(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "orchestrator", *arguments],
            cwd=tmp_path,
            # Before an editable install of this checkout, in every process that follows.
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    orc("init")
    job = tmp_path / "digits_mlp.py"
    job.write_text(job.read_text() + "\n\ndef preload() -> None:\n    print('from', orc.__file__)\n")
    assert "4 of 4 complete" in orc("run", "digits_mlp.yaml", "run_cap=4")
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/*/logs/*.log"))
    assert f"from {installed}" in logs


def test_an_installed_package_leaves_its_folder_alone(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, "import orchestrator.slurm.script")
    assert not list(tmp_path.iterdir())
