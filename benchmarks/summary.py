"""What exactness costs: a Summary beside the shortest code that gives some of its numbers.

    python benchmarks/summary.py [--runs 7] [--trials 1000000]

Of samples: the alternative is `math.fsum` over the values and over their squares, and a sort, for 360 samples (a
validation pass of a small problem); with `numpy.quantile` in place of the sort for a million. It gives a sum and a sum
of squares that can't be merged, and no keys. Of merging: the counts, sums and squares added as floats, the two lists of
best values sorted together, the histograms added as Counters. Of a million trials: the fold by `merge`, of fewer and
scaled. Each way in turn, medians.
"""

from __future__ import annotations

import argparse
import functools
import math
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from orchestrator.stats.summary import Summary

FEW = 360
MANY = 1_000_000
TOP = 100
FOLDED = 5_000


@dataclass(frozen=True)
class Row:
    """One line of the table: two ways, each called `calls` times a run; seconds of the second count `scale` times."""

    name: str
    ours: Callable[[], object]
    alternative: Callable[[], object]
    calls: int
    scale: float = 1.0


def fsums_and_sort(values: list[float]) -> tuple[float, float, list[float]]:
    return math.fsum(values), math.fsum([x * x for x in values]), sorted(values)


def fsums_and_sort_of_array(values: torch.Tensor | np.ndarray) -> tuple[float, float, list[float]]:
    return fsums_and_sort(values.tolist())


def fsums_and_quantiles(values: np.ndarray) -> tuple[float, float, np.ndarray]:
    quantiles = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
    return math.fsum(values.tolist()), math.fsum((values * values).tolist()), quantiles


@dataclass(frozen=True)
class Floats:
    """A summary in floats, whose merge depends on order and grouping."""

    count: int
    total: float
    squares: float
    low: Sequence[tuple[float, int]]
    high: Sequence[tuple[float, int]]
    buckets: Counter[int]

    def merge(self, other: Floats) -> Floats:
        """What is known of both, to rounding."""
        return Floats(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            sorted([*self.low, *other.low])[:TOP],
            sorted([*self.high, *other.high])[:TOP],
            self.buckets + other.buckets,
        )


def as_floats(summary: Summary) -> Floats:
    mean, std = summary.compute().mean or 0.0, summary.compute().std or 0.0
    squares = (std * std + mean * mean) * summary.count
    return Floats(
        summary.count, mean * summary.count, squares, summary.low, summary.high, Counter(dict(summary.buckets))
    )


def singles(values: list[float]) -> Iterator[Summary]:
    return (Summary.of(value, key=key) for key, value in enumerate(values))


def folded(values: list[float]) -> Summary:
    return functools.reduce(Summary.merge, singles(values), Summary.empty())


def rows(num_trials: int) -> list[Row]:
    random = np.random.default_rng(0)
    few, many = random.lognormal(size=FEW), random.lognormal(size=MANY)
    single, with_zeros = torch.tensor(few, dtype=torch.float32), torch.relu(torch.tensor(random.normal(size=FEW)))
    a, b = (Summary.of_samples(random.lognormal(size=FEW), first_key=key, top=TOP) for key in (0, FEW))
    a, b = Summary.from_json(a.to_json()), Summary.from_json(b.to_json())
    floats = as_floats(a), as_floats(b)
    listed, trials = few.tolist(), random.lognormal(size=num_trials).tolist()
    return [
        Row("360 samples, float32 tensor", *_both(Summary.of_samples, fsums_and_sort_of_array, single), 300),
        Row("360 samples, float64 array", *_both(Summary.of_samples, fsums_and_sort_of_array, few), 300),
        Row("360 samples, half of them 0", *_both(Summary.of_samples, fsums_and_sort_of_array, with_zeros), 300),
        Row("360 samples, list", *_both(Summary.of_samples, fsums_and_sort, listed), 300),
        Row("360 samples and their statistics", *_both(_statistics, fsums_and_sort_of_array, single), 300),
        Row(
            "the mean alone of 360 samples", *_both(Summary.mean_of, lambda t: math.fsum(t.tolist()) / FEW, single), 300
        ),
        Row("1,000,000 samples, float64 array", *_both(Summary.of_samples, fsums_and_quantiles, many), 1),
        Row("a merge of two, top 100", lambda: a.merge(b), lambda: floats[0].merge(floats[1]), 300),
        Row(
            f"{num_trials:,} trials, each `of`, and `merge_all`",
            lambda: Summary.merge_all(singles(trials)),
            lambda: folded(trials[:FOLDED]),
            1,
            num_trials / min(FOLDED, num_trials),
        ),
    ]


def _both(
    ours: Callable[..., object], alternative: Callable[..., object], values: object
) -> tuple[Callable[[], object], Callable[[], object]]:
    return functools.partial(ours, values), functools.partial(alternative, values)


def _statistics(values: torch.Tensor) -> object:
    return Summary.of_samples(values).compute()


def seconds(work: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def shown(found: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if found >= size:
            return f"{found / size:.2f} {unit}"
    return f"{found * 1e6:.1f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description="What exactness costs.")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--trials", type=int, default=1_000_000)
    given = parser.parse_args()
    print("| what | Summary, median | min | alternative, median | min | ratio |\n| --- |" + " ---: |" * 5)
    for row in rows(given.trials):
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pairs = [
            (seconds(row.ours, row.calls), seconds(row.alternative, row.calls) * row.scale) for _ in range(given.runs)
        ]
        ours, others = zip(*pairs, strict=True)
        medians = statistics.median(ours), statistics.median(others)
        cells = (shown(medians[0]), shown(min(ours)), shown(medians[1]), shown(min(others)))
        print(f"| {row.name} | {' | '.join(cells)} | {medians[0] / medians[1]:.2f} |", flush=True)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    print(f"memory that the last row added to the process: {grown_mb:.1f} MB")


if __name__ == "__main__":
    main()
