"""Trees of reducers: any partition, any tree, any order, any damage on the way gives the same bytes."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeps import clean_environment, folder, make, names, run, spec
from sweeps import fold as folded
from test_fold import WRITERS, begun, ended, put

from orchestrator.config.plan import PlanFile
from orchestrator.config.spec import Reduce
from orchestrator.core import atomic
from orchestrator.core.atomic import JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import OrcError
from orchestrator.results import reducer
from orchestrator.results.fold import Fold
from orchestrator.results.records import Status, outcome
from orchestrator.results.reduction_tree import parts
from orchestrator.results.reduction_tree.reduction import Reduction
from orchestrator.results.reduction_tree.share import Share
from orchestrator.results.reduction_tree.tree import Tree
from orchestrator.stats.summary import Summary

NUM = 12
DEEP = Tree(num_trials=NUM, num_ranges=4, fan_in=2)
"""Four ranges, two reducers that merge them, and the root."""
STATUSES = [Status.COMPLETE] * 5 + [Status.DIVERGED, Status.PRUNED, Status.FAILED]


def sha(trial: int) -> str:
    return f"{trial:04x}" * 16


def line(trial: int, value: float = 1.0, status: Status = Status.COMPLETE, attempt: int = 0) -> JsonObject:
    payload: JsonObject = {"value": value, "model": sha(trial)} if status is Status.COMPLETE else {}
    return outcome(trial=trial, attempt=attempt, status=status, payload=payload, seconds=0.5)


@st.composite
def histories(draw: st.DrawFn) -> list[list[JsonObject]]:
    """What three writers recorded: every trial at least once, some of them again, with retries and in any order."""
    values = st.sampled_from([0.0, -0.0, 0.25, 1e300, -3.5, 2.0**-1070])
    lines = []
    for trial in range(NUM):
        for attempt in range(draw(st.integers(1, 3))):
            status = draw(st.sampled_from(STATUSES))
            lines += [begun(trial, attempt=attempt)[0], line(trial, draw(values), status, attempt)]
        lines += [ended(trial, attempt=5)] * draw(st.integers(0, 1))
    shuffled = draw(st.permutations(lines))
    cuts = sorted(draw(st.tuples(st.integers(0, len(lines)), st.integers(0, len(lines)))))
    return [shuffled[: cuts[0]], shuffled[cuts[0] : cuts[1]], shuffled[cuts[1] :]]


def written(runs: Path, history: list[list[JsonObject]], *, top: int = 3) -> SweepPaths:
    paths = make(runs, trials=NUM, top=top)
    for writer, lines in zip(WRITERS, history, strict=True):
        put(paths, writer, *lines)
    return paths


@contextmanager
def sweep(history: list[list[JsonObject]]) -> Iterator[SweepPaths]:
    with TemporaryDirectory() as runs:
        yield written(Path(runs), history)


def by_one(paths: SweepPaths) -> bytes:
    """What one fold of everything comes to; writes nothing."""
    return atomic.canonical(reducer.summary_json(PlanFile.open(paths.plan), folded(paths))) + b"\n"


def level(paths: SweepPaths, tree: Tree, number_of: int) -> None:
    for number in range(tree.levels[number_of]):
        reducer.reduce_part(paths, tree, number_of, number, wait_s=0.0)


def by_tree(paths: SweepPaths, tree: Tree, *, until: int | None = None) -> bytes:
    """What the tree writes; with `until`, only so many of its levels were there before the root."""
    for at in range(len(tree.levels) if until is None else until):
        level(paths, tree, at)
    reducer.reduce(paths, wait_s=0.0, alone=False, tree=tree)
    return paths.summary.read_bytes()


@pytest.fixture
def whole(tmp_path: Path) -> SweepPaths:
    """A sweep of which each trial has an outcome and a model; trial i is the better the greater i is."""
    paths = written(tmp_path, [[line(i, float(-i)) for i in range(k, NUM, 3)] for k in range(3)])
    for trial in range(NUM):
        paths.model(trial, sha(trial)).write_bytes(b"weights")
    return paths


def kept(paths: SweepPaths) -> list[int]:
    return sorted(int(name.partition("-")[0]) for name in names(paths.models))


# The shape


@given(st.integers(1, 500), st.integers(1, 60), st.integers(2, 5))
def test_each_level_holds_every_trial_once(num_trials: int, num_ranges: int, fan_in: int) -> None:
    tree = Tree(num_trials=num_trials, num_ranges=min(num_ranges, num_trials), fan_in=fan_in)
    for at, count in enumerate(tree.levels):
        nodes = [tree.node(at, number) for number in range(count)]
        assert all(node.trials for node in nodes)
        assert list(itertools.chain.from_iterable(node.trials for node in nodes)) == list(range(num_trials))
    below = tree.children(tree.root)
    assert len(below) == (0 if tree.num_ranges <= fan_in else tree.levels[-1])
    assert len(below) <= fan_in
    if below:
        assert list(itertools.chain.from_iterable(node.trials for node in below)) == list(tree.root.trials)


@given(st.integers(1, 500), st.integers(1, 60), st.integers(2, 5))
def test_a_reducer_merges_what_its_children_hold(num_trials: int, num_ranges: int, fan_in: int) -> None:
    tree = Tree(num_trials=num_trials, num_ranges=min(num_ranges, num_trials), fan_in=fan_in)
    for at, count in enumerate(tree.levels[1:], 1):
        for node in (tree.node(at, number) for number in range(count)):
            children = tree.children(node)
            assert (children[0].trials.start, children[-1].trials.stop) == (node.trials.start, node.trials.stop)
            assert 1 <= len(children) <= fan_in


def test_a_tree_is_as_deep_as_its_fan_in_asks_for() -> None:
    shapes = {ranges: Tree(num_trials=1000, num_ranges=ranges, fan_in=16).levels for ranges in (1, 16, 17, 257)}
    assert shapes == {1: (), 16: (), 17: (17, 2), 257: (257, 17, 2)}
    assert DEEP.levels == (4, 2)


def test_a_reducer_beyond_its_level_has_nothing_to_do(whole: SweepPaths) -> None:
    reducer.reduce_part(whole, DEEP, 0, 7, wait_s=0.0)
    assert not whole.parts.exists()


# The monoid


@given(histories(), st.data())
def test_any_partition_in_any_tree_and_order_is_the_same_reduction(
    history: list[list[JsonObject]], data: st.DataObject
) -> None:
    with sweep(history) as paths:
        plan = PlanFile.open(paths.plan)
        cuts = sorted({0, NUM, *data.draw(st.lists(st.integers(0, NUM), max_size=5))})
        ranges = [range(start, stop) for start, stop in itertools.pairwise(cuts)]
        ones = [reduction(paths, plan, trials) for trials in data.draw(st.permutations(ranges))]
        ones.insert(data.draw(st.integers(0, len(ones))), Reduction.empty("minimize", 3))
        while len(ones) > 1:
            at = data.draw(st.integers(0, len(ones) - 2))
            ones[at : at + 2] = [ones[at].merge(ones[at + 1])]
        expected = reduction(paths, plan, range(NUM))
        assert ones[0] == expected
        assert atomic.canonical(reducer.finish(plan, ones[0].summary)) + b"\n" == by_one(paths)
        assert Reduction.from_json(orjson.loads(atomic.canonical(expected.to_json()))) == expected


def reduction(paths: SweepPaths, plan: PlanFile, trials: range) -> Reduction:
    fold = Fold(paths, NUM, trials=trials)
    fold.update()
    return Reduction.of(fold, trials, plan.spec.metric, plan.spec.reduce.top)


def test_what_both_have_seen_is_the_lesser_offset_of_the_files_that_both_know() -> None:
    plain = {"goal": "minimize", "summary": Summary.empty(top=3), "models": {}}
    one = Reduction(spans=((0, 2),), seen={"a": 5, "b": 9, "c": 1}, **plain)  # type: ignore[arg-type]
    two = Reduction(spans=((4, 6),), seen={"a": 7, "b": 3}, **plain)  # type: ignore[arg-type]
    assert one.merge(two).seen == {"a": 5, "b": 3}
    assert one.merge(two).spans == ((0, 2), (4, 6))
    assert one.merge(Reduction.empty("minimize", 3)) == one


def test_reductions_of_a_common_trial_another_goal_or_another_top_do_not_merge(whole: SweepPaths) -> None:
    plan = PlanFile.open(whole.plan)
    one = reduction(whole, plan, range(5))
    for other in (
        reduction(whole, plan, range(4, 8)),
        Reduction.empty("maximize", 3),
        Reduction.empty("minimize", 4),
    ):
        with pytest.raises(ValueError, match=r"merge|keep|top|sketch"):
            one.merge(other)


@given(histories(), st.integers(1, NUM), st.integers(2, 4))
def test_any_tree_gives_the_bytes_of_one_reducer(history: list[list[JsonObject]], num_ranges: int, fan_in: int) -> None:
    with sweep(history) as paths:
        expected = by_one(paths)
        tree = Tree(num_trials=NUM, num_ranges=num_ranges, fan_in=fan_in)
        assert by_tree(paths, tree) == expected
        assert not paths.parts.exists()


# Parts that can't be trusted


@pytest.mark.parametrize("until", [0, 1, 2])
def test_a_root_without_some_levels_gives_the_same_bytes(whole: SweepPaths, until: int) -> None:
    expected = by_one(whole)
    assert by_tree(whole, DEEP, until=until) == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"count":3', b'"count":4'),
        lambda data: recrowned(data, sweep="other-0123456789"),
        lambda data: recrowned(data, planned=NUM + 1),
        lambda data: recrowned(data, schema=2),
        lambda data: recrowned(data, reduction=None),
        lambda data: recrowned(data, reduction={**orjson.loads(data)["reduction"], "goal": "maximize"}),
        lambda data: recrowned(data, reduction={**orjson.loads(data)["reduction"], "spans": [[0, 2]]}),
        lambda data: recrowned(data, reduction={**orjson.loads(data)["reduction"], "seen": {"a": -1}}),
        lambda data: recrowned(data, reduction={**orjson.loads(data)["reduction"], "models": []}),
        lambda data: recrowned(data, reduction=orjson.loads(data)["reduction"] | shifted(orjson.loads(data))),
        lambda data: recrowned(data, tails={}),
        lambda data: recrowned(data, tails=None),
    ],
)
def test_a_damaged_or_foreign_part_is_folded_again(whole: SweepPaths, damage: Callable[[bytes], bytes]) -> None:
    expected = by_one(whole)
    level(whole, DEEP, 0)
    part = whole.part(0, 2)
    part.write_bytes(damage(part.read_bytes()))
    assert parts.read(whole, PlanFile.open(whole.plan), range(3)) is None
    assert by_tree(whole, DEEP, until=0) == expected


def shifted(part: Any) -> JsonObject:
    """The summary and models of a reduction, under the indices of trials that are not its own."""
    summary, models = part["reduction"]["summary"], part["reduction"]["models"]
    ends = {end: [[value, key + 3] for value, key in summary[end]] for end in ("low", "high")}
    return {"summary": summary | ends, "models": [[index + 3, model] for index, model in models]}


@pytest.mark.parametrize(
    "harm",
    [
        lambda record: record.unlink(),
        lambda record: record.write_bytes(record.read_bytes()[:-1]),
        lambda record: record.write_bytes(record.read_bytes()[:-1] + b"\0"),
        lambda record: record.write_bytes(bytes(record.stat().st_size)),
    ],
    ids=["gone", "cut", "changed", "zeros"],
)
def test_a_part_counts_for_nothing_once_records_that_it_has_seen_are_gone(
    whole: SweepPaths, harm: Callable[[Path], object]
) -> None:
    level(whole, DEEP, 0)
    level(whole, DEEP, 1)
    harm(whole.record(WRITERS[0]))
    assert by_tree(whole, DEEP, until=0) == by_one(whole)
    assert orjson.loads(whole.summary.read_bytes())["missing"] > 0


def test_records_that_were_made_anew_are_what_counts(whole: SweepPaths) -> None:
    level(whole, DEEP, 0)
    level(whole, DEEP, 1)
    for k in range(3):
        put(whole, WRITERS[k], *[line(i, 100.0 + i) for i in range(k, NUM, 3)])
    assert by_tree(whole, DEEP, until=0) == by_one(whole)
    assert orjson.loads(whole.summary.read_bytes())["min"] == 100.0


def test_no_part_is_left_that_rests_on_what_lies_beyond_a_damaged_line(whole: SweepPaths) -> None:
    record = whole.record(WRITERS[0])
    data = record.read_bytes()
    hole = data.index(b'"trial":3')
    record.write_bytes(data[:hole] + b"\0" + data[hole + 1 :])
    level(whole, DEEP, 0)
    assert names(whole.parts) == ["0-2.json", "3-5.json"]
    record.write_bytes(data[: data.index(b"\n", hole) + 1])
    assert by_tree(whole, DEEP, until=0) == by_one(whole)


def test_a_level_that_is_started_again_after_the_root_leaves_nothing(whole: SweepPaths) -> None:
    by_tree(whole, DEEP)
    reducer.reduce_part(whole, DEEP, 0, 1, wait_s=0.0)
    assert not whole.parts.exists()
    put(whole, WRITERS[1], line(1, -99.0))
    os.utime(whole.summary, (0, 0))
    reducer.reduce_part(whole, DEEP, 0, 1, wait_s=0.0)
    assert names(whole.parts) == ["3-5.json"]
    assert by_tree(whole, Tree(num_trials=NUM), until=0) == by_one(whole)
    assert not whole.parts.exists()


def test_a_root_that_clears_parts_away_while_one_is_written_does_no_harm(
    whole: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = atomic.write

    def cleared(path: Path, data: bytes) -> None:
        parts.clear(whole)
        write(path, data)

    monkeypatch.setattr(atomic, "write", cleared)
    reducer.reduce_part(whole, DEEP, 0, 0, wait_s=0.0)
    assert not whole.parts.exists()


@pytest.mark.parametrize("kind", ["writable", "link", "pipe"])
def test_a_part_that_another_user_may_have_written_is_not_read(whole: SweepPaths, kind: str) -> None:
    plan = PlanFile.open(whole.plan)
    level(whole, DEEP, 0)
    part = whole.part(0, 2)
    assert parts.read(whole, plan, range(3)) is not None
    if kind == "writable":
        part.chmod(0o606)
    else:
        part.rename(whole.parts / "elsewhere")
        part.symlink_to("elsewhere") if kind == "link" else os.mkfifo(part)
    assert parts.read(whole, plan, range(3)) is None


def test_a_record_that_can_not_be_read_by_whom_it_concerns_stops_no_reducer(
    whole: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    level(whole, DEEP, 0)
    part = parts.read(whole, PlanFile.open(whole.plan), range(3))
    assert part is not None
    opened = os.open

    def refused(path: Any, *how: Any, **more: Any) -> int:
        if path == whole.record(WRITERS[0]):
            raise PermissionError(path)
        return opened(path, *how, **more)

    monkeypatch.setattr(os, "open", refused)
    assert not parts.is_current(whole, part)
    unknown = {WRITERS[0]: part.reduction.seen[WRITERS[0]]}
    blind = replace(part, reduction=replace(part.reduction, seen=dict(part.reduction.seen.items() - unknown.items())))
    assert parts.is_current(whole, blind)


def recrowned(data: bytes, **changes: atomic.Json) -> bytes:
    """The line with other content, and a checksum that fits."""
    found = orjson.loads(data)
    del found["crc"]
    return atomic.checked({**found, **changes})


@given(histories(), st.data())
def test_records_that_become_visible_at_any_level_are_in_the_bytes(
    history: list[list[JsonObject]], data: st.DataObject
) -> None:
    with sweep(history) as paths, sweep(history) as late:
        expected = by_one(paths).replace(paths.id.encode(), late.id.encode())
        files = {writer: late.record(writer).read_bytes() for writer in WRITERS}
        for at in range(len(DEEP.levels) + 1):
            for writer, whole_file in files.items():
                shown = (
                    whole_file if at == len(DEEP.levels) else whole_file[: data.draw(st.integers(0, len(whole_file)))]
                )
                shown = max(shown, late.record(writer).read_bytes() if at else b"", key=len)
                late.record(writer).write_bytes(shown)
            if at < len(DEEP.levels):
                level(late, DEEP, at)
        assert by_tree(late, DEEP, until=0) == expected


def test_a_part_that_has_seen_all_is_used(whole: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_one(whole)
    level(whole, DEEP, 0)
    level(whole, DEEP, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Fold, "update", forbidden)
        assert by_tree(whole, DEEP, until=0) == expected


def forbidden(_: object) -> int:
    raise AssertionError("records are read although parts hold them all")


def test_lines_that_are_no_outcome_of_its_trials_leave_a_part_current(whole: SweepPaths) -> None:
    plan = PlanFile.open(whole.plan)
    level(whole, DEEP, 0)
    first, last = parts.read(whole, plan, range(3)), parts.read(whole, plan, range(9, 12))
    assert first is not None
    assert last is not None
    with whole.record(WRITERS[0]).open("ab") as file:
        file.write(atomic.checked({"kind": "beat"}) + atomic.checked(line(10, -99.0)))
    assert parts.is_current(whole, first)
    assert not parts.is_current(whole, last)


def test_a_line_that_goes_as_another_comes_is_a_change(whole: SweepPaths) -> None:
    plan, tree = PlanFile.open(whole.plan), Tree(num_trials=NUM)
    record = whole.record(WRITERS[0])
    before = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join([*before[:2], b"\0\n", *before[2:-1]]))
    share = Share(whole, plan, tree, tree.root)
    assert share.update()
    assert share.reduction.num_missing == 1
    first = share.reduction
    record.write_bytes(b"".join([*before[:2], b"\0\n", bytes(len(before[2]) - 1) + b"\n", *before[3:]]))
    assert share.update()
    cold = Share(whole, plan, tree, tree.root)
    cold.update()
    assert share.reduction == cold.reduction != first
    assert share.reduction.num_missing == 1
    record.write_bytes(b"".join(before))
    assert share.update()
    assert share.reduction.num_missing == 0


def test_missing_trials_are_counted_by_the_root_and_found_by_the_next_one(tmp_path: Path) -> None:
    paths = written(tmp_path, [[line(i) for i in range(NUM - 1)], [], []])
    level(paths, DEEP, 0)
    level(paths, DEEP, 1)
    assert reducer.reduce(paths, wait_s=0.0, alone=False, tree=DEEP) == 4
    assert orjson.loads(paths.summary.read_bytes())["missing"] == 1
    put(paths, WRITERS[1], line(NUM - 1))
    assert reducer.reduce(paths, wait_s=0.0, alone=False, tree=DEEP) == 0


def test_the_root_waits_for_records_beyond_its_parts(tmp_path: Path) -> None:
    paths = written(tmp_path, [[line(i) for i in range(NUM - 1)], [], []])
    level(paths, DEEP, 0)
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            put(paths, WRITERS[1], line(NUM - 1))

    assert reducer.reduce(paths, wait_s=90.0, alone=False, tree=DEEP, sleep=sleep) == 0
    assert len(looks) == 3


# Models


def test_a_tree_keeps_the_models_that_rank_and_no_others(whole: SweepPaths) -> None:
    level(whole, DEEP, 0)
    assert kept(whole) == list(range(NUM))
    by_tree(whole, DEEP, until=0)
    assert kept(whole) == [9, 10, 11]


def test_each_level_lets_go_of_what_is_beaten_in_its_trials(whole: SweepPaths) -> None:
    tree = Tree(num_trials=NUM, num_ranges=3, fan_in=2)
    seen = []
    for at in range(2):
        level(whole, tree, at)
        seen.append(kept(whole))
    by_tree(whole, tree, until=0)
    assert seen == [[1, 2, 3, 5, 6, 7, 9, 10, 11], [5, 6, 7, 9, 10, 11]]
    assert kept(whole) == [9, 10, 11]


def test_a_model_without_a_record_stays_while_workers_may_live(whole: SweepPaths) -> None:
    whole.model(0, "f" * 64).write_bytes(b"of a worker that is about to record it")
    by_tree(whole, DEEP)
    assert "0-ffffffffffffffff.safetensors" in names(whole.models)


class Killed(BaseException):
    """What a kill looks like from the inside: nothing catches it."""


def steps_until_killed(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object], at: int) -> bool:
    """Run `work` until the `at`-th name in the file system is about to change; whether it came that far."""
    left = at

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **more: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return change(*arguments, **more)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(Path, "rename", counted(Path.rename))
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("tree", [Tree(num_trials=NUM), DEEP, Tree(num_trials=NUM, num_ranges=3, fan_in=2)], ids=str)
def test_fault_31_killed_at_any_step_no_model_that_ranks_is_lost(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in itertools.count():
        paths = written(tmp_path / str(at), [[line(i, float(-i)) for i in range(NUM)], [], []])
        for trial in range(NUM):
            paths.model(trial, sha(trial)).write_bytes(b"weights")
        was_killed = steps_until_killed(monkeypatch, lambda paths=paths: by_tree(paths, tree), at)
        assert {9, 10, 11} <= set(kept(paths))
        rerun = by_tree(paths, tree)
        assert rerun == by_one(paths)
        assert kept(paths) == [9, 10, 11]
        if not was_killed:
            break
    assert at > 10


# Processes


def process(paths: SweepPaths, *arguments: str) -> subprocess.Popen[str]:
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
    return subprocess.Popen([*argv, *arguments], stderr=subprocess.PIPE, text=True, env=clean_environment())


def tree_processes(paths: SweepPaths) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of each level of `DEEP`, as Slurm starts them, and its root."""
    shape = ("--ranges", "4", "--fan-in", "2")
    for at, count in enumerate(DEEP.levels):
        yield [process(paths, *shape, "--level", str(at), "--number", str(number)) for number in range(count)]
    yield [process(paths, *shape)]


