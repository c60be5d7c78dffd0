"""Checkpoints: state to resume a trial from, one file each, of which the newest that verifies counts.

    checkpoints = Checkpoints(paths.checkpoint(3), Identity(sweep=paths.id, trial=3), writer, say=print)
    checkpoints.save(1200, pack(state))
    found = checkpoints.newest()            None, or a Checkpoint: step, writer, state

A file is `<step>-<writer>.ckpt`: one line with the format's version and the length and sha256 of all that follows,
then safetensors bytes, whose metadata hold what is no tensor. No bit of it can change unnoticed and nothing in it can
be executed. It is written by `core.atomic`, so a file of that name is whole; the hash is for disks, not kills.

    CheckpointError      a checkpoint can't be written, or doesn't belong to a trial like this
      Gone               the folder has vanished: someone else has finished the trial, and there is nothing left to do
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import torch

from orchestrator.core import atomic
from orchestrator.errors import OrcError
from orchestrator.training.checkpoint.serialization import Packed, Tree, decode, encode, unpack

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "Gone", "Identity", "Refused", "read"]

SCHEMA = 1
_HEADER = re.compile(rb"orc-checkpoint ([1-9][0-9]{0,3}) ([1-9][0-9]{0,17}) ([0-9a-f]{64})\n")
_HEADER_MOST = 128
_NAME = re.compile(r"([0-9]{12,18})-([0-9a-f]{32})\.ckpt")
_PIECE = 1 << 20
_ASKED = 3
"""How often the folder is listed again when a file goes between the listing and the reading: another copy of the trial
is saving, too."""


class CheckpointError(OrcError):
    """A checkpoint can't be written or read, or doesn't fit this trial; the text says why."""


class Gone(CheckpointError):
    """The folder has vanished, as it does when the trial has an outcome: a worker that meets this stops quietly."""


class Refused(ValueError):
    """A file that is no good checkpoint of this trial; the text says why, without the file's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose state a checkpoint is.

    Args:
        sweep: the sweep's id, which is a hash of its plan and its code.
        trial: index in the plan.
        world_size: how many ranks train it.
    """

    sweep: str
    trial: int
    world_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been read.

    Args:
        step: optimizer steps that its state has seen.
        writer: the process start that wrote it.
        identity: whose it is.
        versions: what wrote it, by name.
        state: as it was packed; tensors on the CPU.
    """

    step: int
    writer: str
    identity: Identity
    versions: dict[str, str]
    state: Tree


def versions() -> dict[str, str]:
    """What a state's last bits depend on in this process, by name."""
    return {"python": platform.python_version(), "torch": torch.__version__}


# Files


def _pieces(body: list[memoryview], digest: str, length: int) -> Iterator[bytes]:
    yield b"orc-checkpoint %d %d %b\n" % (SCHEMA, length, digest.encode())
    for part in body:
        for first in range(0, len(part), _PIECE):
            yield bytes(part[first : first + _PIECE])


def write(path: Path, step: int, writer: str, identity: Identity, packed: Packed) -> None:
    """Write a checkpoint, durably and whole or not at all.

    Raises:
        OrcError: the disk is full, the quota is spent, or the folder is not writable; names the path.
        TypeError: see `statetree.encode`.
    """
    about = {"identity": asdict(identity), "step": step, "writer": writer, "versions": versions()}
    body = encode(packed, {"orchestrator": orjson.dumps(about).decode()})
    digest = hashlib.sha256()
    for part in body:
        digest.update(part)
    atomic.write_lines(path, _pieces(body, digest.hexdigest(), sum(map(len, body))))


def read(path: Path) -> Checkpoint:
    """The checkpoint in `path`, whatever is there.

    Raises:
        Refused: it isn't one, or not an intact one.
        FileNotFoundError: there is nothing.
    """
    try:
        packed, metadata = decode(_verified(path))  # so the bytes are gone before the state is made of the parts
        return _checkpoint(orjson.loads(metadata["orchestrator"]), unpack(packed))
    except (Refused, FileNotFoundError):
        raise
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise Refused(f"it can't be read: {reason}") from error
    except (LookupError, TypeError, ValueError) as error:
        raise Refused(f"its sum is right, but {error}") from error


