"""What interruptions cost: where attempts went on, and which steps were done twice.

    read(paths).resumptions             every attempt that went on from a checkpoint, or began anew
    ends(paths, 3)                      how attempts at trial 3 ended without an outcome

It is computed when somebody asks, from all record files. The fold needs none of it, and skips the lines that say it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from orchestrator.core import atomic
from orchestrator.results import records
from orchestrator.results.records import as_index

if TYPE_CHECKING:
    from orchestrator.core.atomic import Json, JsonObject
    from orchestrator.core.paths import SweepPaths

__all__ = ["Account", "Resumption", "ends", "read"]

_RESUME: Final = b'{"kind":"resume"'
_END: Final = b'{"kind":"end"'
_STEP: Final = re.compile(
    rb'\{"kind":"(?:report|at|end)","trial":(\d{1,18}),"attempt":(\d{1,18}),[^\n]*?"step":(\d{1,18})[,}]'
)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Resumption:
    """An attempt after an interruption.

    Args:
        trial: its index.
        attempt: its number, from 1.
        step: where it went on; 0 if nothing had been saved.
        lost: steps that an earlier attempt had done beyond that, as far as is known.
    """

    trial: int
    attempt: int
    step: int
    lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What is known of a sweep's interruptions.

    Args:
        resumptions: by trial and attempt.
        saved: how many attempts were saved when they ended, by cause.
    """

    resumptions: tuple[Resumption, ...] = ()
    saved: Mapping[str, int] = field(default_factory=dict)


def read(paths: SweepPaths) -> Account:
    """Return what all record files say of interruptions."""
    resumed: dict[tuple[int, int], tuple[int, int]] = {}
    saved: Counter[str] = Counter()
    for data in _contents(paths):
        for trial, attempt, line in _lines(data, _RESUME):
            lead = line.get("lead")
            resumed[trial, attempt] = _number(line, "step"), lead if isinstance(lead, int) else trial
        saved.update(str(line.get("cause")) for _, _, line in _lines(data, _END) if _number(line, "step"))
    reached = _reached(paths, {lead for _, lead in resumed.values()})
    resumptions = (
        Resumption(trial=trial, attempt=attempt, step=step, lost=max(0, _before(reached, lead, attempt) - step))
        for (trial, attempt), (step, lead) in sorted(resumed.items())
    )
    return Account(resumptions=tuple(resumptions), saved=saved)


def _reached(paths: SweepPaths, trials: Collection[int]) -> dict[int, dict[int, int]]:
    """Return trial -> attempt -> the highest step that a line of any record file names."""
    steps: dict[int, dict[int, int]] = {trial: {} for trial in trials}
    for data in _contents(paths) if trials else ():
        for line in _STEP.finditer(data):
            trial, attempt, step = map(int, line.groups())
            if trial in steps:
                steps[trial][attempt] = max(step, steps[trial].get(attempt, 0))
    return steps


def _before(reached: Mapping[int, Mapping[int, int]], trial: int, attempt: int) -> int:
    """Return the step that the attempts before one had come to."""
    return max((step for earlier, step in reached[trial].items() if earlier < attempt), default=0)


def ends(paths: SweepPaths, trial: int) -> dict[int, str]:
    """Attempt -> how it ended without an outcome, for the attempts at a trial of which that is known."""
    return {
        attempt: f"{line.get('cause')}: {line.get('detail')}"
        for data in _contents(paths)
        for _, attempt, line in _lines(data, b'%b,"trial":%d,' % (_END, trial))
    }


def _contents(paths: SweepPaths) -> Iterator[bytes]:
    """What each record file holds; one that can't be read, of which the fold tells, holds nothing."""
    for path in records.files(paths):
        with contextlib.suppress(OSError):
            yield path.read_bytes()


def _lines(data: bytes, prefix: bytes) -> Iterator[tuple[int, int, JsonObject]]:
    """(trial, attempt, line) of the intact lines that begin so; the many others cost next to nothing."""
    for found in re.finditer(b"^" + re.escape(prefix) + b".*$", data, re.MULTILINE):
        line = atomic.unchecked(found[0])
        if line is not None:
            yield as_index(line.get("trial")), as_index(line.get("attempt")), line


def _number(line: JsonObject, name: str) -> int:
    value: Json = line.get(name)
    return value if isinstance(value, int) else 0