def ended_codes(processes: list[subprocess.Popen[str]]) -> list[int]:
    for one in processes:
        one.communicate(timeout=60)
    return [one.returncode for one in processes]


def test_fault_31_reducers_killed_at_random_or_run_twice_give_the_same_bytes(whole: SweepPaths) -> None:
    expected = by_one(whole)
    chance = random.Random(31)
    for _ in range(2):
        for trial in range(NUM):
            whole.model(trial, sha(trial)).write_bytes(b"weights")
        for processes in tree_processes(whole):
            victim = chance.choice(processes)
            with contextlib.suppress(subprocess.TimeoutExpired):
                victim.wait(chance.uniform(0.0, 0.15))
            victim.send_signal(signal.SIGKILL)
            ended_codes(processes)
            assert {9, 10, 11} <= set(kept(whole))
    twice = [process(whole), process(whole), process(whole, "--ranges", "4", "--fan-in", "2")]
    assert ended_codes(twice) == [0, 0, 0]
    assert whole.summary.read_bytes() == expected
    assert kept(whole) == [9, 10, 11]


def test_reducers_as_processes_give_the_same_bytes_and_leave_no_parts(whole: SweepPaths) -> None:
    expected = by_one(whole)
    assert [ended_codes(processes) for processes in tree_processes(whole)] == [[0] * 4, [0] * 2, [0]]
    assert whole.summary.read_bytes() == expected
    assert not whole.parts.exists()


