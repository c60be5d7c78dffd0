"""What a set of samples comes to beyond a mean of theirs, from the exact Summaries of per-sample values.

    trial.validate(losses, val_set, derived={"rmse": metrics.rmse, "r2": metrics.r2})

Each takes the Summaries of a validation by name, and reads those that `training.losses` has named. The sums in a
Summary are exact, and what is made of them is rounded once at the end: the same bits on any number of ranks.

All are NaN where a value was NaN or infinite, and where they are not defined, as an R² of equal targets. For values of
other names give these: `partial(metrics.rmse, square="error2")`, or a function of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from orchestrator.stats import exact
from orchestrator.stats.summary import Summary

__all__ = [
    "Derived",
    "Summaries",
    "calibration_error",
    "mae",
    "mape",
    "mean",
    "perplexity",
    "r2",
    "rmse",
    "wmape",
    "zero_targets",
]

Summaries: TypeAlias = Mapping[str, Summary]
Derived: TypeAlias = "Callable[[Summaries], float]"


def _found(summaries: Summaries, name: str) -> Summary:
    if name not in summaries:
        raise ValueError(f"expected values named {name!r} from losses, found {', '.join(sorted(summaries)) or 'none'}")
    return summaries[name]


def _is_whole(*found: Summary) -> bool:
    """Whether there are values, and all are finite."""
    return all(one.count and not one.num_diverged for one in found)


def _sum(of: Summary) -> int:
    """The weighted sum, in units of 2**-1074."""
    return of.total + of.product_excess


def _weight(of: Summary) -> int:
    """The sum of the weights, in units of 2**-1074."""
    return (of.count << exact.UNIT_SHIFT) + of.weight_excess


def _ratio(upper: Summary, lower: Summary) -> float:
    if not _is_whole(upper, lower) or not _sum(lower):
        return math.nan
    return exact.quotient(_sum(upper), _sum(lower))


def mean(summaries: Summaries, name: str) -> float:
    """The mean of the values of one name, correctly rounded."""
    of = _found(summaries, name)
    return exact.quotient(_sum(of), _weight(of)) if _is_whole(of) and _weight(of) else math.nan


# Numbers


def rmse(summaries: Summaries, *, square: str = "_square") -> float:
    """Root of the mean squared error, correctly rounded from the squared errors."""
    of = _found(summaries, square)
    if not _is_whole(of) or not _weight(of):
        return math.nan
    return exact.root(_sum(of) * _weight(of), _weight(of))


def mae(summaries: Summaries, *, absolute: str = "_absolute") -> float:
    """Mean absolute error, correctly rounded from the absolute errors."""
    return mean(summaries, absolute)


def mape(summaries: Summaries, *, relative: str = "_relative", nonzero: str = "_nonzero") -> float:
    """Mean absolute percentage error as a fraction, 0.1 for 10%: of the targets that are not 0."""
    return _ratio(_found(summaries, relative), _found(summaries, nonzero))


def wmape(summaries: Summaries, *, absolute: str = "_absolute", magnitude: str = "_magnitude") -> float:
    """Weighted mean absolute percentage error as a fraction: the sum of absolute errors over that of |targets|."""
    return _ratio(_found(summaries, absolute), _found(summaries, magnitude))


def zero_targets(summaries: Summaries, *, zero: str = "_zero") -> float:
    """How many targets were 0, which `mape` leaves out."""
    of = _found(summaries, zero)
    return exact.quotient(of.total, exact.ONE) if _is_whole(of) else math.nan


def r2(summaries: Summaries, *, square: str = "_square", target: str = "_target") -> float:
    """Coefficient of determination, 1 - sum (target - prediction)² / sum (target - mean target)², correctly rounded.

    Raises:
        ValueError: the values are weighted, or the targets are not there, as with several targets a sample.
    """
    errors, targets = _found(summaries, square), _found(summaries, target)
    if errors.weight_excess or errors.product_excess:
        raise ValueError('r2 is not defined here for samples that have weights: leave out "weight"')
    # n * sum (t - mean)² = n * sum t² - (sum t)², here without any rounding.
    spread = targets.count * targets.squares - targets.total * targets.total
    if not _is_whole(errors, targets) or not spread:
        return math.nan
    return exact.quotient(spread - (targets.count * errors.total << exact.UNIT_SHIFT), spread)


# Classes


def perplexity(summaries: Summaries, *, loss: str = "loss") -> float:
    """The exponential of the mean cross entropy, which is in nats; infinite beyond float64."""
    try:
        return math.exp(mean(summaries, loss))
    except OverflowError:
        return math.inf


def calibration_error(summaries: Summaries, *, gaps: Iterable[str] | None = None) -> float:
    """Expected calibration error: the mean over samples of how far accuracy and confidence of their bin are apart.

    Guo et al. 2017, On calibration of modern neural networks, ICML, equation 3; correctly rounded from the confidences.

    Args:
        summaries: of the values of `losses.calibration`.
        gaps: their names; None for all that begin with "_gap_".
    """
    names = [name for name in summaries if name.startswith("_gap_")] if gaps is None else list(gaps)
    found = [_found(summaries, name) for name in names or ["_gap_00"]]
    if not _is_whole(*found) or not _weight(found[0]):
        return math.nan
    return exact.quotient(sum(abs(_sum(one)) for one in found), _weight(found[0]))
