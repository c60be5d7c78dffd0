"""What interruptions cost, as record files tell it."""

from __future__ import annotations

from pathlib import Path

import pytest
from histories import begun, empty, ended, put

from orchestrator.core.paths import SweepPaths
from orchestrator.results import resumption
from orchestrator.results.records import Cause, at, end, report, resume
from orchestrator.results.resumption import Account, Resumption

ONE, OTHER = "a" * 32, "b" * 32


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return empty(tmp_path)


def saved(trial: int, step: int | None, cause: Cause = Cause.PREEMPTED, attempt: int = 0) -> dict[str, object]:
    return {**end(trial=trial, attempt=attempt, cause=cause, detail="left", step=step)}


@pytest.mark.parametrize(
    "line",
    [
        at(trial=3, attempt=0, step=17, saved=10),
        at(trial=3, attempt=0, step=17, saved=None),
        report(trial=3, attempt=2, step=17, metrics={"step": 99.0, "val_loss": 0.5}),
        end(trial=3, attempt=0, cause=Cause.TIMEOUT, detail="saved at step 17", step=17),
    ],
    ids=lambda line: str(line["kind"]),
)
def test_what_was_lost_is_counted_from_the_highest_step_that_any_line_names(
    paths: SweepPaths, line: dict[str, object]
) -> None:
    put(paths, ONE, at(trial=3, attempt=0, step=5, saved=None), at(trial=33, attempt=0, step=400, saved=None))
    put(paths, OTHER, {**line}, *begun(3))  # type: ignore[arg-type]
    assert resumption.read(paths).resumptions == ()
    of = {3: 10, 33: 399, 1: 4}
    put(paths, "c" * 32, *(resume(trial=trial, attempt=4, step=step) for trial, step in of.items()))
    put(paths, "d" * 32, at(trial=3, attempt=4, step=900, saved=None))  # of the attempt that goes on itself
    assert [(each.trial, each.lost) for each in resumption.read(paths).resumptions] == [(1, 0), (3, 7), (33, 1)]


def test_a_member_of_a_pack_has_come_as_far_as_its_lead(paths: SweepPaths) -> None:
    put(paths, ONE, at(trial=0, attempt=0, step=12, saved=10))
    put(paths, OTHER, *(resume(trial=trial, attempt=1, step=10, lead=0) for trial in (0, 2)))
    assert [(each.trial, each.lost) for each in resumption.read(paths).resumptions] == [(0, 2), (2, 2)]


def test_resumptions_count_once_however_often_they_are_read_and_come_in_order(paths: SweepPaths) -> None:
    lines = [resume(trial=1, attempt=2, step=10), resume(trial=0, attempt=1, step=0)]
    reached = [at(trial=0, attempt=0, step=7, saved=None), at(trial=1, attempt=1, step=13, saved=None)]
    put(paths, ONE, *lines, *reached)
    put(paths, OTHER, lines[0], resume(trial=1, attempt=1, step=4))
    found = resumption.read(paths).resumptions
    assert found == (
        Resumption(trial=0, attempt=1, step=0, lost=7),
        Resumption(trial=1, attempt=1, step=4, lost=0),
        Resumption(trial=1, attempt=2, step=10, lost=3),
    )


def test_attempts_that_were_saved_when_they_ended_count_by_cause(paths: SweepPaths) -> None:
    put(paths, ONE, saved(0, 5), saved(1, 6, Cause.TIMEOUT), saved(2, None), ended(3))  # type: ignore[arg-type]
    put(paths, OTHER, saved(4, 9), saved(5, 0))  # type: ignore[arg-type]
    assert resumption.read(paths).saved == {"preempted": 2, "timeout": 1}


def test_how_attempts_ended_is_told_by_attempt(paths: SweepPaths) -> None:
    put(paths, ONE, ended(3), ended(31, attempt=4))
    put(paths, OTHER, ended(3, Cause.MEMORY, attempt=1), *begun(3, attempt=2))
    assert resumption.ends(paths, 3) == {0: "signal: because", 1: "out of memory: because"}
    assert resumption.ends(paths, 1) == {}


def test_lines_that_are_torn_and_files_that_are_no_record_files_say_nothing(paths: SweepPaths) -> None:
    data = put(paths, ONE, resume(trial=0, attempt=1, step=5), ended(0))
    paths.record(ONE).write_bytes(data.replace(b'"step":5', b'"step":9').replace(b"because", b"becausE"))
    (paths.records / "notes.jsonl").write_bytes(data)
    paths.record("c" * 32).mkdir()
    paths.record("d" * 32).symlink_to(paths.records / "notes.jsonl")
    assert resumption.read(paths) == Account(saved={})
    assert resumption.ends(paths, 0) == {}


def test_a_file_that_cannot_be_read_is_passed_over(paths: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    put(paths, ONE, ended(3))
    put(paths, OTHER, ended(3, Cause.MEMORY, attempt=1))
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.stem == ONE:
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert resumption.ends(paths, 3) == {1: "out of memory: because"}
