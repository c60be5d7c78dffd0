"""The fold: lines torn, late, twice and in any order give one table."""

from __future__ import annotations

import errno
import hashlib
import itertools
import math
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import orjson
import pytest
from histories import FILES, NUM, OUTCOMES, WRITERS, begun, done, empty, ended, folded, put, shows, view
from hypothesis import given
from hypothesis import strategies as st
from sweeps import make

from orchestrator.cli import tables as show
from orchestrator.core.atomic import JsonObject, canonical, checked
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import FolderError
from orchestrator.results.fold import Disagreement, Fold, segment
from orchestrator.results.fold import table as tables
from orchestrator.results.fold.line_cache import payload_text
from orchestrator.results.records import Cause, Status, end, notice, outcome, report, start
from orchestrator.sweep import Sweep


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return empty(tmp_path)


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
        {"kind": "outcome", "trial": 0, "attempt": 0, "status": [], "payload": {"value": 1.0}, "seconds": 1.0},
        {"kind": "outcome", "trial": 0, "attempt": 0, "status": "complete", "payload": {"value": None}, "seconds": 1.0},
        {"kind": "outcome", "trial": 0, "attempt": 0, "status": "complete", "payload": 7, "seconds": 1.0},
        {"kind": "start", "trial": 0, "attempt": 10**12},
        {"kind": "start", "trial": 0, "attempt": -1},
        {"kind": "writer", "writer": WRITERS[0], "submission": []},
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


@pytest.mark.parametrize("attempt", [0, 1])
def test_no_value_is_minus_zero(paths: SweepPaths, attempt: int) -> None:
    put(paths, WRITERS[0], done(0, -0.0, attempt))
    assert math.copysign(1.0, folded(paths).value(0)) == 1.0


# What is no record file, and what can't be read


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [fifo, link_to_nothing, link_to_a_device, Path.mkdir])
def test_what_is_no_file_is_passed_over(paths: SweepPaths, make: Callable[[Path], None]) -> None:
    put(paths, WRITERS[0], done(0))
    make(paths.record(WRITERS[1]))
    fold = folded(paths)
    assert (fold.missing(), list(fold.seen), fold.unreadable) == ([1, 2, 3], [WRITERS[0]], [])


@pytest.mark.parametrize("name", [b"b.jsonl", b"B" * 32 + b".jsonl", WRITERS[1].encode(), b"\xff" * 32 + b".jsonl"])
def test_a_file_that_is_not_called_like_a_record_file_is_passed_over(paths: SweepPaths, name: bytes) -> None:
    put(paths, WRITERS[0], done(0))
    (paths.records / os.fsdecode(name)).write_bytes(put(paths, WRITERS[1], done(1)))
    paths.record(WRITERS[1]).unlink()
    assert folded(paths).missing() == [1, 2, 3]


def test_a_file_that_cannot_be_read_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make(tmp_path, trials=2)
    put(paths, WRITERS[0], done(0))
    put(paths, WRITERS[1], done(1))
    original = segment.opened

    def opened(path: Path) -> object:
        if path == paths.record(WRITERS[1]):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(segment, "opened", opened)
    sweep = Sweep(paths)
    assert (sweep.fold.missing(), sweep.fold.unreadable) == ([1], [(paths.record(WRITERS[1]), "Permission denied")])
    said = (
        f"1 record file can't be read, so trials may be missing that are done: {paths.record(WRITERS[1])}: permission"
    )
    assert said in show.standing(sweep, sweep.standing())
    monkeypatch.undo()
    assert (sweep.refresh().fold.missing(), sweep.fold.unreadable) == ([], [])


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_a_line_that_is_far_too_long_is_one_bad_line(
    paths: SweepPaths, monkeypatch: pytest.MonkeyPatch, chunk: int, ending: bytes
) -> None:
    monkeypatch.setattr(segment, "_CHUNK", chunk)
    monkeypatch.setattr(segment, "_LONGEST", 1000)
    long = bytes(5000) + ending
    data = put(paths, WRITERS[0], done(0), done(1))
    cut = data.index(b"\n", data.index(b'"trial":0')) + 1
    paths.record(WRITERS[0]).write_bytes(data[:cut] + long + data[cut:] if ending else data + long)
    fold = folded(paths)
    assert (fold.missing(), fold.num_bad_lines) == ([2, 3], 1)
    assert fold.seen == {WRITERS[0]: cut if ending else len(data)}
    assert fold.payload(1) == {"value": 1.0}


# Torn


def test_fault_17_a_file_cut_at_every_byte_keeps_the_rest_intact(paths: SweepPaths) -> None:
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


def test_whatever_changes_is_told_by_the_number_of_changes(paths: SweepPaths) -> None:
    head, *lines = put(paths, WRITERS[0], done(0), done(1), done(2), done(3)).splitlines(keepends=True)
    zeros = [bytes(len(line) - 1) + b"\n" for line in lines]
    holed = [[zeros[0], lines[1], zeros[2], lines[3]], [zeros[0], zeros[1], lines[2], lines[3]]]
    path, counts, fold = paths.record(WRITERS[0]), [], Fold(paths, NUM)
    for shown in (*holed, lines, lines, lines[:3]):
        path.write_bytes(head + b"".join(shown))
        counts.append((fold.update(), fold.num_changes))
    more, changes = zip(*counts, strict=True)
    assert more == (3, 0, 2, 0, -1)
    assert [after > before for before, after in itertools.pairwise((0, *changes))] == [True, True, True, False, True]


