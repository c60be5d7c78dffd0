"""A fold from the cache, by several processes, or of ranges of trials, is the fold from the records alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from histories import FILES, NUM, WRITERS, begun, done, empty, ended, put, shows, view, writer
from hypothesis import example, given
from hypothesis import strategies as st
from sweeps import no_room_after

from orchestrator.config.spec import Metric
from orchestrator.core import permissions
from orchestrator.core.atomic import JsonObject, checked
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import FolderError, OrcError
from orchestrator.results import fold as folding
from orchestrator.results.fold import Fold, cache, incremental, parallel
from orchestrator.results.fold import table as tables
from orchestrator.results.fold.columns import COMPLETE, Columns
from orchestrator.results.fold.segment import Unit
from orchestrator.results.fold.table import Table
from orchestrator.results.records import Status
from orchestrator.stats.summary import Summary


class Inline:
    """Stands for a child: reads its share here, into the same memory, with the same answer."""

    take = parallel.Child.take

    def __init__(self, table: Table, share: list[Unit]) -> None:
        self.table, self.share = table.twin(), share

    @classmethod
    def start(cls, table: Table, share: list[Unit]) -> Inline:
        return cls(table, share)

    def finish(self) -> bytes | None:
        try:
            return parallel.answer(self.table, self.share)
        except OrcError:
            return None

    def stop(self) -> None:
        pass


@contextmanager
def at_once(num_processes: int = 3, least_bytes: int = 0) -> Iterator[None]:
    """Much is made of little: everything new is dealt to `num_processes`, saved, and gone through for the leaders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "_DEALT_BYTES", least_bytes)
        patch.setattr(folding, "_SAVED_BYTES", 1)
        patch.setattr(parallel, "is_alone", lambda: True)
        patch.setattr(parallel, "num_processes", lambda _: num_processes)
        patch.setattr(parallel, "Child", Inline)
        patch.setattr(incremental, "_REACH", 2)
        patch.setattr(os, "fsync", lambda _: None)  # nothing here is about a power cut, and a disk is slow
        yield


def folded(paths: SweepPaths, *, eager: bool = False, trials: range | None = None) -> Fold:
    found = Fold(paths, NUM, trials=trials, eager=eager)
    found.update()
    return found


