"""Keeps a trial's state: when to save it at a safe point, and what to do there when a notice has come.

    keeper = CheckpointManager(checkpoints, spec.checkpoint, hears=..., tells=...)
    found = keeper.newest()                             what an earlier attempt has left
    if keeper.clock() >= keeper.look_s:                 at every safe point; all that most of them cost
        keeper.look(step, epochs, take)
    keeper.close()                                      whatever came of the trial

A notice is a word of the supervisor's: `save`, while it asks for the reason, and then `leave` or `stay`. A signal says
no more than that there may be a word.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Final

from orchestrator.config.spec import CheckpointOptions as Wanted
from orchestrator.core.messages import AttemptEnded, Cause, Message, Progress, Resumed, Superseded, Unable
from orchestrator.errors import OrcError
from orchestrator.training.checkpoint.async_writer import AsyncWriter
from orchestrator.training.checkpoint.files import Checkpoint, CheckpointError, Checkpoints, Gone
from orchestrator.training.checkpoint.interval import SaveInterval
from orchestrator.training.checkpoint.serialization import Tree
from orchestrator.training.checkpoint.state import StateGroup, newest

__all__ = ["LEAVE", "SAVE", "STAY", "CheckpointManager", "Interrupted", "left"]

SAVE: Final = "save"
LEAVE: Final = "leave"
STAY: Final = "stay"

_SOON_S = 0.02
"""How long to wait for what is under way, in seconds."""
_WORD_S = 2.0
"""How long to wait, after a save, for the word that says whether to leave, in seconds."""
_LOOK_S = 0.005
_ONE_EVENT_S = 5.0
"""How long one event's signals may follow each other, in seconds: to save once is enough for all of them."""
_TOLD_S = 1.0
"""From one word about where the trial is to the next, at least, in seconds; or the hundredth part of its age."""
_TOLD_PART = 0.01

_UNWRITTEN = "a checkpoint could not be written, and the trial goes on"

Take = Callable[[], Tree]


class Interrupted(BaseException):
    """The trial ends here without an outcome. Not an `Exception`, so that no job catches it by accident.

    Args:
        answer: the message that ends the attempt.
    """

    def __init__(self, answer: Message) -> None:
        super().__init__(answer)
        self.answer = answer


def left(step: int) -> AttemptEnded:
    """The answer of an attempt that was asked to leave, and has been saved at `step`."""
    detail = f"saved at step {step}, to go on later" if step else "left before its first step, to go on later"
    return AttemptEnded(cause=Cause.PREEMPTED, detail=detail, step=step)


