"""Plain JSON into the parts of a monoid: each is checked, and what is wrong with it is said.

    found = with_keys("a top", value, schema=1, keys={"n", "entries"})
    n = whole("n", found["n"], least=1)

Every function raises ValueError with the name of the part, what was found and what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING

from orchestrator.stats import exact
from orchestrator.stats.topk import LEAST_KEY, Pair, checked

if TYPE_CHECKING:
    from orchestrator.core.atomic import Json, JsonObject

__all__ = ["number", "pairs", "ranked", "whole", "with_keys"]


def with_keys(what: str, value: Json, *, schema: int, keys: Set[str]) -> JsonObject:
    """`value` as an object of this schema with exactly these keys and `schema`; `what` is such as "a summary"."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, found {value!r}")
    if value.get("schema") != schema:
        raise ValueError(f"{what} is read in schema {schema}, found {value.get('schema')!r}")
    known = {"schema", *keys}
    if value.keys() != known:
        lacking, foreign = sorted(known - value.keys()), sorted(value.keys() - known)
        raise ValueError(f"{what} must have its own keys and no others: missing {lacking}, unknown {foreign}")
    return value


def whole(name: str, value: Json, least: int = 0) -> int:
    """`value` as an integer from `least`; True is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer from {least}, found {value!r}")
    return value


def number(name: str, value: Json, unit_shift: int) -> int:
    """`value`, which `exact.text` has written, in units of 2**-unit_shift."""
    try:
        return exact.parse(value, unit_shift)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def pairs(name: str, value: Json) -> Iterator[tuple[Json, Json]]:
    """The items of a list of lists of two."""
    for item in value if isinstance(value, list) else (None,):
        if not isinstance(item, list) or len(item) != 2:
            raise ValueError(f"{name}: expected a list of pairs, found {item!r} in {value!r}")
        yield item[0], item[1]


def ranked(name: str, value: Json) -> Iterator[Pair]:
    """The items of a list of [value, key]."""
    for one, key in pairs(name, value):
        try:
            yield checked(_finite(one), whole("key", key, LEAST_KEY))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _finite(value: Json) -> float:
    try:
        found = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"expected a finite number, found {value!r}")
    return found
