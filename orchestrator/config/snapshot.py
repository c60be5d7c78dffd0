"""The snapshot of the user's code, taken when a sweep is submitted, so that editing while jobs wait changes nothing.

    snapshot = code.survey(Path("train.py"), base, exclude=[runs, sweep_file])
    snapshot.digest                                    part of the sweep's id
    snapshot.copy(into)                                read-only, whole or not at all
    code.Manifest.read(into).program                   where the program is, inside
    code.Lineage.of(paths).twin(file)                  the copy of a file of the original tree

In a git work tree the snapshot holds the tracked files and the untracked ones that git doesn't ignore, of the whole
tree. Elsewhere nothing says which files are code and which were written by a trial, and a result that counts as code
would make the same sweep file another sweep; so of the program's folder it holds source, by name, scripts, small
configuration files, Python packages whole, and the files that the command names, without hidden files, virtual
environments, byte-code and sweeps. Keys and passwords are never taken, nor links that lead out of the tree; what was
left out for such a reason is in `skipped`.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import secrets
import stat
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from orchestrator.core import atomic
from orchestrator.errors import FolderError, OrcError, UsageError

if TYPE_CHECKING:
    from orchestrator.core.atomic import Json, JsonObject
    from orchestrator.core.paths import SweepPaths

__all__ = ["MANIFEST", "MAX_BYTES", "MAX_FILES", "Lineage", "Manifest", "Snapshot", "SnapshotFile", "digest", "survey"]

MAX_BYTES = 64 * 2**20
MAX_FILES = 20_000
MANIFEST = ".snapshot.json"
"""Name of the list of contents that lies inside a copied snapshot; a user's file of that name is left out."""