def test_what_a_file_server_lost_no_longer_counts(paths: SweepPaths) -> None:
    lines = put(paths, WRITERS[0], done(0), done(1), done(2)).splitlines(keepends=True)
    path = paths.record(WRITERS[0])
    path.write_bytes(b"".join([*lines[:2], bytes(len(lines[2]) - 1) + b"\n", lines[3]]))
    warm = folded(paths)
    assert warm.missing() == [1, 3]
    path.write_bytes(b"".join(lines[:2]))
    warm.update()
    assert (warm.missing(), view(warm)) == ([1, 2, 3], view(folded(paths)))


def test_an_outcome_that_was_lost_since_the_last_look_is_an_error_by_name(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0))
    fold = folded(paths)
    put(paths, WRITERS[0])
    with pytest.raises(FolderError, match=f"{WRITERS[0]}.jsonl: the record at byte .* no longer there"):
        fold.payload(0)


# Late, twice, in any order


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


@given(FILES, st.data())
def test_fault_41_a_fold_of_late_lines_equals_a_cold_one(files: list[list[JsonObject]], data: st.DataObject) -> None:
    shown = shows(files, data)
    with tempfile.TemporaryDirectory() as folder:
        paths = empty(Path(folder))
        warm = Fold(paths, NUM)
        for step in range(4):
            for name, views in shown.items():
                paths.record(name).write_bytes(views[step])
            warm.update()
            assert warm.update() == 0
            assert view(warm) == view(folded(paths))


# Disagreement


payloads = st.dictionaries(
    st.sampled_from(["value", "payload", ',"payload":', ',"seconds":1}', "{"]) | st.text(max_size=3),
    st.none()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.dictionaries(st.text(max_size=2), st.integers(0, 9)),
    max_size=4,
)


@pytest.mark.parametrize(
    "names", list(itertools.permutations(WRITERS)), ids=["".join(one) for one in itertools.permutations("abc")]
)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_fault_40_outcomes_that_differ_are_reported_and_the_same_one_is_kept(
    paths: SweepPaths, order: tuple[int, ...], names: tuple[str, ...]
) -> None:
    fold = Fold(paths, NUM)
    for which in order:
        put(paths, names[which], done(0, [1.0, 2.0, 2.0][which]))
        fold.update()
    cold = folded(paths)
    assert fold.outcome(0) == cold.outcome(0)
    assert fold.disagreements == cold.disagreements
    (found,) = cold.disagreements
    hosts = [f"host-{name[0]}" for name in names]
    assert found.trial == 0
    assert found.hosts in (tuple(sorted((hosts[0], hosts[1]))), tuple(sorted((hosts[0], hosts[2]))))
    # Whoever wrote it, and whichever was seen first: the payload with the smallest sha256 is kept.
    assert fold.payload(0) == {"value": KEPT}


KEPT = min(1.0, 2.0, key=lambda value: hashlib.sha256(canonical({"value": value})).digest())


def test_equal_outcomes_of_two_writers_are_no_disagreement(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0, attempt=0))
    put(paths, WRITERS[1], done(0, attempt=1))
    assert folded(paths).disagreements == []


def test_what_was_done_twice_alike_is_not_gone_through_again(
    paths: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(paths, WRITERS[0], *map(done, range(NUM)), submission="a")
    put(paths, WRITERS[1], *(done(i, attempt=1) for i in range(NUM)), *map(done, range(NUM)), submission="b")
    monkeypatch.setattr(tables, "order", lambda _: pytest.fail("put in order"))
    fold = folded(paths)
    assert fold.disagreements == []
    assert [one["submission"] for one in fold.authors(2)] == ["a", "b", "b"]


@given(payloads, st.floats(0, 1e6), st.integers(0, 1))
def test_the_payload_of_a_line_is_found_without_parsing_it(payload: JsonObject, seconds: float, attempt: int) -> None:
    line = outcome(trial=0, attempt=attempt, status=Status.COMPLETE, payload=payload, seconds=seconds)
    assert payload_text(checked(line)[:-1]) == orjson.dumps(payload)
    turned: JsonObject = {name: line[name] for name in reversed(line)}
    assert payload_text(checked(turned)[:-1]) == b""
    nested: JsonObject = {"kind": "outcome", "seconds": seconds, "payload": {**payload, "seconds": seconds}}
    assert payload_text(checked(nested)[:-1]) == b""
    inner: JsonObject = {"payload": payload, "more": {"kind": 1, "payload": {}}, "seconds": seconds}
    assert payload_text(checked(inner)[:-1]) == b""


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


@pytest.mark.parametrize("copy", [WRITERS[1], "0" * 32])
def test_a_copy_of_a_record_file_charges_nothing_twice(paths: SweepPaths, copy: str) -> None:
    put(paths, WRITERS[0], *begun(0, 1), ended(0, Cause.SIGNAL))
    charged = [folded(paths).charges(i) for i in range(2)]
    paths.record(copy).write_bytes(paths.record(WRITERS[0]).read_bytes())
    fold = folded(paths)
    assert [fold.charges(i) for i in range(2)] == charged == [Counter({Cause.SIGNAL: 1}), Counter({Cause.UNKNOWN: 1})]
    assert (fold.retries(), len(fold.running()[1])) == (Counter({Cause.SIGNAL: 1}), 1)


def test_files_that_say_that_they_continue_each_other_have_an_end(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], continues=WRITERS[1])
    put(paths, WRITERS[1], continues=WRITERS[0])
    assert folded(paths).latest(WRITERS[0]) == WRITERS[1]


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