STOPS = """
import os, signal, sys
from pathlib import Path
from orchestrator.core import atomic
from orchestrator.results import reducer
from orchestrator.core.paths import SweepPaths
from orchestrator.results.reduction_tree.tree import Tree
write = atomic.write
def write_after_a_stop(path, data, **more):
    if path.name == "summary.json" and not os.environ.pop("GONE_ON", None):
        os.environ["GONE_ON"] = "1"
        os.kill(os.getpid(), signal.SIGSTOP)
    write(path, data, **more)
atomic.write = write_after_a_stop
tree = Tree(num_trials=12, num_ranges=int(sys.argv[2]), fan_in=2)
sys.exit(reducer.reduce(SweepPaths(Path(sys.argv[1])), wait_s=0.0, alone=False, tree=tree))
"""


@pytest.mark.parametrize("num_ranges", [1, 4])
def test_fault_38_the_older_of_two_reducers_renames_last(tmp_path: Path, num_ranges: int) -> None:
    paths = written(tmp_path, [[line(i) for i in range(NUM - 1)], [], []])
    argv = [sys.executable, "-P", "-c", STOPS, str(paths.root), str(num_ranges)]
    with subprocess.Popen(argv, env=clean_environment()) as older:
        _, status = os_wait_stopped(older.pid)
        assert status == signal.SIGSTOP
        assert reducer.reduce(paths, wait_s=0.0, alone=False) == 4
        assert orjson.loads(paths.summary.read_bytes())["missing"] == 1
        put(paths, WRITERS[1], line(NUM - 1, 7.0))  # a requeued element brings the last outcome
        assert reducer.reduce(paths, wait_s=0.0, alone=False) == 0
        right = paths.summary.read_bytes()
        older.send_signal(signal.SIGCONT)
        assert older.wait(60) == 0
    assert paths.summary.read_bytes() == right
    assert orjson.loads(right)["missing"] == 0


