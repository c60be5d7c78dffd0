"""The same checks for a naive summary and for ours: prints the table of docs/summary.md.

    python benchmarks/summary_checks.py

A check is one set of data, looked at in several ways that must not matter: other numbers of ranks, other orders of the
writers' files. The right answer comes from fractions.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import TypeAlias

import naive_summary
from naive_summary import Line

from orchestrator.core import atomic
from orchestrator.core.paths import SweepPaths
from orchestrator.results import records
from orchestrator.results.fold import Fold
from orchestrator.results.records import Status
from orchestrator.stats.summary import Summary

__all__ = ["Answer", "Check", "checks", "rows", "table"]

RANKS = (1, 2, 3, 4, 7)
BATCH = 16

Files: TypeAlias = Sequence[Sequence[Line]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said of a set of values; `image` is all that is known of it, as bytes."""

    count: int
    failed: int
    mean: float
    std: float
    best: int | None
    image: bytes = b""


@dataclass(frozen=True, slots=True)
class Check:
    """A set of data and the answers to it.

    Args:
        name: what is checked.
        right: the right answer.
        naive: that of `naive_summary`, one for each way of looking.
        ours: that of `orchestrator`, likewise.
    """

    name: str
    right: Answer
    naive: list[Answer]
    ours: list[Answer]


# The answers


def of_naive(found: naive_summary.Naive) -> Answer:
    return Answer(found.count, found.failed, found.mean, found.std, found.best, repr(found).encode())


def of_summary(found: Summary) -> Answer:
    numbers = found.compute()
    assert numbers.mean is not None
    assert numbers.std is not None
    image = atomic.canonical(found.to_json())
    return Answer(numbers.count, numbers.failed, numbers.mean, numbers.std, numbers.min_key, image)


