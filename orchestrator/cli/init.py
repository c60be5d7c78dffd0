"""The example jobs that come with the package, copied out to start from."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import NothingMatched, UsageError

__all__ = ["copy", "folder", "names"]


def folder() -> Path:
    """Where the example jobs are: in an installed package, or beside the package in a checkout."""
    here = Path(__file__).parents[1]
    return here / "jobs" if (here / "jobs").is_dir() else here.parent / "jobs"


def names() -> list[str]:
    """The example jobs that have a sweep file."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def copy(job: str, into: Path) -> list[Path]:
    """Copy a job and its sweep file to `into`; returns the new files.

    Raises:
        NothingMatched: no such job.
        UsageError: a file of that name is there already, or the folder can't be written.
    """
    if job not in names():
        raise NothingMatched(f"no example job {job!r}; there are {', '.join(names())}")
    targets = [into / f"{job}.py", into / f"{job}.yaml"]
    for target in targets:
        if target.exists():
            raise UsageError(f"{target}: is there already and is left as it is; choose another folder")
    try:
        into.mkdir(parents=True, exist_ok=True)
        for target in targets:
            target.write_bytes((folder() / target.name).read_bytes())
    except OSError as error:
        raise UsageError(f"{into}: can't be written: {error.strerror}") from error
    return targets
