"""What ranks decide together at a safe point, without waiting for each other there.

    agreement = Agreement(party)
    for step, batch in enumerate(batches):
        ...
        wish = agreement.ask(Wish(notice=noticed, save=is_due), at=step)
        if wish.notice: save and leave              all ranks here, at the same step

A notice reaches the ranks at different moments, and clocks differ; but who saves at another step than the rest spoils
the checkpoint, and who leaves alone kills them. So every rank asks at every safe point: what one wished at step s, all
are told at step s + 1. The reduction between the two runs beside the step. It costs the processors some wake-ups all
the same, so where steps are short only some of them have one; each reduction says when the next one is due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from orchestrator.distributed.rendezvous import RankContext
from orchestrator.errors import OrcError

__all__ = ["Agreement", "OutOfStep", "Wish"]

_MOST_STEPS = 20
"""From one reduction to the next, at most: steps may become slow without warning, and notices wait for so many."""


class OutOfStep(OrcError):
    """Ranks came to a safe point from different steps, so that each would wait for what the others never do."""


class Wish(NamedTuple):
    """What a rank, or any of them, wants.

    Args:
        notice: save and leave.
        save: save and go on.
    """

    notice: bool = False
    save: bool = False


class Agreement:
    """Tells every rank at a safe point what any of them had wished at one before it; alone, at the same one.

    Args:
        party: the ranks.
        every_s: how long from one reduction to the next, about, in seconds; 0 for one at every step.
        clock: seconds, monotonic.
    """

    def __init__(
        self, party: RankContext, *, every_s: float = 0.05, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._group = party.group.process_group
        self._roll = party.roll
        self._every_s = every_s
        self._clock = clock
        self._wish = Wish()
        self._left = 0
        self._gap = 1
        self._asked_s = clock()
        self._words = torch.zeros(5, dtype=torch.int64, device="cpu")
        self._work: dist.Work | None = None
        self._how = dist.AllreduceOptions()
        self._how.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]  # its stubs differ from it

    def ask(self, wish: Wish, at: int) -> Wish:
        """What all ranks agree on here. Every rank must call this at the same safe points.

        Args:
            wish: this rank's. A wish stands until all have been told of it.
            at: which safe point it is, such as the number of steps so far.

        Raises:
            OutOfStep: the ranks were at different ones when they last asked each other.
            RuntimeError: from torch, when a rank is gone or silent; `Membership.blame` says which.
        """
        if self._group is None:
            return wish
        self._wish = Wish(self._wish.notice or wish.notice, self._wish.save or wish.save)
        found = self._told()
        self._left -= 1
        if self._left <= 0:
            self._begin(at)
        return found

    def last(self, at: int) -> Wish:
        """What they agree on when no further safe point follows; waits for all ranks, each of which must call this."""
        if self._group is None:
            return Wish()
        before = self._told()
        self._begin(at)
        after = self._told()
        return Wish(before.notice or after.notice, before.save or after.save)

    def _begin(self, at: int) -> None:
        now = self._clock()
        step_s = (now - self._asked_s) / self._gap
        self._asked_s = now
        wanted = self._every_s / step_s if step_s > 0 else math.inf
        # At most doubled, since the first steps tell little of those that follow. All take the longest gap.
        gap = max(1, math.ceil(min(wanted, 2 * self._gap, _MOST_STEPS)))
        # A maximum of both a number and its negative tells whether all gave the same.
        mine = [self._wish.notice, self._wish.save, at, -at, gap]
        self._words = torch.tensor(mine, dtype=torch.int64, device="cpu")
        assert self._group is not None
        self._work = self._group.allreduce([self._words], self._how)
        self._left = self._gap = 1  # until it is known
        if self._roll is not None:
            self._roll.sign(at)

    def _told(self) -> Wish:
        """What came of the last reduction, the first time that this is asked."""
        if self._work is None:
            return Wish()
        self._work.wait()
        self._work = None
        notice, save, most, least, self._gap = self._words.tolist()
        if most != -least:
            raise OutOfStep(
                f"the ranks are at different steps, from {-least} to {most}: does a loop end, or go on, by what only "
                "one rank knows, such as its own loss or the time?"
            )
        self._left = self._gap
        if save:
            self._wish = self._wish._replace(save=False)
        return Wish(bool(notice), bool(save))
