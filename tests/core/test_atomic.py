"""Durable files: the old state or the new one, and lines that tell when a bit of them has changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeps import names, no_room_after

from orchestrator.core import atomic
from orchestrator.core.atomic import AppendFile, JsonObject, checked, intact, unchecked
from orchestrator.errors import OrcError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LINES = st.dictionaries(st.text(max_size=8), JSON, min_size=1, max_size=4)
CALLS = "openat,write,fsync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"


# Lines


@given(LINES)
def test_a_checked_line_gives_its_object_back(value: JsonObject) -> None:
    line = checked(value)
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    found = unchecked(line[:-1])
    assert found is not None
    assert list(found)[-1] == "crc"
    assert {**value, "crc": found["crc"]} == found


@given(LINES, st.data())
def test_any_flipped_bit_is_found(value: JsonObject, data: st.DataObject) -> None:
    line = bytearray(checked(value)[:-1])
    position = data.draw(st.integers(0, len(line) - 1))
    line[position] ^= 1 << data.draw(st.integers(0, 7))
    assert not intact(bytes(line))
    assert unchecked(bytes(line)) is None


@given(LINES, st.data())
def test_a_line_cut_short_or_zeroed_in_part_is_found(value: JsonObject, data: st.DataObject) -> None:
    line = checked(value)[:-1]
    cut = data.draw(st.integers(0, len(line) - 1))
    assert not intact(line[:cut])
    assert not intact(line[:cut] + bytes(len(line) - cut))


@pytest.mark.parametrize(
    ("a", "b"), [({"x": 1, "a": 2}, {"a": 2, "x": 1}), ({"n": {"q": 0, "b": 1}}, {"n": {"b": 1, "q": 0}})]
)
def test_equal_values_have_equal_canonical_bytes(a: JsonObject, b: JsonObject) -> None:
    assert atomic.canonical(a) == atomic.canonical(b)


def test_canonical_bytes_have_no_nan_or_infinity() -> None:
    assert atomic.canonical([float("nan"), float("inf"), 1.0]) == b"[null,null,1.0]"


def test_lines_are_those_that_are_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\n\nthree\nfou")
    assert list(atomic.lines(path)) == [(0, b"one"), (4, b""), (5, b"three")]
    assert list(atomic.lines(path, 5)) == [(5, b"three")]
    assert list(atomic.lines(path, 5, torn=True)) == [(5, b"three"), (11, b"")]
    assert list(atomic.lines(tmp_path / "none", torn=True)) == []


# Whole files


def test_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write(path, b"old")
    atomic.write(path, b"new" * 10**6)
    assert path.read_bytes() == b"new" * 10**6
    assert names(tmp_path) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_source_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise KeyError("the rest")

    atomic.write(tmp_path / "file", b"old")
    with pytest.raises(KeyError):
        atomic.write_lines(tmp_path / "file", pieces())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_fault_18_a_full_disk_leaves_the_old_file_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write(path, b"old")
    with no_room_after(1000), pytest.raises(OrcError, match=re.escape(str(path))):
        atomic.write(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_fault_18_a_full_disk_creates_nothing(tmp_path: Path) -> None:
    with no_room_after(1000), pytest.raises(OrcError, match=re.escape(str(tmp_path / "file"))):
        atomic.create(tmp_path / "file", b"new" * 1000)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "act", [lambda path: atomic.write(path, b""), lambda path: atomic.create(path, b""), AppendFile]
)
@pytest.mark.parametrize("below", ["no such folder", "a file"])
def test_a_folder_that_is_none_is_a_clear_error(tmp_path: Path, act, below: str) -> None:
    (tmp_path / "a file").touch()
    path = tmp_path / below / "name"
    with pytest.raises(OrcError, match=re.escape(str(path))):
        act(path)


def test_create_is_exclusive(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    assert atomic.create(path, b"first")
    assert not atomic.create(path, b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["claim"]


def test_create_knows_its_own_success_when_the_answer_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", repeated)
    assert atomic.create(tmp_path / "claim", b"mine")


def test_another_writer_of_equal_bytes_is_no_success_of_ours(tmp_path: Path) -> None:
    assert atomic.create(tmp_path / "claim", b"same")
    assert not atomic.create(tmp_path / "claim", b"same")


def test_create_works_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert atomic.create(tmp_path / "claim", b"first")
    assert not atomic.create(tmp_path / "claim", b"second")
    assert (tmp_path / "claim").read_bytes() == b"first"


# Killed at every system call

WRITE = "atomic.write(path, b'n' * 3_000_000)"
CREATE = "atomic.create(path, b'n' * 3_000_000)"
APPEND = "file = atomic.AppendFile(path); file.append({'a': 1}); file.append({'b': 2}, {'c': 3}); file.close()"


def traced(path: Path, act: str, *options: str) -> subprocess.CompletedProcess[str]:
    program = f"from pathlib import Path; from orchestrator.core import atomic; path = Path({str(path)!r}); {act}"
    argv = ["strace", "-e", f"trace={CALLS}", *options, sys.executable, "-B", "-I", "-S", "-c"]
    packages = [str(Path(atomic.__file__).parents[2]), str(Path(sys.modules["orjson"].__file__ or "").parent.parent)]
    return subprocess.run(
        [*argv, f"import sys; sys.path[:0] = {packages!r}; {program}"], capture_output=True, text=True, timeout=60
    )


def calls_on(folder: Path, log: str) -> list[tuple[str, int]]:
    """(system call, how often it was made before) of every call from the first one on that names `folder`."""
    seen: dict[str, int] = {}
    found: list[tuple[str, int]] = []
    for line in log.splitlines():
        name = line.partition("(")[0]
        if name in CALLS.split(","):
            seen[name] = seen.get(name, 0) + 1
            if found or str(folder) in line:
                found.append((name, seen[name]))
    return found


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("act", [WRITE, CREATE, APPEND])
def test_fault_16_a_kill_at_any_system_call_leaves_old_or_new(tmp_path: Path, act: str) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    points = calls_on(path.parent, traced(path, act).stderr)
    new = path.read_bytes()
    assert len(points) >= 4
    for call, count in points:
        path.unlink(missing_ok=True)
        if act == WRITE:
            path.write_bytes(b"old")
        killed = traced(path, act, "-e", f"inject={call}:signal=KILL:when={count}")
        assert "+++ killed by SIGKILL" in killed.stderr
        found = path.read_bytes() if path.exists() else b"old"
        assert found in (b"old", new) or (act == APPEND and new.startswith(found) and found[-1:] in (b"", b"\n"))
        assert all(name.startswith((".file.", "file")) for name in names(path.parent))


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path: Path) -> None:
    calls = [call for call, _ in calls_on(tmp_path, traced(tmp_path / "file", WRITE).stderr)]
    assert [call for call in calls if call in ("fsync", "rename")] == ["fsync", "rename", "fsync"]


# Files that grow


def test_appended_lines_are_there_at_once(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "file")
    file.append({"a": 1}, {"b": 2})
    assert [unchecked(line) is not None for _, line in atomic.lines(file.path)] == [True, True]
    file.close()


def test_a_file_that_grows_is_never_reopened(tmp_path: Path) -> None:
    AppendFile(tmp_path / "file").close()
    with pytest.raises(OrcError, match="file: can't be created: File exists"):
        AppendFile(tmp_path / "file")


@pytest.mark.parametrize("room", [100, 130])
def test_a_short_or_failed_append_is_an_error_that_names_the_file(tmp_path: Path, room: int) -> None:
    file = AppendFile(tmp_path / "file")
    file.append({"a": "x" * 80})
    before = (tmp_path / "file").read_bytes()
    with no_room_after(max(room, len(before))), pytest.raises(OrcError, match=re.escape(str(file.path))):
        file.append({"b": "y" * 80})
    after = (tmp_path / "file").read_bytes()
    assert after.startswith(before)
    assert [line for _, line in atomic.lines(file.path)] == [before[:-1]]
    file.close()
