"""Other users: what is run is nobody else's, and what is believed is this user's, root's or the folder's owner's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sweeps

from orchestrator.core import permissions
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import FolderError

only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    found = sweeps.folder(tmp_path, sweeps.spec(program="train.py"), "")
    found.submissions.touch(mode=0o600)
    return found


RUN = ("root", "plan", "code", "submissions")


@pytest.mark.parametrize("name", RUN)
def test_what_anyone_may_write_is_not_run(paths: SweepPaths, name: str) -> None:
    permissions.check(paths)
    path: Path = getattr(paths, name)
    path.chmod(path.stat().st_mode | 0o002)
    with pytest.raises(FolderError, match=rf"^{path}: anyone may write it, so it may hold anyone's code; `chmod o-w`"):
        permissions.check(paths)


@only_root
@pytest.mark.parametrize("name", RUN)
def test_what_another_user_owns_is_not_run(paths: SweepPaths, name: str) -> None:
    path: Path = getattr(paths, name)
    os.chown(path, 4242, -1)
    with pytest.raises(FolderError, match=rf"^{path}: belongs to another user \(4242\), so nothing in it is run"):
        permissions.check(paths)


def test_what_is_missing_is_named(paths: SweepPaths) -> None:
    paths.submissions.unlink()
    with pytest.raises(FolderError, match=r"submissions\.jsonl: can't be read, so .* is no sweep: No such file"):
        permissions.check(paths)


def believed(paths: SweepPaths, path: Path) -> bool:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return permissions.is_believed(paths, handle)
    finally:
        os.close(handle)


@pytest.mark.parametrize(("mode", "expected"), [(0o600, True), (0o660, True), (0o602, False)])
def test_a_derived_file_is_believed_unless_anyone_may_write_it(paths: SweepPaths, mode: int, expected: bool) -> None:
    paths.fold_cache.touch()
    paths.fold_cache.chmod(mode)
    assert believed(paths, paths.fold_cache) is expected


def test_what_is_no_file_is_not_believed(paths: SweepPaths) -> None:
    os.mkfifo(paths.fold_cache, 0o600)
    assert not believed(paths, paths.fold_cache)
    assert not believed(paths, paths.root)


@only_root
@pytest.mark.parametrize(("folder", "file", "expected"), [(0, 4242, False), (4242, 4242, True), (4242, 77, False)])
def test_a_derived_file_of_the_folder_s_owner_is_believed_and_a_third_user_s_is_not(
    paths: SweepPaths, folder: int, file: int, expected: bool
) -> None:
    paths.fold_cache.touch(mode=0o600)
    os.chown(paths.root, folder, -1)
    os.chown(paths.fold_cache, file, -1)
    assert believed(paths, paths.fold_cache) is expected
