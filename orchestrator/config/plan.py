"""The plan: every trial of a sweep, before any of them runs.

    plan = SweepPlan(spec=spec, code=digest)      plan.id, plan.num_trials, plan.trial(7), iteration: nothing laid out
    write_plan(plan, paths.plan)                  header and a line a trial, streamed
    PlanFile.open(paths.plan).trial(7)            read back at random, without reading the rest
    plan.pack(7)                                  the trials that train together with trial 7, itself among them

Trial i has parameters and seed that depend on the sweep's seed and on i alone; its id is `<i>-<8 hex>` of their hash.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Self, TypeAlias, cast

import orjson

from orchestrator.config.spec import SweepSpec
from orchestrator.core.atomic import JsonObject, canonical, write_lines
from orchestrator.errors import FolderError

__all__ = ["SCHEMA", "Blocks", "Pack", "PlanFile", "PlannedTrial", "SweepPlan", "blocks", "packs", "write_plan"]

SCHEMA = 1
"""Version of everything in a sweep's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTrial:
    """One configuration with its seed.

    Args:
        index: place in the plan, from 0.
        trial: id, `<index>-<8 hex>`.
        params: parameters by name; nested ones are nested.
        seed: 63-bit.
    """

    index: int
    trial: str
    params: JsonObject
    seed: int

    def to_json(self) -> JsonObject:
        """The trial as its line in the plan."""
        return {"index": self.index, "trial": self.trial, "params": self.params, "seed": self.seed}


_TRIAL_KEYS = {"index", "trial", "params", "seed"}


