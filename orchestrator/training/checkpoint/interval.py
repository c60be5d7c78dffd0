"""When a checkpoint is due: as the sweep says, or as the cost of saving and the chance of a failure say.

    pace = SaveInterval(clock=time.monotonic)               or every_s=600.0, or every_steps=1000
    if pace.due(step):                              cheap enough for every step
        pace.begun(step)
        ...
        pace.measured(cost_s=0.004, whole_s=0.05)

By default the interval is the one that loses least work to saving and to failures together (Young 1974; Daly 2006),
for the stated mean time between failures, or for the age of the trial while that is less: a trial of a minute that is
killed was on a machine where failures come by the minute, and a trial of a day has shown that they don't.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["MTBF_S", "SHORTEST_S", "SaveInterval", "interval_s"]

MTBF_S = 3600.0
"""Mean time between failures that is assumed, in seconds: machines that preempt are why checkpoints are written."""
SHORTEST_S = 2.0
"""The default never saves more often than this, so trials of a second don't save at all."""
_MOST_COST = 0.05
"""The largest part of a young trial's time that saving may hold it up."""
_MOST_WRITING = 0.2
"""The largest part of the time that a save may be under way: a slow file system is not pressed further."""
_FIRST_COST_S = 0.005
"""What a save is taken to cost until one has been measured."""


def optimum_s(cost_s: float, mtbf_s: float) -> float:
    """The time between two saves that loses least, in seconds.

    Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
    Systems 22 (2006), equation 37; its first term is Young's sqrt(2 C M), from which it differs by a tenth where C is
    M / 20.

    Args:
        cost_s: what one save holds the training up, C.
        mtbf_s: mean time between failures, M.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    half = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(half) / 3 + half / 9) - cost_s


def interval_s(cost_s: float, whole_s: float, age_s: float, mtbf_s: float = MTBF_S) -> float:
    """The time from the start of one save to that of the next, in seconds.

    It is `optimum_s` for the smaller of `mtbf_s` and the trial's age, within these bounds: at least `SHORTEST_S`; at
    least five times `whole_s`; a young trial is held up for at most a twentieth of its time.

    Args:
        cost_s: what one save holds the training up.
        whole_s: from the start of a save until it is durable; most of it passes beside the training.
        age_s: how long the trial has been running.
        mtbf_s: mean time between failures.
    """
    # Young's formula spends C / W = sqrt(C / 2M) of the time on saving.
    least_mtbf_s = cost_s / (2 * _MOST_COST**2)
    mean_s = min(mtbf_s, max(age_s, least_mtbf_s))
    optimum = optimum_s(cost_s, mean_s) if mean_s > 0 else 0.0
    return max(optimum, whole_s / _MOST_WRITING, SHORTEST_S)


class SaveInterval:
    """When the next save is due. With neither `every_s` nor `every_steps` it follows `interval_s`.

    Args:
        clock: seconds, monotonic; the trial's age counts from now.
        every_s: seconds from the start of one save to that of the next.
        every_steps: steps between two saves.
        mtbf_s: mean time between failures, in seconds.
        agree: turns this process's wish into what all ranks do. Clocks differ, so with several ranks it must give
            each of them rank 0's wish. It is called at every step by every rank.

    Raises:
        ValueError: a number that is not positive, or both `every_s` and `every_steps`.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        every_s: float | None = None,
        every_steps: int | None = None,
        mtbf_s: float = MTBF_S,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        if every_s is not None and every_steps is not None:
            raise ValueError("a checkpoint is due every so many seconds or every so many steps, not both")
        for given in (every_s, every_steps, mtbf_s):
            if given is not None and not given > 0:
                raise ValueError(f"the time and the steps between checkpoints are above 0, not {given}")
        self._clock = clock
        self._every_s = every_s
        self._every_steps = every_steps
        self._mtbf_s = mtbf_s
        self._agree = agree
        self._start_s = self._last_s = clock()
        self._last_step = 0
        self._cost_s, self._whole_s = _FIRST_COST_S, 0.0
        self._is_measured = False
        self._due_s = self._next()

    @property
    def interval_s(self) -> float | None:
        """The present time between two saves, in seconds; None when steps decide."""
        return None if self._every_steps is not None else self._due_s - self._last_s

    @property
    def due_s(self) -> float:
        """When the next save is due, by the clock; that of the last one when steps decide."""
        return self._last_s if self._every_steps is not None else self._due_s

    def resumed(self, step: int) -> None:
        """The trial goes on after `step`, whose checkpoint there is already."""
        self._last_step = step

    def due(self, step: int, *, busy: bool = False) -> bool:
        """Whether a save is to begin at this safe point, after `step` steps.

        Args:
            step: optimizer steps so far.
            busy: the last save is still under way, so it can't.
        """
        return self._agree(not busy and self._wants(step))

    def _wants(self, step: int) -> bool:
        if self._every_steps is not None:
            return step - self._last_step >= self._every_steps
        return self._clock() >= self._due_s

    def begun(self, step: int) -> None:
        """A save of `step` begins, due or not."""
        self._last_step = step
        self._last_s = self._clock()
        self._due_s = self._next()

    def measured(self, cost_s: float, whole_s: float) -> None:
        """What the last save took: `cost_s` out of the training's time, `whole_s` until it was durable."""
        self._cost_s = self._known(self._cost_s, cost_s)
        self._whole_s = self._known(self._whole_s, whole_s)
        self._is_measured = True
        self._due_s = self._next()

    def _known(self, before: float, now: float) -> float:
        # A busy moment, or the first use of memory, makes a save dearer; nothing makes it cheaper than it is.
        return min(now, (before + now) / 2) if self._is_measured else now

    def _next(self) -> float:
        if self._every_s is not None:
            return self._last_s + self._every_s
        age_s = self._last_s - self._start_s
        return self._last_s + interval_s(self._cost_s, self._whole_s, age_s, self._mtbf_s)