def cold(paths: SweepPaths) -> object:
    """The view of a fold that has no cache to read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SweepPaths, "fold_cache", paths.root / "none")
        return view(folded(paths))


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return empty(tmp_path)


@pytest.fixture
def saved(paths: SweepPaths) -> SweepPaths:
    """A small sweep with a cache."""
    put(paths, WRITERS[0], *begun(0, 1, 2), done(0, 1.5), ended(1), slots=2)
    put(paths, WRITERS[1], *begun(1, attempt=1), done(0, 2.5), done(3, 0.5))
    with at_once():
        folded(paths, eager=True).summary(2)
    assert paths.fold_cache.exists()
    return paths


# Every way to fold


@given(FILES, st.data())
def test_fault_41_every_way_to_fold_late_lines_equals_a_cold_fold(
    files: list[list[JsonObject]], data: st.DataObject
) -> None:
    shown = shows(files, data)
    with tempfile.TemporaryDirectory() as folder, at_once():
        paths = empty(Path(folder))
        kept = Fold(paths, NUM)
        for step in range(4):
            for name, views in shown.items():
                paths.record(name).write_bytes(views[step])
            if data.draw(st.booleans()):
                folded(paths, eager=True)
            if data.draw(st.booleans()):
                kept.update()
                assert kept.update() == 0
                assert view(kept) == cold(paths)
            assert view(folded(paths, eager=data.draw(st.booleans()))) == cold(paths)


ENDED_TWICE: list[JsonObject] = [
    {"kind": "beat"},
    {"kind": "end", "trial": 2, "attempt": 0, "cause": "error", "detail": "because"},
    {"kind": "beat"},
    {"kind": "end", "trial": 2, "attempt": 0, "cause": "signal", "detail": "because"},
]


@given(FILES, st.integers(0, NUM), st.booleans(), st.booleans())
@example([ENDED_TWICE], 0, False, True)
@example([ENDED_TWICE, ENDED_TWICE[::-1]], 0, True, True)
def test_ranges_of_trials_add_up_to_all_of_them(
    files: list[list[JsonObject]], cut: int, has_cache: bool, eager: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, at_once():
        paths = empty(Path(folder))
        for name, lines in zip(WRITERS, files, strict=False):
            put(paths, name, *lines, slots=2)
        whole = folded(paths, eager=has_cache)
        parts = [folded(paths, trials=trials, eager=eager) for trials in (range(cut), range(cut, NUM))]
        for part in parts:
            for i in part.indices:
                assert (part.status(i), part.value(i), part.outcome(i)) == (
                    whole.status(i),
                    whole.value(i),
                    whole.outcome(i),
                )
                assert (part.attempts(i), part.next_attempt(i)) == (whole.attempts(i), whole.next_attempt(i))
                assert (part.charges(i), part.authors(i)) == (whole.charges(i), whole.authors(i))
        one, other = parts
        assert one.summary(2).merge(other.summary(2)) == whole.summary(2)
        assert one.retries() + other.retries() == whole.retries()
        assert {**one.running(), **other.running()} == whole.running()
        assert one.missing() + other.missing() == whole.missing()
        assert one.disagreements + other.disagreements == whole.disagreements
        assert (one.has_begun or other.has_begun) == whole.has_begun
        assert one.seen == other.seen == whole.seen
        for goal in ("minimize", "maximize"):
            metric = Metric(goal=goal)
            sign = 1 if goal == "minimize" else -1
            both = sorted(one.best(metric, 2) + other.best(metric, 2), key=lambda i: (sign * whole.value(i), i))
            assert both[:2] == whole.best(metric, 2)


def test_a_range_is_asked_about_its_own_trials_only(saved: SweepPaths) -> None:
    part = folded(saved, trials=range(2, NUM))
    assert part.values[1] == part.value(3) == 0.5
    for trial in (0, 1, NUM):
        with pytest.raises(IndexError):
            part.status(trial)


# The cache


def test_what_was_cached_is_not_read_again(saved: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cold(saved)
    monkeypatch.setattr(tables, "lines", lambda path, *_: pytest.fail(f"read {path} again"))
    fold = Fold(saved, NUM)
    assert fold.update() == 10
    monkeypatch.undo()
    assert view(fold) == expected


def test_only_what_is_new_is_read_after_a_cache(saved: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    known = folded(saved).seen
    with saved.record(WRITERS[1]).open("ab") as file:
        file.write(checked(done(2, 0.25)))
    read: list[tuple[str, int]] = []
    original = tables.lines
    monkeypatch.setattr(
        tables, "lines", lambda path, start, stop: read.append((path.stem, start)) or original(path, start, stop)
    )
    assert folded(saved).best(Metric(), 1) == [2]
    assert read == [(WRITERS[1], known[WRITERS[1]])]


def test_a_line_that_was_bad_is_read_again_after_a_cache(paths: SweepPaths) -> None:
    data = put(paths, WRITERS[0], done(0), done(1), done(2))
    paths.record(WRITERS[0]).write_bytes(data.replace(b'"trial":0', b'"trial":7'))
    with at_once():
        assert folded(paths, eager=True).num_bad_lines == 1
    paths.record(WRITERS[0]).write_bytes(data)
    fold = folded(paths)
    assert (fold.num_bad_lines, fold.missing()) == (0, [3])


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_cache_with_any_byte_changed_changes_nothing(position: int, by: int) -> None:
    with tempfile.TemporaryDirectory() as folder, at_once():
        paths = empty(Path(folder))
        put(paths, WRITERS[0], *begun(0, 1), done(0), ended(1, attempt=1))
        folded(paths, eager=True)
        expected, data = cold(paths), bytearray(paths.fold_cache.read_bytes())
        data[position % len(data)] ^= by
        paths.fold_cache.write_bytes(data)
        assert view(folded(paths)) == expected


def shorter(paths: SweepPaths) -> None:
    data = paths.record(WRITERS[0]).read_bytes()
    paths.record(WRITERS[0]).write_bytes(data[: data.rindex(b"\n", 0, -1) + 1])


def other_last_line(paths: SweepPaths) -> None:
    data = paths.record(WRITERS[1]).read_bytes().splitlines(keepends=True)
    paths.record(WRITERS[1]).write_bytes(b"".join([*data[:-1], checked(done(3, 0.7)), checked(done(2))]))


def no_record_file(paths: SweepPaths) -> None:
    paths.record(WRITERS[0]).unlink()


def cut_cache(paths: SweepPaths) -> None:
    paths.fold_cache.write_bytes(paths.fold_cache.read_bytes()[:-1])


def longer_cache(paths: SweepPaths) -> None:
    paths.fold_cache.write_bytes(paths.fold_cache.read_bytes() + b"\0")


def no_cache(paths: SweepPaths) -> None:
    paths.fold_cache.unlink()


def empty_cache(paths: SweepPaths) -> None:
    paths.fold_cache.write_bytes(b"")


def other_schema(paths: SweepPaths) -> None:
    line, _, rows = paths.fold_cache.read_bytes().partition(b"\n")
    head = cache.atomic.unchecked(line)
    assert head is not None
    del head["crc"]
    paths.fold_cache.write_bytes(checked({**head, "schema": 0}) + rows)


OLD = 10**18


def lie(paths: SweepPaths) -> None:
    """Give the sweep a cache in which all is well but what it says: that of records with another value."""
    other = SweepPaths(paths.root / "other")
    other.records.mkdir(parents=True)
    put(other, WRITERS[0], *begun(0, 1, 2), done(0, 9.5), ended(1), slots=2)
    put(other, WRITERS[1], *begun(1, attempt=1), done(0, 9.5), done(3, 9.5))
    for path in (*paths.records.iterdir(), *other.records.iterdir()):
        os.utime(path, ns=(OLD, OLD))
    with at_once():
        folded(other, eager=True)
    other.fold_cache.replace(paths.fold_cache)


@pytest.mark.parametrize(
    "harm",
    [
        shorter, other_last_line, no_record_file, cut_cache, longer_cache, no_cache, empty_cache, other_schema,
    ],
)  # fmt: skip
def test_a_cache_that_does_not_fit_is_thrown_away(saved: SweepPaths, harm: Callable[[SweepPaths], None]) -> None:
    harm(saved)
    assert view(folded(saved)) == cold(saved)


def test_a_cache_of_another_plan_is_thrown_away(saved: SweepPaths) -> None:
    longer = Fold(saved, NUM + 1)
    longer.update()
    assert longer.missing() == [1, 2, 4]


@pytest.mark.parametrize(
    ("owner", "mode", "is_believed"),
    [(os.getuid(), 0o600, True), (0, 0o640, True), (4242, 0o600, False), (os.getuid(), 0o606, False)],
)
def test_a_cache_that_others_could_have_written_is_not_read(
    saved: SweepPaths, monkeypatch: pytest.MonkeyPatch, owner: int, mode: int, is_believed: bool
) -> None:
    lie(saved)
    state = SimpleNamespace(st_mode=stat.S_IFREG | mode, st_uid=owner, st_mtime_ns=saved.fold_cache.stat().st_mtime_ns)
    monkeypatch.setattr(permissions, "os", SimpleNamespace(fstat=lambda _: state, getuid=os.getuid))
    assert (folded(saved).value(3) == 9.5) is is_believed


def test_a_cache_of_another_user_is_not_replaced_in_a_folder_that_is_not_ours(
    saved: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.fold_cache.stat().st_ino
    monkeypatch.setattr(cache.os, "getuid", lambda: 4242)
    put(saved, WRITERS[2], done(2))
    with at_once():
        assert folded(saved, eager=True).missing() == [1]
    assert saved.fold_cache.stat().st_ino == before


def test_what_was_seen_beyond_a_hole_is_not_cached(paths: SweepPaths) -> None:
    lines = put(paths, WRITERS[0], done(0), done(1), done(2), done(3)).splitlines(keepends=True)
    path = paths.record(WRITERS[0])
    path.write_bytes(b"".join([*lines[:2], bytes(len(lines[2]) - 1) + b"\n", *lines[3:]]))
    with at_once():
        fold = folded(paths, eager=True)
        assert fold.missing() == [1]
        path.write_bytes(b"".join(lines[:2]))
        assert folded(paths, eager=True).missing() == [1, 2, 3]
        fold.update()
    assert view(folded(paths)) == view(fold) == cold(paths)


@given(FILES, st.data())
def test_fault_41_a_fold_of_lines_that_come_and_go_equals_a_cold_one(
    files: list[list[JsonObject]], data: st.DataObject
) -> None:
    """Beyond a hole lines may turn to zeros again, as long as the hole is there: nothing of them counts any more."""
    with tempfile.TemporaryDirectory() as folder, at_once():
        paths = empty(Path(folder))
        kept, eager = Fold(paths, NUM), Fold(paths, NUM, eager=True)
        for name, lines in zip(WRITERS, files, strict=False):
            put(paths, name, *lines)
        whole = {path: path.read_bytes() for path in paths.records.iterdir()}
        for step in range(4):
            for path, content in whole.items():
                path.write_bytes(holed(content, data) if step < 3 else content)
            for fold in (kept, eager):
                fold.update()
                assert fold.update() == 0
                assert view(fold) == cold(paths)


def holed(content: bytes, data: st.DataObject) -> bytes:
    """A file of which the first line is not visible, and a part of the others."""
    begin = content.find(b"\n")
    first, last = sorted(data.draw(st.integers(begin + 1, len(content))) for _ in range(2))
    return bytes(begin) + content[begin:first] + bytes(last - first) + content[last:]


def test_a_torn_last_line_does_not_keep_the_rest_from_the_cache(saved: SweepPaths) -> None:
    saved.fold_cache.unlink()
    with saved.record(WRITERS[1]).open("ab") as file:
        file.write(checked(done(2))[:-9])
    with at_once():
        folded(saved, eager=True)
    assert saved.fold_cache.exists()
    assert view(folded(saved)) == cold(saved)


def test_files_that_end_alike_are_told_apart(paths: SweepPaths) -> None:
    beats: list[JsonObject] = [{"kind": "beat"}] * 1000
    data = put(paths, WRITERS[0], done(0), done(1), *beats)
    with at_once():
        folded(paths, eager=True)
    line = checked(done(1))
    paths.record(WRITERS[0]).write_bytes(data.replace(line, bytes(len(line))))
    assert folded(paths).missing() == [1, 2, 3]


def test_a_cache_that_is_no_file_is_not_waited_for(saved: SweepPaths) -> None:
    saved.fold_cache.unlink()
    os.mkfifo(saved.fold_cache)
    assert view(folded(saved)) == cold(saved)
    saved.fold_cache.unlink()
    saved.fold_cache.symlink_to("/dev/zero")
    assert view(folded(saved)) == cold(saved)


def test_no_room_for_the_cache_is_no_error(saved: SweepPaths) -> None:
    before = saved.fold_cache.read_bytes()
    put(saved, WRITERS[2], done(2))
    with at_once(), no_room_after(0):
        assert folded(saved, eager=True).missing() == [1]
    assert saved.fold_cache.read_bytes() == before
    assert [path.name for path in saved.root.iterdir() if path.name.startswith(".")] == []


def test_a_fold_that_serves_others_writes_no_cache(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], done(0))
    with at_once():
        folded(paths)
        folded(paths, eager=True, trials=range(2))
    assert not paths.fold_cache.exists()


def test_records_that_lost_their_end_with_the_power_are_read_again(saved: SweepPaths) -> None:
    path = saved.record(WRITERS[1])
    before, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-40] + bytes(40))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert folded(saved).missing() == [1, 2, 3]


# The best, and the Summary


@given(
    st.lists(st.tuples(st.integers(0, 11), st.sampled_from(list(Status)), st.integers(-3, 3)), max_size=40), st.data()
)
def test_what_leads_is_kept_up_to_date(lines: list[tuple[int, Status, int]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, at_once():
        paths = empty(Path(folder))
        put(paths, WRITERS[0])
        warm = Fold(paths, 12)
        while lines:
            some, lines = lines[:4], lines[4:]
            with paths.record(WRITERS[0]).open("ab") as file:
                file.writelines(checked(done(trial, value / 2, 0, status)) for trial, status, value in some)
            warm.update()
            values = {i: warm.value(i) for i in warm.trials(Status.COMPLETE)}
            top = data.draw(st.integers(1, 4))
            assert warm.best(Metric(), top) == sorted(values, key=lambda i: (values[i], i))[:top]
            assert warm.best(Metric(goal="maximize"), top) == sorted(values, key=lambda i: (-values[i], i))[:top]
            if data.draw(st.booleans()):
                assert warm.summary(2).compute() == summarized(warm, values).compute()


def summarized(fold: Fold, values: dict[int, float]) -> Summary:
    counts = Counter(fold.status(i) for i in fold.indices)
    ones = [Summary.of(value, key=i, top=2) for i, value in values.items()]
    others = (Summary.diverged, Status.DIVERGED), (Summary.pruned, Status.PRUNED), (Summary.failed, Status.FAILED)
    return Summary.merge_all([*ones, *(of(counts[status], top=2) for of, status in others)])


def test_many_trials_have_the_summary_that_few_have(saved: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = folded(saved).summary(2)
    monkeypatch.setattr(incremental, "_FEW", 0)
    monkeypatch.setattr(incremental, "_MANY", 3)
    saved.fold_cache.unlink()
    assert folded(saved).summary(2) == expected
    assert folded(saved, trials=range(1, NUM)).summary(2).merge(folded(saved, trials=range(1)).summary(2)) == expected


def test_the_summary_is_cached_once_it_was_long_in_the_making(
    saved: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.fold_cache.unlink()
    monkeypatch.setattr(incremental, "_FEW", 1)
    with at_once():
        expected = folded(saved, eager=True).summary(2)
    monkeypatch.setattr(incremental.IncrementalBest, "_summed", lambda *_: pytest.fail("summed again"))
    assert folded(saved).summary(2) == expected


# Several processes


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
def test_shares_cover_every_line_once(paths: SweepPaths, num_shares: int) -> None:
    data = {name: put(paths, name, *(done(i % NUM) for i in range(5 * k))) for k, name in enumerate(WRITERS)}
    news = [(Unit(k, 0), paths.record(name), len(data[name])) for k, name in enumerate(WRITERS)]
    shares = parallel.deal(news, num_shares)
    found: dict[int, bytes] = {}
    for unit in (unit for share in shares for unit in share):
        content = data[WRITERS[unit.number]]
        assert unit.start == len(found.get(unit.number, b""))
        found[unit.number] = found.get(unit.number, b"") + content[unit.start : unit.stop]
        assert content[: unit.start].endswith(b"\n") or not unit.start
    assert list(found.values()) == list(data.values())
    assert 1 <= len(shares) <= num_shares


def test_rows_of_two_tables_join_in_any_mixture() -> None:
    whole, mine, its = (Columns(20_000, range(20_000)) for _ in range(3))
    for row in range(20_000):
        some = mine if row < 6000 or (row < 12_000 and row % 3) else its
        for one in (whole, some):
            one.status[row], one.marks[row] = COMPLETE, 1
            one.where[row], one.values[row], one.seconds[row] = -row, row / 7, row / 9
    assert list(mine.shared_with(its)) == []
    mine.take(its)
    assert mine.buffer == whole.buffer


FORKED = """
import os, sys
from pathlib import Path
from orchestrator.results import fold as folding
from orchestrator.results.fold import Fold, parallel
from orchestrator.core.paths import SweepPaths
folding._DEALT_BYTES, folding._SAVED_BYTES = 0, 1 << 60
parallel.num_processes = lambda table: 3
forks, fork = [], os.fork
os.fork = lambda: forks.append(1) or fork()
if sys.argv[2] == "none":
    def refuse():
        forks.append(1)
        raise BlockingIOError(11, "Resource temporarily unavailable")
    os.fork = refuse
