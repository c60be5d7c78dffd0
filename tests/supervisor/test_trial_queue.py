"""Which worker runs what: every trial once, and what a lost worker left, once it is known to be lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import Clock, no_room_after

from orchestrator.core.atomic import JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.results.claims import Block, Claims, WriterWatch
from orchestrator.results.fold import Fold
from orchestrator.results.records import Cause, RecordWriter, Status, end, notice, outcome, start
from orchestrator.supervisor.trial_queue import GoneWriters, PendingTrial, TrialQueue

NUM, SIZE = 10, 3
LEASE_S = 10.0


class House:
    """A sweep of ten trials in blocks of three, and the workers on it."""

    def __init__(self, folder: Path) -> None:
        self.paths = SweepPaths(folder)
        self.clock = Clock()
        for path in (self.paths.claims, self.paths.records):
            path.mkdir()

    def writer(self, submission: str = "first", job: str | None = None, restarts: int = 0) -> RecordWriter:
        identity: JsonObject = {"submission": submission, "job": job, "restarts": restarts, "slots": 1}
        return RecordWriter(self.paths, identity, clock=self.clock)

    def source(self, writer: RecordWriter, worker: int = 0, **succession: object) -> TrialQueue:
        known = {"submission": "first", "job": None, "restarts": 0, "superseded": frozenset[str](), **succession}
        return TrialQueue(
            Block.all(NUM, SIZE),
            worker,
            claims=Claims(self.paths, writer.writer),
            fold=Fold(self.paths, NUM),
            growth=WriterWatch(self.paths, LEASE_S, clock=self.clock),
            succession=GoneWriters(**known),  # type: ignore[arg-type]
        )

    def lost(self, *finished: int, **identity: object) -> RecordWriter:
        """A worker that claimed block 0, finished some of it, and was not heard of again."""
        writer = self.writer(**identity)  # type: ignore[arg-type]
        block = self.source(writer).next()
        writer.append(*(start(trial=ready.trial, attempt=ready.attempt) for ready in block))
        writer.append(*map(complete, finished))
        return writer


def complete(trial: int, status: Status = Status.COMPLETE) -> JsonObject:
    return outcome(trial=trial, attempt=0, status=status, payload={"value": 1.0}, seconds=0.0)


def trials(block: list[PendingTrial]) -> list[int]:
    return [ready.trial for ready in block]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@settings(max_examples=20)
@given(workers=st.lists(st.integers(0, 2), min_size=30, max_size=30))
def test_each_trial_is_handed_out_once_whatever_the_order(tmp_path_factory, workers: list[int]) -> None:
    house = House(tmp_path_factory.mktemp("sweep"))
    sources = [house.source(house.writer(), worker) for worker in range(3)]
    handed = Counter(trial for worker in workers for trial in trials(sources[worker].next()))
    assert set(handed.values()) == {1}
    assert len(handed) == NUM or len(set(workers)) < 3


def test_a_worker_begins_with_the_block_of_its_number(house: House) -> None:
    assert trials(house.source(house.writer(), 2).next()) == [6, 7, 8]
    assert trials(house.source(house.writer(), 5).next()) == [3, 4, 5]
    assert trials(house.source(house.writer(), 2).next()) == [9]


def test_one_worker_runs_everything_and_then_nothing(house: House) -> None:
    source = house.source(house.writer())
    assert [trials(block) for block in source] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert source.next() == []


def test_a_sweep_without_trials_has_nothing_to_do(tmp_path: Path) -> None:
    house = House(tmp_path)
    source = TrialQueue(
        [],
        0,
        claims=Claims(house.paths, "w"),
        fold=Fold(house.paths, 0),
        growth=WriterWatch(house.paths, 1.0),
        succession=GoneWriters(submission="s", job=None, restarts=0, superseded=frozenset()),
    )
    assert source.next() == []


# Taking over


def test_a_live_holder_keeps_its_block(house: House) -> None:
    holder = house.lost(0)
    source = house.source(house.writer(), 1)
    for _ in range(3):
        source.next()
    for second in range(1, 40, 4):
        house.clock.now = float(second)
        holder.append({"kind": "beat"})
        assert source.next() == []


def test_fault_22_a_silent_holder_loses_what_it_has_not_finished(house: House) -> None:
    house.lost(0)
    source = house.source(house.writer(), 1)
    assert trials(source.next()) == [3, 4, 5]
    house.clock.now = LEASE_S - 0.1
    assert [trials(source.next()) for _ in range(3)] == [[6, 7, 8], [9], []]
    house.clock.now = LEASE_S
    assert source.next() == [
        PendingTrial(1, 1, Counter({Cause.UNKNOWN: 1})),
        PendingTrial(2, 1, Counter({Cause.UNKNOWN: 0})),
    ]
    assert source.next() == []


def test_a_block_is_taken_over_by_one_only(house: House) -> None:
    house.lost()
    writers = [house.writer(), house.writer()]
    heirs = [house.source(writer, worker) for worker, writer in enumerate(writers, start=1)]
    for heir in heirs:
        assert all(0 not in trials(block) for block in heir)
    house.clock.now = LEASE_S
    for writer in writers:
        writer.append({"kind": "beat"})
    assert sorted(len(heir.next()) for heir in heirs) == [0, 3]


def test_the_blocks_of_a_superseded_submission_need_no_lease(house: House) -> None:
    house.lost(1)
    source = house.source(house.writer("second"), 1, submission="second", superseded=frozenset({"first"}))
    assert trials([ready for block in source for ready in block]) == [3, 4, 5, 6, 7, 8, 9, 0, 2]


def test_an_earlier_run_of_our_own_job_is_gone_and_was_no_fault_of_the_trial(house: House) -> None:
    house.lost(job="7_3")
    source = house.source(house.writer(job="7_3", restarts=1), 1, job="7_3", restarts=1)
    last = list(source)[-1]
    assert [(ready.trial, ready.attempt, ready.charges[Cause.UNKNOWN]) for ready in last] == [
        (0, 1, 0),
        (1, 1, 0),
        (2, 1, 0),
    ]


@pytest.mark.parametrize(
    "ours",
    [
        {"job": "7_4", "restarts": 1},  # another element of the array
        {"job": "7_3", "restarts": 0},  # the same run
        {"job": "7_3", "restarts": 1, "submission": "second"},  # an old job id given to a new job
        {"job": None, "restarts": 1},
    ],
)
def test_a_run_of_any_other_job_is_not_known_to_be_gone(house: House, ours: dict[str, object]) -> None:
    house.lost(job="7_3")
    source = house.source(house.writer(), 1, **ours)
    assert sorted(trial for block in source for trial in trials(block)) == list(range(3, NUM))


def test_charges_come_along(house: House) -> None:
    writer = house.lost()
    writer.append(end(trial=0, attempt=0, cause=Cause.SIGNAL, detail=""), start(trial=0, attempt=1))
    source = house.source(house.writer("second"), 1, submission="second", superseded=frozenset({"first"}))
    ready = {ready.trial: ready for block in source for ready in block}
    assert (ready[0].attempt, ready[0].charges) == (2, Counter({Cause.SIGNAL: 1, Cause.UNKNOWN: 0}))
    assert ready[1].charges[Cause.UNKNOWN] == 1


@pytest.mark.parametrize(("retry_failed", "again"), [(False, [2]), (True, [0, 2])])
def test_failed_trials_run_again_only_when_asked(house: House, retry_failed: bool, again: list[int]) -> None:
    writer = house.lost()
    writer.append(complete(0, Status.FAILED), complete(1))
    source = house.source(
        house.writer("second"), 1, submission="second", superseded=frozenset({"first"}), retry_failed=retry_failed
    )
    assert trials(list(source)[-1]) == again


def test_a_trial_that_fails_again_alike_is_not_run_a_third_time(house: House) -> None:
    """Of two failures that are equal, the first one is the kept one."""
    house.lost().append(complete(0, Status.FAILED), complete(1), complete(2))
    known = {"submission": "second", "superseded": frozenset({"first"}), "retry_failed": True}
    house.writer("second").append(complete(0, Status.FAILED))
    late = house.source(house.writer("second"), 0, **known)
    assert trials([ready for block in late for ready in block]) == [3, 4, 5, 6, 7, 8, 9]


def test_a_writer_that_had_to_change_files_keeps_its_block(house: House) -> None:
    holder = house.lost(0)
    first = house.paths.record(holder.writer)
    with no_room_after(first.stat().st_size + 10):
        holder.append({"kind": "beat", "much": "x" * 20})
    assert house.paths.record(holder.writer) != first
    source = house.source(house.writer(), 1)
    seen: list[int] = []
    for second in range(1, 40, 4):
        house.clock.now = float(second)
        holder.append({"kind": "beat"})
        seen += trials(source.next())
    assert seen == [3, 4, 5, 6, 7, 8, 9]


def test_preemptions_are_no_fault_of_the_trial_whoever_takes_over(house: House) -> None:
    for restarts in range(6):
        writer = house.writer(job="7_3", restarts=restarts)
        house.source(writer, job="7_3", restarts=restarts)._claims.take(Block(0, 2), restarts)
        writer.append(start(trial=0, attempt=restarts))
    writer.append(notice(signal="SIGTERM", state="RUNNING", action="preempted: finish or stop, then requeue"))
    observers = [
        house.source(house.writer(job="7_3", restarts=6), 1, job="7_3", restarts=6),
        house.source(house.writer(job="7_4"), 1, job="7_4"),
        house.source(house.writer("second", job="9_0"), 1, submission="second", superseded=frozenset({"first"})),
    ]
    assert {+source._ready(0).charges[cause] for source in observers for cause in (Cause.UNKNOWN, Cause.SIGNAL)} == {0}


def test_a_trial_that_fails_again_is_not_run_a_third_time(house: House) -> None:
    house.lost().append(complete(0, Status.FAILED), complete(1), complete(2))
    ours = house.writer("second")
    known = {"submission": "second", "superseded": frozenset({"first"}), "retry_failed": True}
    source = house.source(ours, 1, **known)
    assert trials(list(source)[-1]) == [0]
    ours.append(outcome(trial=0, attempt=1, status=Status.FAILED, payload={"cause": "error"}, seconds=0.0))
    late = house.source(house.writer("second"), 0, **known)
    assert trials([ready for block in late for ready in block]) == []
