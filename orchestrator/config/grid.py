"""The grid: every point of a search space of finitely many, and the i-th without those before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from orchestrator.config.distributions import Path, infer, leaves, nest, number
from orchestrator.core.atomic import Json, JsonObject

__all__ = ["Axis", "Grid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One parameter of a grid, or several that advance together: `count` places, `at(k)` the values of place k."""

    paths: tuple[Path, ...]
    count: int
    at: Callable[[int], tuple[Json, ...]]


def _levels(config: JsonObject) -> tuple[int, Callable[[int], Json]]:
    """How many values a parameter goes through, and the k-th."""
    name = infer(config)
    if name == "constant":
        return 1, lambda _: config["value"]
    if name == "categorical":
        values = cast("list[Json]", config["values"])
        return len(values), values.__getitem__
    low, high = number(config, "min"), number(config, "max")
    if name == "int_uniform":
        return int(high - low + 1), lambda k: int(low) + k
    assert name == "q_uniform", config
    return _steps(low, high, cast("float", config.get("q", 1)))


def _steps(low: float, high: float, step: float) -> tuple[int, Callable[[int], Json]]:
    from decimal import ROUND_CEILING, Decimal

    first, stride = Decimal(repr(low)), Decimal(repr(step))
    count = max(1, int(((Decimal(repr(high)) - first) / stride).to_integral_value(ROUND_CEILING)))
    if isinstance(low, int) and isinstance(step, int):
        return count, lambda k: low + k * step
    return count, lambda k: float(first + k * stride)


def _axis(group: Sequence[tuple[Path, JsonObject]]) -> Axis:
    counts, places = zip(*(_levels(config) for _, config in group), strict=True)
    assert len(set(counts)) == 1, group
    return Axis(
        paths=tuple(path for path, _ in group), count=counts[0], at=lambda k: tuple(place(k) for place in places)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The Cartesian product of axes, the last one fastest; never laid out in memory."""

    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, parameters: JsonObject, zipped: Sequence[Sequence[str]] = ()) -> Grid:
        """The grid of faultless `parameters`, in the order of their paths, so that it does not depend on the file's.

        Args:
            parameters: as in a sweep file, all of them `ENUMERABLE`.
            zipped: groups of dotted paths, each of as many values as the others of its group; a group stands where the
                first of its paths does.
        """
        ordered = sorted(leaves(parameters), key=lambda leaf: leaf[0])
        group_of = {name: tuple(group) for group in zipped for name in group}
        groups: dict[Path, list[tuple[Path, JsonObject]]] = {}
        for path, config in ordered:
            name = ".".join(path)
            groups.setdefault(group_of.get(name, (name,)), []).append((path, config))
        return cls(axes=tuple(map(_axis, groups.values())))

    @property
    def size(self) -> int:
        """How many configurations there are."""
        return math.prod(axis.count for axis in self.axes)

    def point(self, index: int) -> JsonObject:
        """Configuration `index`, in steps proportional to the number of parameters."""
        values: JsonObject = {}
        for axis in reversed(self.axes):
            index, place = divmod(index, axis.count)
            for path, value in zip(axis.paths, axis.at(place), strict=True):
                nest(values, path, value)
        return values