class CheckpointManager:
    """Keeps one trial's state.

    Args:
        checkpoints: where to; nothing is looked for or made there before it is needed.
        wanted: when, as the sweep file says.
        hears: the words of notices that have come since it was last called; doesn't wait.
        tells: takes messages to the supervisor: where the trial is, and where it went on.
        say: takes a line for the log.
        group: the ranks.
        clock: seconds, monotonic.
        sleep: waits.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        wanted: Wanted,
        *,
        hears: Callable[[], Iterable[str]] = tuple,
        tells: Callable[[Message], None] = lambda message: None,
        say: Callable[[str], None] = lambda line: None,
        group: StateGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.clock = clock
        self._checkpoints = checkpoints
        self._hears = hears
        self._tells = tells
        self._say = say
        self._group = group
        self._every = wanted.interval
        self._pace = SaveInterval(
            clock=clock, every_s=self._every.seconds, every_steps=self._every.steps, mtbf_s=wanted.mtbf_s
        )
        self._saver: AsyncWriter | None = None
        self._is_off = self._every.is_off
        self._sleep = sleep
        self._wish: str | None = None
        self._is_settled = True
        self._resumed: int | None = None
        self._last = 0, 0
        self._notice_s = -math.inf
        self._said: set[str] = set()
        self._start_s = clock()
        self._tell_s = self._start_s + _TOLD_S
        self.look_s = 0.0
        """When `look` is to be called next, by `clock`; a signal sets it to 0."""
        self._plan()

    @property
    def only_epochs(self) -> bool:
        """Whether the trial is never to be saved inside of an epoch."""
        return self._every.epochs is not None

    def warn(self, text: str) -> None:
        """Say something that the user should know, once."""
        self._complain(text)

    # Before and after

    def newest(self) -> Checkpoint | None:
        """What the attempts before have left; says so if that is nothing.

        Raises:
            Interrupted: there is something that can't be read here, or that other ranks have written.
        """
        try:
            found = None if self._is_off else newest(self._checkpoints, self._group)
        except CheckpointError as error:
            raise Interrupted(Unable(reason=str(error))) from error
        if found is None:
            self.resumed(0, 0)
        return found

    def resumed(self, step: int, epochs: int) -> None:
        """The trial goes on here, or begins anew at step 0 though there were attempts before."""
        self._pace.resumed(step)
        self._last = step, epochs
        self._resumed = step or None
        self._say(f"--- goes on from step {step}" if step else "--- begins anew: no checkpoint was left")
        self._tells(Resumed(step=step))

    def close(self) -> None:
        """Return once nothing is being written any more."""
        if self._saver is not None:
            self._saver.close()

    @property
    def has_saved(self) -> bool:
        """Whether this attempt may have left a checkpoint."""
        return self._saver is not None

    # Safe points

    def look(self, step: int, epochs: int, take: Take | None) -> None:
        """At a safe point: save if that is due, answer notices.

        Args:
            step: where the trial is.
            epochs: how many are over.
            take: captures the state; None where the trial can't go on from, so that all of this waits for a later one.

        Raises:
            Interrupted: it was asked to leave, or someone else has finished the trial, or nothing can be written.
        """
        self._hear()
        try:
            if self._is_off:
                self._wish = None
            elif take is not None and self._wish is not None:
                self._answer(step, epochs, take)
            elif take is not None and self._is_due(step, epochs):
                self._save(step, epochs, take)
        except Gone as error:
            raise Interrupted(Superseded(reason=str(error))) from error
        self._tell(step)
        self._plan()

    def _hear(self) -> None:
        """Take the words that have come: of a wish to save and one to leave, the latter holds."""
        for word in self._hears():
            self._is_settled = word != SAVE
            if word != STAY:
                self._wish = LEAVE if LEAVE in (word, self._wish) else SAVE

    def _plan(self) -> None:
        """When to look again: at once where a wish is left, or steps decide and not the clock."""
        if self._is_off:
            self.look_s = self._tell_s
        elif self._wish is not None or self._every.steps is not None or self._every.epochs is not None:
            self.look_s = 0.0
        else:
            is_busy = self._saver is not None and self._saver.is_busy
            due_s = max(self._pace.due_s, self.clock() + _SOON_S) if is_busy else self._pace.due_s
            self.look_s = min(due_s, self._tell_s)

    def _is_due(self, step: int, epochs: int) -> bool:
        try:
            is_due = self._pace.due(step) if self._saver is None else self._saver.due(step)
        except Gone:
            raise
        except OrcError as error:
            self._complain(_UNWRITTEN, f": {error}")
            return False
        if self._every.epochs is None:
            return is_due
        is_busy = self._saver is not None and self._saver.is_busy
        return epochs - self._last[1] >= self._every.epochs and not is_busy

    def _opened(self) -> AsyncWriter:
        if self._saver is None:
            is_first = self._group is None or self._group.rank == 0
            self._saver = AsyncWriter(self._checkpoints if is_first else None, self._pace)
        return self._saver

    def _save(self, step: int, epochs: int, take: Take) -> None:
        """Beside the training."""
        try:
            self._opened().save(step, take)
            self._last = step, epochs
        except Gone:
            raise
        except OrcError as error:
            self._complain(_UNWRITTEN, f": {error}")
        except Exception as error:  # whatever the job's own state_dict() raises
            self._give_up(error)

    def _answer(self, step: int, epochs: int, take: Take) -> None:
        """Do what a notice asks for."""
        wish, self._wish = self._wish, None
        if wish == SAVE and self._is_repeated():
            return
        self._notice_s = self.clock()
        is_saved = self._save_now(step, epochs, take, must=wish == LEAVE)
        if is_saved and (wish == LEAVE or self._is_to_leave()):
            raise Interrupted(left(step))
        if is_saved:
            self._say(f"--- saved at step {step} after a notice, and goes on")

    def _is_repeated(self) -> bool:
        """Whether a wish to save that has come now is of the event for which this was done already."""
        return self.clock() < self._notice_s + _ONE_EVENT_S

    def _is_to_leave(self) -> bool:
        """Whether the word that follows on `save` is `leave`; a step made before it would have to be saved, too."""
        until = self.clock() + _WORD_S
        while not self._is_settled and self.clock() < until:
            self._sleep(_LOOK_S)
            self._hear()
        return self._wish == LEAVE

    def _save_now(self, step: int, epochs: int, take: Take, *, must: bool) -> bool:
        """Whether the state of this step is durable when this returns."""
        if (step, epochs) == self._last and self._is_durable():
            return True
        try:
            self._opened().save_now(step, take)
        except Gone:
            raise
        except OrcError as error:
            if must:
                raise Interrupted(Unable(reason=str(error))) from error
            self._complain(_UNWRITTEN, f": {error}")
            return False
        except Exception as error:  # whatever the job's own state_dict() raises
            self._give_up(error)
            return False
        self._last = step, epochs
        return True

    def _is_durable(self) -> bool:
        """Wait for what is under way; whether it went well."""
        try:
            if self._saver is not None:
                self._saver.wait()
        except Gone:
            raise
        except OrcError:
            return False
        return True

    def _give_up(self, error: Exception) -> None:
        self._is_off = True
        self._complain("no checkpoints: if this trial is interrupted, it begins anew", f": {error}")

    def _complain(self, text: str, more: str = "") -> None:
        """Say a text that was not said before, whatever else there is to it."""
        if text not in self._said:
            self._said.add(text)
            self._say(f"--- {text}{more}")

    def _tell(self, step: int) -> None:
        now = self.clock()
        if now >= self._tell_s:
            self._tell_s = now + max(_TOLD_S, _TOLD_PART * (now - self._start_s))
            saved = None if self._saver is None else self._saver.saved
            self._tells(Progress(step=step, saved=self._resumed if saved is None else saved))
