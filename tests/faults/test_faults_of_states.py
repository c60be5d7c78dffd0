"""Fault 16: killed at any point while a trial's state or its model is written, the trial ends with the same bits."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sweeps
import torch
from killpoints import kill_everywhere, run_apart
from test_resumed_training import Process, usual
from test_single_worker import answers, build, message

from orchestrator.core.messages import AttemptEnded
from orchestrator.core.paths import SweepPaths
from orchestrator.results import reducer, top_models
from orchestrator.results.records import RecordWriter, Status, outcome
from orchestrator.training.trial import Result, Trial

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A fork has none of the threads that the pool of this process counts on."""
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num)


def left_at(process: Process, attempt: int) -> int:
    """Where an attempt leaves that is told to at its third safe point, and saves there, as any does at a notice."""
    answer = process.run(attempt=attempt, leave_after=2)
    assert isinstance(answer, AttemptEnded), answer
    assert isinstance(answer.step, int)
    return answer.step


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_fault_16_a_kill_in_a_checkpoint_leaves_the_old_state_or_the_new_and_the_trial_ends_with_the_same_bits(
    tmp_path: Path, num_before: int
) -> None:
    calm = Process(tmp_path / "calm", usual, every="off").run()
    process, before = Process(tmp_path / "trial", usual, every="10 steps"), tmp_path / "before"
    steps = [0, *(left_at(process, attempt) for attempt in range(num_before))]
    if num_before:
        shutil.copytree(process.folder, before)
    for kill in kill_everywhere(lambda: left_at(process, num_before)):
        shutil.rmtree(process.folder, ignore_errors=True)
        if num_before:
            shutil.copytree(before, process.folder)
        kill()
        process.told.clear()
        found = process.run(attempt=num_before + 1)
        resumed = process.told[0].step
        assert resumed in (steps[-1], steps[-1] + 3)
        assert kill.happened or resumed == steps[-1] + 3
        assert isinstance(found, Result)
        assert isinstance(calm, Result)
        assert (found.payload, found.model) == (calm.payload, calm.model)
    assert steps == [3 * number for number in range(num_before + 1)]
    assert kill.number >= 8


def test_fault_16_a_kill_in_a_save_beside_the_training_leaves_a_state_that_counts(tmp_path: Path) -> None:
    calm = Process(tmp_path / "calm", usual, every="off").run()
    process = Process(tmp_path / "trial", usual, every="7 steps")
    for kill in kill_everywhere(process.run):
        shutil.rmtree(process.folder, ignore_errors=True)
        kill()
        process.told.clear()
        found = process.run(attempt=1)
        assert (process.told[0].step or 7) in range(7, 19)
        assert isinstance(found, Result)
        assert isinstance(calm, Result)
        assert (found.payload, found.model) == (calm.payload, calm.model)
    assert kill.number >= 8


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return sweeps.folder(tmp_path, sweeps.spec(program="train.py", trials=2, top=1), "")


def test_fault_16_a_kill_between_a_worker_s_model_and_its_record_leaves_no_record_without_its_model(
    paths: SweepPaths,
) -> None:
    def job(trial: Trial) -> float:
        trial.build(build)
        return trial.index + 0.5

    def act() -> None:
        """What a worker and its supervisor do, one after the other: the model, then the line that names it."""
        records = RecordWriter(paths, {})
        for index in range(2):
            *_, answer = answers(paths, job, message(index, seed=index), build=build)
            records.append(
                outcome(trial=index, attempt=0, status=Status.COMPLETE, payload=answer.body.payload, seconds=0.0)
            )
        records.close()

    for kill in kill_everywhere(act):
        for path in (*paths.models.iterdir(), *paths.records.iterdir()):
            path.unlink()
        kill()
        named = sweeps.fold(paths)
        for sha256 in filter(None, (top_models.model_of(named, trial) for trial in range(2))):
            (path,) = paths.models.glob(f"*-{sha256[:16]}.safetensors")
            assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        run_apart(act)  # the trials again
        reducer.reduce(paths, wait_s=0.0)
        assert sweeps.names(paths.models) == [paths.model(0, top_models.model_of(sweeps.fold(paths), 0) or "").name]
        assert sweeps.counts(paths) == {"complete": 2}
    assert kill.number >= 20
