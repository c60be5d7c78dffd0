"""A sweep's folder: made whole or not at all, once, whoever submits the same sweep again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config.plan import PlanFile, SweepPlan, write_plan
from orchestrator.core import atomic, permissions
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import FolderError, OrcError

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from orchestrator.config.snapshot import Snapshot

__all__ = ["prepare"]


def prepare(plan: SweepPlan, snapshot: Snapshot, sweep_file: bytes, runs: Path) -> SweepPaths:
    """The sweep's folder below `runs`: made whole, or found whole from an earlier time.

    Args:
        plan: its id names the folder.
        snapshot: the code that the plan was made with.
        sweep_file: the sweep file's bytes as the user gave them.
        runs: the folder of sweeps; made when missing, then with a `.gitignore` for everything in it.

    Raises:
        FolderError: `runs` is not writable, or there is a folder of that name that is not this sweep, or not ours.
    """
    assert snapshot.digest == plan.code, "the plan is of other code"
    paths = SweepPaths(runs.absolute() / plan.id)
    if paths.root.exists():
        return _same(paths, plan)
    _make_runs(paths.root.parent)
    temporary = SweepPaths(paths.root.with_name(f".{plan.id}.{os.urandom(6).hex()}"))
    try:
        _fill(temporary, plan, snapshot, sweep_file)
        return _publish(temporary, paths, plan)
    except OSError as error:
        raise FolderError(f"{runs}: no sweep can be stored here: {error.strerror}; use --dir or $ORC_DIR") from error
    finally:
        _remove(temporary.root)


def _publish(temporary: SweepPaths, paths: SweepPaths, plan: SweepPlan) -> SweepPaths:
    try:
        temporary.root.rename(paths.root)
    except OSError:
        if not paths.plan.exists():
            raise
        # Somebody submitted the same sweep at this very moment, and was first.
        return _same(paths, plan)
    atomic.sync_folder(paths.root.parent)
    return paths


def _make_runs(runs: Path) -> None:
    try:
        runs.mkdir(mode=0o700, parents=True)
        atomic.write(runs / ".gitignore", b"*\n")
    except FileExistsError:
        if not runs.is_dir():
            raise FolderError(f"{runs}: should be a folder for sweeps, but is a file; use --dir or $ORC_DIR") from None
    except OSError as error:
        raise FolderError(f"{runs}: can't be made: {error.strerror}; use --dir or $ORC_DIR") from error


def _fill(paths: SweepPaths, plan: SweepPlan, snapshot: Snapshot, sweep_file: bytes) -> None:
    for folder in paths.folders:
        folder.mkdir(mode=0o700)
    snapshot.copy(paths.code)
    atomic.write(paths.sweep_file, sweep_file)
    atomic.write(paths.origin, os.fsencode(snapshot.root / snapshot.folder))
    atomic.write(paths.submissions, b"")
    write_plan(plan, paths.plan)


def _remove(folder: Path) -> None:
    if folder.exists():
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


def _same(paths: SweepPaths, plan: SweepPlan) -> SweepPaths:
    permissions.check(paths)
    found = PlanFile.open(paths.plan)
    if (found.id, found.num_trials, found.code) != (plan.id, plan.num_trials, plan.code):
        raise FolderError(f"{paths.root}: holds another sweep ({found.id}, {found.num_trials} trials); move it away")
    return paths


_LOCK_S = 120.0


@contextmanager
def locked(paths: SweepPaths) -> Iterator[None]:
    """Keeps two commands from doing the same work twice; nothing is wrong without it, so no lock is no error."""
    from filelock import FileLock, Timeout

    lock = FileLock(paths.submit_lock, timeout=_LOCK_S, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise OrcError(
            f"{paths.submit_lock}: another command has been submitting this sweep for {_LOCK_S:g} s; wait for it"
        ) from None
    except (NotImplementedError, OSError):
        yield
        return
    try:
        yield
    finally:
        lock.release()