def _points(spec: SweepSpec) -> Callable[[int], JsonObject]:
    # Imported by whoever plans; reading a plan back does not need it, and must be quick.
    from orchestrator.config.distributions import random_points
    from orchestrator.config.grid import Grid

    if spec.method == "grid":
        return Grid.of(spec.parameters, spec.zip).point
    return random_points(spec.parameters, spec.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """The trials of `spec`, each made when it is asked for.

    Args:
        spec: a faultless spec, as `orchestrator.config.load` reads it.
        code: sha256 of the code snapshot, in hexadecimal digits; part of the sweep's identity.
        packed_by: parameters of which the trials of a pack have equal values; they follow from the code.
    """

    spec: SweepSpec
    code: str
    packed_by: tuple[str, ...] = ()
    _point: Callable[[int], JsonObject] = field(init=False, repr=False, compare=False)
    _seed: Callable[[int, int], int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from orchestrator.config.distributions import trial_seed

        object.__setattr__(self, "_point", _points(self.spec))
        object.__setattr__(self, "_seed", trial_seed)

    @property
    def id(self) -> str:
        """`<name>-<10 hex>`: equal for equal specs (but for sbatch's options) and equal code, and only for those."""
        identity = sha256(self.spec.identity() + b"\0" + self.code.encode())
        return f"{self.spec.name}-{identity.hexdigest()[:10]}"

    @property
    def num_trials(self) -> int:
        """How many trials there are, repeats counted."""
        if self.spec.method == "random":
            assert self.spec.run_cap is not None
            return self.spec.run_cap
        from orchestrator.config.grid import Grid

        size = Grid.of(self.spec.parameters, self.spec.zip).size * self.spec.repeats
        return size if self.spec.run_cap is None else min(size, self.spec.run_cap)

    def trial(self, index: int) -> PlannedTrial:
        """Trial `index`: repeat `index % repeats` of configuration `index // repeats`."""
        params, seed = self._point(index // self.spec.repeats), self._seed(self.spec.seed, index)
        digest = sha256(canonical({"params": params, "seed": seed})).hexdigest()
        return PlannedTrial(index=index, trial=f"{index}-{digest[:8]}", params=params, seed=seed)

    def __iter__(self) -> Iterator[PlannedTrial]:
        return map(self.trial, range(self.num_trials))

    @property
    def blocks(self) -> Blocks:
        """How its trials are dealt."""
        return _dealt(self.spec, self.num_trials)

    def packs(self) -> Iterator[Pack]:
        """Every pack, block by block."""
        for block in range(self.blocks.num_blocks):
            trials = map(self.trial, self.blocks.trials(block, self.num_trials))
            yield from packs(trials, self.packed_by, self.spec.launch.pack)


class Blocks(NamedTuple):
    """How trials are dealt: `num_blocks` blocks of `size` consecutive trials, the last one maybe shorter."""

    size: int
    num_blocks: int

    def trials(self, block: int, num_trials: int) -> range:
        """Indices of the trials of block `block`."""
        return range(block * self.size, min((block + 1) * self.size, num_trials))


def blocks(num_trials: int, trials_per_task: int | None = None, pack: int = 1) -> Blocks:
    """Blocks of `trials_per_task`; None makes at most 100 blocks, of at least `pack` trials."""
    size = trials_per_task or max(pack, -(-num_trials // 100))
    return Blocks(size, -(-num_trials // size))


def _dealt(spec: SweepSpec, num_trials: int) -> Blocks:
    return blocks(num_trials, spec.launch.trials_per_task, spec.launch.pack)


Pack: TypeAlias = "tuple[int, ...]"
"""Indices of the trials that train together, each at its place."""


def packs(trials: Iterable[PlannedTrial], packed_by: Iterable[str], most: int) -> list[Pack]:
    """The packs of a block, in the order of their first trials.

    Trials with equal parameters of the names `packed_by` are gathered in their order, `most` to a pack.
    """
    found: list[list[int]] = []
    fillable: dict[bytes, list[int]] = {}
    for trial in trials:
        key = canonical({name: trial.params[name] for name in packed_by if name in trial.params})
        if len(fillable.get(key, range(most))) >= most:
            fillable[key] = []
            found.append(fillable[key])
        fillable[key].append(trial.index)
    return list(map(tuple, found))


def _lines(plan: SweepPlan) -> Iterator[bytes]:
    header: JsonObject = {"kind": "plan", "schema": SCHEMA, "sweep": plan.id, "num_trials": plan.num_trials}
    packed_by: JsonObject = {"packed_by": [*plan.packed_by]} if plan.spec.launch.pack > 1 else {}
    yield orjson.dumps({**header, "code": plan.code, **packed_by, "spec": plan.spec.to_json()}) + b"\n"
    for trial in plan:
        yield orjson.dumps(trial.to_json()) + b"\n"


def write_plan(plan: SweepPlan, path: Path) -> None:
    """Write `plan` to `path`, whole or not at all, in flat memory.

    Raises:
        OrcError: `path` can't be written.
    """
    write_lines(path, _lines(plan))


class PlanFile:
    """A plan on disk. Lines stand in the order of their index, so a trial is found by bisection of the file's bytes.

    Attributes:
        id: the sweep's id.
        num_trials: how many trials there are.
        code: sha256 of the code snapshot.
        spec: what was planned.
        packed_by: parameters of which the trials of a pack have equal values.
    """

    __slots__ = ("_data", "_first", "_packs", "_path", "code", "id", "num_trials", "packed_by", "spec")

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self._path, self._data = path, data
        self._packs: tuple[int, list[Pack]] = -1, []
        self._first = data.find(b"\n") + 1
        header = self._object(0, self._first)
        if header.get("kind") != "plan":
            raise FolderError(f"{path}: not a plan: its first line is no header of kind 'plan'")
        if header.get("schema") != SCHEMA:
            raise FolderError(
                f"{path}: schema {header.get('schema')!r}, this version reads {SCHEMA}: use the version that wrote it"
            )
        try:
            self.id, self.code = str(header["sweep"]), str(header["code"])
            self.num_trials = int(cast("int", header["num_trials"]))
            self.spec = SweepSpec.from_json(cast("JsonObject", header["spec"]))
            self.packed_by = tuple(map(str, cast("list[str]", header.get("packed_by", []))))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(f"its header lacks or garbles {error}") from error
        self._check_end()

    @classmethod
    def open(cls, path: Path) -> Self:
        """The plan at `path`; opening costs the same for ten trials and for a million.

        Raises:
            FolderError: it is missing, can't be read, is of another schema, or has been cut off.
        """
        try:
            with path.open("rb") as file:
                return cls(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            raise FolderError(f"{path}: no such plan: {path.parent} is not the folder of a sweep") from None
        except ValueError:
            raise FolderError(f"{path}: the plan is empty; delete the folder and submit again") from None
        except OSError as error:
            raise FolderError(f"{path}: can't be read: {error.strerror}") from error

    def trial(self, index: int) -> PlannedTrial:
        """Trial `index`.

        Raises:
            FolderError: the file's lines are not a plan's.
            IndexError: there is no such trial.
        """
        if not 0 <= index < self.num_trials:
            raise IndexError(f"{self._path}: no trial {index}, there are {self.num_trials}")
        low, high = self._first, len(self._data)
        while low < high:
            start = max(low, self._data.rfind(b"\n", low, (low + high) // 2) + 1)
            end = self._data.find(b"\n", start) + 1
            trial = self._trial(start, end)
            if trial.index == index:
                return trial
            low, high = (end, high) if trial.index < index else (low, start)
        raise self._damaged(f"trial {index} has no line")

    def trials(self) -> Iterator[PlannedTrial]:
        """Every trial, in order.

        Raises:
            FolderError: as `trial`.
        """
        start = self._first
        for index in range(self.num_trials):
            end = self._data.find(b"\n", start) + 1
            trial = self._trial(start, end)
            if trial.index != index:
                raise self._damaged(f"where trial {index} is expected, there is {trial.index}")
            yield trial
            start = end

    @property
    def blocks(self) -> Blocks:
        """How its trials are dealt."""
        return _dealt(self.spec, self.num_trials)

    def pack(self, index: int) -> Pack:
        """The trials that train together with trial `index`, itself among them; without packs itself alone.

        Raises:
            FolderError, IndexError: as `trial`.
        """
        most = self.spec.launch.pack
        if most == 1:
            return (index,)
        block = index // self.blocks.size
        if self._packs[0] != block:
            trials = map(self.trial, self.blocks.trials(block, self.num_trials))
            self._packs = block, packs(trials, self.packed_by, most)
        return next(pack for pack in self._packs[1] if index in pack)

    def _object(self, start: int, end: int) -> JsonObject:
        try:
            value = orjson.loads(self._data[start:end])
        except ValueError as error:
            raise self._damaged(f"no JSON at byte {start}: {error}") from error
        if not isinstance(value, dict):
            raise self._damaged(f"no JSON object at byte {start}")
        return value

    def _trial(self, start: int, end: int) -> PlannedTrial:
        line = self._object(start, end)
        if not isinstance(line.get("index"), int) or line.keys() != _TRIAL_KEYS:
            raise self._damaged(f"no trial at byte {start}")
        return PlannedTrial(**line)  # type: ignore[arg-type]  # as Trial.to_json wrote it

    def _check_end(self) -> None:
        if self._data[-1:] != b"\n":
            raise self._damaged("its last line is cut off")
        last = self._data.rfind(b"\n", 0, len(self._data) - 1) + 1
        count = self._trial(last, len(self._data)).index + 1 if last else 0
        if count != self.num_trials:
            raise self._damaged(f"it holds {count} of its {self.num_trials} trials")

    def _damaged(self, what: str) -> FolderError:
        return FolderError(
            f"{self._path}: the plan is damaged: {what}; restore the file, or submit into another folder"
        )
