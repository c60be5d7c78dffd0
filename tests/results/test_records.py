"""Records: one file a process start, beats when silent, another file after a write that failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sweeps import Clock, names, no_room_after, records

from orchestrator.core import atomic
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import OrcError
from orchestrator.results.fold import Fold
from orchestrator.results.records import (
    Cause,
    RecordWriter,
    Status,
    Unrecordable,
    brief,
    end,
    notice,
    outcome,
    report,
    start,
)


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    found = SweepPaths(tmp_path)
    found.records.mkdir()
    return found


def kinds(paths: SweepPaths) -> list[str]:
    return [line["kind"] for line in records(paths)]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (start(trial=3, attempt=1), b'{"kind":"start","trial":3,"attempt":1}'),
        (
            report(trial=3, attempt=1, step=2, metrics={"a": None}),
            b'{"kind":"report","trial":3,"attempt":1,"step":2,"metrics":{"a":null}}',
        ),
        (
            outcome(trial=3, attempt=1, status=Status.COMPLETE, payload={"value": 1.0}, seconds=0.123456),
            b'{"kind":"outcome","trial":3,"attempt":1,"status":"complete","payload":{"value":1.0},"seconds":0.1235}',
        ),
        (
            end(trial=3, attempt=1, cause=Cause.SIGNAL, detail="killed by SIGSEGV"),
            b'{"kind":"end","trial":3,"attempt":1,"cause":"signal","detail":"killed by SIGSEGV"}',
        ),
        (
            end(trial=3, attempt=1, cause=Cause.TIMEOUT, detail="not begun", begun=False),
            b'{"kind":"end","trial":3,"attempt":1,"cause":"timeout","detail":"not begun","begun":false}',
        ),
        (
            notice(signal="SIGTERM", state="RUNNING", action="leave"),
            b'{"kind":"notice","signal":"SIGTERM","state":"RUNNING","action":"leave"}',
        ),
    ],
)
def test_the_kind_comes_first(line: atomic.JsonObject, text: bytes) -> None:
    assert atomic.checked(line).partition(b',"crc"')[0] + b"}" == text


def test_the_first_line_says_who_writes(paths: SweepPaths) -> None:
    writer = RecordWriter(paths, {"host": "n1", "slots": 2})
    line = records(paths)[0]
    assert (line["kind"], line["writer"], line["host"], line["slots"]) == ("writer", writer.writer, "n1", 2)
    assert names(paths.records) == [f"{writer.writer}.jsonl"]


def test_two_writers_never_share_a_file(paths: SweepPaths) -> None:
    assert RecordWriter(paths, {}).writer != RecordWriter(paths, {}).writer
    assert len(names(paths.records)) == 2


def test_it_beats_after_silence_only(paths: SweepPaths) -> None:
    clock = Clock()
    writer = RecordWriter(paths, {}, beat_s=30.0, clock=clock)
    clock.now = 29.0
    assert writer.tick() == 1.0
    writer.append(start(trial=0, attempt=0), durable=True)
    clock.now = 31.0
    assert writer.tick() == 28.0
    assert kinds(paths) == ["writer", "start"]
    clock.now = 59.0
    writer.tick()
    assert kinds(paths) == ["writer", "start", "beat"]


def test_lines_wait_for_the_disk_half_a_second_at_most(paths: SweepPaths) -> None:
    clock = Clock()
    writer = RecordWriter(paths, {}, clock=clock)
    writer.append(start(trial=0, attempt=0))
    assert writer.tick() == 0.5
    assert writer.is_dirty
    clock.now = 0.5
    writer.tick()
    assert not writer.is_dirty


def test_a_durable_line_waits_for_the_disk(paths: SweepPaths) -> None:
    writer = RecordWriter(paths, {}, clock=Clock())
    writer.append(start(trial=0, attempt=0))
    writer.append(start(trial=1, attempt=0), durable=True)
    assert not writer.is_dirty


def test_after_a_short_write_another_file_is_started(paths: SweepPaths) -> None:
    writer = RecordWriter(paths, {"host": "n1"})
    writer.append(start(trial=0, attempt=0), {"kind": "beat"})
    first = paths.record(writer.writer)
    with no_room_after(first.stat().st_size + 40):  # room for a new file of one line, not for two in this one
        writer.append(start(trial=1, attempt=0))
    assert paths.record(writer.writer) != first
    assert not first.read_bytes().endswith(b"\n")
    lines = {path: [atomic.unchecked(line) for _, line in atomic.lines(path)] for path in paths.records.iterdir()}
    assert [line["kind"] for line in lines[first] if line] == ["writer", "start", "beat"]
    assert [(line["kind"], line.get("trial")) for line in lines[paths.record(writer.writer)] if line] == [
        ("writer", None),
        ("start", 1),
    ]
    (_, line), *_ = atomic.lines(paths.record(writer.writer))
    assert json.loads(line)["continues"] == first.stem


def test_a_writer_that_found_no_room_at_all_goes_on_once_there_is_some(paths: SweepPaths) -> None:
    writer = RecordWriter(paths, {})
    first = writer.writer
    with no_room_after(1), pytest.raises(OrcError):
        writer.append(start(trial=0, attempt=0))
    other = (paths.root / "other").open("wb")  # may get the number of the file that was closed
    writer.append(start(trial=1, attempt=0))
    other.close()
    (_, line), (_, second) = atomic.lines(paths.record(writer.writer))
    assert (json.loads(line)["continues"], json.loads(second)["trial"]) == (first, 1)
    assert (paths.root / "other").read_bytes() == b""


def test_a_disk_without_any_room_is_an_error_that_names_a_record_file(paths: SweepPaths) -> None:
    writer = RecordWriter(paths, {})
    with no_room_after(1), pytest.raises(OrcError, match=str(paths.records)):
        writer.append(start(trial=0, attempt=0))


# Too long for a line


def sized(num_bytes: int) -> atomic.JsonObject:
    """An outcome that takes so many bytes as a line."""
    made = outcome(trial=3, attempt=1, status=Status.COMPLETE, payload={"value": 0.5, "pad": ""}, seconds=0.0)
    short = len(atomic.checked(made))  # a checksum has as many digits as it has
    made["payload"] = {"value": 0.5, "pad": "x" * (num_bytes - short)}
    return made


def test_a_line_of_the_longest_that_readers_take_counts_and_a_longer_one_is_refused_by_name(paths: SweepPaths) -> None:
    writer = RecordWriter(paths, {})
    longest = next(
        line for cut in range(3) if len(atomic.checked(line := sized(atomic.LONGEST - cut))) <= atomic.LONGEST
    )
    writer.append(longest)
    with pytest.raises(
        Unrecordable, match=r"trial 3, attempt 1: its outcome takes 17\.0 MiB, and a record holds 16 MiB"
    ):
        writer.append(start(trial=0, attempt=0), sized(17 << 20))
    writer.append(start(trial=1, attempt=0))
    writer.close()
    assert kinds(paths) == ["writer", "outcome", "start"], "nothing of what came with it is written"
    assert len(names(paths.records)) == 1, "the file is good, and is not abandoned"
    fold = Fold(paths, 4)
    fold.update()
    assert (fold.value(3), fold.num_bad_lines) == (0.5, 0)


def test_a_long_text_keeps_its_begin_and_its_end() -> None:
    assert brief("short") == "short"
    found = brief("a" * 5000 + "b" * 5000)
    assert found.startswith("aaa")
    assert found.endswith("bbb")
    assert len(found) < 4100
