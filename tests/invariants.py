"""What must hold after any sweep, whatever was done to it: one function an invariant, and `check` for all of them.

    memory = Memory(paths)                  before and between faults: memory.look()
    check(paths, undisturbed=bytes)         after them

They are told from the files alone, by a second, plain reading of the protocol, so that the product's own reader can be
wrong and be found out.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.paths import SweepPaths

__all__ = [
    "Jobs",
    "Memory",
    "check",
    "counting",
    "leftovers",
    "newest_process",
    "nothing_is_left",
    "one_record_counts",
    "processes_naming",
    "processes_of",
    "the_counts_add_up",
    "until",
]

ORDER = ("complete", "diverged", "pruned", "failed")
Line = dict[str, Any]


# Reading, a second time


def intact_lines(path: Path) -> Iterator[tuple[int, Line]]:
    """(offset, object) of every line of a record file whose checksum is right."""
    offset = 0
    for line in path.read_bytes().splitlines(keepends=True):
        body, found, tail = line.rpartition(b',"crc":')
        if found and tail == b"%d}\n" % zlib.crc32(body):
            yield offset, json.loads(line)
        offset += len(line)


def outcomes(paths: SweepPaths) -> dict[int, list[Line]]:
    """Every outcome of every trial."""
    found: dict[int, list[Line]] = {}
    for path in sorted(paths.records.glob("*.jsonl")):
        for _, line in intact_lines(path):
            if line["kind"] == "outcome":
                found.setdefault(line["trial"], []).append(line)
    return found


def counting(paths: SweepPaths) -> dict[int, Line]:
    """Trial -> the outcome that counts, by the words of the protocol: the greatest, then the smallest digest."""
    return {trial: min(lines, key=_rank) for trial, lines in outcomes(paths).items()}


def _rank(line: Line) -> tuple[int, bytes, str]:
    measured = {name: value for name, value in line["payload"].items() if name != "model"}
    text = json.dumps(measured, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return ORDER.index(line["status"]), hashlib.sha256(text.encode()).digest(), line["payload"].get("model") or "~"


def num_planned(paths: SweepPaths) -> int:
    return paths.plan.read_bytes().count(b"\n") - 1


# The invariants


def one_record_counts(paths: SweepPaths) -> None:
    """I1: of each trial one outcome counts, the same for whoever reads; a whole sweep has one of every trial."""
    from sweeps import fold

    found, read = counting(paths), fold(paths)
    assert sorted(found) == [trial for trial in range(read.num_trials) if read.status(trial) is not None]
    for trial, line in found.items():
        status = read.status(trial)
        assert status is not None
        assert status.value == line["status"]
        if status.value == "complete":
            assert read.value(trial) == line["payload"]["value"]


class Memory:
    """I2: what was once visible. `look` remembers, and fails when something that was seen is no longer there."""

    def __init__(self, paths: SweepPaths) -> None:
        self._paths = paths
        self._seen: dict[tuple[str, int], Line] = {}

    def look(self) -> None:
        now = {
            (path.name, offset): line
            for path in self._paths.records.glob("*.jsonl")
            for offset, line in intact_lines(path)
        }
        lost = [where for where, line in self._seen.items() if now.get(where) != line]
        assert not lost, f"records that were visible are gone: {lost}"
        self._seen = now


def the_same_bytes(paths: SweepPaths, undisturbed: bytes) -> None:
    """I3: `summary.json` is that of a run without faults."""
    assert paths.summary.read_bytes() == undisturbed


def the_counts_add_up(paths: SweepPaths) -> None:
    """I4: in `orc status`, and in the summary where there is one, every trial of the plan is in one place."""
    from orchestrator.sweep import Sweep

    planned = num_planned(paths)
    tally = Counter(line["status"] for line in counting(paths).values())
    trials = Sweep(paths).standing().trials
    assert sum(trials.values()) == planned
    assert {status: trials[status] for status in ORDER} == {status: tally[status] for status in ORDER}
    if paths.summary.exists():
        found = json.loads(paths.summary.read_bytes())
        parts = [found[name] for name in ("count", "diverged", "pruned", "failed", "missing")]
        assert (found["planned"], sum(parts)) == (planned, planned)


def never_done_while_missing(paths: SweepPaths, exit_codes: Iterable[int]) -> None:
    """I5: no command that was to finish the sweep left with 0 while work is missing; nor does the summary say so."""
    # The summary first: while workers run, less is missing with every look.
    said = json.loads(paths.summary.read_bytes())["missing"] if paths.summary.exists() else None
    missing = num_planned(paths) - len(counting(paths))
    assert not (missing and 0 in exit_codes)
    assert said is None or said >= missing


@dataclass(frozen=True, slots=True)
class Jobs:
    """Jobs and arrays of one Slurm: their ids, and the configuration that tells it from others of this machine."""

    ids: tuple[str, ...] = ()
    conf: str = ""

    def own(self, environment: bytes) -> bool:
        """Whether a process with this environment is of one of them."""
        settings = environment.split(b"\0")
        names = (f"{name}={job}".encode() for job in self.ids for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"))
        return f"SLURM_CONF={self.conf}".encode() in settings and any(name in settings for name in names)


NO_JOBS = Jobs()


def processes_of(paths: SweepPaths, jobs: Jobs = NO_JOBS) -> list[str]:
    """Command lines of processes that are at work on a sweep, or are of one of `jobs`; they hold the ports, too."""
    entries = (entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and entry.name != str(os.getpid()))
    return [text for entry in entries if (text := _named(entry, os.fsencode(paths.root), jobs))]


def newest_process() -> int:
    """The number of the process that this machine has started last."""
    return int(Path("/proc/loadavg").read_text().split()[-1])


def processes_naming(folder: Path, *, since: int) -> list[str]:
    """Command lines of processes that name a folder in them, or in their environment, and are newer than one.

    Only those are looked at, which takes a few milliseconds. Numbers begin anew when they are used up; then all are.
    What `multiprocessing` keeps for the next test is nobody's.
    """
    newest = newest_process()
    if newest == since:
        return []
    first = since + 1 if newest > since else 1
    numbers = (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 (a tenth of the time)
    own = {os.getpid(), os.getppid()}
    entries = (Path("/proc") / str(number) for number in numbers if number >= first and number not in own)
    found = (_named(entry, os.fsencode(folder), NO_JOBS) for entry in entries)
    return [text for text in found if text and "multiprocessing" not in text]


def _named(entry: Path, root: bytes, jobs: Jobs) -> str:
    try:
        command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        state = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return ""
    is_one = root in command or root in environment or jobs.own(environment)
    return f"{entry.name} {command.decode(errors='replace')}" if is_one and state not in "ZX" else ""


def leftovers(paths: SweepPaths) -> list[Path]:
    """Temporary files and folders of a sweep, and checkpoints of trials that have their outcome."""
    found = [path for path in paths.root.rglob(".*") if path != paths.submit_lock and paths.code not in path.parents]
    found += paths.root.parent.glob(f".{paths.id}.*")
    trials = set(map(str, counting(paths)))
    done = [path for path in paths.checkpoints.iterdir() if path.name.partition(".")[0] in trials]
    return sorted([*found, *done, *([paths.parts] if paths.parts.exists() else [])])


def nothing_is_left(paths: SweepPaths, jobs: Jobs = NO_JOBS) -> None:
    """I6: no process, temporary file or port; processes that are ending are given their time."""
    until(lambda: not processes_of(paths, jobs), lambda: f"still running: {processes_of(paths, jobs)}")
    assert leftovers(paths) == []


def status_says(paths: SweepPaths, *words: str) -> None:
    """I7: `orc status` names the cause and the remedy."""
    from orchestrator.cli import tables
    from orchestrator.sweep import Sweep

    sweep = Sweep(paths)
    text = tables.standing(sweep, sweep.standing())
    assert all(word in text for word in words), text


def check(
    paths: SweepPaths,
    *,
    undisturbed: bytes | None = None,
    says: Collection[str] = (),
    exit_codes: Collection[int] = (),
    jobs: Jobs = NO_JOBS,
    memory: Memory | None = None,
    ended: bool = True,
) -> None:
    """All invariants of a sweep.

    Args:
        paths: the sweep.
        undisturbed: `summary.json` of a run without faults; None where the sweep isn't done.
        says: words that `orc status` must have.
        exit_codes: of the commands that were to finish it.
        jobs: of the sweep.
        memory: of what was visible before.
        ended: nothing of it is meant to be running.
    """
    one_record_counts(paths)
    if memory is not None:
        memory.look()
    if undisturbed is not None:
        the_same_bytes(paths, undisturbed)
    never_done_while_missing(paths, exit_codes)
    if ended:
        nothing_is_left(paths, jobs)
    the_counts_add_up(paths)
    status_says(paths, paths.id, *says)


def until(condition: Callable[[], object], text: Callable[[], str]) -> None:
    """As `sweeps.until`, with what is wrong in the message."""
    import sweeps

    try:
        sweeps.until(condition)
    except AssertionError:
        raise AssertionError(text()) from None