if sys.argv[2] == "one":
    pipe, pipes = os.pipe, []
    def refuse():
        pipes.append(1)
        if len(pipes) == 2:
            forks.append(1)
            raise OSError(24, "Too many open files")
        return pipe()
    os.pipe = refuse
handles = len(os.listdir("/proc/self/fd"))
if sys.argv[2] == "die":
    answer = parallel.answer
    parallel.answer = lambda *args: os.kill(os.getpid(), 9)
paths = SweepPaths(Path(sys.argv[1]))
many, one = Fold(paths, 3000, eager=True), Fold(paths, 3000)
assert many.update() == one.update() == int(sys.argv[3])
assert len(forks) == 2
assert many._table.rows.buffer == one._table.rows.buffer
assert (many.running(), many.missing(), many.seen) == (one.running(), one.missing(), one.seen)
assert many.summary(5) == one.summary(5)
assert len(os.listdir("/proc/self/fd")) == handles
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("all gone")
"""


@pytest.mark.parametrize("how", ["live", "die", "none", "one"])
def test_several_processes_read_what_one_would_even_if_they_die_or_cannot_be_had(paths: SweepPaths, how: str) -> None:
    for k, name in enumerate(WRITERS):
        mine = [done(i, float(i)) for i in range(3000) if i % 3 == k and i % 10]
        put(paths, name, *begun(*range(0, 3000, 10)), *mine, *(done(i) for i in range(k * 100)))
    number = sum(len(paths.record(name).read_bytes().splitlines()) for name in WRITERS)
    argv = [sys.executable, "-P", "-c", FORKED, str(paths.root), how, str(number)]
    found = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == ("all gone\n", "")


def test_a_record_of_another_version_is_refused_by_name_whoever_reads_it(paths: SweepPaths) -> None:
    put(paths, WRITERS[0], *(done(i % NUM) for i in range(20)))
    put(paths, WRITERS[1], {"kind": "outcome", "trial": 0, "attempt": 0, "status": "splendid", "payload": {}})
    with (
        at_once(),
        pytest.raises(FolderError, match=f"{WRITERS[1]}.jsonl: a record at byte {len(checked(writer(WRITERS[1])))}"),
    ):
        folded(paths, eager=True)


def test_a_process_with_threads_does_not_fork() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert not parallel.is_alone()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(("cores", "trials", "expected"), [(1, 10, 1), (4, 10, 4), (64, 10, 8), (64, 1_000_000, 2)])
def test_processes_are_as_many_as_cores_and_memory_allow(
    cores: int, trials: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert parallel.num_processes(Table([], trials, range(trials))) == expected
