"""Folders of a process in this machine's temporary folder, and those that killed processes have left there.

    folder = scratch.make()      whoever made it removes it
    scratch.clear()              removes those whose makers are gone

A process that is killed cannot clean up, and nothing may be left that does it later. So a folder's name says whose it
is: `orc-<boot>-<namespace>-<pid>-<random>`, the first eight digits of the kernel's id of this boot, the number of the
namespace of process ids, and the process. Whoever is of another boot, as on a file system that several machines see,
or of another namespace, as in a container, is not judged. The batch scripts name theirs in the same way.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from orchestrator.core.procfs import boot_id, pid_namespace, process_stat

__all__ = ["clear", "make"]

_NAME = re.compile(r"orc-([0-9a-f]{8})-([0-9]+)-([1-9][0-9]*)-\w{8}")


def make() -> Path:
    """A new folder of this process, mode 0700.

    Raises:
        OSError: none can be made.
    """
    import tempfile

    boot, namespace = _here() or ("", "")
    return Path(tempfile.mkdtemp(prefix=f"orc-{boot}-{namespace}-{os.getpid()}-"))


def clear() -> None:
    """Remove what processes of this user have left that are gone; what can't be removed stays, without a word."""
    import shutil

    for folder in _deserted():
        shutil.rmtree(folder, ignore_errors=True)


def _deserted() -> Iterator[Path]:
    here = _here()
    for entry in _entries():
        named = _NAME.fullmatch(entry.name)
        if named and named.group(1, 2) == here and _is_ours(entry) and not _is_alive(int(named[3])):
            yield Path(entry.path)


def _entries() -> Iterator[os.DirEntry[str]]:
    import tempfile

    # The batch scripts fall back on the second.
    for folder in {tempfile.gettempdir(), "/tmp"}:  # noqa: S108 (nothing is made there)
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            yield from entries


def _is_ours(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid()
    except OSError:
        return False


def _is_alive(pid: int) -> bool:
    # Another user's process with this number is not the maker, but that is not worth a race.
    stat = process_stat(pid)
    return stat is not None and not stat.has_ended


def _here() -> tuple[str, str] | None:
    """What names a process together with its number; None where the system doesn't tell."""
    boot, namespace = boot_id()[:8], pid_namespace()
    return (boot, namespace) if boot and namespace else None
