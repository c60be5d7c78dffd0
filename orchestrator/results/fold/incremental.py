"""The incremental best: the best rows and the Summary of all rows, kept up to date by what has changed.

A million rows are gone through once; after that an answer costs what is new. The extremes are exact as long as enough
of the first ones are known; otherwise, as when a kept outcome of a counted trial was replaced, all rows are gone
through again, for a best value or a sum can't be taken out of a summary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import compress
from typing import TYPE_CHECKING, Final, cast

from orchestrator.results.fold.columns import COMPLETE
from orchestrator.stats.summary import Summary

if TYPE_CHECKING:
    from orchestrator.core.atomic import JsonObject
    from orchestrator.results.fold.table import Table

__all__ = ["IncrementalBest"]

_REACH: Final = 32
"""Least number of first rows that are known, so that some may be replaced or more be asked for."""
_BLOCK: Final = 1 << 10
_FEW: Final = 1 << 12
"""Rows up to which a Summary is quicker without NumPy, whose import takes a tenth of a second."""
_MANY: Final = 1 << 16
_IS_COMPLETE: Final = bytes(code == COMPLETE for code in range(256))


@dataclass(frozen=True, slots=True, kw_only=True)
class _First:
    """The first complete rows by (sign * value, row) when `upto` rows had changed; `is_all` if there are no others."""

    pairs: list[tuple[float, int]]
    is_all: bool
    upto: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sum:
    """The Summary of the complete rows when `upto` rows had changed and `num_replaced` outcomes been replaced."""

    summary: Summary
    num_replaced: int
    upto: int = 0


class IncrementalBest:
    """What is worked out of a table.

    Args:
        table: it may change between the calls.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._first: dict[float, _First] = {}
        self._sum: _Sum | None = None

    def _changed(self) -> list[int]:
        """The rows that have changed since something was first worked out."""
        if self._table.changed is None:
            self._table.changed = []
            self._first, self._sum = {}, None
        return self._table.changed

    # The best

    def best(self, sign: float, top: int) -> list[int]:
        """The `top` complete rows first by (sign * value, row); fewer if there are fewer."""
        changed = self._changed()
        known = self._first.get(sign)
        found = None if known is None else self._renewed(known, sign, changed)
        if found is None or not (found.is_all or len(found.pairs) >= top):
            reach = max(_REACH, 2 * top)
            pairs = self._scan(sign, reach)
            found = _First(pairs=pairs, is_all=len(pairs) < reach, upto=len(changed))
        self._first[sign] = found
        return [row for _, row in found.pairs[:top]]

    def _renewed(self, known: _First, sign: float, changed: list[int]) -> _First:
        """`known` with what has changed since; of rows beyond the last one known, nothing is known."""
        if known.upto == len(changed):
            return known
        rows, new = self._table.rows, set(changed[known.upto :])
        pairs = [(sign * rows.values[row], row) for row in new if rows.status[row] == COMPLETE]
        if not known.is_all:
            last = known.pairs[-1] if known.pairs else (-math.inf, 0)
            pairs = [pair for pair in pairs if pair <= last]
        pairs = sorted(pairs + [pair for pair in known.pairs if pair[1] not in new])
        most = max(_REACH, len(known.pairs))
        return _First(pairs=pairs[:most], is_all=known.is_all and len(pairs) <= most, upto=len(changed))

    def _scan(self, sign: float, reach: int) -> list[tuple[float, int]]:
        """The first rows, looking closely only at blocks whose least value can be among them."""
        rows, found, bar = self._table.rows, list[tuple[float, int]](), math.inf
        least = min if sign > 0 else max
        for start in range(0, len(rows.status), _BLOCK):
            chosen = rows.status[start : start + _BLOCK].tobytes().translate(_IS_COMPLETE)
            values = list(compress(rows.values[start : start + _BLOCK].tolist(), chosen))
            # Of equal values the earlier row comes first, so a block that only ties has nothing to offer.
            if values and (len(found) < reach or sign * least(values) < bar):
                pairs = zip(
                    (sign * value for value in values), compress(range(start, start + _BLOCK), chosen), strict=True
                )
                found = nsmallest(reach, [*found, *(pair for pair in pairs if pair[0] <= bar)])
                bar = found[-1][0] if len(found) == reach else bar
        return found

    # The Summary

    def summary(self, top: int) -> tuple[Summary, bool]:
        """The Summary of the complete rows under their trials, and whether many rows had to be gone through for it."""
        changed = self._changed()
        found = self._renewed_sum(changed) if self._sum is not None and self._sum.summary.top == top else None
        anew = found is None
        if found is None:
            found = self._summed(top)
        self._sum = _Sum(summary=found, num_replaced=self._table.num_replaced, upto=len(changed))
        return found, anew and found.count > _FEW

    def _renewed_sum(self, changed: list[int]) -> Summary | None:
        known = self._sum
        if known is None or known.num_replaced != self._table.num_replaced:
            return None
        rows, first = self._table.rows, self._table.trials.start
        new = [row for row in set(changed[known.upto :]) if rows.status[row] == COMPLETE]
        if len(new) > _FEW:
            return None
        top = known.summary.top
        return Summary.merge_all(
            (Summary.of(rows.values[row], key=first + row, top=top) for row in new), start=known.summary
        )

    def _summed(self, top: int) -> Summary:
        rows, first = self._table.rows, self._table.trials.start
        if rows.count(COMPLETE) > _FEW:
            return self._summed_at_once(top)
        ones = (Summary.of(rows.values[trial - first], key=trial, top=top) for trial in rows.trials(COMPLETE))
        return Summary.merge_all(ones, start=Summary.empty(top=top))

    def _summed_at_once(self, top: int) -> Summary:
        import numpy as np

        rows, parts = self._table.rows, []
        for start in range(0, len(rows.status), _MANY):
            values = np.array(rows.values[start : start + _MANY])
            others = np.frombuffer(rows.status[start : start + _MANY], np.uint8) != COMPLETE
            values[others] = np.nan
            part = Summary.of_samples(values, first_key=self._table.trials.start + start, top=top)
            parts.append(replace(part, num_diverged=part.num_diverged - int(others.sum())))
        return Summary.merge_all(parts)

    # To and from the cache

    def to_json(self) -> JsonObject:
        """What is known for certain of the rows as they are now."""
        changed = self._changed()
        for sign in (1.0, -1.0):
            self.best(sign, _REACH)
        known = None if self._sum is None else self._renewed_sum(changed)
        return {
            "first": [[sign, one.is_all, [[*pair] for pair in one.pairs]] for sign, one in self._first.items()],
            "summary": None if known is None else known.to_json(),
        }

    def take_json(self, value: JsonObject) -> None:
        """Take over what `to_json` gave for a table with these rows."""
        self._changed()
        for sign, is_all, pairs in cast("list[tuple[float, bool, list[list[float]]]]", value["first"]):
            self._first[sign] = _First(pairs=[(one, int(row)) for one, row in pairs], is_all=is_all)
        if value["summary"] is not None:
            self._sum = _Sum(summary=Summary.from_json(value["summary"]), num_replaced=self._table.num_replaced)
