"""Faults 16 and 18: killed, or without room, at any point of a commit: afterwards there is the old or the new."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sweeps
from invariants import Memory, check, intact_lines, leftovers
from killpoints import kill_everywhere
from sweeps import OTHER, TOKEN, counts, no_room_after, superseded

from orchestrator.config.plan import PlanFile, SweepPlan, write_plan
from orchestrator.config.snapshot import Manifest, Snapshot, SnapshotFile
from orchestrator.config.spec import Metric
from orchestrator.core import atomic
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import FolderError, OrcError
from orchestrator.results import fold as folding
from orchestrator.results import reducer
from orchestrator.results.claims import Block, Claims
from orchestrator.results.fold import Fold, cache
from orchestrator.results.fold.incremental import IncrementalBest
from orchestrator.results.fold.table import Table
from orchestrator.results.records import RecordWriter, Status, look, outcome, start
from orchestrator.results.reduction_tree import parts
from orchestrator.results.reduction_tree.tree import Tree
from orchestrator.slurm import jobs, ledger, submit, sweep_folder
from orchestrator.sweep import Sweep

MODEL = b"weights" * 1000
SHA = hashlib.sha256(MODEL).hexdigest()


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return sweeps.make(tmp_path, trials=3)


def done(trial: int, **payload: atomic.Json) -> atomic.JsonObject:
    return outcome(
        trial=trial, attempt=0, status=Status.COMPLETE, payload={"value": trial + 0.5, **payload}, seconds=0.1
    )


def put(paths: SweepPaths, *lines: atomic.JsonObject) -> None:
    writer = RecordWriter(paths, {"submission": TOKEN, "host": "n1"})
    writer.append(*lines)
    writer.close()


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


# 16: killed


def test_fault_16_a_kill_in_a_record_loses_no_line_that_was_durable_and_tears_only_the_last(paths: SweepPaths) -> None:
    def act() -> None:
        writer = RecordWriter(paths, {"submission": TOKEN})
        writer.append(start(trial=0, attempt=0), durable=True)
        (paths.logs / "begun").touch()
        writer.append(done(0), done(1))
        writer.close()

    for kill in kill_everywhere(act):
        clear(paths.records)
        (paths.logs / "begun").unlink(missing_ok=True)
        kill()
        kinds = [line["kind"] for path in paths.records.iterdir() for _, line in intact_lines(path)]
        assert kinds == ["writer", "start", "outcome", "outcome"][: len(kinds)]
        assert len(kinds) >= 2 or not (paths.logs / "begun").exists()
        put(paths, *map(done, range(3)))  # whoever runs the trials again
        assert sweeps.fold(paths).num_bad_lines <= 1
        assert counts(paths) == {"complete": 3}


def test_fault_16_a_kill_in_a_claim_leaves_no_claim_or_one_that_names_its_owner(paths: SweepPaths) -> None:
    block = Block(0, 2)
    for kill in kill_everywhere(lambda: Claims(paths, "ours").take(block, 0)):
        clear(paths.claims)
        kill()
        theirs = Claims(paths, "theirs")
        found = theirs.newest()
        assert found in ({}, {(0, 2): 0})
        assert theirs.holder(block, 0) == ("ours" if found else "")
        assert theirs.take(block, 0) is not bool(found)
        assert theirs.holder(block, 0) in ("ours", "theirs")


def two_submissions() -> list[ledger.Submission]:
    part = ledger.SubmissionPart(what="local", num_workers=1)
    return [
        ledger.Submission(token=token, epoch=epoch, on="local", host="here", parts=(part,))
        for epoch, token in enumerate((TOKEN, OTHER))
    ]


def test_fault_16_a_kill_in_the_ledger_leaves_the_lines_before_and_a_line_that_is_whole_or_none(
    paths: SweepPaths,
) -> None:
    first, second = two_submissions()
    for kill in kill_everywhere(lambda: ledger.append(paths, ledger.intent(second, "local"))):
        paths.submissions.unlink(missing_ok=True)
        ledger.append(paths, ledger.intent(first, "local"))
        kill()
        found = [one.token for one in ledger.submissions(paths)]
        assert found in ([first.token], [first.token, second.token])
        ledger.append(paths, ledger.intent(second, "local"))
        assert [one.token for one in ledger.submissions(paths)] == [first.token, second.token]


def test_fault_16_a_kill_in_the_summary_leaves_the_old_one_or_the_new_one(paths: SweepPaths) -> None:
    put(paths, done(0))
    old = sweeps.summary(paths)
    put(paths, *map(done, range(3)))
    new = sweeps.summary(paths)
    for kill in kill_everywhere(lambda: reducer.reduce(paths, wait_s=0.0)):
        paths.summary.write_bytes(old)
        kill()
        assert paths.summary.read_bytes() in (old, new)
        assert sweeps.summary(paths) == new
    for path in leftovers(paths):
        os.utime(path, (0, 0))  # what is new may be another reducer's; what is old goes
    assert sweeps.summary(paths) == new
    check(paths, undisturbed=new)


def test_fault_16_a_kill_between_a_model_and_its_record_leaves_no_record_without_its_model(paths: SweepPaths) -> None:
    def act() -> None:
        atomic.write(paths.model(0, SHA), MODEL)
        put(paths, done(0, model=SHA))

    for kill in kill_everywhere(act):
        clear(paths.models)
        clear(paths.records)
        kill()
        if sweeps.fold(paths).payload(0):
            assert paths.model(0, SHA).read_bytes() == MODEL
        put(paths, done(1), done(2))
        act()  # the trial again
        sweeps.summary(paths)
        assert sweeps.names(paths.models) == [paths.model(0, SHA).name]
        assert paths.model(0, SHA).read_bytes() == MODEL


def test_fault_16_a_kill_while_models_are_let_go_loses_none_that_ranks(tmp_path: Path) -> None:
    paths = sweeps.make(tmp_path, trials=4, top=2)
    digests = [hashlib.sha256(b"%d" % trial).hexdigest() for trial in range(4)]
    put(paths, *(done(trial, model=digests[trial]) for trial in range(4)))
    best = {paths.model(trial, digests[trial]).name for trial in (0, 1)}
    for kill in kill_everywhere(lambda: reducer.reduce(paths, wait_s=0.0)):
        for trial in range(4):
            paths.model(trial, digests[trial]).write_bytes(b"%d" % trial)
        kill()
        assert best <= set(sweeps.names(paths.models))
        sweeps.summary(paths)
        assert set(sweeps.names(paths.models)) == best
        assert [one.model for one in Sweep(paths).best(2)] == [paths.model(i, digests[i]) for i in (0, 1)]


@pytest.mark.parametrize("num_before", [0, 1])
def test_fault_16_a_kill_while_the_fold_cache_is_written_leaves_the_old_or_the_new_and_changes_no_answer(
    paths: SweepPaths, monkeypatch: pytest.MonkeyPatch, num_before: int
) -> None:
    monkeypatch.setattr(folding, "_SAVED_BYTES", 1)

    def act() -> dict[str, object]:
        found = Fold(paths, 3, eager=True)
        found.update()
        return {"values": list(found.values), "missing": found.missing(), "top": found.best(Metric(), 3)}

    def kept() -> bytes | None:
        return paths.fold_cache.read_bytes() if paths.fold_cache.exists() else None

    def scene() -> None:
        paths.fold_cache.unlink(missing_ok=True)
        if old is not None:
            paths.fold_cache.write_bytes(old)

    put(paths, *map(done, range(num_before)))
    act()
    old = kept() if num_before else None
    put(paths, *map(done, range(3)))
    scene()  # which files are known decides in what order they are, so the new one is made from the old
    act()
    new = kept()
    for kill in kill_everywhere(act):
        scene()
        kill()
        assert kept() in (old, new)
        assert act() == {"values": [0.5, 1.5, 2.5], "missing": [], "top": [0, 1, 2]}
        assert kept() == new
        assert cache.load(paths, *empty_table(), look(paths)) is not None


def empty_table() -> tuple[Table, IncrementalBest]:
    table = Table([], 3, range(3))
    return table, IncrementalBest(table)


def test_fault_16_a_kill_in_a_reducer_s_part_leaves_none_or_one_that_the_records_bear_out(paths: SweepPaths) -> None:
    tree = Tree(num_trials=3, num_ranges=2, fan_in=2)
    put(paths, *map(done, range(3)))
    new = sweeps.summary(paths)
    paths.summary.unlink()
    plan, trials = PlanFile.open(paths.plan), tree.node(0, 0).trials
    for kill in kill_everywhere(lambda: reducer.reduce_part(paths, tree, 0, 0, wait_s=0.0)):
        kill()
        part = parts.read(paths, plan, trials)
        assert part is None or parts.is_current(paths, part)
        assert kill.happened or part is not None
        reducer.reduce_part(paths, tree, 0, 0, wait_s=0.0)
        assert parts.read(paths, plan, trials) is not None
        assert reducer.reduce(paths, wait_s=0.0, tree=tree) == 0
        assert paths.summary.read_bytes() == new
        assert not paths.parts.exists()
        paths.summary.unlink()


def test_fault_16_a_kill_in_a_cancel_leaves_the_sweep_running_or_ended_and_never_in_doubt(paths: SweepPaths) -> None:
    for submission in two_submissions():
        ledger.append(paths, ledger.intent(submission, "local"))
    for kill in kill_everywhere(lambda: jobs.cancel(paths)):
        paths.cancelled.write_text("0\n")  # of the submission before
        kill()
        assert ledger.is_cancelled(paths, TOKEN)
        assert ledger.cancelled_epoch(paths) in (0, 1)
        assert ledger.is_cancelled(paths, OTHER) == (ledger.cancelled_epoch(paths) == 1)
        jobs.cancel(paths)
        assert ledger.is_cancelled(paths, OTHER)


CODE = Snapshot(
    files=(
        SnapshotFile(path="here", executable=False, content=b"pkg", is_link=True),
        SnapshotFile(path="pkg/__init__.py", executable=False, content=b"X = 1\n" * 5000),
        SnapshotFile(path="train.py", executable=True, content=b"import pkg\n"),
    ),
    program="train.py",
)


def test_fault_16_a_kill_in_the_plan_leaves_none_or_a_whole_one(tmp_path: Path) -> None:
    plan, path = planned(400), tmp_path / "plan.jsonl"
    for kill in kill_everywhere(lambda: write_plan(plan, path)):
        path.unlink(missing_ok=True)
        kill()
        if path.exists():
            assert [trial.index for trial in PlanFile.open(path).trials()] == [*range(400)]
        else:
            with pytest.raises(FolderError, match="no such plan"):
                PlanFile.open(path)
        write_plan(plan, path)
        assert PlanFile.open(path).num_trials == 400


def test_fault_16_a_kill_while_the_code_is_copied_leaves_none_or_all_of_it(tmp_path: Path) -> None:
    into = tmp_path / "code"
    for kill in kill_everywhere(lambda: CODE.copy(into)):
        shutil.rmtree(into, ignore_errors=True)
        kill()
        if not into.exists():
            CODE.copy(into)
        assert Manifest.read(into) == CODE.manifest
        assert (into / "here" / "__init__.py").read_bytes() == CODE.files[1].content
        assert os.access(into / "train.py", os.X_OK)


def planned(trials: int = 3, code: Snapshot = CODE) -> SweepPlan:
    return SweepPlan(spec=sweeps.spec(trials=trials), code=code.digest)


def test_fault_16_a_kill_while_a_sweep_is_stored_leaves_no_sweep_or_a_whole_one(tmp_path: Path) -> None:
    plan, runs = planned(), tmp_path / "runs"

    def act() -> SweepPaths:
        return sweep_folder.prepare(plan, CODE, b"name: small\n", runs)

    for kill in kill_everywhere(act):
        shutil.rmtree(runs, ignore_errors=True)
        kill()
        paths = SweepPaths(runs / plan.id)
        if paths.root.exists():
            assert PlanFile.open(paths.plan).num_trials == 3
            assert all(folder.is_dir() for folder in paths.folders)
            assert Manifest.read(paths.code) == CODE.manifest
        assert act() == paths
        assert [trial.index for trial in PlanFile.open(paths.plan).trials()] == [0, 1, 2]
        assert paths.sweep_file.read_bytes() == b"name: small\n"
        assert Manifest.read(paths.code) == CODE.manifest
        assert (paths.code / "train.py").read_bytes() == CODE.files[2].content


def test_fault_16_a_kill_in_a_submission_is_completed_by_the_same_command_and_starts_one_process(
    tmp_path: Path,
) -> None:
    plan, runs = planned(1, Snapshot()), tmp_path / "runs"

    def act() -> submit.Receipt:
        return submit.submit(SweepPaths(runs / plan.id), plan, on="local", workers=1)

    for kill in kill_everywhere(act):
        shutil.rmtree(runs, ignore_errors=True)
        paths = sweep_folder.prepare(plan, Snapshot(), b"", runs)
        kill()
        receipt = act()
        assert receipt.submission is not None
        assert receipt.submission.is_complete
        sweeps.until(lambda paths=paths: paths.summary.exists() and not jobs.live(paths))
        assert len(sweeps.names(paths.records)) == 1
        check(paths, undisturbed=undisturbed(paths, tmp_path))


def undisturbed(paths: SweepPaths, tmp_path: Path) -> bytes:
    """`summary.json` of the same plan in another folder, from records that nothing has happened to."""
    calm = SweepPaths(tmp_path / "calm" / paths.id)
    for folder in calm.folders:
        folder.mkdir(parents=True, exist_ok=True)
    calm.plan.write_bytes(paths.plan.read_bytes())
    put(calm, *map(done, range(PlanFile.open(calm.plan).num_trials)))
    return sweeps.summary(calm)


# 18: no room


@pytest.mark.parametrize("room", [0, 1, 40])
def test_fault_18_without_room_a_ledger_line_is_an_error_by_name_and_goes_through_later(
    paths: SweepPaths, room: int
) -> None:
    superseded(paths, TOKEN)
    size = paths.submissions.stat().st_size
    with no_room_after(size + room), pytest.raises(OrcError, match=r"submissions\.jsonl"):
        superseded(paths, OTHER, TOKEN)
    assert [one.token for one in ledger.submissions(paths)] == [TOKEN]
    superseded(paths, OTHER, TOKEN)
    assert [one.token for one in ledger.submissions(paths)] == [TOKEN, OTHER]


def test_fault_18_without_room_no_claim_is_left_behind(paths: SweepPaths) -> None:
    with no_room_after(0), pytest.raises(OrcError, match=r"claims/0-2\.0: can't be created"):
        Claims(paths, "ours").take(Block(0, 2), 0)
    assert sweeps.names(paths.claims) == []
    assert Claims(paths, "theirs").take(Block(0, 2), 0)


def test_fault_18_without_room_the_old_summary_stays_and_a_reader_still_tells_the_truth(paths: SweepPaths) -> None:
    put(paths, done(0))
    old = sweeps.summary(paths)
    put(paths, *map(done, range(3)))
    with no_room_after(50), pytest.raises(OrcError, match=r"summary\.json: can't be written"):
        reducer.reduce(paths, wait_s=0.0)
    assert paths.summary.read_bytes() == old
    check(paths)
    assert json.loads(sweeps.summary(paths))["missing"] == 0


def test_fault_18_without_room_no_sweep_is_stored_and_the_folder_is_named(tmp_path: Path) -> None:
    plan, runs = planned(3, Snapshot()), tmp_path / "runs"
    with no_room_after(100), pytest.raises(OrcError, match=str(runs)):
        sweep_folder.prepare(plan, Snapshot(), b"", runs)
    assert [path for path in runs.glob("*") if path.name != ".gitignore"] == []
    assert PlanFile.open(sweep_folder.prepare(plan, Snapshot(), b"", runs).plan).num_trials == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, *, but: int) -> Path:
    """Leave so many pages free."""
    file = folder / "fill"
    with file.open("wb", buffering=0) as full, suppress(OSError):
        while True:
            full.write(bytes(4096))
    os.truncate(file, file.stat().st_size - but * 4096)
    return file


@pytest.mark.parametrize("free_pages", [0, 1, 2, 4])
def test_fault_18_a_disk_that_is_full_at_any_point_is_named_and_the_work_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path, free_pages: int
) -> None:
    paths = sweeps.make(small_disk, trials=6, trials_per_task=2)
    memory = Memory(paths)
    filler = fill(small_disk, but=free_pages)
    code, said = sweeps.run(paths)
    assert code == 1
    assert "No space left on device" in said
    assert str(paths.root) in said
    assert "Traceback" not in said
    memory.look()
    check(paths, exit_codes=[code])
    filler.unlink()
    superseded(paths, OTHER, TOKEN)
    assert sweeps.run(paths, submission=OTHER)[0] == 0
    sweeps.summary(paths)
    check(paths, undisturbed=undisturbed(paths, tmp_path), memory=memory, exit_codes=[0])