_SECRET_NAMES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".htpasswd"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".git-credentials", "credentials", "credentials.json"),
)
_SOURCES = (
    *(
        ".py",
        ".pyi",
        ".pyx",
        ".pxd",
        ".so",
        ".sh",
        ".bash",
        ".zsh",
        ".fish",
        ".csh",
        ".awk",
        ".sed",
        ".slurm",
        ".sbatch",
    ),
    *(".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".f", ".f90", ".f95", ".rs", ".go", ".java", ".cmake"),
    *(".jl", ".r", ".m", ".lua", ".pl", ".rb", ".js", ".ts", ".sql"),
)
_CONFIGURATIONS = (".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".gin", ".j2", ".jinja", ".jinja2", ".tmpl")
_CONFIGURATION_BYTES = 2**18
_SECRET_FOLDERS = frozenset({".ssh", ".aws", ".gnupg", ".kube", ".azure", ".gcloud", ".git"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFile:
    """One file or link of a snapshot.

    Args:
        path: relative to the snapshot, with slashes.
        executable: whether its owner may run it.
        content: its bytes, held so that what is copied is what was hashed; of a link, where it points.
        is_link: a link to a folder of the snapshot.
    """

    path: str
    executable: bool
    content: bytes = field(repr=False)
    is_link: bool = False

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def mode(self) -> str:
        """`x` for an executable file, `l` for a link, `-` for anything else."""
        return "l" if self.is_link else "x" if self.executable else "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a copied snapshot holds, as written beside its files.

    Args:
        digest: as `Snapshot.digest`.
        program: the program's path inside the snapshot; None where the sweep has no program file.
        folder: path of the sweep file's folder inside the snapshot, `.` for its top.
        files: path to (mode, SHA-256).
    """

    digest: str
    program: str | None
    folder: str
    files: dict[str, tuple[str, str]]

    def to_json(self) -> JsonObject:
        """As a JSON object."""
        files: dict[str, Json] = {path: list(entry) for path, entry in self.files.items()}
        return {"schema": 1, "digest": self.digest, "program": self.program, "folder": self.folder, "files": files}

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the snapshot in `folder`.

        Raises:
            FolderError: there is none, or it is not one that this version understands.
        """
        import orjson

        path = folder / MANIFEST
        try:
            found = orjson.loads(path.read_bytes())
            files = {name: (mode, sha256) for name, (mode, sha256) in found["files"].items()}
            if found["schema"] != 1:
                raise FolderError(f"{path}: snapshot of schema {found['schema']}, this version reads schema 1")
            return cls(digest=found["digest"], program=found["program"], folder=found["folder"], files=files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FolderError(f"{path}: not a code snapshot: {error}") from error

    def changes(self, other: Manifest) -> list[str]:
        """How `other` differs, one line a file: `added`, `removed` or `changed` and its path, sorted by path."""
        lines = []
        for path in sorted(self.files.keys() | other.files.keys()):
            mine, its = self.files.get(path), other.files.get(path)
            if mine != its:
                lines.append(f"{'added' if mine is None else 'removed' if its is None else 'changed'} {path}")
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """A copied snapshot and where it came from.

    Args:
        code: the copy.
        folder: the sweep file's folder in it.
        root: the folder that it was taken of, which may have changed since; None where that is not known.
    """

    code: Path
    folder: Path
    root: Path | None = None

    @classmethod
    def of(cls, paths: SweepPaths) -> Lineage:
        """The lineage of a sweep's code."""
        try:
            inside = PurePath(Manifest.read(paths.code).folder)
            origin = Path(os.fsdecode(paths.origin.read_bytes()))
        except (FolderError, OSError):
            return cls(code=paths.code, folder=paths.code)
        root = Path(*origin.parts[: len(origin.parts) - len(inside.parts)])
        return cls(code=paths.code, folder=paths.code / inside, root=root)

    def twin(self, path: str | os.PathLike[str]) -> Path | None:
        """The copy of a file or folder of the original; None for one that is not below it, or was not taken."""
        if self.root is None:
            return None
        # As text: every import asks, and all but a few of them from elsewhere.
        folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100
        real = os.path.join(_real_folder(folder), name)  # noqa: PTH118
        if not _is_below(real, os.fspath(self.root)) or _is_below(real, os.fspath(self.code)):
            return None
        found = self.code / os.path.relpath(real, self.root)
        return found if found.exists() else None

    def twins(self, folders: Iterable[str]) -> list[Path]:
        """The copies of those folders that have one, such as `src` where an editable install has put it on the path."""
        return [twin for folder in folders if (twin := self.twin(folder)) is not None and twin.is_dir()]


@functools.lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The user's code at one moment, in memory.

    Args:
        files: sorted by path.
        root: the folder that it was taken of.
        program: the program's path inside; None where there is none.
        folder: path of the sweep file's folder inside, `.` for its top.
        skipped: what was left out that one might miss, one line each with the reason.
    """

    files: tuple[SnapshotFile, ...] = ()
    root: Path = Path()
    program: str | None = None
    folder: str = "."
    skipped: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over paths, modes and contents: equal snapshots and no others share it."""
        return digest(self.files)

    @property
    def manifest(self) -> Manifest:
        """What `copy` writes beside the files."""
        files = {file.path: (file.mode, file.sha256) for file in self.files}
        return Manifest(digest=self.digest, program=self.program, folder=self.folder, files=files)

    def copy(self, into: Path) -> None:
        """Create the folder `into` with every file, read-only: whole, or not there at all.

        Raises:
            OrcError: it exists, or can't be written; names it. Nothing is left behind.
        """
        temporary = into.with_name(f".{into.name}.{secrets.token_hex(6)}")
        try:
            temporary.mkdir(mode=0o700)
            self._fill(temporary)
            temporary.rename(into)
        except OSError as error:
            _remove(temporary)
            raise OrcError(f"{into}: the code can't be copied here: {error.strerror}") from error

    def _fill(self, folder: Path) -> None:
        # Folders stay writable, so that deleting a sweep is a plain `rm -r`; the files are what must not change.
        for name in sorted({os.path.dirname(file.path) for file in self.files}):  # noqa: PTH120 (paths in the snapshot are text)
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in self.files:
            _write(folder / file.path, file)
        # In a second pass, since one fsync then finds most of the other files on the disk already.
        for file in self.files:
            _sync(folder / file.path, file)
        atomic.write(folder / MANIFEST, atomic.canonical(self.manifest.to_json()), mode=0o400)


def digest(files: Iterable[SnapshotFile]) -> str:
    """SHA-256 over (path, mode, SHA-256 of the content) of the files, sorted by path."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        total.update(os.fsencode(file.path) + f"\0{file.mode}\0{file.sha256}\n".encode())
    return total.hexdigest()


def _write(path: Path, file: SnapshotFile) -> None:
    if file.is_link:
        path.symlink_to(os.fsdecode(file.content))
        return
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o500 if file.executable else 0o400)
    with os.fdopen(handle, "wb") as out:
        out.write(file.content)


def _sync(path: Path, file: SnapshotFile) -> None:
    if file.is_link:
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def survey(program: Path | None, base: Path, *, exclude: Sequence[Path] = (), command: Sequence[str] = ()) -> Snapshot:
    """Read the code that a sweep will run.

    Args:
        program: the program's file; None for a `command:` or a function of an importable package.
        base: the sweep file's folder.
        exclude: files and folders to leave out: the folder of sweeps, and the sweep file itself, whose `slurm:` part
            must not change the sweep's id.
        command: the sweep's `command`; files that it names relative to `base` are code, whatever they are called.

    Raises:
        UsageError: too many files or bytes (names the largest), a file that can't be read, or no such program.
    """
    base = base.resolve()
    program = program.resolve() if program else None
    if program and not program.is_file():
        raise UsageError(f"{program}: no such program file")
    left_out = {path.resolve() for path in exclude}
    root, names, skipped = _git_tree(program, base) or _plain_tree(program, base, command, left_out)
    reader = _Reader(root, skipped)
    files = reader.read(name for name in names if not _is_within(root / name, left_out))
    inside = program.relative_to(root).as_posix() if program else None
    if inside and not any(file.path == inside for file in files):
        raise UsageError(f"{program}: looks like a credential or lies in a left-out folder; a program can't be one")
    folder = base.relative_to(root).as_posix() if base.is_relative_to(root) else "."
    return Snapshot(files=files, root=root, program=inside, folder=folder, skipped=tuple(reader.skipped))


def _is_within(path: Path, folders: set[Path]) -> bool:
    return bool(folders) and (path in folders or not folders.isdisjoint(path.parents))


def _git_tree(program: Path | None, base: Path) -> tuple[Path, list[str], list[str]] | None:
    """Top and files of the work tree that holds the program; None outside of one, or where git ignores the program."""
    start = program.parent if program else base
    top = _git(start, "rev-parse", "--show-toplevel")
    if not top:
        return None
    root = Path(os.fsdecode(top).removesuffix("\n"))
    names = sorted(set(_git_files(root)))
    wanted = (program or base).relative_to(root).as_posix()
    if program:
        return (root, names, []) if wanted in names else None
    return (root, names, []) if wanted == "." or any(name.startswith(f"{wanted}/") for name in names) else None


def _git(folder: Path, *arguments: str) -> bytes:
    """What git prints; empty where there is no git or no work tree.

    Raises:
        UsageError: git refuses a work tree that is there, such as one of another owner.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"LC_ALL": "C"}
    argv = ["git", "-C", os.fspath(folder), "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(argv, capture_output=True, check=False, env=env, stdin=subprocess.DEVNULL, timeout=60)
    except (FileNotFoundError, PermissionError):
        return b""
    except subprocess.TimeoutExpired:
        raise UsageError(f"{folder}: git did not list the work tree's files within 60 s") from None
    if done.returncode and b"dubious ownership" in done.stderr:
        raise UsageError(f"{folder}: git refuses this work tree: {os.fsdecode(done.stderr).strip()}")
    return b"" if done.returncode else done.stdout


def _git_files(root: Path) -> Iterator[str]:
    """Tracked files and untracked ones that git doesn't ignore, those of submodules and nested repositories too."""
    for entry in _git(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split(b"\0"):
        name = os.fsdecode(entry).rstrip("/")
        if not name:
            continue
        if (root / name / ".git").exists():
            yield from (f"{name}/{inner}" for inner in _git_files(root / name))
        elif "__pycache__" not in name.split("/"):
            yield name


def _plain_tree(
    program: Path | None, base: Path, command: Sequence[str], left_out: set[Path]
) -> tuple[Path, list[str], list[str]]:
    """The program's folder, its files that are code, and a line about the others."""
    root = base if program is None else program.parent
    named = {os.path.normpath(base / word) for word in command}
    names: list[str] = []
    others: list[str] = []
    for name, is_code in _walk(root):
        if is_code or os.fspath(root / name) in named:
            names.append(name)
        elif not _is_within(root / name, left_out):
            others.append(name)
    if not others:
        return root, names, []
    more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
    return root, names, [f"{min(others)}{more}: left out: outside of git only what looks like source is code"]


def _walk(root: Path) -> Iterator[tuple[str, bool]]:
    """Files and links to folders below `root`, and whether each is code."""
    packages: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=False):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118 (hot)
        folders[:] = [name for name in folders if name not in links and _is_wanted(Path(folder, name))]
        prefix = "" if folder == os.fspath(root) else Path(folder).relative_to(root).as_posix() + "/"
        if "__init__.py" in names or os.path.dirname(folder) in packages:  # noqa: PTH120 (hot)
            packages.add(folder)
        for name in (*names, *links):
            if not name.startswith(".") and not name.endswith(".pyc"):
                yield prefix + name, folder in packages or name in links or _is_source(Path(folder, name))


def _is_source(path: Path) -> bool:
    """Whether a file is code as far as its name, its mode and its first bytes tell."""
    suffix = path.suffix.lower()
    if suffix in _SOURCES:
        return True
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return True  # The reader says why it can't be taken.
        if status.st_mode & stat.S_IXUSR:
            return True
        if suffix in _CONFIGURATIONS:
            return status.st_size <= _CONFIGURATION_BYTES
        return not suffix and _has_shebang(path)
    except OSError:
        return path.is_symlink()


def _has_shebang(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def _is_wanted(folder: Path) -> bool:
    """Whether a folder below the program is code: not hidden, byte-code, a virtual environment or a sweep."""
    if folder.name.startswith(".") or folder.name in ("__pycache__", "node_modules"):
        return False
    return not any((folder / mark).exists() for mark in ("pyvenv.cfg", "conda-meta", "plan.jsonl"))


class _Reader:
    """Reads files up to the limits, noting what it leaves out."""

    def __init__(self, root: Path, skipped: list[str]) -> None:
        self.root = root
        self.skipped = skipped
        self._sizes: list[tuple[int, str]] = []
        self._total = 0

    def read(self, names: Iterable[str]) -> tuple[SnapshotFile, ...]:
        found = [(name, file) for name in names if (file := self._find(name)) is not None]
        if self._total > MAX_BYTES or len(found) > MAX_FILES:
            raise UsageError(self._too_much(len(found)))
        return tuple(self._load(name, path) for name, path in sorted(found))

    def _find(self, name: str) -> Path | None:
        """The file to read for `name`, or None with the reason noted."""
        path = self.root / name
        try:
            target = Path(os.path.realpath(path, strict=True))
            status = target.stat()
        except (FileNotFoundError, NotADirectoryError):
            # Tracked but deleted is as good as absent; a link that leads nowhere is worth a word.
            return self._skip(name, "the link leads nowhere") if path.is_symlink() else None
        except OSError as error:
            return self._skip(name, f"can't be looked at: {error.strerror}")
        if reason := self._objection(name, target):
            return self._skip(name, reason)
        return self._plain(name, path, target, status)

    def _objection(self, name: str, target: Path) -> str | None:
        if not _is_utf8(name):
            return "its name is not UTF-8"
        if name == MANIFEST:
            return "its name is taken by the list of contents"
        if not target.is_relative_to(self.root):
            return f"a link that leaves the tree, to {target}"
        if _is_secret(name) or _is_secret(target.relative_to(self.root).as_posix()):
            return "looks like a credential"
        return None

    def _plain(self, name: str, path: Path, target: Path, status: os.stat_result) -> Path | None:
        if stat.S_ISREG(status.st_mode):
            self._sizes.append((status.st_size, name))
            self._total += status.st_size
            return target
        if not stat.S_ISDIR(status.st_mode):
            return self._skip(name, "not a plain file")
        return target if path.is_symlink() else None

    def _skip(self, name: str, reason: str) -> Path | None:
        self.skipped.append(f"{name}: left out: {reason}")
        return None

    def _load(self, name: str, path: Path) -> SnapshotFile:
        if path.is_dir():
            link = os.path.relpath(path, (self.root / name).parent)
            return SnapshotFile(path=name, executable=False, content=os.fsencode(link), is_link=True)
        try:
            with path.open("rb") as file:
                executable = bool(os.fstat(file.fileno()).st_mode & stat.S_IXUSR)
                return SnapshotFile(path=name, executable=executable, content=file.read())
        except OSError as error:
            raise UsageError(
                f"{path}: can't be read for the code snapshot: {error.strerror}; make it readable, or ignore it in git"
            ) from error

    def _too_much(self, num_files: int) -> str:
        largest = "\n".join(f"  {size / 2**20:8.1f} MiB  {name}" for size, name in sorted(self._sizes)[:-6:-1])
        return (
            f"{self.root}: the code is too large for a snapshot: {num_files} files, {self._total / 2**20:.1f} MiB; "
            f"at most {MAX_FILES} files and {MAX_BYTES / 2**20:g} MiB. The largest:\n{largest}\n"
            "Name data and results in .gitignore, or keep the program in a folder of its own"
        )


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _is_secret(name: str) -> bool:
    *folders, last = name.lower().split("/")
    return not _SECRET_FOLDERS.isdisjoint(folders) or any(fnmatch.fnmatchcase(last, mark) for mark in _SECRET_NAMES)
