"""Statistics: the numbers that a Summary comes to, correctly rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from orchestrator.stats.topk import Ranked

if TYPE_CHECKING:
    from orchestrator.core.atomic import JsonObject

__all__ = ["QUANTILES", "Statistics"]

QUANTILES: Final = {"p05": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95}
"""Name of each quantile, and its percents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The plain numbers of a `Summary`.

    Of no values, `min`, `max`, their keys, `mean`, `std` and the quantiles are None.

    Args:
        count: finite values.
        min: smallest value.
        max: largest value.
        min_key: its key, the smallest of several.
        max_key: its key, the smallest of several.
        mean: weighted mean, correctly rounded from the exact sums of w and of w * x, each product rounded to float64;
            None too when the weights add up to 0. Without weights, the mean, correctly rounded.
        std: population standard deviation, correctly rounded; every value counts once, whatever its weight.
        sum: sum of the values, whatever their weights, correctly rounded; beyond float64 a text of 17 significant
            digits such as `1.7976931348623157e+309`.
        quantiles: by name (`QUANTILES`). The p-th quantile is the value at position floor(p / 100 * (count - 1)) in
            ascending order (NumPy's method "lower"), to within 0.8% of itself and within min and max, whatever the
            weights.
        diverged: values that were NaN or infinite.
        failed: what gave no value because it failed.
        pruned: what was stopped early and gave no value.
        top: the best values by goal, best first, ties by the smaller key.
        bottom: the worst values by goal, worst first, ties by the smaller key.
    """

    count: int
    min: float | None
    max: float | None
    min_key: int | None
    max_key: int | None
    mean: float | None
    std: float | None
    sum: float | str
    quantiles: Mapping[str, float | None]
    diverged: int
    failed: int
    pruned: int
    top: tuple[Ranked, ...]
    bottom: tuple[Ranked, ...]

    def to_json(self) -> JsonObject:
        """All of it as plain JSON; `top` and `bottom` as objects of value and key."""
        result: JsonObject = {field.name: getattr(self, field.name) for field in fields(self)}
        ranked = {"top": self.top, "bottom": self.bottom}
        return result | {
            "quantiles": dict(self.quantiles),
            **{name: [{"value": one.value, "key": one.key} for one in entries] for name, entries in ranked.items()},
        }