def os_wait_stopped(pid: int) -> tuple[int, int]:
    """Until the process has stopped: its id and the signal."""
    found, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return found, os.WSTOPSIG(status)


def test_a_full_disk_at_a_level_is_said_and_costs_nothing(whole: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_one(whole)

    def full(path: Path, _: bytes) -> None:
        raise OrcError(f"{path}: can't be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write", full)
        with pytest.raises(OrcError, match=r"reduce/0-2\.json"):
            reducer.reduce_part(whole, DEEP, 0, 0, wait_s=0.0)
    assert by_tree(whole, DEEP, until=0) == expected


# Ranks


class Company:
    """Ranks that take turns in one process, each with what the others said in the same round."""

    def __init__(self, rank: int, shares: list[Share]) -> None:
        self.rank, self.world_size, self._shares = rank, len(shares), shares

    def reduce(self, value: object) -> object:
        for share in self._shares:
            share.update()
        return Reduction.merge_all(share.reduction for share in self._shares).summary

    def barrier(self) -> None:
        pass


@pytest.mark.parametrize("world", [2, 3, 5, NUM + 3])
def test_ranks_that_hold_a_part_of_the_trials_each_give_the_same_bytes(whole: SweepPaths, world: int) -> None:
    expected, plan = by_one(whole), PlanFile.open(whole.plan)
    tree = Tree(num_trials=NUM, num_ranges=world, fan_in=world)
    for rank in range(world):
        company = Company(rank, [Share(whole, plan, tree, tree.node(0, other)) for other in range(world)])
        assert reducer.reduce(whole, wait_s=0.0, alone=False, company=company) == 0  # type: ignore[arg-type]
        assert {9, 10, 11} <= set(kept(whole))
    assert whole.summary.read_bytes() == expected
    assert kept(whole) == [9, 10, 11]


# Who reduces


@pytest.mark.parametrize(("trials_per_range", "reduced_before"), [(3, False), (1, False), (1, True)])
def test_the_worker_with_the_last_outcome_reduces_a_small_sweep_or_one_that_was_reduced_too_early(
    tmp_path: Path, trials_per_range: int, reduced_before: bool
) -> None:
    paths = folder(
        tmp_path, replace(spec(trials=3), reduce=Reduce(trials_per_range=trials_per_range, visibility_s=0.0))
    )
    if reduced_before:
        assert reducer.reduce(paths, alone=False) == 4
    assert run(paths)[0] == 0
    assert paths.summary.exists() == (trials_per_range == 3 or reduced_before)
    if paths.summary.exists():
        assert orjson.loads(paths.summary.read_bytes())["missing"] == 0
