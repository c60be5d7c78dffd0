"""What is done for a sweep from outside: when what is missing is submitted again, and what is written down before."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fakes import FakeSlurm
from test_submit import SNAPSHOT, plan_of

from orchestrator.core.atomic import JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.results import records
from orchestrator.results.records import Cause, RecordWriter, Status
from orchestrator.slurm import jobs, ledger, submit, sweep_folder
from orchestrator.slurm import resubmit as tending
from orchestrator.slurm.resubmit import ASK_S, MOST_FRUITLESS, Resubmitter, objection
from orchestrator.slurm.submit import Receipt
from orchestrator.sweep import Sweep


@dataclass
class Scene:
    """A sweep of four trials in two blocks, handed over to a Slurm that a test plays."""

    paths: SweepPaths
    fake: FakeSlurm
    now_s: float = 0.0
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sweep = Sweep(self.paths)
        submit.submit(self.paths, self.sweep.plan)
        self.tender = self.new_tender()

    def new_tender(self, *, retries: bool = False) -> Resubmitter:
        return Resubmitter(
            self.sweep, again=self.again, say=self.said.append, retries=retries, clock=lambda: self.now_s
        )

    def again(self) -> Receipt:
        return submit.resubmit(self.paths, self.sweep.plan, missing=self.sweep.fold.num_missing)

    @property
    def token(self) -> str:
        now = ledger.current(self.paths)
        assert now is not None
        return now.token

    @property
    def num_submissions(self) -> int:
        return len(ledger.submissions(self.paths))

    def ends(self, state: str, **changes: object) -> None:
        """Whatever has not ended yet is in this state."""
        self.fake.jobs = [
            {**job, "state": state, **changes} if job["state"] in ("PENDING", "RUNNING") else job
            for job in self.fake.jobs
        ]

    def starts(self, *trials: int, job: str, attempt: int = 0, restarts: int = 0) -> RecordWriter:
        who: JsonObject = {"submission": self.token, "job": job, "restarts": restarts, "slots": 1, "host": "n0"}
        writer = RecordWriter(self.paths, who)
        writer.append(*(records.start(trial=trial, attempt=attempt) for trial in trials), durable=True)
        return writer

    def look(self) -> bool:
        """Whether it is over, once it is time to ask Slurm again."""
        self.now_s += ASK_S
        self.sweep.refresh()
        return self.tender.is_over()


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    (tmp_path / "fake").mkdir()
    fake = FakeSlurm(tmp_path / "fake", monkeypatch)
    plan = plan_of(parameters={"x": {"values": [0, 1, 2, 3]}})
    return Scene(sweep_folder.prepare(plan, SNAPSHOT, b"name: s\n", tmp_path / "runs"), fake)


# When


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL", "TIMEOUT", "FAILED", "COMPLETED", "OUT_OF_MEMORY"])
def test_what_slurm_has_ended_goes_on(state: str) -> None:
    assert objection([state, "COMPLETED"], num_workers=2, fruitless=0) is None


@pytest.mark.parametrize("state", ["CANCELLED", "DEADLINE", "REVOKED"])
def test_what_somebody_has_ended_does_not(state: str) -> None:
    assert objection(["PREEMPTED", state], num_workers=2, fruitless=0) == f"a job of it is {state}"


def test_nothing_goes_on_that_slurm_has_forgotten() -> None:
    why = objection(["PREEMPTED"], num_workers=2, fruitless=0)
    assert why == "Slurm doesn't say any more how its jobs ended"


@pytest.mark.parametrize(("fruitless", "goes_on"), [(MOST_FRUITLESS - 1, True), (MOST_FRUITLESS, False)])
def test_workers_that_do_nothing_are_not_sent_for_ever(fruitless: int, goes_on: bool) -> None:
    assert (objection(["FAILED"], num_workers=1, fruitless=fruitless) is None) is goes_on


def test_slurm_is_asked_now_and_then(scene: Scene) -> None:
    asked = scene.fake.commands.count("squeue")
    assert not any(scene.tender.is_over() for _ in range(50))
    assert scene.fake.commands.count("squeue") == asked
    assert not scene.look()
    assert not any(scene.tender.is_over() for _ in range(50))
    assert scene.fake.commands.count("squeue") == asked + 1


def test_a_slurm_that_does_not_answer_is_asked_again_later(scene: Scene) -> None:
    scene.ends("PREEMPTED")
    scene.fake.will("squeue", "down")
    assert not scene.look()
    assert scene.num_submissions == 1
    assert not scene.look()
    assert scene.num_submissions == 2


# What is lost


def test_what_is_missing_is_submitted_again_as_often_as_slurm_takes_it_away(scene: Scene) -> None:
    for number in range(MOST_FRUITLESS + 1):
        assert scene.num_submissions == number + 1
        scene.ends("PREEMPTED")
        assert not scene.look()
    assert len(scene.said) == MOST_FRUITLESS + 1
    assert "its workers have ended (2 PREEMPTED); 4 of 4 trials go on in workers-0 103, reducer 104" in scene.said[0]


def test_while_something_is_alive_nothing_is_submitted(scene: Scene) -> None:
    scene.fake.jobs = [{**job, "state": "PREEMPTED" if job["tasks"] else "RUNNING"} for job in scene.fake.jobs]
    assert not scene.look()
    assert (scene.num_submissions, scene.said) == (1, [])


def test_what_was_cancelled_is_over(scene: Scene) -> None:
    jobs.cancel(scene.paths)
    assert scene.look()
    assert (scene.num_submissions, scene.said) == (1, [])


def test_one_cancelled_job_is_reason_enough_to_leave_the_sweep_to_its_user(scene: Scene) -> None:
    scene.ends("CANCELLED")
    assert scene.look()
    assert scene.num_submissions == 1
    assert f"`orc resume {scene.sweep.id}` goes on" in scene.said[0]


def test_workers_that_fail_before_their_first_attempt_are_given_up(scene: Scene) -> None:
    for _ in range(MOST_FRUITLESS - 1):
        scene.ends("FAILED")
        assert not scene.look()
    scene.ends("FAILED")
    assert scene.look()
    assert scene.num_submissions == MOST_FRUITLESS
    assert f"ended {MOST_FRUITLESS} times without having done anything" in scene.said[-1]


def test_workers_that_do_something_are_sent_again_as_long_as_budgets_last(scene: Scene) -> None:
    for attempt in range(MOST_FRUITLESS + 1):
        scene.starts(0, job=f"{101 + 2 * attempt}_0", attempt=attempt).close()
        scene.ends("FAILED")
        assert not scene.look()
    assert scene.num_submissions == MOST_FRUITLESS + 2


def test_a_sweep_that_is_done_is_over_at_once(scene: Scene) -> None:
    writer = scene.starts(0, 1, 2, 3, job="101_0")
    payload: JsonObject = {"value": 0.5}
    writer.append(
        *(
            records.outcome(trial=trial, attempt=0, status=Status.COMPLETE, payload=payload, seconds=1.0)
            for trial in range(4)
        )
    )
    writer.close()
    scene.paths.summary.write_text("{}")
    scene.sweep.refresh()
    assert scene.tender.is_over()
    # Of trials that had failed, an outcome is there before they are tried again.
    assert not scene.new_tender(retries=True).is_over()


@pytest.mark.parametrize(("state", "goes_on"), [("COMPLETED", False), ("PREEMPTED", True)])
def test_failed_trials_that_are_tried_again_go_on_if_their_worker_was_lost(
    scene: Scene, state: str, goes_on: bool
) -> None:
    writer = scene.starts(0, 1, 2, 3, job="101_0")
    failed = [
        records.outcome(trial=trial, attempt=0, status=Status.FAILED, payload={"error": "no"}, seconds=1.0)
        for trial in range(4)
    ]
    writer.append(*failed, durable=True)
    writer.close()
    scene.tender = scene.new_tender(retries=True)
    scene.ends(state)
    assert scene.look() is not goes_on
    assert scene.num_submissions == 1 + goes_on


# Why


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("PREEMPTED", Cause.PREEMPTED),
        ("TIMEOUT", Cause.TIMEOUT),
        ("NODE_FAIL", Cause.NODE_FAILURE),
        ("OUT_OF_MEMORY", Cause.MEMORY),
        ("FAILED", Cause.UNKNOWN),
    ],
)
def test_an_attempt_that_vanished_with_its_job_is_charged_as_slurm_says(scene: Scene, state: str, cause: Cause) -> None:
    scene.starts(0, 1, job="101_0").close()
    scene.ends(state)
    assert not scene.look()
    fold = scene.sweep.refresh().fold
    assert dict(fold.charges(0)) == {cause: 1}
    assert not +fold.charges(1)  # of the block, but not begun
    assert (fold.next_attempt(0), fold.num_missing) == (1, 4)


def test_only_what_is_open_is_written_down_and_of_the_last_run_of_a_job(scene: Scene) -> None:
    scene.starts(1, job="101_0").close()
    writer = scene.starts(0, 1, job="101_0", attempt=1, restarts=1)
    writer.append(records.end(trial=0, attempt=1, cause=Cause.ERROR, detail="exit code 1"), durable=True)
    writer.close()
    found = list(tending.ends(scene.sweep.refresh(), scene.token, {"101_0": "TIMEOUT"}))
    said = [(line["trial"], line["attempt"], line["cause"], line["detail"]) for line in found]
    assert said == [(1, 1, "timeout", "Slurm says TIMEOUT")]
    assert not list(tending.ends(scene.sweep, "another", {"101_0": "TIMEOUT"}))
    assert not list(tending.ends(scene.sweep, scene.token, {"101_1": "TIMEOUT"}))


def test_whoever_writes_down_computes_nothing_so_its_machine_does_not_matter(scene: Scene) -> None:
    writer = RecordWriter(scene.paths, {"submission": scene.token, "job": "101_0", "cpu": "AVX2", "versions": {}})
    writer.append(records.start(trial=0, attempt=0))
    writer.close()
    scene.ends("PREEMPTED")
    assert not scene.look()
    assert len(scene.sweep.refresh().fold.writers()) == 2
    assert scene.sweep.standing().mixed == []


# Waiting


def test_a_requeued_job_is_started(scene: Scene) -> None:
    scene.fake.will("scontrol", *["say JobId=101 JobState=PENDING Restarts=1\\n", "ok"] * 3)
    scene.ends("PENDING", reason="BeginTime")
    assert not scene.look()
    assert ["update", "JobId=101_0", "StartTime=now"] in scene.fake.argv("scontrol")
    assert "requeued, and started without the wait: 101_0, 101_1, 102" in scene.said[0]


def test_a_job_that_its_user_wants_later_is_not(scene: Scene) -> None:
    scene.fake.will("scontrol", *["say JobId=101 JobState=PENDING Restarts=0\\n"] * 9)
    scene.ends("PENDING", reason="BeginTime")
    assert not scene.look()
    assert not [argv for argv in scene.fake.argv("scontrol") if argv[0] == "update"]
    assert scene.said == []


def test_a_site_that_refuses_is_not_asked_again(scene: Scene) -> None:
    requeued = "say JobId=101 JobState=PENDING Restarts=1\\n"
    scene.fake.will("scontrol", *[requeued, "reject Access/permission denied"] * 3, *[requeued] * 9)
    scene.ends("PENDING", reason="BeginTime")
    assert not scene.look()
    assert not scene.look()
    assert len([argv for argv in scene.fake.argv("scontrol") if argv[0] == "update"]) == 3
    assert scene.said == []
