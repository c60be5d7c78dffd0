"""The fold: lines torn, late, twice and in any order give one table."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import FolderError
from orchestrator.fold import Disagreement, Fold
from orchestrator.paths import SweepPaths
from orchestrator.records import Cause, Status, end, notice, outcome, report, start
from orchestrator.store import JsonObject, checked

NUM = 4
WRITERS = ("a" * 32, "b" * 32, "c" * 32)


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return empty(tmp_path)


def empty(folder: Path) -> SweepPaths:
    found = SweepPaths(folder)
    found.records.mkdir()
    return found


def writer(name: str, **more: object) -> JsonObject:
    return {"kind": "writer", "writer": name, "host": f"host-{name[0]}", **more}


def done(trial: int, value: float = 1.0, attempt: int = 0, status: Status = Status.COMPLETE) -> JsonObject:
    return outcome(trial=trial, attempt=attempt, status=status, payload={"value": value}, seconds=1.0)


def ended(trial: int, cause: Cause = Cause.SIGNAL, attempt: int = 0, **more: bool) -> JsonObject:
    return end(trial=trial, attempt=attempt, cause=cause, detail="because", **more)


def begun(*trials: int, attempt: int = 0) -> list[JsonObject]:
    return [start(trial=trial, attempt=attempt) for trial in trials]


def put(paths: SweepPaths, name: str, *lines: JsonObject, **more: object) -> bytes:
    data = b"".join(map(checked, (writer(name, **more), *lines)))
    paths.record(name).write_bytes(data)
    return data


def folded(paths: SweepPaths) -> Fold:
    found = Fold(paths, NUM)
    found.update()
    return found


def view(fold: Fold) -> object:
    """All that a person can ask of a fold."""
    trials = range(NUM)
    return (
        [fold.status(i) for i in trials],
        list(fold.values),
        [fold.payload(i) for i in trials],
        [fold.next_attempt(i) for i in trials],
        [fold.attempts(i) for i in trials],
        [fold.charges(i) for i in trials],
        fold.running(),
        fold.retries(),
        fold.disagreements,
        fold.num_missing,
        fold.num_bad_lines,
        fold.writers(),
        sorted(map(repr, fold.notices())),
    )


# What counts


def test_each_trial_has_one_outcome_that_counts(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *begun(0, 1), done(0, 5.0), done(1, status=Status.DIVERGED))
    fold = folded(paths)
    assert [fold.status(i) for i in range(NUM)] == [Status.COMPLETE, Status.DIVERGED, None, None]
    assert (fold.values[0], fold.missing(), fold.count(Status.COMPLETE)) == (5.0, [2, 3], 1)
    assert fold.trials(Status.DIVERGED) == [1]


@pytest.mark.parametrize(("better", "worse"), [(a, b) for i, a in enumerate(Status) for b in list(Status)[i + 1 :]])
@pytest.mark.parametrize("turned", [False, True])
def test_the_greater_outcome_wins_in_either_order(
    paths: SweepPaths, better: Status, worse: Status, turned: bool
) -> None:
    lines = [done(0, 1.0, status=better), done(0, 2.0, status=worse)]
    put(paths, WRITERS[0], *(lines[::-1] if turned else lines))
    assert folded(paths).status(0) == better
    assert folded(paths).values[0] == 1.0


def test_a_trial_of_another_plan_is_ignored(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(NUM), done(-1), done(2**40), done(3))
    assert folded(paths).missing() == [0, 1, 2]


def test_a_damaged_payload_is_never_half_read(paths: SweepPaths) -> None:
    data = put(paths, WRITERS[0], done(0), done(1))
    paths.record(WRITERS[0]).write_bytes(data.replace(b'"value":1.0', b'"value":2.0', 1))
    fold = folded(paths)
    assert (fold.status(0), fold.status(1), fold.num_bad_lines) == (None, Status.COMPLETE, 1)


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "outcome", "trial": 0, "attempt": 0, "status": "splendid", "payload": {}},
        {"kind": "outcome", "trial": 0, "attempt": 0},
        {"kind": "end", "trial": 0, "attempt": 0, "cause": "fate"},
    ],
)
def test_a_record_of_another_version_is_refused_by_name(paths: SweepPaths, line: JsonObject) -> None:
    put(paths, WRITERS[0], line)
    with pytest.raises(FolderError, match=f"{WRITERS[0]}.jsonl: a record at byte"):
        folded(paths)


def test_a_kind_that_is_unknown_changes_nothing(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *begun(0), {"kind": "news", "trial": 0, "attempt": 0}, {"kind": "more"})
    assert list(folded(paths).running()) == [0]


# Torn


def test_a_file_cut_at_every_byte_keeps_the_rest_intact(paths: SweepPaths) -> None:
    put(paths, WRITERS[1], done(3))
    lines = [*begun(0, 1), done(0), report(trial=1, attempt=0, step=1, metrics={}), done(1)]
    data = put(paths, WRITERS[0], *lines)
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in range(len(data) + 1):
        paths.record(WRITERS[0]).write_bytes(data[:cut])
        fold = folded(paths)
        assert fold.num_bad_lines == (cut not in (0, *ends)), cut
        complete = [i for i, needs in ((0, ends[3]), (1, ends[5])) if cut >= needs]
        assert fold.trials(Status.COMPLETE) == [*complete, 3]


def test_a_torn_line_is_counted_until_it_is_whole(paths: SweepPaths) -> None:
    data = put(paths, WRITERS[0], done(0))
    paths.record(WRITERS[0]).write_bytes(data[:-5])
    fold = folded(paths)
    assert (fold.num_bad_lines, fold.num_missing) == (1, NUM)
    paths.record(WRITERS[0]).write_bytes(data)
    assert fold.update() == 1
    assert (fold.num_bad_lines, fold.num_missing) == (0, NUM - 1)


def test_an_update_without_news_says_so_beyond_a_bad_line_too(paths: SweepPaths) -> None:
    data = put(paths, WRITERS[0], done(0), done(1), done(2))
    paths.record(WRITERS[0]).write_bytes(data.replace(b'"trial":0', b'"trial":7'))
    fold = Fold(paths, NUM)
    assert [fold.update() for _ in range(3)] == [3, 0, 0]
    paths.record(WRITERS[0]).write_bytes(data)
    assert [fold.update() for _ in range(2)] == [1, 0]


# Late, twice, in any order

OUTCOMES = st.builds(
    done, st.integers(0, NUM - 1), st.sampled_from([1.0, 2.0]), st.integers(0, 1), st.sampled_from(list(Status))
)
ENDS = st.builds(ended, st.integers(0, NUM - 1), st.sampled_from(list(Cause)), st.integers(0, 2), begun=st.booleans())
STARTS = st.builds(
    lambda trial, attempt: start(trial=trial, attempt=attempt), st.integers(0, NUM - 1), st.integers(0, 2)
)
OTHERS = st.sampled_from(
    [
        {"kind": "beat"},
        report(trial=0, attempt=0, step=1, metrics={"m": 1.0}),
        notice(signal="S", state="R", action="A"),
    ]
)
FILES = st.lists(st.lists(STARTS | OUTCOMES | ENDS | OTHERS, max_size=6), min_size=1, max_size=3)


def joined(lines: Iterable[JsonObject]) -> list[object]:
    with tempfile.TemporaryDirectory() as folder:
        paths = empty(Path(folder))
        put(paths, WRITERS[0], *lines)
        fold = folded(paths)
        return [(fold.status(i), fold.values[i], fold.payload(i)) for i in range(NUM)]


@given(st.lists(OUTCOMES, max_size=8), st.randoms())
def test_the_join_is_commutative_and_associative(lines: list[JsonObject], rng: random.Random) -> None:
    shuffled = rng.sample(lines, len(lines))
    assert joined(lines) == joined(shuffled)


@given(st.lists(OUTCOMES, max_size=5))
def test_the_join_is_idempotent(lines: list[JsonObject]) -> None:
    assert joined(lines) == joined([*lines, *lines])


@given(FILES, st.permutations(WRITERS))
def test_the_order_of_files_is_irrelevant(files: list[list[JsonObject]], names: list[str]) -> None:
    def seen(order: list[str]) -> object:
        with tempfile.TemporaryDirectory() as folder:
            paths = empty(Path(folder))
            for name, lines in zip(order, files, strict=False):
                # Same writer line whatever the file's name, so that only the order differs.
                data = b"".join(map(checked, ({"kind": "writer", "host": f"h{len(lines)}", "slots": 2}, *lines)))
                paths.record(name).write_bytes(data)
            fold = folded(paths)
            return [
                [(fold.status(i), fold.values[i], fold.charges(i), fold.next_attempt(i)) for i in range(NUM)],
                set(fold.running()),
                fold.disagreements,
            ]

    assert seen(list(WRITERS)) == seen(names)


@st.composite
def views_of_a_file(draw: st.DrawFn, content: bytes, steps: int) -> list[bytes]:
    """What a network file system shows of a file over time: more and more of it, with zeros that become data late."""
    lengths = sorted(draw(st.integers(0, len(content))) for _ in range(steps))
    first = draw(st.integers(0, len(content)))
    last = min(len(content), first + draw(st.integers(0, 200)))
    healed = draw(st.integers(0, steps))
    holed = content[:first] + bytes(last - first) + content[last:]
    return [(content if step >= healed else holed)[:length] for step, length in enumerate(lengths)]


@given(FILES, st.data())
def test_an_incremental_fold_equals_a_cold_one(files: list[list[JsonObject]], data: st.DataObject) -> None:
    whole = {
        name: b"".join(map(checked, (writer(name, slots=2), *lines)))
        for name, lines in zip(WRITERS, files, strict=False)
    }
    shown = {name: data.draw(views_of_a_file(content, 3)) for name, content in whole.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = empty(Path(folder))
        warm = Fold(paths, NUM)
        for step in range(4):
            for name, content in whole.items():
                paths.record(name).write_bytes([*shown[name], content][step])
            warm.update()
            assert warm.update() == 0
            assert view(warm) == view(folded(paths))


# Disagreement


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_outcomes_that_differ_are_reported_and_the_same_one_is_kept(paths: SweepPaths, order: tuple[int, ...]) -> None:
    fold = Fold(paths, NUM)
    for which in order:
        put(paths, WRITERS[which], done(0, [1.0, 2.0, 2.0][which]))
        fold.update()
    cold = folded(paths)
    assert fold.payload(0) == cold.payload(0)
    assert fold.disagreements == cold.disagreements
    (found,) = cold.disagreements
    assert found.trial == 0
    assert found.hosts in (("host-a", "host-b"), ("host-a", "host-c"))


def test_equal_outcomes_of_two_writers_are_no_disagreement(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0, attempt=0))
    put(paths, WRITERS[1], done(0, attempt=1))
    assert folded(paths).disagreements == []


def test_a_trial_that_failed_and_then_completed_is_no_disagreement(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0, status=Status.FAILED), done(0, 2.0, status=Status.FAILED, attempt=1))
    put(paths, WRITERS[1], done(0, attempt=2))
    assert folded(paths).disagreements == []


def test_a_trial_that_diverged_on_one_host_only_is_a_disagreement(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0, status=Status.DIVERGED))
    put(paths, WRITERS[1], done(0))
    assert folded(paths).disagreements == [Disagreement(0, ("host-a", "host-b"))]


def with_model(model: str | None, value: float = 1.0) -> JsonObject:
    payload: JsonObject = {"value": value, "model": model}
    return outcome(trial=0, attempt=0, status=Status.COMPLETE, payload=payload, seconds=1.0)


@pytest.mark.parametrize("names", [WRITERS[:2], WRITERS[1::-1]])
def test_of_equal_outcomes_one_with_a_model_is_kept_and_none_disagrees(
    paths: SweepPaths, names: tuple[str, str]
) -> None:
    put(paths, names[0], with_model(None))
    put(paths, names[1], with_model("ab" * 32))
    fold = folded(paths)
    assert (fold.payload(0)["model"], fold.disagreements) == ("ab" * 32, [])


@pytest.mark.parametrize("other", [with_model("cd" * 32), with_model(None, 2.0)])
def test_other_weights_or_other_values_disagree(paths: SweepPaths, other: JsonObject) -> None:
    put(paths, WRITERS[0], with_model("ab" * 32))
    put(paths, WRITERS[1], other)
    assert folded(paths).disagreements == [Disagreement(0, ("host-a", "host-b"))]


def test_trials_that_failed_in_other_words_do_not_disagree(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0, 1.0, status=Status.FAILED))
    put(paths, WRITERS[1], done(0, 2.0, status=Status.FAILED))
    assert folded(paths).disagreements == []


# Attempts and what they are charged to


def test_those_that_were_running_are_the_first_ones_open(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *begun(0, 1, 2, 3), done(0), slots=2)
    fold = folded(paths)
    assert sorted(fold.running()) == [1, 2]
    assert [fold.charges(i)[Cause.UNKNOWN] for i in range(NUM)] == [0, 1, 1, 0]


def test_starts_that_are_seen_late_are_still_the_first_ones(paths: SweepPaths) -> None:
    data = put(paths, WRITERS[0], *begun(0, 1, 2), slots=2)
    paths.record(WRITERS[0]).write_bytes(data.replace(b'"trial":0', b'"trial":7'))
    fold = folded(paths)
    paths.record(WRITERS[0]).write_bytes(data)
    fold.update()
    assert sorted(fold.running()) == [0, 1]


def test_an_attempt_that_is_charged_by_name_is_not_charged_as_unknown(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *begun(0, 1), ended(0, Cause.SIGNAL))
    assert folded(paths).charges(0) == Counter({Cause.SIGNAL: 1})
    assert list(folded(paths).running()) == [1]


def test_what_had_not_begun_costs_nothing(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *begun(0, 1), ended(0, Cause.TIMEOUT), ended(1, Cause.TIMEOUT, begun=False))
    fold = folded(paths)
    assert (fold.charges(0)[Cause.TIMEOUT], fold.charges(1)[Cause.TIMEOUT]) == (1, 0)
    assert (fold.retries(), fold.running()) == (Counter({Cause.TIMEOUT: 1}), {})
    assert fold.next_attempt(1) == 1


@pytest.mark.parametrize(
    ("later", "charged"),
    [
        ({"job": "7", "restarts": 2}, 0),
        ({"job": "7", "restarts": 1}, 1),
        ({"job": "8", "restarts": 2}, 1),
        ({"job": "7", "restarts": 2, "submission": "other"}, 1),
    ],
)
@pytest.mark.parametrize("names", [WRITERS[:2], WRITERS[1::-1]])
def test_a_run_whose_job_was_requeued_is_not_charged_whoever_looks(
    paths: SweepPaths, names: tuple[str, str], later: dict[str, object], charged: int
) -> None:
    put(paths, names[0], *begun(0), job="7", restarts=1)
    put(paths, names[1], **later)
    assert folded(paths).charges(0) == Counter({Cause.UNKNOWN: charged})


@pytest.mark.parametrize(
    ("actions", "cause"),
    [
        (["preempted: finish or stop, then requeue"], Cause.PREEMPTED),
        (["preempted: finish or stop, then requeue", "cancelled: leave"], Cause.CANCELLED),
        (["timeout: finish or stop, then requeue"], Cause.TIMEOUT),
        (["preempted: finish or stop, then requeue", "unknown: go on"], Cause.PREEMPTED),
        (["signal: go on"], Cause.UNKNOWN),
        (["unknown: go on"], Cause.UNKNOWN),
        ([], Cause.UNKNOWN),
    ],
)
def test_a_writer_that_fell_silent_after_a_notice_is_charged_to_the_notice(
    paths: SweepPaths, actions: list[str], cause: Cause
) -> None:
    put(paths, WRITERS[0], *begun(0), *(notice(signal="SIGTERM", state="", action=action) for action in actions))
    assert folded(paths).charges(0) == Counter({cause: 1})


def test_every_process_that_may_run_a_trial_is_named(paths: SweepPaths) -> None:
    put(paths, WRITERS[2], *begun(0), host="dead")
    warm = folded(paths)
    put(paths, WRITERS[0], *begun(0, attempt=1), host="alive")
    warm.update()
    assert [writer["host"] for writer in warm.running()[0]] == ["alive", "dead"]
    assert warm.running() == folded(paths).running()


def test_the_file_that_continues_another_one_is_known(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *begun(0))
    put(paths, WRITERS[1], continues=WRITERS[0])
    put(paths, WRITERS[2], continues=WRITERS[1])
    fold = folded(paths)
    assert [fold.latest(name) for name in (*WRITERS, "other")] == [WRITERS[2]] * 3 + ["other"]


@pytest.mark.parametrize("names", [WRITERS[:2], WRITERS[1::-1]])
def test_an_attempt_that_ended_in_its_writers_next_file_is_charged_once(
    paths: SweepPaths, names: tuple[str, str]
) -> None:
    put(paths, names[0], *begun(0, 1))
    put(paths, names[1], ended(0, Cause.ERROR), done(1))
    fold = folded(paths)
    assert fold.running() == {}
    assert fold.charges(0) == Counter({Cause.ERROR: 1})


def test_only_attempts_that_began_are_counted(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *begun(0, 1, 2), ended(0), ended(1, begun=False))
    put(paths, WRITERS[1], *begun(1, 0, 3, attempt=1), done(1, attempt=1), slots=1)
    fold = folded(paths)
    assert [fold.attempts(i) for i in range(NUM)] == [2, 1, 1, 0]


def test_the_next_attempt_follows_every_start(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *begun(0, attempt=4))
    put(paths, WRITERS[1], *begun(0, attempt=1), done(1))
    fold = folded(paths)
    assert (fold.next_attempt(0), fold.next_attempt(1)) == (5, 0)
    assert (fold.attempts(0), fold.attempts(1), fold.attempts(2)) == (2, 1, 0)
    assert fold.has_begun


def test_starts_that_were_taken_back_are_no_beginning(paths: SweepPaths) -> None:
    assert not folded(paths).has_begun
    put(
        paths,
        WRITERS[0],
        start(trial=0, attempt=0),
        end(trial=0, attempt=0, cause=Cause.UNKNOWN, detail="", begun=False),
    )
    assert not folded(paths).has_begun


def test_notices_come_with_their_writer(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], notice(signal="SIGTERM", state="RUNNING", action="leave"))
    ((who, what),) = folded(paths).notices()
    assert (who["host"], what["signal"]) == ("host-a", "SIGTERM")
