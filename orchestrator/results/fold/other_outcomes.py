"""Other outcomes: where the outcomes are that do not count, of trials that have more than one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from orchestrator.core.atomic import Json, JsonObject

__all__ = ["OtherOutcomes"]


class OtherOutcomes:
    """Trial -> places of its outcomes besides the kept one; and which trials have outcomes that are not equal.

    A sweep of which everything was done twice has one rival a trial, so that one is kept at the cost of an integer.
    """

    __slots__ = ("_more", "_one", "unequal")

    def __init__(self) -> None:
        self._one: dict[int, int] = {}
        self._more: dict[int, set[int]] = {}
        self.unequal: set[int] = set()
        """Trials with outcomes that may differ in more than where they are."""

    def add(self, trial: int, where: int) -> None:
        """An outcome that does not count; again as often as you like."""
        if self._one.setdefault(trial, where) != where:
            self._more.setdefault(trial, set()).add(where)

    def of(self, trial: int) -> set[int]:
        """The places of a trial."""
        one = self._one.get(trial)
        return set() if one is None else {one, *self._more.get(trial, ())}

    def __contains__(self, rival: tuple[int, int]) -> bool:
        trial, where = rival
        return self._one.get(trial) == where or where in self._more.get(trial, ())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Every (trial, place)."""
        yield from self._one.items()
        for trial, places in self._more.items():
            yield from ((trial, where) for where in places)

    def join(self, other: OtherOutcomes) -> None:
        """Take over those of another table."""
        for trial, where in other:
            self.add(trial, where)
        self.unequal |= other.unequal

    def to_json(self) -> JsonObject:
        """As plain JSON: flat, for there may be many."""
        unequal: list[Json] = list(self.unequal)
        return {"places": [number for pair in self for number in pair], "unequal": unequal}

    @classmethod
    def from_json(cls, value: JsonObject, trials: range) -> OtherOutcomes:
        """Those of some trials, of which `value` is the `to_json`."""
        found = cls()
        flat = cast("list[int]", value["places"])
        for trial, where in zip(flat[::2], flat[1::2], strict=True):
            if trial in trials:
                found.add(trial, where)
        found.unequal = _within(cast("Iterable[int]", value["unequal"]), trials)
        return found


def _within(trials: Iterable[int], wanted: range) -> set[int]:
    return {trial for trial in trials if trial in wanted}
