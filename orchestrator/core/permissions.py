"""Other users: whose files are run, and whose are believed.

trust.check(paths)                      before anything is run that the folder of a sweep holds
trust.is_believed(paths, handle)        whether a derived file, which only saves work, is to be used
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from orchestrator.errors import FolderError

if TYPE_CHECKING:
    from orchestrator.core.paths import SweepPaths

__all__ = ["check", "is_believed"]


def check(paths: SweepPaths) -> None:
    """What a sweep's folder holds is run, so nobody else may have written it.

    Raises:
        FolderError: the folder, its plan, its code or its ledger is of a third user, or anyone may write it, or it
            can't be read; names it and the remedy.
    """
    for path in (paths.root, paths.plan, paths.code, paths.submissions):
        try:
            status = path.stat()
        except OSError as error:
            raise FolderError(f"{path}: can't be read, so {paths.root} is no sweep: {error.strerror}") from error
        if status.st_uid not in (os.getuid(), 0):
            raise FolderError(
                f"{path}: belongs to another user ({status.st_uid}), so nothing in it is run; work in a folder of "
                "your own, or copy the sweep first"
            )
        if status.st_mode & stat.S_IWOTH:
            raise FolderError(
                f"{path}: anyone may write it, so it may hold anyone's code; `chmod o-w` it if it is yours"
            )


def is_believed(paths: SweepPaths, handle: int) -> bool:
    """Whether an open file is a regular one of this user's, root's, or the folder's owner's, that not anyone may write.

    Args:
        paths: the sweep.
        handle: of the file, open; what its name leads to may be another one by now.
    """
    status, owners = os.fstat(handle), {0, os.getuid(), paths.root.stat().st_uid}
    return stat.S_ISREG(status.st_mode) and status.st_uid in owners and not status.st_mode & stat.S_IWOTH
