"""The scheduler: what runs next and what comes of it, decided without a process, a socket or a file of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sweeps

from orchestrator.config.plan import PlanFile
from orchestrator.config.spec import Retries
from orchestrator.core.atomic import JsonObject
from orchestrator.core.messages import Cause, Outcome, Progress, Reported, Resumed, Status
from orchestrator.supervisor.removals import Removals
from orchestrator.supervisor.scheduler import TrialScheduler
from orchestrator.supervisor.trial_queue import PendingTrial

DONE = Outcome(status=Status.COMPLETE, payload={"value": 0.5})


class Writer:
    """Keeps the lines, those that had to be durable marked."""

    def __init__(self) -> None:
        self.lines: list[JsonObject] = []
        self.durable: list[JsonObject] = []

    def append(self, *lines: JsonObject, durable: bool = False, lasting: bool = True) -> None:
        self.lines += lines
        self.durable += lines if durable else ()

    def of(self, kind: str, *keys: str) -> list[tuple[Any, ...]]:
        return [tuple(line.get(key) for key in keys) for line in self.lines if line["kind"] == kind]


class Queue:
    """Gives blocks of trials; those in `finished` have outcomes."""

    def __init__(self, *blocks: list[PendingTrial]) -> None:
        self.blocks = list(blocks)
        self.finished: set[int] = set()

    def next(self) -> list[PendingTrial]:
        return self.blocks.pop(0) if self.blocks else []

    def has_outcome(self, trial: int) -> bool:
        return trial in self.finished


class Bench:
    """A scheduler over some blocks, and what it does."""

    def __init__(self, folder: Path, *blocks: list[PendingTrial], **options: Any) -> None:
        self.writer, self.queue, self.removals = Writer(), Queue(*blocks), Removals()
        plan = PlanFile.open(sweeps.make(folder, trials=6, **options).plan)
        self.scheduler = TrialScheduler(plan, self.queue, self.writer, self.removals)

    def hand_out(self, slot: int = 0) -> tuple[int, ...]:
        """The trials that a slot begins with; none if nothing is left."""
        self.scheduler.fill(lambda: True)
        assignment = self.scheduler.next()
        if assignment is None:
            return ()
        self.scheduler.begin(slot, assignment, memory_kills=0, ranks=None)
        return assignment.pack


def block(*trials: int) -> list[PendingTrial]:
    return [PendingTrial(trial) for trial in trials]


def test_trials_run_in_order_and_are_durably_begun_before_any_of_their_block_runs(tmp_path: Path) -> None:
    bench = Bench(tmp_path, block(3, 4), block(0))
    assert bench.hand_out(0) == (3,)
    assert bench.writer.of("start", "trial", "attempt") == [(3, 0), (4, 0)]
    assert bench.writer.durable == bench.writer.lines
    assert [bench.hand_out(1), bench.hand_out(2), bench.hand_out(3)] == [(4,), (0,), ()]
    assert bench.scheduler.is_exhausted
    assert not bench.scheduler.is_done


def test_nothing_is_claimed_that_may_not_be(tmp_path: Path) -> None:
    bench = Bench(tmp_path, block(0))
    bench.scheduler.fill(lambda: False)
    assert bench.scheduler.next() is None
    assert bench.scheduler.has_work_left


def test_an_outcome_is_recorded_and_frees_the_slot(tmp_path: Path) -> None:
    bench = Bench(tmp_path, block(2))
    bench.hand_out()
    bench.scheduler.finish(0, DONE)
    assert bench.writer.of("outcome", "trial", "attempt", "status") == [(2, 0, "complete")]
    assert bench.hand_out() == ()
    assert bench.scheduler.is_done
    assert not bench.scheduler.has_work_left
    assert bench.removals.checkpoints == [2]


def test_a_cause_is_charged_until_its_budget_is_spent(tmp_path: Path) -> None:
    bench = Bench(tmp_path, block(1), retries=Retries(error=2))
    for attempt in range(3):
        assert bench.hand_out() == (1,)
        assert bench.scheduler.running[0].assignment.attempt == attempt
        bench.scheduler.end(0, Cause.ERROR, "left with exit code 3")
    assert bench.hand_out() == ()
    assert bench.writer.of("end", "attempt", "cause") == [(0, "error"), (1, "error"), (2, "error")]
    assert bench.writer.of("outcome", "status", "payload") == [
        ("failed", {"cause": "error", "error": "left with exit code 3"})
    ]


@pytest.mark.parametrize("cause", [Cause.PREEMPTED, Cause.CANCELLED, Cause.NOTICE, Cause.NODE_FAILURE])
def test_some_causes_are_never_the_trial_s_fault(tmp_path: Path, cause: Cause) -> None:
    bench = Bench(tmp_path, block(1), retries=Retries(error=0, signal=0, memory=0, timeout=0, unknown=0))
    for _ in range(20):
        assert bench.hand_out() == (1,)
        bench.scheduler.end(0, cause, "")
    assert bench.writer.of("outcome", "status") == []


def test_what_is_not_tried_again_is_left_for_a_later_run_of_the_job(tmp_path: Path) -> None:
    bench = Bench(tmp_path, block(1))
    bench.hand_out()
    bench.scheduler.end(0, Cause.PREEMPTED, "saved at step 4, to go on later", 4, again=False)
    assert bench.hand_out() == ()
    assert bench.scheduler.has_work_left
    assert bench.writer.of("end", "cause", "step") == [("preempted", 4)]


def test_a_trial_whose_budget_other_workers_have_spent_fails_without_a_start(tmp_path: Path) -> None:
    spent = PendingTrial(1, 3, Counter({Cause.SIGNAL: 9}))
    bench = Bench(tmp_path, [spent, *block(2)], retries=Retries(signal=2))
    assert bench.hand_out() == (2,)
    assert bench.writer.of("outcome", "trial", "status") == [(1, "failed")]
    assert bench.writer.of("start", "trial") == [(2,)]


@pytest.mark.parametrize("finished", [True, False])
def test_what_somebody_else_has_finished_is_dropped_unless_that_is_not_so(tmp_path: Path, finished: bool) -> None:
    bench = Bench(tmp_path, block(1), retries=Retries(unknown=1))
    bench.queue.finished |= {1} if finished else set()
    for _ in range(2):
        if bench.hand_out():
            bench.scheduler.drop(0, "somebody else has finished this trial")
    assert bench.hand_out() == ()
    assert bench.writer.of("outcome", "status") == ([] if finished else [("failed",)])
    assert set(bench.writer.of("end", "cause", "begun")) == {("unknown", False)}


def test_reports_and_places_are_noted_of_what_runs(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [PendingTrial(1, 2)])
    bench.hand_out()
    running = bench.scheduler.running[0]
    bench.scheduler.note(running, Resumed(step=5))
    bench.scheduler.note(running, Reported(step=6, metrics={"val_loss": 0.5}))
    bench.scheduler.note(running, Progress(step=7, saved=6))
    assert bench.writer.of("resume", "trial", "attempt", "step") == [(1, 2, 5)]
    assert bench.writer.of("report", "trial", "attempt", "step", "metrics") == [(1, 2, 6, {"val_loss": 0.5})]
    assert bench.writer.of("at", "trial", "attempt", "step", "saved") == [(1, 2, 7, 6)]


def test_what_is_open_at_the_end_is_told_from_what_had_not_begun(tmp_path: Path) -> None:
    bench = Bench(tmp_path, block(0, 1))
    bench.hand_out()
    bench.scheduler.close(Cause.CANCELLED)
    assert bench.writer.of("end", "trial", "cause", "detail", "begun") == [
        (0, "cancelled", "stopped before it was done", None), (1, "cancelled", "not begun", False),
    ]  # fmt: skip


def test_models_that_are_beaten_are_to_be_removed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, block(0, 1, 2), top=1)
    for trial, value in enumerate((0.5, 0.1, 0.3)):
        bench.hand_out()
        bench.scheduler.finish(0, Outcome(status=Status.COMPLETE, payload={"value": value, "model": f"m{trial}"}))
    assert bench.removals.models == [(0, "m0"), (2, "m2")]
    assert bench.scheduler.bar == 0.1


def pack(folder: Path) -> Bench:
    return Bench(folder, block(0, 1, 2), program="job.py", pack=3, retries=Retries(error=0))


def test_a_pack_begins_when_it_is_handed_out_and_ends_trial_by_trial(tmp_path: Path) -> None:
    bench = pack(tmp_path)
    bench.scheduler.fill(lambda: True)
    assert bench.writer.lines == []
    assert bench.hand_out() == (0, 1, 2)
    assert bench.writer.of("start", "trial") == [(0,), (1,), (2,)]
    for trial in (2, 0, 1):
        bench.scheduler.finish(0, Outcome(status=Status.COMPLETE, payload={"value": 1.0}, trial=trial))
    assert 0 in bench.scheduler.running
    bench.scheduler.finish_pack(0)
    assert bench.writer.of("outcome", "trial") == [(2,), (0,), (1,)]
    assert bench.scheduler.running == {}


def test_a_trial_of_a_pack_whose_outcome_cannot_be_recorded_is_charged_alone(tmp_path: Path) -> None:
    bench = pack(tmp_path)
    bench.hand_out()
    bench.scheduler.finish(0, Outcome(status=Status.COMPLETE, payload={"value": 1.0}, trial=1))
    bench.scheduler.finish(0, Outcome(status=Status.COMPLETE, payload={"value": 1.0}, trial=2))
    bench.scheduler.running[0].unrecordable = "its outcome is too long"
    bench.scheduler.finish_pack(0)
    assert bench.writer.of("end", "trial", "cause", "detail") == [(0, "error", "its outcome is too long")]