def _verified(path: Path) -> bytes:
    """The body of a checkpoint file, read only when its size is what its header says."""
    # Opening a pipe that nobody writes to would wait for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
        os.close(handle)
        raise Refused("it is no regular file")
    with os.fdopen(handle, "rb") as file:
        header = _HEADER.match(file.read(_HEADER_MOST))
        if header is None:
            raise Refused("it is empty" if not about.st_size else "it doesn't begin as a checkpoint does")
        version, length, digest = int(header[1]), int(header[2]), header[3].decode()
        if version != SCHEMA:
            raise Refused(f"it is of version {version} of the format, and this is version {SCHEMA}")
        if about.st_size != header.end() + length:
            raise Refused(f"it has {about.st_size} bytes, and should have {header.end() + length}")
        file.seek(header.end())
        body = file.read(length)
    if hashlib.sha256(body).hexdigest() != digest:
        raise Refused("its bytes have changed since it was written: the sha256 differs")
    return body


def _checkpoint(about: dict[str, object], state: Tree) -> Checkpoint:
    identity, written_by = about["identity"], about["versions"]
    step, writer = about["step"], about["writer"]
    if not isinstance(identity, dict) or not isinstance(written_by, dict):
        raise TypeError("it doesn't say whose it is")
    if not isinstance(step, int) or not isinstance(writer, str):
        raise TypeError("it doesn't say which step it is of")
    return Checkpoint(step=step, writer=writer, identity=Identity(**identity), versions=written_by, state=state)


# Folders