def right(values: dict[int, float], failed: int = 0) -> Answer:
    """By fractions, of the values that are finite."""
    finite = {key: Fraction(value) for key, value in values.items() if math.isfinite(value)}
    mean = sum(finite.values()) / Fraction(len(finite))
    variance = sum((value - mean) ** 2 for value in finite.values()) / len(finite)
    with localcontext(prec=60):
        std = float((Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt())
    best = min(finite, key=lambda key: (finite[key], key))
    return Answer(len(finite), failed, float(mean), std, best)


# A validation pass on several ranks


def ours_on_ranks(losses: Sequence[float], world: int) -> Summary:
    """Whole batches are dealt to the ranks; what they have found is merged in a tree."""
    shares = [Summary.empty() for _ in range(world)]
    for batch, first in enumerate(range(0, len(losses), BATCH)):
        part = Summary.of_samples(losses[first : first + BATCH], first_key=first)
        shares[batch % world] = shares[batch % world].merge(part)
    while len(shares) > 1:
        shares = [Summary.merge_all(shares[place : place + 2]) for place in range(0, len(shares), 2)]
    return shares[0]


def on_ranks(name: str, losses: Sequence[float]) -> Check:
    return Check(
        name,
        right(dict(enumerate(losses))),
        [of_naive(naive_summary.validate(losses, world)) for world in RANKS],
        [of_summary(ours_on_ranks(losses, world)) for world in RANKS],
    )


# A sweep with several writers


def outcome(line: Line) -> atomic.JsonObject:
    """A line as a record: what was measured decides its status."""
    payload: atomic.JsonObject = {"value": line.value}
    status = Status.COMPLETE
    if line.value is None or not math.isfinite(line.value):
        status, payload = (Status.FAILED, {"error": "killed"}) if line.value is None else (Status.DIVERGED, {})
    return records.outcome(trial=line.trial, attempt=0, status=status, payload=payload, seconds=1.0)


def ours_from_files(files: Files) -> Summary:
    """The files as record files, in this order of their names, folded."""
    num_trials = 1 + max(line.trial for lines in files for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        paths = SweepPaths(Path(folder))
        paths.records.mkdir()
        for place, lines in enumerate(files):
            writer = f"{place:032x}"
            head: atomic.JsonObject = {"kind": "writer", "writer": writer, "host": "here"}
            paths.record(writer).write_bytes(b"".join(map(atomic.checked, [head, *map(outcome, lines)])))
        fold = Fold(paths, num_trials)
        fold.update()
        return fold.summary(top=10)


def from_files(name: str, files: Files, values: dict[int, float], failed: int = 0) -> Check:
    orders = list(permutations(files))
    return Check(
        name,
        right(values, failed),
        [of_naive(naive_summary.sweep(order)) for order in orders],
        [of_summary(ours_from_files(order)) for order in orders],
    )


def dealt(values: dict[int, float], num_writers: int = 4) -> list[list[Line]]:
    """Lines of writers that took turns."""
    lines = [Line(trial, value) for trial, value in values.items()]
    return [lines[writer::num_writers] for writer in range(num_writers)]


# The checks


def numbers(count: int, *, offset: float = 0.0) -> list[float]:
    draw = random.Random(0)
    return [offset + draw.random() for _ in range(count)]


def checks() -> Iterator[Check]:
    """Every check, data and answers."""
    trials = dict(enumerate(numbers(100)))
    files = dealt(trials)
    yield on_ranks("840 samples, which all these numbers of ranks divide", numbers(840))
    yield on_ranks("100 samples, which 3 and 7 don't divide", numbers(100))
    yield on_ranks("3 samples, fewer than ranks", numbers(3))
    yield on_ranks("840 samples near 1e8", numbers(840, offset=1e8))
    yield from_files("100 trials", files, trials)
    yield from_files("one of them was run twice", [*files[:3], [*files[3], Line(0, trials[0])]], trials)
    yield from_files("one failed, then completed", [*files[:3], [*files[3], Line(0, None)]], trials)
    yield from_files("one has two results that differ", *disagreeing(files, trials))
    yield from_files("one is NaN", dealt(trials | {5: math.nan}), trials | {5: math.nan})
    yield from_files("four are equally good", dealt(trials | ties()), trials | ties())


def ties() -> dict[int, float]:
    return dict.fromkeys((2, 5, 8, 11), 0.001)


def disagreeing(files: Files, trials: dict[int, float]) -> tuple[Files, dict[int, float]]:
    """A trial for which another writer says another value; that of the smaller sha256 of the payload is kept."""
    other = 0.5
    kept = min((trials[0], other), key=lambda value: _sha256({"value": value}))
    return [*files[:3], [*files[3], Line(0, other)]], trials | {0: kept}


def _sha256(payload: atomic.JsonObject) -> bytes:
    from hashlib import sha256

    return sha256(atomic.canonical(payload)).digest()


# The table


def faults(found: Sequence[Answer], correct: Answer) -> list[str]:
    """What is wrong with some answers: in words, a part for each number that is not as it should be."""
    return [
        *(_whole(name, [getattr(one, name) for one in found], getattr(correct, name)) for name in ("count", "failed")),
        *(_off(name, [getattr(one, name) for one in found], getattr(correct, name)) for name in ("mean", "std")),
        *_best([one.best for one in found], correct.best),
    ]


def _whole(name: str, found: Sequence[int], correct: int) -> str:
    if set(found) == {correct}:
        return ""
    return f"{name} {_or(map(str, sorted(set(found))))}, not {correct}"


def _off(name: str, found: Sequence[float], correct: float) -> str:
    if any(map(math.isnan, found)):
        return f"{name} NaN"
    worst = max(abs(value - correct) for value in found)
    return f"{name} off by up to {worst:.1e}" if worst else ""


def _best(found: Sequence[int | None], correct: int | None) -> list[str]:
    if set(found) == {correct}:
        return []
    return [
        f"best trial {_or(map(str, sorted(set(found), key=lambda key: -1 if key is None else key)))}, not {correct}"
    ]


def _or(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def verdict(found: Sequence[Answer], correct: Answer) -> str:
    wrong = [fault for fault in faults(found, correct) if fault]
    num_results = len({one.image for one in found})
    results = "one result" if num_results == 1 else f"{num_results} results"
    return f"{results}: {'; '.join(wrong) or 'right'}"


def rows(found: Iterable[Check]) -> Iterator[tuple[str, str, str]]:
    """Name, verdict on the naive answers, verdict on ours."""
    for check in found:
        yield check.name, verdict(check.naive, check.right), verdict(check.ours, check.right)


def table(found: Iterable[Check]) -> str:
    """The rows as Markdown."""
    lines = [("check", "naive", "ours"), ("---", "---", "---"), *rows(found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(checks()))
