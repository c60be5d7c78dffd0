"""Why a notice came: the table, and what `scontrol show job` says."""

from __future__ import annotations

import pytest

from orchestrator.results.records import Cause
from orchestrator.slurm.notice_policy import Action, Decision, Situation, decide, seconds

LEAVE_CANCELLED = Decision(Cause.CANCELLED, Action.LEAVE)
LEAVE_REQUEUED = Decision(Cause.PREEMPTED, Action.LEAVE)
PREEMPTED = Decision(Cause.PREEMPTED, Action.REQUEUE)
TIMEOUT = Decision(Cause.TIMEOUT, Action.REQUEUE)
BY_HAND = Decision(Cause.SIGNAL, Action.GO_ON)
UNKNOWN = Decision(Cause.NOTICE, Action.FINISH)


def situation(state: str, *, preempted: bool = False, restarts: int = 0, left_s: float | None = 5000.0) -> Situation:
    return Situation(state=state, preempted=preempted, restarts=restarts, left_s=left_s)


@pytest.mark.parametrize(
    ("found", "decision"),
    [
        (None, UNKNOWN),
        (situation("RUNNING", preempted=True), PREEMPTED),
        (situation("RUNNING", preempted=True, left_s=1.0), PREEMPTED),
        (situation("RUNNING", left_s=100.0), TIMEOUT),
        (situation("RUNNING", left_s=165.0), TIMEOUT),  # the controller may send it a minute early
        (situation("RUNNING", left_s=166.0), BY_HAND),
        (situation("RUNNING", left_s=None), BY_HAND),
        (situation("CONFIGURING", left_s=100.0), TIMEOUT),
        (situation("CONFIGURING", preempted=True), PREEMPTED),
        (situation("COMPLETING", restarts=1), LEAVE_REQUEUED),
        (situation("RUNNING", restarts=1), LEAVE_REQUEUED),  # a later run of ours; this one is a lost node's late copy
        (situation("RUNNING", restarts=1, left_s=100.0), LEAVE_REQUEUED),
        (situation("RUNNING", restarts=1, preempted=True), LEAVE_REQUEUED),
        (situation("CONFIGURING", restarts=1), LEAVE_REQUEUED),
        (situation("COMPLETING"), LEAVE_CANCELLED),
        (situation("COMPLETING", preempted=True), LEAVE_CANCELLED),
        (situation("CANCELLED"), LEAVE_CANCELLED),
        (situation("PENDING"), LEAVE_REQUEUED),
        (situation(""), UNKNOWN),
        (situation("SPLENDID"), UNKNOWN),
    ],
)
def test_the_table(found: Situation | None, decision: Decision) -> None:
    assert decide(found, own_restarts=0, notice_s=100.0) == decision


@pytest.mark.parametrize(
    ("decisions", "holds"),
    [
        ([BY_HAND], None),
        ([BY_HAND, PREEMPTED], PREEMPTED),
        ([PREEMPTED, BY_HAND, UNKNOWN], PREEMPTED),
        ([PREEMPTED, LEAVE_CANCELLED], LEAVE_CANCELLED),
        ([LEAVE_CANCELLED, PREEMPTED], LEAVE_CANCELLED),
        ([UNKNOWN, TIMEOUT], TIMEOUT),
        ([TIMEOUT, PREEMPTED], TIMEOUT),
    ],
)
def test_a_later_notice_only_makes_it_stricter(decisions: list[Decision], holds: Decision | None) -> None:
    found = None
    for decision in decisions:
        found = decision if decision.replaces(found) else found
    assert found == holds


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT", "FAILED", "", "ANYTHING", "COMPLETED"])
@pytest.mark.parametrize("restarts", [0, 3])
def test_a_job_that_does_not_run_is_never_requeued(state: str, restarts: int) -> None:
    found = situation(state, preempted=True, restarts=restarts, left_s=0.0)
    assert decide(found, own_restarts=0, notice_s=100.0).action is not Action.REQUEUE


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("00:01:05", 65.0),
        ("05:00", 300.0),
        ("1-02:00:00", 93600.0),
        ("365-00:00:00", 31536000.0),
        ("UNLIMITED", None),
        ("Partition_Limit", None),
        ("INVALID", None),
        ("", None),
        ("x-00:00:01", None),
        ("-00:00:01", None),
    ],
)
def test_durations(text: str, found: float | None) -> None:
    assert seconds(text) == found


@pytest.mark.parametrize(
    ("preempt_time", "preempted"),
    [("None", False), ("", False), ("Unknown", False), ("N/A", False), ("2026-01-01T00:00:00", True)],
)
def test_a_situation_is_read_from_what_scontrol_says(preempt_time: str, preempted: bool) -> None:
    fields = {"JobState": "RUNNING", "Restarts": "2", "TimeLimit": "01:00:00", "RunTime": "00:59:00"}
    found = Situation.of({**fields, "PreemptTime": preempt_time})
    assert found == situation("RUNNING", preempted=preempted, restarts=2, left_s=60.0)


def test_a_situation_is_read_from_nothing() -> None:
    assert Situation.of({}) == situation("", left_s=None)
