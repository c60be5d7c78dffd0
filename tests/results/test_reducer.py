"""The reducer: the same bytes however often it runs, and never "done" while work is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
from sweeps import Clock, clean_environment, make, names, no_room_after
from test_fold import WRITERS, put

from orchestrator.config.plan import PlanFile
from orchestrator.core import atomic
from orchestrator.core.atomic import JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import OrcError
from orchestrator.results import reducer
from orchestrator.results.fold import Fold
from orchestrator.results.records import Status, outcome

NUM = 4


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return make(tmp_path, trials=NUM, top=2)


def done(trial: int, value: float = 1.0, status: Status = Status.COMPLETE) -> JsonObject:
    payload: JsonObject = {"value": value} if status is Status.COMPLETE else {}
    return outcome(trial=trial, attempt=0, status=status, payload=payload, seconds=0.0)


def reduced(paths: SweepPaths) -> tuple[int, JsonObject]:
    code = reducer.reduce(paths, wait_s=0.0)
    return code, orjson.loads(paths.summary.read_bytes())


def test_a_whole_sweep_is_summed_up(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0, 4.0), done(1, 1.0), done(2, 1.0), done(3, status=Status.DIVERGED))
    code, found = reduced(paths)
    assert code == 0
    assert (found["planned"], found["missing"], found["count"], found["diverged"]) == (NUM, 0, 3, 1)
    assert (found["min"], found["max"], found["mean"], found["sum"]) == (1.0, 4.0, 2.0, 6.0)
    assert found["top"] == [
        {"index": 1, "params": {"x": 1}, "value": 1.0},
        {"index": 2, "params": {"x": 2}, "value": 1.0},
    ]


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([], 4),
        ([done(0), done(1), done(2)], 4),
        ([done(i) for i in range(NUM)], 0),
        ([done(i, status=Status.FAILED) for i in range(NUM)], 4),
        ([done(i, status=Status.DIVERGED) for i in range(NUM)], 0),
    ],
)
def test_it_never_says_done_while_something_is_missing_or_failed(
    paths: SweepPaths, lines: list[JsonObject], code: int
) -> None:
    put(paths, WRITERS[0], *lines)
    found, summary = reduced(paths)
    assert found == code
    counted = sum(int(str(summary[key])) for key in ("missing", "count", "diverged", "failed", "pruned"))
    assert counted == NUM


def test_an_empty_sweep_has_null_and_no_nan(paths: SweepPaths) -> None:
    put(paths, WRITERS[0])
    _, found = reduced(paths)
    assert [found[key] for key in ("min", "max", "mean", "std")] == [None] * 4
    assert b"NaN" not in paths.summary.read_bytes()


def test_the_same_bytes_however_the_records_lie(paths: SweepPaths) -> None:
    lines = [done(0, 0.1), done(1, 0.2), done(2, 0.3), done(3, 1e16)]
    put(paths, WRITERS[0], *lines)
    reduced(paths)
    one = paths.summary.read_bytes()
    put(paths, WRITERS[0], lines[3], lines[1])
    put(paths, WRITERS[1], lines[2], lines[0], lines[1])
    reduced(paths)
    assert paths.summary.read_bytes() == one


def test_a_damaged_record_is_left_out_and_does_not_hold_it_up(paths: SweepPaths) -> None:
    data = put(paths, WRITERS[0], *map(done, range(NUM)))
    paths.record(WRITERS[0]).write_bytes(data.replace(b'"trial":1', b'"trial":9'))
    code, found = reduced(paths)
    assert (code, found["missing"]) == (4, 1)


def test_it_waits_for_records_that_become_visible(paths: SweepPaths) -> None:
    clock = Clock()
    put(paths, WRITERS[0], done(0))

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now >= 5.0:
            put(paths, WRITERS[1], done(1), done(2), done(3))

    assert reducer.reduce(paths, wait_s=90.0, sleep=sleep) == 0
    assert 5.0 <= clock.now < 90.0


def test_it_stops_waiting_at_its_limit(paths: SweepPaths) -> None:
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.now += seconds

    put(paths, WRITERS[0], done(0))
    assert reducer.reduce(paths, wait_s=90.0, sleep=sleep) == 4
    assert clock.now == 90.0


def test_a_record_that_appears_while_it_writes_is_in_the_summary(
    paths: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(paths, WRITERS[0], done(0), done(1), done(2))
    write = atomic.write

    def late(path: Path, data: bytes) -> None:
        write(path, data)
        put(paths, WRITERS[1], done(3))

    monkeypatch.setattr(atomic, "write", late)
    code, found = reduced(paths)
    assert (code, found["missing"]) == (0, 0)


def test_it_ends_beside_a_busy_writer(paths: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    put(paths, WRITERS[0], done(0))
    busy = atomic.AppendFile(paths.record(WRITERS[1]))
    write, written = atomic.write, []

    def beside(path: Path, data: bytes) -> None:
        write(path, data)
        written.append(data)
        busy.append({"kind": "beat"})

    monkeypatch.setattr(atomic, "write", beside)
    assert reducer.reduce(paths, wait_s=0.0) == 4
    assert len(written) == 1
    busy.close()


def test_it_ends_although_every_look_shows_something_new(paths: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = atomic.AppendFile(paths.record(WRITERS[1]))
    write, written = atomic.write, []

    def beside(path: Path, data: bytes) -> None:
        write(path, data)
        written.append(data)
        assert len(written) < 100
        busy.append(done(0, 1000.0 - len(written)))

    monkeypatch.setattr(atomic, "write", beside)
    assert reducer.reduce(paths, wait_s=0.0) == 4
    busy.close()


def test_a_summary_is_current_only_while_it_says_what_the_records_say(paths: SweepPaths) -> None:
    plan, fold = PlanFile.open(paths.plan), Fold(paths, NUM)
    put(paths, WRITERS[0], done(0))
    fold.update()
    assert not reducer.is_reduced(paths, plan, fold)
    reduced(paths)
    assert reducer.is_reduced(paths, plan, fold)
    put(paths, WRITERS[1], done(1))
    fold.update()
    assert not reducer.is_reduced(paths, plan, fold)


def test_what_killed_writers_left_goes_when_nothing_is_alive_or_it_is_old(paths: SweepPaths) -> None:
    left = [paths.root / ".summary.json.0123456789ab", paths.models / ".1-ab.safetensors.0123456789ab"]
    stay = [paths.root / ".submit.lock", paths.root / ".summary.json.ba9876543210", paths.models / "1-ab.safetensors"]
    for path in (*left, *stay):
        path.touch()
    reducer.reduce(paths, wait_s=0.0, alone=False)
    assert all(path.exists() for path in left)
    os.utime(left[0], (0, 0))
    os.utime(stay[0], (0, 0))
    reducer.reduce(paths, wait_s=0.0, alone=False)
    assert [path.exists() for path in left] == [False, True]
    reducer.reduce(paths, wait_s=0.0, alone=True)
    assert [path.exists() for path in (*left, *stay)] == [False, False, True, True, True]


def test_what_killed_readers_and_ranks_left_goes_once_it_is_old(paths: SweepPaths) -> None:
    cache, meeting = paths.root / ".fold.cache.0123456789ab", paths.rendezvous("7-0-1")
    meeting.mkdir()
    (meeting / "meet-0123456789abcdef").touch()
    cache.touch()
    for age_s, left in ((0, [True, True]), (300, [False, True]), (7200, [False, False])):
        for path in filter(Path.exists, (cache, meeting)):
            os.utime(path, (time.time() - age_s,) * 2)
        reducer.reduce(paths, wait_s=0.0, alone=False)
        assert [cache.exists(), meeting.exists()] == left


def test_checkpoints_of_trials_with_an_outcome_go_and_those_of_others_stay(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0))
    for trial in (0, 1):
        (paths.checkpoint(trial) / "attempt-0").mkdir(parents=True)
    (paths.checkpoints / "notes").mkdir()
    reducer.reduce(paths, wait_s=0.0, alone=False)
    assert names(paths.checkpoints) == ["1", "notes"]


def test_folders_that_were_removed_by_hand_hold_nothing_up(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *map(done, range(NUM)))
    for folder in (paths.checkpoints, paths.models, paths.claims):
        folder.rmdir()
    assert reduced(paths)[0] == 0


def test_a_full_disk_keeps_the_old_summary(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0))
    reduced(paths)
    before = paths.summary.read_bytes()
    put(paths, WRITERS[0], done(0), done(1))
    with no_room_after(50), pytest.raises(OrcError, match=r"summary\.json"):
        reducer.reduce(paths, wait_s=0.0)
    assert paths.summary.read_bytes() == before


def process(paths: SweepPaths) -> subprocess.Popen[str]:
    argv = [
        sys.executable,
        "-P",
        "-m",
        "orchestrator.results.reducer",
        "--dir",
        str(paths.root),
        "--submission",
        "s" * 32,
    ]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=clean_environment())


def test_as_a_process_it_names_the_remedy(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0))
    with process(paths) as found:
        _, said = found.communicate(timeout=60)
    assert found.returncode == 4
    assert f"orc status {paths.id}" in said
    assert "Traceback" not in said


def test_two_at_once_or_one_killed_give_the_same_bytes(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *map(done, range(NUM)))
    reduced(paths)
    expected = paths.summary.read_bytes()
    paths.summary.unlink()
    with process(paths) as one, process(paths) as two, process(paths) as killed:
        killed.kill()
        assert [one.wait(60), two.wait(60)] == [0, 0]
        killed.wait()
    assert paths.summary.read_bytes() == expected
    assert "summary.json" in names(paths.root)
