"""What interruptions cost: where attempts went on, and which steps were done twice.

    reached(paths, 3)                   the last step that any attempt at trial 3 is known to have come to
    read(paths).resumptions             every attempt that went on from a checkpoint, or began anew
    ends(paths, 3)                      how attempts at trial 3 ended without an outcome

The fold needs none of this, and skips the lines that say it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from orchestrator.core import atomic
from orchestrator.results import records
from orchestrator.results.records import as_index

if TYPE_CHECKING:
    from orchestrator.core.atomic import Json, JsonObject
    from orchestrator.core.paths import SweepPaths

__all__ = ["Account", "Resumption", "ends", "reached", "read"]

_RESUME: Final = b'{"kind":"resume"'
_END: Final = b'{"kind":"end"'


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


def reached(paths: SweepPaths, trial: int) -> int:
    """The highest step of a trial that a line of any record file names; 0 if there is none."""
    step = re.compile(rb'\{"kind":"(?:report|at|end)","trial":%d,"attempt":\d+,[^\n]*?"step":(\d{1,18})[,}]' % trial)
    return max((int(found[1]) for data in _contents(paths) for found in step.finditer(data)), default=0)


def read(paths: SweepPaths) -> Account:
    """What all record files say of interruptions."""
    resumptions: set[Resumption] = set()
    saved: Counter[str] = Counter()
    for data in _contents(paths):
        resumptions |= {
            Resumption(trial=trial, attempt=attempt, step=_number(line, "step"), lost=_number(line, "lost"))
            for trial, attempt, line in _lines(data, _RESUME)
        }
        saved.update(str(line.get("cause")) for _, _, line in _lines(data, _END) if _number(line, "step"))
    return Account(resumptions=tuple(sorted(resumptions)), saved=saved)


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
