"""Folders of processes in the temporary folder: those of dead ones go, and no others."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sweeps

from orchestrator.core import scratch


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this process and of those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def of_a_dead_process() -> Path:
    """A folder whose maker was killed."""
    text = "import os, signal; from orchestrator.core import scratch; print(scratch.make(), flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        folder = Path(maker.stdout.readline().strip())
        (folder / "params.json").write_text("{}")
        maker.send_signal(signal.SIGKILL)
    return folder


def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_has_is_not(tmp: Path) -> None:
    left, mine = of_a_dead_process(), scratch.make()
    assert (left.parent, mine.parent, stat.S_IMODE(mine.stat().st_mode)) == (tmp, tmp, 0o700)
    scratch.clear()
    assert list(tmp.iterdir()) == [mine]


@pytest.mark.parametrize("part", [1, 2], ids=["boot", "namespace"])
def test_whoever_is_of_another_boot_or_namespace_is_not_judged(tmp: Path, part: int) -> None:
    left = of_a_dead_process()
    words = left.name.split("-")
    words[part] = "0" * 8
    kept = left.rename(tmp / "-".join(words))
    scratch.clear()
    assert kept.exists()


def test_links_and_names_of_others_are_left_alone(tmp: Path) -> None:
    left = of_a_dead_process()
    kept = left.rename(tmp / "kept")
    left.symlink_to(kept)
    others = [tmp / "orc-lab-12345678", tmp / f"{left.name}.x", tmp / "orc.12345678"]
    for other in others:
        other.mkdir()
    scratch.clear()
    assert sorted(tmp.iterdir()) == sorted([kept, left, *others])
    assert (kept / "params.json").exists()


def test_a_temporary_folder_that_is_not_there_is_no_error(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp / "none"))
    scratch.clear()


def test_the_batch_script_names_its_folder_in_the_same_way(tmp: Path) -> None:
    text = Path("templates/background.sh.j2").read_text()
    first, last = text.index("{ read -r orc_boot"), text.index("export ORC_READY")
    script = f"{text[first:last]}\necho $orc_box"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    left = Path(done.stdout.strip())
    assert left.is_dir()
    assert left.parent == tmp
    assert left.name.split("-")[:3] == scratch.make().name.split("-")[:3]
    scratch.clear()
    assert not left.exists()


def test_a_worker_leaves_nothing_when_what_forks_for_it_is_killed_and_clears_up_after_others(tmp: Path) -> None:
    # The program's parent is the worker, that one's its guardian, and the guardian's what forks.
    above = 'above() { cut -d" " -f4 "/proc/$1/stat"; }; '
    paths = sweeps.make(tmp / "runs", above + "kill -9 $(above $(above $PPID)); sleep 300", trials=1)
    left = of_a_dead_process()
    code, said = sweeps.run(paths)
    assert code == 1
    assert "the process that starts the workers was killed by SIGKILL" in said
    assert not left.exists()
    assert list(tmp.glob("orc*")) == []
