"""Small sweeps for tests: a folder ready to run, supervisors as real processes, and what came of them."""

from __future__ import annotations

import os
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from orchestrator.config.plan import SweepPlan, write_plan
from orchestrator.config.spec import Launch, Metric, Reduce, Retries, SweepSpec
from orchestrator.core import atomic
from orchestrator.core.atomic import JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.results import reducer
from orchestrator.results.fold import Fold
from orchestrator.results.records import Status
from orchestrator.slurm import ledger

TOKEN, OTHER, THIRD = (secrets.token_hex(16) for _ in range(3))
"""Of submissions, and of no test of another process beside this one: who cancels a submission ends its processes."""
HALF = 'echo "{\\"val_loss\\": $ORC_TRIAL.5}" >> $ORC_REPORT'
"""A shell script whose trial i gives i + 0.5."""
LIMIT_S = 30.0
"""Longest that a test waits for anything; a machine that is busy needs seconds for what takes milliseconds."""


def spec(
    script: str = HALF,
    trials: int = 3,
    *,
    parameters: JsonObject | None = None,
    retries: Retries | None = None,
    metric: Metric | None = None,
    top: int = 10,
    argv: tuple[str, ...] | None = None,
    env: dict[str, str] | None = None,
    program: str | None = None,
    **launch: Any,
) -> SweepSpec:
    """A sweep of a shell script over x = 0, 1, ..., or of `program` where that is given."""
    return SweepSpec(
        name="small",
        method="grid",
        parameters={"x": {"values": list(range(trials))}} if parameters is None else parameters,
        metric=metric or Metric(),
        program=program,
        command=None if program else argv or ("/bin/sh", "-c", script),
        env=env or {},
        launch=Launch(retries=retries or Retries(), **launch),
        reduce=Reduce(visibility_s=0.0, top=top),
    )


def folder(runs: Path, of: SweepSpec, job: str | None = None, *, packed_by: tuple[str, ...] = ()) -> SweepPaths:
    """The folder of a sweep below `runs`; `job` is the text of its program, and trials of a pack equal `packed_by`."""
    plan = SweepPlan(spec=of, code="0" * 64, packed_by=packed_by)
    paths = SweepPaths(runs.absolute() / plan.id)
    for path in paths.folders:
        path.mkdir(mode=0o700, parents=True)
    write_plan(plan, paths.plan)
    if job is not None and of.program is not None:
        paths.code.mkdir()
        (paths.code / of.program).write_text(job)
    return paths


def make(runs: Path, script: str = HALF, trials: int = 3, **options: Any) -> SweepPaths:
    """The folder of a sweep of a shell script; see `spec`."""
    return folder(runs, spec(script, trials, **options))


def start(
    paths: SweepPaths, *arguments: str, submission: str = TOKEN, env: dict[str, str] | None = None, **popen: Any
) -> subprocess.Popen[str]:
    """A supervisor at work on a sweep, as Slurm would start it."""
    argv = [sys.executable, "-P", "-m", "orchestrator.supervisor", "work"]
    return subprocess.Popen(
        [*argv, "--dir", str(paths.root), "--submission", submission, *arguments],
        env={**clean_environment(), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def clean_environment() -> dict[str, str]:
    """Ours without a word of Slurm or of a sweep."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "ORC_"))}


@contextmanager
def started(paths: SweepPaths, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """As `start`; killed at the end of the block at the latest."""
    process = start(paths, *arguments, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def run(paths: SweepPaths, *arguments: str, **options: Any) -> tuple[int, str]:
    """A supervisor from start to end: exit code and what it printed."""
    with started(paths, *arguments, **options) as process:
        said, _ = process.communicate(timeout=4 * LIMIT_S)
        return process.returncode, said


def fold(paths: SweepPaths) -> Fold:
    """All records of a sweep."""
    found = Fold(paths, paths.plan.read_bytes().count(b"\n") - 1)
    found.update()
    return found


def summary(paths: SweepPaths) -> bytes:
    """`summary.json` as the reducer writes it now."""
    reducer.reduce(paths, wait_s=0.0)
    return paths.summary.read_bytes()


def counts(paths: SweepPaths) -> dict[str, int]:
    """How many trials came to what, zeros left out."""
    found = fold(paths)
    numbers = {status.value: found.count(status) for status in Status} | {"missing": found.num_missing}
    return {name: number for name, number in numbers.items() if number}


def records(paths: SweepPaths, kind: str | None = None) -> list[dict[str, Any]]:
    """Every intact line of every record file, or those of one kind."""
    found = []
    for path in sorted(paths.records.iterdir()):
        found += [orjson.loads(line) for _, line in atomic.lines(path) if atomic.intact(line)]
    return [line for line in found if kind in (None, line["kind"])]


def superseded(paths: SweepPaths, by: str, *earlier: str, retry_failed: bool = False) -> None:
    """Write down a submission with token `by` that saw the `earlier` ones dead."""
    part = ledger.SubmissionPart(what="local", num_workers=1)
    submission = ledger.Submission(
        token=by, epoch=1, on="local", host="here", parts=(part,), supersedes=earlier, retry_failed=retry_failed
    )
    ledger.append(paths, ledger.intent(submission, "local"))


def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Return once `condition` holds; fail when it doesn't in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"it still doesn't hold after {limit_s:.0f} s"
        time.sleep(0.01)


def left_running(paths: SweepPaths) -> list[int]:
    """Processes of a sweep that are alive: those that name its folder in their arguments or environment."""
    word, own = os.fsencode(paths.root), str(os.getpid())
    entries = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and entry.name != own]
    return [int(entry.name) for entry in entries if _mentions(entry, word)]


def names(folder: Path) -> list[str]:
    """What a folder holds, sorted."""
    return sorted(path.name for path in folder.iterdir())


def _mentions(entry: Path, word: bytes) -> bool:
    try:
        return word in (entry / "cmdline").read_bytes() or word in (entry / "environ").read_bytes()
    except OSError:
        return False


@contextmanager
def no_room_after(num_bytes: int) -> Iterator[None]:
    """Files of this process can't grow beyond `num_bytes`, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Clock:
    """A monotonic clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
