"""The notice handler finds out why a signal came, tells the workers what to do about it, and asks for a requeue.

What to do is decided by `slurm.notice_policy`, from what Slurm says of the job. The first decision may be replaced by
one that says more. Until the reason is known, workers save and stay.
"""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Callable

from orchestrator.config.spec import SweepSpec
from orchestrator.core.messages import Cause
from orchestrator.core.signals import Signals
from orchestrator.results import records
from orchestrator.results.records import RecordWriter
from orchestrator.slurm.notice_policy import Action, Decision, Situation
from orchestrator.slurm.own_job import OwnJob, acknowledge

__all__ = ["NoticeHandler"]

_LAST_CALL_S = 20.0
"""Before a time limit, in seconds: what still runs then is stopped, so that the requeue is ours and not too late."""
_SAVE_S = 3.0
"""After a cancel, in seconds: how long a trial may take to save. Slurm kills after KillWait, by default 30."""
_LATE_S = 1.0
"""How much later than a worker's our own copy of a signal may come, in seconds."""
_TRIES = 3
"""How often a requeue is asked for at least, after pauses of one second, two, four, ... up to this many seconds:"""
_LONGEST_PAUSE_S = 8.0
_ENDS_OF_A_NOTICE = ("SIGTERM", "SIGUSR1", "SIGINT", "to go on later")


class NoticeHandler:
    """Handles the signals that ask a supervisor to leave.

    Args:
        signals: of this process.
        job: our own, in Slurm's eyes; None outside of Slurm.
        spec: the sweep's.
        writer: of this supervisor's records.
        is_cancelled: whether somebody has cancelled the submission.
        tell: passes `save`, `stay` or `leave` on to the workers.
        reap: handles the workers that have ended, after any signal.
    """

    def __init__(
        self,
        signals: Signals,
        job: OwnJob | None,
        spec: SweepSpec,
        writer: RecordWriter,
        *,
        is_cancelled: Callable[[], bool],
        tell: Callable[[str], None],
        reap: Callable[[], None],
    ) -> None:
        self._signals = signals
        self._job = job
        self._is_command = spec.command is not None
        self._notice_s = float(spec.launch.notice_s)
        self._writer = writer
        self._is_cancelled = is_cancelled
        self._tell = tell
        self._reap = reap
        self._noticed = 0.0
        self._is_told = False
        self._last_call: float | None = None
        self.decision: Decision | None = None

    @property
    def last_call_left_s(self) -> float | None:
        """Seconds until what still runs is stopped; None while that has no limit."""
        return None if self._last_call is None else max(0.0, self._last_call - time.monotonic())

    def on_signals(self) -> None:
        """Take the signals that have come."""
        names = self._signals.take()
        self._reap()
        if names:
            self._on_notice(names)

    def _on_notice(self, names: list[str]) -> None:
        acknowledge()
        is_first = not self._is_command and self.decision is None
        if is_first:
            self._tell("save")  # which is right whatever the reason is, and asking for that may take a while
        situation, decision = self._judge()
        self._record("+".join(names), situation, f"{decision.cause}: {decision.action}")
        if decision.replaces(self.decision):
            self.adopt(decision, situation)
        if is_first and not self._is_told:
            self._tell("stay")

    def adopt(self, decision: Decision, situation: Situation | None = None) -> None:
        """Act on a decision."""
        is_first = self.decision is None
        self.decision = decision
        if decision.cause is Cause.CANCELLED:
            self._last_call = time.monotonic() + _SAVE_S
        elif decision.cause is Cause.TIMEOUT and situation is not None and situation.left_s is not None:
            self._last_call = time.monotonic() + max(0.0, situation.left_s - _LAST_CALL_S)
        if is_first:
            self._noticed = time.monotonic()
        # A job in Python saves and stays while the reason is unknown; a command's TERM says both.
        if not self._is_told and (self._is_command or decision.action in (Action.REQUEUE, Action.LEAVE)):
            self._is_told = True
            self._tell("leave")

    def lose_node(self) -> None:
        """Decide to be started anew: without all its nodes the job can't go on."""
        self.decision, self._is_told = Decision(Cause.NODE_FAILURE, Action.REQUEUE), True
        self._noticed = time.monotonic()

    def explain(self, cause: Cause, detail: str) -> Cause:
        """Return the cause of an attempt's end: the notice, if it ended because of one."""
        if self.decision is None and detail.endswith(_ENDS_OF_A_NOTICE):
            self._listen(_LATE_S)
        # Programs answer TERM with any exit code.
        by_notice = (
            (Cause.SIGNAL, Cause.PREEMPTED, Cause.ERROR) if self._is_command else (Cause.SIGNAL, Cause.PREEMPTED)
        )
        if self.decision is not None and cause in by_notice:
            return self.decision.cause
        # Nobody asked it to go on later, and it must not do so for ever.
        return Cause.UNKNOWN if cause is Cause.PREEMPTED else cause

    def _listen(self, seconds: float) -> None:
        """Take signals alone, for so long or until one changes the decision."""
        before, until = self.decision, time.monotonic() + seconds
        while self.decision is before and (left := until - time.monotonic()) > 0:
            if select.select([self._signals], [], [], left)[0]:
                self.on_signals()

    def _judge(self) -> tuple[Situation | None, Decision]:
        if self._job is None or self._is_cancelled():
            return None, Decision(Cause.CANCELLED, Action.LEAVE)
        return self._job.judge()

    def _record(self, name: str, situation: Situation | None, action: str) -> None:
        self._writer.append(records.notice(signal=name, state=str(situation), action=action), durable=True)

    def request_requeue(self) -> None:
        """Ask for our requeue until Slurm says that it comes, or that there must be none; or stay until it kills us."""
        until = self._noticed + self._notice_s
        for number in itertools.count():
            if self._action is Action.LEAVE:
                return
            situation, decision = self._judge()
            if decision.replaces(self.decision):
                self.decision = decision
            if decision.action is Action.LEAVE or (decision.action, self._action) == (Action.GO_ON, Action.FINISH):
                return
            if decision.action is not Action.FINISH and self._job is not None:
                self._job.requeue()
            if number + 1 >= _TRIES and time.monotonic() >= until:
                self._record("none", situation, f"{decision.cause}: leaves without a requeue that Slurm confirms")
                return
            self._listen(min(2.0**number, _LONGEST_PAUSE_S))

    @property
    def _action(self) -> Action:
        return self.decision.action if self.decision is not None else Action.GO_ON
