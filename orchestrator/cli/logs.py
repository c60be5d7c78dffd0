"""What a trial printed: the pieces of the workers' logs between its marks, every attempt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from orchestrator.config.plan import PlannedTrial
from orchestrator.core.channel import MARK
from orchestrator.core.text import spans
from orchestrator.errors import NothingMatched
from orchestrator.results import resumption
from orchestrator.sweep import Sweep

__all__ = ["pieces", "show"]

_LOOK_S = 0.5


def pieces(logs: Path, trial: str) -> Iterator[tuple[int, Path, bytes]]:
    """(attempt, log file, text with its marks) for every attempt at a trial, in the order of the attempts.

    An attempt that was cut off has no closing mark; its text ends where the next one's begins, or with the file.
    """
    files = sorted(logs.glob("*.log"), key=lambda path: (path.name.startswith("rank-"), path.name))
    found = [piece for path in files for piece in _in_file(path, trial.encode())]
    yield from sorted(found, key=lambda piece: piece[0])


def _in_file(path: Path, trial: bytes) -> Iterator[tuple[int, Path, bytes]]:
    """Yield the attempts of a file, each from its first mark to its last.

    After the closing mark follow those of what was left running, and between them may stand what that has printed.
    """
    lines: list[bytes] = []
    after_close: list[bytes] = []
    attempt, is_closed = -1, False
    with path.open("rb") as file:
        for line in _lines(file):
            mark = MARK.match(line)
            if mark is not None and attempt >= 0 and (mark[1], int(mark[2])) != (trial, attempt):
                yield attempt, path, b"".join(lines)
                attempt = -1
            if mark is not None and mark[1] == trial and attempt < 0:
                attempt, lines, after_close, is_closed = int(mark[2]), [line], [], False
            elif attempt >= 0 and mark is not None:
                lines += [*after_close, line]
                after_close, is_closed = [], True
            elif attempt >= 0:
                (after_close if is_closed else lines).append(line)
    if attempt >= 0:
        yield attempt, path, b"".join(lines)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a log; a mark begins a line of its own also where what was printed before it ended without one."""
    for line in file:
        mark = MARK.search(line)
        if mark and mark.start():
            yield line[: mark.start()] + b"\n"
            line = line[mark.start() :]
        yield line


def show(sweep: Sweep, trial: PlannedTrial, *, follow: bool, write: Callable[[str], None]) -> None:
    """Write what a trial printed; with `follow`, go on until it has an outcome.

    Raises:
        NothingMatched: it has not begun.
    """
    shown: dict[tuple[int, Path], int] = {}
    if len(pack := sweep.plan.pack(trial.index)) > 1:
        write(f"--- trial {trial.index} is of the pack of {spans(pack)}, whose lines these are\n")
    _write_new(sweep, trial, shown, write)
    while follow and sweep.refresh().fold.status(trial.index) is None:
        time.sleep(_LOOK_S)
        _write_new(sweep, trial, shown, write)
    if follow:
        _write_new(sweep, trial, shown, write)
    if not shown:
        raise NothingMatched(f"{sweep.id}: trial {trial.index} has printed nothing yet; `orc status` shows what runs")


def _heading(sweep: Sweep, trial: PlannedTrial, attempt: int, path: Path) -> str:
    """The line before an attempt: where it printed; of one after the first, what ended the one before and what came."""
    if attempt <= 0:
        return f"--- {path.name}\n"
    ended = resumption.ends(sweep.paths, trial.index).get(attempt - 1)
    resumed = {(one.trial, one.attempt): one for one in resumption.read(sweep.paths).resumptions}
    found = resumed.get((trial.index, attempt))
    words = [f"after {ended}"] if ended else []
    if found is not None:
        words.append(f"goes on from step {found.step}" if found.step else "begins anew")
        words.append(f"{found.lost} steps done twice" if found.lost else "nothing lost")
    return f"--- {path.name}: attempt {attempt}{', ' if words else ''}{'; '.join(words)}\n"


def _write_new(
    sweep: Sweep, trial: PlannedTrial, shown: dict[tuple[int, Path], int], write: Callable[[str], None]
) -> None:
    lead = sweep.plan.trial(sweep.plan.pack(trial.index)[0])  # by whose name a pack's lines are found
    for attempt, path, text in pieces(sweep.paths.logs, lead.trial):
        before = shown.get((attempt, path), 0)
        if before == 0:
            write(_heading(sweep, trial, attempt, path))
        write(text[before:].decode(errors="replace"))
        shown[attempt, path] = len(text)
