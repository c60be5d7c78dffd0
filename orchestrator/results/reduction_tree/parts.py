"""Part files: what the reducers of one level leave for those of the next. Derived: deleting them loses work, no data.

    parts.write(paths, plan, reduction)
    parts.read(paths, plan, range(0, 100))         None if there is none that can be trusted
    parts.Look(paths).bears_out(part)              whether the records, as they are now, hold what it says, and no more

A part is never trusted beyond what it has seen: it says up to which byte of each record file it knows every line, and
tells those bytes by a checksum of the last of them. Whoever uses it reads what came after; where a file has been
removed, cut or replaced since, the part counts for nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Final

import orjson

from orchestrator.config.plan import PlanFile
from orchestrator.core import atomic, permissions
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import OrcError
from orchestrator.results.fold.segment import lines, opened, tail
from orchestrator.results.records import as_index, look
from orchestrator.results.reduction_tree.reduction import Reduction

__all__ = ["Look", "PartialReduction", "clear", "is_current", "read", "write"]

SCHEMA: Final = 1
_TAIL: Final = 1 << 14
"""How many bytes tell a file from another, at most: of what looks alike in two files, more than an hour's beats."""
_OTHERS = tuple(b'{"kind":"%b"' % kind for kind in (b"report", b"beat", b"start", b"writer", b"notice", b"end"))
"""How lines begin that are no outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialReduction:
    """What one reducer has left.

    Args:
        reduction: of its trials.
        tails: writer id to the checksum of the last bytes of its file that the reduction has seen.
    """

    reduction: Reduction
    tails: dict[str, int]


class Look:
    """The record files as they are now; what several parts ask of one of them is read once.

    Args:
        paths: the sweep.
    """

    def __init__(self, paths: SweepPaths) -> None:
        self._paths = paths
        self._tails: dict[tuple[str, int], int | None] = {}
        self._unseen: dict[tuple[str, int], frozenset[int]] = {}
        self._sizes = {name.removesuffix(".jsonl"): seen.size for name, seen in look(paths).items()}

    def bears_out(self, part: PartialReduction) -> bool:
        """Whether all that the part has seen is still there, and no outcome of its trials that it may not hold.

        Lines after a damaged one count as unseen, so beside a torn file a part may be refused that is right.
        """
        seen, spans = part.reduction.seen, part.reduction.spans
        if any(self.tail(writer, offset) != part.tails[writer] for writer, offset in seen.items()):
            return False
        unseen = (trial for writer in self._sizes for trial in self._beyond(writer, seen.get(writer, 0)))
        return not any(start <= trial < stop for trial in unseen for start, stop in spans)

    def tail(self, writer: str, offset: int) -> int | None:
        """The checksum of the last bytes of a writer's file before `offset`; None where the file does not reach it."""
        key = writer, offset
        if key not in self._tails:
            self._tails[key] = self._read_tail(writer, offset) if self._sizes.get(writer, -1) >= offset else None
        return self._tails[key]

    def _read_tail(self, writer: str, offset: int) -> int | None:
        try:
            return tail(self._paths.record(writer), offset, _TAIL)
        except OSError:
            return None

    def _beyond(self, writer: str, offset: int) -> frozenset[int]:
        """The trials of a writer's outcomes beyond what was seen."""
        if self._sizes[writer] <= offset:
            return frozenset()
        key = writer, offset
        if key not in self._unseen:
            self._unseen[key] = frozenset(self._read_beyond(writer, offset))
        return self._unseen[key]

    def _read_beyond(self, writer: str, offset: int) -> list[int]:
        found = []
        try:
            for _, block in lines(self._paths.record(writer), offset, None):
                outcomes = (line for line in block if not line.startswith(_OTHERS) and atomic.intact(line))
                found += [as_index(orjson.loads(line).get("trial")) for line in outcomes]
        except OSError:
            pass  # a fold can't read it either
        return found


def write(paths: SweepPaths, plan: PlanFile, reduction: Reduction) -> None:
    """Leave `reduction`, which is of one range of trials, for the next level.

    None is left that nobody would believe: where the records say more by now, or something beyond a damaged line that
    may be gone tomorrow.

    Raises:
        OrcError: it can't be written.
    """
    ((start, stop),) = reduction.spans
    now = Look(paths)
    tails = {writer: now.tail(writer, offset) for writer, offset in reduction.seen.items()}
    part = PartialReduction(
        reduction=reduction, tails={writer: tail for writer, tail in tails.items() if tail is not None}
    )
    if len(part.tails) < len(tails) or not now.bears_out(part):
        return
    header: JsonObject = {"kind": "part", "schema": SCHEMA, "sweep": plan.id, "planned": plan.num_trials}
    line = atomic.checked({**header, "tails": {**part.tails}, "reduction": reduction.to_json()})
    paths.parts.mkdir(mode=0o700, exist_ok=True)
    try:
        atomic.write(paths.part(start, stop - 1), line)
    except OrcError:
        if paths.parts.exists():  # else a root has cleared it away just now, and needs none any more
            raise


def read(paths: SweepPaths, plan: PlanFile, trials: range) -> PartialReduction | None:
    """The part of `trials`; None if it is missing, damaged, of another plan, or a third user's."""
    try:
        found = atomic.unchecked(_read_own(paths, trials).removesuffix(b"\n"))
        if found is None or (found.get("schema"), found.get("sweep")) != (SCHEMA, plan.id):
            return None
        reduction = Reduction.from_json(found.get("reduction"))
        tails = _tails(found.get("tails"), reduction)
    except (OSError, ValueError):
        return None
    spec = plan.spec
    expected = (plan.num_trials, ((trials.start, trials.stop),), spec.metric.goal, spec.reduce.top)
    known = (found.get("planned"), reduction.spans, reduction.goal, reduction.summary.top)
    return PartialReduction(reduction=reduction, tails=tails) if known == expected else None


def _read_own(paths: SweepPaths, trials: range) -> bytes:
    """The bytes of a part; none of what a third user may have put in its place."""
    with opened(paths.part(trials.start, trials.stop - 1)) as file:
        return file.read() if permissions.is_believed(paths, file.fileno()) else b""


def _tails(value: Json, reduction: Reduction) -> dict[str, int]:
    tails = value if isinstance(value, dict) else {}
    found = {writer: tail for writer, tail in tails.items() if isinstance(tail, int)}
    if found.keys() != reduction.seen.keys():
        raise ValueError(f"expected a checksum of each file that was seen, found {sorted(found)}")
    return found


def is_current(paths: SweepPaths, part: PartialReduction) -> bool:
    """Whether the records, as they are now, bear out what the part says of its trials."""
    return Look(paths).bears_out(part)


def clear(paths: SweepPaths) -> None:
    """Remove every part."""
    shutil.rmtree(paths.parts, ignore_errors=True)
