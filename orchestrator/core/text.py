"""How messages name what was found, and guess what was meant.

describe("10")                          "the string '10'"
did_you_mean("metod", ["method"])       "; did you mean 'method'?"
spans([0, 1, 2, 5])                     "0 to 2, 5"
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["describe", "did_you_mean", "nearest", "spans"]

_SHOWN = 60


def describe(value: object) -> str:
    """What `value`, read from YAML, is called in a message; long strings are cut."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    if isinstance(value, str):
        return f"the string {value if len(value) <= _SHOWN else value[:_SHOWN] + chr(0x2026)!r}"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    return "a list" if value else "an empty list"


def spans(numbers: Iterable[int]) -> str:
    """Ascending whole numbers, those that follow each other as a span."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join(" to ".join(map(str, span)) for span in found)


def nearest(word: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The choice that looks most like `word`, if any is alike enough; `cutoff` as in difflib."""
    # Costs 3 ms, and is wanted only when something is wrong.
    from difflib import get_close_matches

    found = get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """The end of a message about an unknown word: a guess, or nothing."""
    found = nearest(word, choices) if isinstance(word, str) else None
    return f"; did you mean {found!r}?" if found else ""
