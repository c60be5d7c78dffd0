"""A keeper of several ranks: what one of them wishes at a safe point, all do at the same later one.

    keeper = RankCheckpointManager(checkpoints, spec.checkpoint, party, hears=..., tells=...)

A rank that stopped by itself to save would wait for others that train on. So at each safe point every rank says what it
wishes, the first one also for its clock, and does what all are told: all give their part of the state, the first writes
it, and where they are to leave none goes before it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from orchestrator.config.spec import CheckpointOptions as Wanted
from orchestrator.core.messages import Message, Superseded
from orchestrator.distributed.consensus import Agreement, Wish
from orchestrator.distributed.failure import is_of_others
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.errors import OrcError
from orchestrator.training.checkpoint.files import Checkpoints, Gone
from orchestrator.training.checkpoint.manager import LEAVE, SAVE, CheckpointManager, Interrupted, Take, left
from orchestrator.training.checkpoint.serialization import Tree

__all__ = ["RankCheckpointManager"]


class RankCheckpointManager(CheckpointManager):
    """Keeps one trial's state, on one of its ranks.

    Args:
        checkpoints: as for `CheckpointManager`; only the first rank writes there.
        wanted: as for `CheckpointManager`.
        party: the ranks, more than one.
        hears: as for `CheckpointManager`; every rank may hear.
        tells: as for `CheckpointManager`.
        say: as for `CheckpointManager`.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        wanted: Wanted,
        party: RankContext,
        *,
        hears: Callable[[], Iterable[str]] = tuple,
        tells: Callable[[Message], None] = lambda message: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(checkpoints, wanted, hears=hears, tells=tells, say=say, group=party.group)
        self._ranks = party.group
        self._sign = (lambda step: None) if party.roll is None else party.roll.sign
        self._agreement = Agreement(party)
        self._agreed = Wish()
        self._is_leaving = False

    @property
    def has_notice(self) -> bool:
        """Whether the ranks know that they are to leave, at the next safe point from where the trial can go on."""
        return self._agreed.notice

    def _plan(self) -> None:
        self.look_s = 0.0  # all ranks look at every safe point: clocks differ

    def look(self, step: int, epochs: int, take: Take | None) -> None:
        """As that of `CheckpointManager`; every rank must call it, at the same safe points.

        Raises:
            Interrupted: on all ranks, if they were asked to leave; on one, for its own reasons.
            OutOfStep: the ranks are not at the same safe point.
            RuntimeError: from torch, when a rank is gone or silent.
        """
        self._hear()
        if self._every.is_off:
            self._sign(step)
        else:
            self._ask(step, epochs, can_save=take is not None)
        if take is not None and (self._agreed.notice or self._agreed.save):
            agreed, self._agreed = self._agreed, Wish()
            try:
                self._do(agreed, step, epochs, take)
            except Gone as error:
                raise Interrupted(Superseded(reason=str(error))) from error
        if self._ranks.rank == 0:
            self._tell(step)

    def _ask(self, step: int, epochs: int, *, can_save: bool) -> None:
        is_first = self._ranks.rank == 0
        is_due = is_first and can_save and not self._is_off and self._is_due(step, epochs)
        # All are told to save, and the first one's asking is enough.
        is_asked = is_first and self._wish == SAVE and not self._is_repeated()
        self._is_leaving = self._is_leaving or self._wish == LEAVE
        self._wish = None  # the agreement keeps it until all know
        found = self._agreement.ask(Wish(notice=self._is_leaving, save=is_due or is_asked), at=step)
        self._agreed = Wish(self._agreed.notice or found.notice, self._agreed.save or found.save)

    def _do(self, agreed: Wish, step: int, epochs: int, take: Take) -> None:
        """Save, all of us, and leave if the first rank says so: once it has written the state."""
        try:
            state = take()
        except Exception as error:
            if isinstance(error, OrcError) or is_of_others(error):
                raise
            self._give_up(error)  # on every rank alike
            return
        is_first = self._ranks.rank == 0 and not self._is_off
        leaves = is_first and self._is_written_to_leave(agreed, step, epochs, state)
        if bool(self._ranks.all_gather(torch.tensor([int(leaves)], device="cpu"))[0]):
            raise Interrupted(left(step))

    def _is_written_to_leave(self, agreed: Wish, step: int, epochs: int, state: Tree) -> bool:
        """Write the state; whether it is durable, and all are to leave."""
        must = agreed.notice or self._is_leaving
        if not must and self._is_settled:
            self._save(step, epochs, lambda: state)
            return False
        self._notice_s = self.clock()
        is_saved = self._save_now(step, epochs, lambda: state, must=must)
        if is_saved and not must and not self._is_to_leave():
            self._say(f"--- saved at step {step} after a notice, and goes on")
            return False
        return is_saved