class Checkpoints:
    """The checkpoints of one trial, as one process sees them. The folder is made by the first save.

    Only what is older than the `keep` newest that this process has itself written or verified is ever deleted, so two
    live copies of a trial can't take each other's last good state.

    Args:
        folder: of this trial alone.
        identity: of the trial; files of others are refused.
        writer: id of this process start, 32 hexadecimal digits.
        keep: how many stay.
        say: takes a line about each file that was refused, and why.
        is_gone: whether a writer, by its id, is known to be dead, so that what it left half written may be deleted.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        writer: str,
        *,
        keep: int = 2,
        say: Callable[[str], None] = lambda line: None,
        is_gone: Callable[[str], bool] = lambda writer: False,
    ) -> None:
        if keep < 1:
            raise ValueError(f"at least one checkpoint must be kept, not {keep}")
        self.folder = folder
        self.identity = identity
        self.writer = writer
        self._keep = keep
        self._say = say
        self._is_gone = is_gone
        self._good: set[tuple[int, str]] = set()
        self._refused: set[str] = set()
        self._has_folder = False

    def path(self, step: int, writer: str | None = None) -> Path:
        """The file of a step; `writer` is this process by default."""
        return self.folder / f"{step:012d}-{writer or self.writer}.ckpt"

    # Saving

    def save(self, step: int, packed: Packed) -> Path | None:
        """Write a checkpoint, then delete those that it makes superfluous.

        None when the file was deleted while it was written, as happens when another copy of the trial is far ahead.

        Raises:
            Gone: the folder has vanished.
            OrcError: it can't be written; names the path. The older checkpoints stay and nothing half-written does.
        """
        path = self.path(step)
        self._make_folder()
        try:
            write(path, step, self.writer, self.identity, packed)
        except OrcError as error:
            self._explain(path, error)
            return None
        self._is_good(step, self.writer)
        self._tidy()
        return path

    def _make_folder(self) -> None:
        if self._has_folder:
            return
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            atomic.sync_folder(self.folder.parent)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: can't be made: {error.strerror}") from error
        self._has_folder = True

    def _explain(self, path: Path, error: OrcError) -> None:
        """Raise what a failed write means, unless it means nothing."""
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOENT, errno.ESTALE):
            raise error
        if not os.path.isdir(self.folder):  # noqa: PTH112 (Path.is_dir raises where a handle is stale)
            raise Gone(f"{self.folder}: has vanished: someone else has finished this trial") from error
        self._say(f"{path}: was deleted while it was written: another copy of this trial is ahead")

    def _is_good(self, step: int, writer: str) -> None:
        self._good.add((step, writer))
        self._good = set(sorted(self._good)[-self._keep :])

    def _tidy(self) -> None:
        """Delete what is older than the good ones that are kept, and what dead writers have left half written."""
        oldest = min(self._good) if len(self._good) >= self._keep else (-1, "")
        _unlink(path for key, path in self._listing() if key < oldest)
        _unlink(path for path in atomic.temporaries(self.folder) if self._is_left(path, oldest))

    def _is_left(self, temporary: Path, oldest: tuple[int, str]) -> bool:
        name = temporary.name.removeprefix(".").rpartition(".")[0]
        found = _NAME.fullmatch(name)
        if found is None:
            return False
        step, writer = int(found[1]), found[2]
        # We are not writing now, so what is ours has been left by a write that failed.
        return (step, writer) < oldest or writer == self.writer or self._is_gone(writer)

    # Finding

    def files(self) -> list[Path]:
        """The checkpoint files, best first: by step, then by writer. They are not verified."""
        return [path for _, path in sorted(self._listing(), reverse=True)]

    def _listing(self) -> list[tuple[tuple[int, str], Path]]:
        try:
            names = os.listdir(self.folder)  # noqa: PTH208 (names are all that is needed)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder}: can't be listed: {error.strerror}") from error
        found = [(match, self.folder / name) for name in names if (match := _NAME.fullmatch(name))]
        return [((int(match[1]), match[2]), path) for match, path in found]

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies: the highest step, ties by writer. None when there is none.

        Raises:
            CheckpointError: the good ones are of another number of ranks, or the folder changes while it is read.
        """
        for _ in range(_ASKED):
            found, has_changed = self._first_good(self.files())
            if found is not None or not has_changed:
                return found
        raise CheckpointError(f"{self.folder}: its files are deleted faster than they can be read: is it in use twice?")

    def _first_good(self, paths: Iterable[Path]) -> tuple[Checkpoint | None, bool]:
        """The first that is good, and whether one that was listed has gone."""
        misfit, has_changed = None, False
        for path in paths:
            if path.name in self._refused:
                continue
            try:
                return self.load(path), has_changed
            except FileNotFoundError:
                has_changed = True
            except Refused as refused:
                self.refuse(path, str(refused))
            except CheckpointError as error:
                misfit = error
        if misfit is not None:
            raise misfit
        return None, has_changed

    def refuse(self, path: Path, reason: str) -> None:
        """Pass over a file from now on, and say so."""
        self._refused.add(path.name)
        self._good = {key for key in self._good if self.path(*key).name != path.name}
        self._say(f"{path}: refused, the one before it is tried: {reason}")

    def load(self, path: Path) -> Checkpoint:
        """One checkpoint of this trial, verified.

        Raises:
            Refused: it is no intact checkpoint of this trial.
            CheckpointError: it is one, of another number of ranks.
            FileNotFoundError: there is none.
        """
        found = read(path)
        expected, identity = self.identity, found.identity
        if self.path(found.step, found.writer).name != path.name:
            raise Refused(f"it was written as {self.path(found.step, found.writer).name}")
        if identity.sweep != expected.sweep:
            raise Refused(f"it is of sweep {identity.sweep!r}, not of {expected.sweep!r}")
        if identity.trial != expected.trial:
            raise Refused(f"it is of trial {identity.trial!r}, not of trial {expected.trial}")
        if identity.world_size != expected.world_size:
            raise CheckpointError(
                f"{path}: is of {identity.world_size} ranks and can't be resumed with {expected.world_size}, since "
                f"the result would differ: resume with {identity.world_size} ranks, or plan a new sweep"
            )
        self._note_versions(path, found.versions)
        self._has_folder = True
        self._is_good(found.step, found.writer)
        return found

    def _note_versions(self, path: Path, written_by: dict[str, str]) -> None:
        for name, version in versions().items():
            if written_by.get(name) != version:
                self._say(
                    f"{path}: was written with {name} {written_by.get(name)}, this is {version}: the trial goes on, "
                    "but its last bits may differ from those of an undisturbed one"
                )


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        # A leftover costs room, no more; a folder of that name is not ours to remove.
        with contextlib.suppress(OSError):
            path.unlink()
