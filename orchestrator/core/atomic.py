"""Durable files: atomic write, exclusive create, checked append, tolerant read.

A file is written as temporary file in the same folder, fsync, rename, fsync of the folder, so a reader (or a power cut)
sees the old state or the new one. A file that grows is written by one process only, each line carrying a checksum over
its own bytes, so a torn or zeroed line is recognised and the lines around it stay good.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import orjson

from orchestrator.errors import OrcError

__all__ = [
    "AppendFile",
    "Json",
    "JsonObject",
    "TooLong",
    "canonical",
    "checked",
    "create",
    "intact",
    "lines",
    "sync_folder",
    "temporaries",
    "unchecked",
    "write",
    "write_lines",
]

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"
JsonObject: TypeAlias = "dict[str, Json]"

LONGEST = 16 << 20
"""The longest line, in bytes, that whoever reads a file that grows takes for one."""
_CRC = b',"crc":'
_TEMPORARY_DIGITS = 12


class TooLong(OrcError):
    """A line has not been written, since it is longer than readers take.

    Args:
        path: the file.
        value: what the line was to hold.
        num_bytes: how long it is.
    """

    def __init__(self, path: Path, value: JsonObject, num_bytes: int) -> None:
        super().__init__(f"{path}: a line of {num_bytes:,} bytes was to be added, and readers take {LONGEST:,} at most")
        self.value = value
        self.num_bytes = num_bytes


def canonical(value: Json) -> bytes:
    """`value` as JSON with sorted keys and no spaces: equal values give equal bytes. NaN and infinity become null."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def checked(value: JsonObject) -> bytes:
    """`value` as one line whose last key, `crc`, is the CRC-32 of all bytes before it.

    Keys keep their order (`kind` first lets a reader skip a line by its first bytes). `value` must not be empty.
    """
    body = orjson.dumps(value)[:-1]
    return b"%b%b%d}\n" % (body, _CRC, zlib.crc32(body))


def intact(line: bytes) -> bool:
    """Whether `line`, given without its newline, is a `checked` line of which no bit has changed."""
    body, found, tail = line.rpartition(_CRC)
    return bool(found) and tail == b"%d}" % zlib.crc32(body)


def unchecked(line: bytes) -> JsonObject | None:
    """The object of a `checked` line, given without its newline; None when it is not `intact`."""
    if not intact(line):
        return None
    value: JsonObject = orjson.loads(line)
    return value


def sync_folder(folder: Path) -> None:
    """Return once the names in `folder` are on the disk: a new file or a rename is durable only then."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(_TEMPORARY_DIGITS // 2).hex()}")


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def write(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data`: after a crash at any point it holds the old bytes or the new ones.

    Raises:
        OrcError: the disk is full, the quota is spent, or the folder is not writable; names the path. Nothing is left
            behind.
    """
    write_lines(path, (data,), mode=mode)


def write_lines(path: Path, pieces: Iterable[bytes], *, mode: int = 0o600) -> None:
    """`write` what `pieces` give one after the other, never holding more than a mebibyte of them.

    Raises:
        OrcError: as `write`. Whatever `pieces` raises leaves nothing behind, too.
    """
    temporary = _temporary(path)
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(handle, "wb", buffering=2**20) as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(handle)
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OrcError(f"{path}: can't be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def temporaries(folder: Path) -> list[Path]:
    """What calls of `write` and `create` that are under way, or were killed, have in `folder`."""
    return [path for path in folder.glob(".*.*") if _is_temporary(path.name)]


def _is_temporary(name: str) -> bool:
    end = name.rpartition(".")[2]
    return len(end) == _TEMPORARY_DIGITS and set(end) <= set("0123456789abcdef")


def create(path: Path, data: bytes, *, mode: int = 0o600) -> bool:
    """Create `path` with `data`, exclusively and whole: no reader sees it half written. False if it exists already.

    A link, not O_EXCL, makes it appear together with its content, so whoever finds it can tell whose it is.
    """
    temporary = _temporary(path)
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            _write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        return _link(temporary, path, data)
    except OSError as error:
        raise OrcError(f"{path}: can't be created: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _link(temporary: Path, path: Path, data: bytes) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # An NFS client that repeats a lost answer reports our own success as "exists".
        return temporary.stat().st_nlink == 2 and path.read_bytes() == data
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return _create_without_links(path, data)
    return True


def _create_without_links(path: Path, data: bytes) -> bool:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    try:
        _write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
    return True


class AppendFile:
    """A file of `checked` lines with a single writer, created exclusively and never reopened.

    `append` hands lines to the kernel at once, so the death of this process loses nothing; `sync` makes them survive
    the death of the machine.

    Raises:
        OrcError: from every method, when a write fails or is short; the file must then be abandoned, since its last
            line may be torn.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            sync_folder(path.parent)
        except OSError as error:
            raise OrcError(f"{path}: can't be created: {error.strerror}") from error
        self._unsynced = False

    def append(self, *values: JsonObject) -> None:
        """Write the objects as lines, in one system call.

        Raises:
            TooLong: one of them is; none is written, and the file is good.
        """
        data = b"".join(map(self._line, values))
        try:
            written = os.write(self._handle, data)
        except OSError as error:
            raise OrcError(f"{self.path}: can't be appended to: {error.strerror}") from error
        if written != len(data):
            raise OrcError(f"{self.path}: only {written} of {len(data)} bytes could be written: is the disk full?")
        self._unsynced = True

    def _line(self, value: JsonObject) -> bytes:
        line = checked(value)
        if len(line) > LONGEST:
            raise TooLong(self.path, value, len(line))
        return line

    def sync(self) -> None:
        """Return once everything appended so far is on the disk."""
        if not self._unsynced:
            return
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise OrcError(f"{self.path}: can't be made durable: {error.strerror}") from error
        self._unsynced = False

    def close(self) -> None:
        """Make durable and close; closing again does nothing."""
        if self._handle < 0:
            return
        try:
            self.sync()
        finally:
            # The number may soon be another file's, so it is forgotten.
            handle, self._handle = self._handle, -1
            os.close(handle)


def lines(path: Path, start: int = 0, *, torn: bool = False) -> Iterator[tuple[int, bytes]]:
    """The complete lines of `path` from byte `start` on, as (offset, line without newline). A missing file has none.

    With `torn`, a last line that is incomplete is given too, as an empty one, which is never `intact`.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            offset = start
            for line in file:
                if not line.endswith(b"\n"):
                    if torn:
                        yield offset, b""
                    return
                yield offset, line[:-1]
                offset += len(line)
    except FileNotFoundError:
        return
