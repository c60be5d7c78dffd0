"""A user's file becomes a module, or the user sees its own error and nothing of ours."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from orchestrator.config import snapshot as code
from orchestrator.config.program import check, load_job
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import ProgramError


@pytest.fixture(autouse=True)
def own_modules() -> Iterator[None]:
    """What a test imports is gone after it."""
    path, modules, byte_code = list(sys.path), set(sys.modules), sys.dont_write_bytecode
    finders = list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    sys.path[:], sys.dont_write_bytecode = path, byte_code
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "program", "function"),
    [
        ("mine_train.py", "mine_train.py", "train"),
        ("mine_train.py", "mine_train.py:fit", "fit"),
        ("deep/mine_train.py", "deep/mine_train.py:fit", "fit"),
        ("mine_pkg/job.py", "mine_pkg.job:fit", "fit"),
    ],
)
def test_a_program_in_each_of_its_forms(tmp_path: Path, name: str, program: str, function: str) -> None:
    write(tmp_path, name, "def train(trial): ...\ndef fit(trial): ...\ndef build(): ...\n")
    job = load_job(tmp_path, program)
    assert job.train.__name__ == function
    assert job.build is not None


def test_a_file_finds_its_neighbours_and_the_root(tmp_path: Path) -> None:
    write(tmp_path, "at_root.py", "A = 1")
    write(tmp_path, "deep/beside.py", "B = 2")
    write(tmp_path, "deep/job_x.py", "import at_root, beside\ndef train(trial): return at_root.A + beside.B")
    assert load_job(tmp_path, "deep/job_x.py").train(None) == 3


def test_the_snapshot_comes_before_an_installed_package_of_that_name(tmp_path: Path) -> None:
    elsewhere, snapshot = tmp_path / "elsewhere", tmp_path / "snapshot"
    write(elsewhere, "mine_lib.py", "WHO = 'installed'")
    write(snapshot, "mine_lib.py", "WHO = 'snapshot'")
    write(snapshot, "job_y.py", "import mine_lib\ndef train(trial): return mine_lib.WHO")
    sys.path.insert(0, str(elsewhere))
    assert load_job(snapshot, "job_y.py").train(None) == "snapshot"


class Editable:
    """Finds one module where an editable install says that it is, as setuptools does for most layouts."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        folders = [str(self.path.parent)] if self.path.stem == "__init__" else None
        return importlib.util.spec_from_file_location(name, self.path, submodule_search_locations=folders)


@pytest.mark.parametrize("how", ["on the path", "gone since", "found"])
def test_the_snapshot_comes_before_an_editable_install(tmp_path: Path, how: str) -> None:
    live, paths = tmp_path / "live", SweepPaths(tmp_path / "sweep")
    for name in ("mine_lib.py", "mine_inner/__init__.py", "mine_inner/part.py"):
        write(live / "src", name, "WHO = 'then'")
    write(
        live,
        "job_v.py",
        "from mine_inner import part\nimport mine_lib\ndef train(trial): return mine_lib.WHO + part.WHO",
    )
    paths.root.mkdir()
    paths.origin.write_text(str(live))
    code.survey(None, live).copy(paths.code)
    for name in ("mine_lib.py", "mine_inner/part.py"):
        write(live / "src", name, "WHO = 'now'")
    write(live / "src", "mine_inner/built.py", "")  # which the snapshot lacks, as it does what git ignores
    if how != "found":
        sys.path.insert(0, str(live / "src"))
    else:
        sys.meta_path.append(Editable("mine_lib", live / "src/mine_lib.py"))
        sys.meta_path.append(Editable("mine_inner", live / "src/mine_inner/__init__.py"))
    if how == "gone since":
        (live / "src/mine_lib.py").unlink()
    assert load_job(paths.code, "job_v.py", code.Lineage.of(paths)).train(None) == "thenthen"
    assert importlib.import_module("mine_inner.built").__file__ == str(live / "src/mine_inner/built.py")


def test_jobs_of_two_sweeps_in_one_process_each_come_from_their_own_snapshot(tmp_path: Path) -> None:
    live = tmp_path / "live"
    sys.path.insert(0, str(live))
    for number in (1, 2):
        write(live, f"mine_part{number}.py", f"WHO = {number}")
        write(live, f"job_u{number}.py", f"import mine_part{number} as part\ndef train(trial): return part.__file__")
        paths = SweepPaths(tmp_path / f"sweep{number}")
        paths.root.mkdir()
        paths.origin.write_text(str(live))
        code.survey(None, live).copy(paths.code)
        job = load_job(paths.code, f"job_u{number}.py", code.Lineage.of(paths))
        assert job.train(None) == str(paths.code / f"mine_part{number}.py")


def test_a_file_named_like_a_module_of_ours_hides_nothing(tmp_path: Path) -> None:
    write(tmp_path, "json.py", "def train(trial): return 'job'")
    import json

    assert load_job(tmp_path, "json.py").train(None) == "job"
    assert sys.modules["json"] is json


def test_nothing_is_written_into_the_snapshot(tmp_path: Path) -> None:
    write(tmp_path, "beside_z.py", "")
    write(tmp_path, "job_z.py", "import beside_z\ndef train(trial): ...")
    load_job(tmp_path, "job_z.py")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside_z.py", "job_z.py"]


def test_a_program_that_can_be_imported_passes(tmp_path: Path) -> None:
    check(write(tmp_path, "good.py", "print('noise')\ndef train(trial): ..."), "good.py", timeout_s=60)


def test_what_a_program_starts_when_it_is_imported_ends_with_the_check(tmp_path: Path) -> None:
    detached = "subprocess.Popen(['sleep', '333'], start_new_session=True, stdout=out, stderr=out)"
    text = f"import subprocess\nout = subprocess.DEVNULL\nprint({detached}.pid, file=open('{tmp_path}/pid', 'w'))\n"
    check(write(tmp_path, "starts.py", f"{text}def train(trial): ..."), "starts.py", timeout_s=60)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def train(:", "SyntaxError"),
        ("def other(trial): ...", "has no attribute 'train'"),
        ("train = 3", "TypeError: bad.py: train is not a function"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_program_that_cannot_be_imported_shows_its_own_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ProgramError) as error:
        check(write(tmp_path, "bad.py", text), "bad.py", timeout_s=60)
    assert said in str(error.value)
    assert str(error.value).startswith("bad.py: it can't be imported:")
    assert "orchestrator/config/program.py" not in str(error.value)


def test_an_import_that_takes_too_long_is_cut_off(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"slow\.py: importing it took longer than 1 s"):
        check(write(tmp_path, "slow.py", "import time; time.sleep(60)"), "slow.py", timeout_s=1.0)
