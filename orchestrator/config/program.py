"""A user's job: how its file becomes a module, and whether it can.

load_job(code, "train.py")                       imported from a folder that comes first on sys.path
load_job(code, "train.py", lineage)              with all else that it imports and the snapshot has
check(code, "train.py", timeout_s=60)            the same in a process of its own, with a time limit

python -P -m orchestrator.config.program --code DIR --program PROGRAM       what `check` starts
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec as Spec
from pathlib import Path
from types import ModuleType

from orchestrator.config.snapshot import Lineage
from orchestrator.core import guardian
from orchestrator.errors import ProgramError

__all__ = ["LoadedJob", "check", "load_job", "preload"]

_SHOWN_LINES = 20
_END_S = 5.0
_OURS = "orchestrator"


@dataclass(frozen=True, slots=True)
class LoadedJob:
    """A user's job: its module, and its training function."""

    module: ModuleType
    train: Callable[..., object]

    @property
    def build(self) -> Callable[..., object] | None:
        """The module's `build`, if it has one."""
        found = getattr(self.module, "build", None)
        return found if callable(found) else None


class FromSnapshot:
    """Finds modules of the original tree in the snapshot, however they came to be found: an editable install, say.

    What the snapshot lacks, such as a compiled module that git ignores, is taken from where it is.

    Args:
        lineage: the snapshot.
    """

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Spec | None:
        """As the import system asks."""
        if name.partition(".")[0] == _OURS:
            return None  # it runs already, and not from the snapshot
        others = (finder for finder in sys.meta_path if not isinstance(finder, FromSnapshot))
        asked = (finder.find_spec(name, path, target) for finder in others)
        spec = next((found for found in asked if found is not None), None)
        twin = self._lineage.twin(spec.origin) if spec is not None and spec.origin and spec.has_location else None
        if spec is None or twin is None:
            return spec
        folders = spec.submodule_search_locations
        inside = None if folders is None else [str(twin.parent), *folders]
        return importlib.util.spec_from_file_location(name, twin, submodule_search_locations=inside)


def load_job(code: Path, program: str, lineage: Lineage | None = None) -> LoadedJob:
    """Import a job from a code snapshot, which comes first on `sys.path`.

    Args:
        code: the snapshot's folder.
        program: `file.py`, `file.py:function` or `package.module:function`; files relative to `code`.
        lineage: where the snapshot came from; what would be imported from there is imported from the snapshot, now and
            later.

    Raises:
        Exception: whatever importing it raises; AttributeError when it has no such function.
    """
    sys.dont_write_bytecode = True  # the snapshot is read-only, and root would write into it all the same
    if lineage is not None and lineage.root is not None:
        # After the original, which `FromSnapshot` looks up: only what is gone from there is found here.
        sys.path[:] = [found for entry in sys.path for found in (entry, *map(str, lineage.twins([entry])))]
        # In the place of an earlier one: who loads models of several sweeps loads them one after the other.
        others = [finder for finder in sys.meta_path if not isinstance(finder, FromSnapshot)]
        sys.meta_path[:] = [FromSnapshot(lineage), *others]
    target, _, function = program.partition(":")
    if target.endswith(".py"):
        module = _import_file(code, code / target)
    else:
        sys.path.insert(0, str(code))
        module = importlib.import_module(target)
    train = getattr(module, function or "train")
    if not callable(train):
        raise TypeError(f"{program}: {function or 'train'} is not a function")
    return LoadedJob(module, train)


def _import_file(code: Path, path: Path) -> ModuleType:
    sys.path[:0] = [str(path.parent), str(code)] if path.parent != code else [str(code)]
    name = path.stem if path.stem not in sys.modules else f"job_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def preload(job: LoadedJob, *, ranks: int = 1) -> None:
    """Do once, before forking, what every trial would do by itself: `preload()` of the job, torch's lazy imports."""
    source = getattr(job.module, "__file__", None)
    if ranks > 1 or (source and "optim" in Path(source).read_text(errors="replace")):
        # The first optimizer imports it, which takes a second, and so does what distributes a network.
        import torch._dynamo  # noqa: F401
    prepare = getattr(job.module, "preload", None)
    if callable(prepare):
        prepare()


def check(code: Path, program: str, *, timeout_s: float) -> None:
    """Import a job in a process of its own, so that nothing of it can harm this one.

    Args:
        code: the folder that a snapshot would be taken of.
        program: as for `load_job`.
        timeout_s: how long it may take, in seconds.

    Raises:
        ProgramError: it can't be imported, or not in time; the text ends with its own error.
    """
    argv = [sys.executable, "-P", "-m", "orchestrator.config.program", "--code", str(code), "--program", program]
    argv += ["--parent", str(os.getpid())]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise ProgramError(
                f"{program}: importing it took longer than {timeout_s:.0f} s; move slow work out of the module's top "
                "level, or raise launch.import_timeout_s"
            ) from None
    if process.returncode:
        said = (errors or out).strip().splitlines()[-_SHOWN_LINES:]
        raise ProgramError(f"{program}: it can't be imported:\n" + "\n".join(f"    {line}" for line in said))


def _end(process: subprocess.Popen[str]) -> None:
    """End a check, and all that the program has started."""
    process.send_signal(guardian.END)
    try:
        process.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _own_frames(error: BaseException) -> list[str]:
    """The traceback without the frames of this package, which are none of the user's business."""
    here = str(Path(__file__).parents[1])
    kept = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename, here)]
    return [*traceback.format_list(kept), *traceback.format_exception_only(error)]


def _is_ours(filename: str, here: str) -> bool:
    return (filename.startswith(here) and "/jobs/" not in filename) or filename.startswith("<frozen importlib")


def main(arguments: list[str] | None = None) -> int:
    """Entry of the process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="orchestrator.config.program")
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--program", required=True)
    parser.add_argument("--parent", type=int, required=True, help="who waits for it")
    options = parser.parse_args(arguments)
    guardian.stand_guard([options.parent])  # which ends what the program starts: it is of no use here
    try:
        load_job(options.code, options.program)
    except BaseException as error:
        sys.stderr.writelines(_own_frames(error))
        return 1
    return 0


if __name__ == "__main__":
    gc.disable()  # hardly anything that is imported becomes garbage
    _code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Whoever submits waits for this: taking torch apart in good order would add to it.
    os._exit(_code)
