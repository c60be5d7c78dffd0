"""Keeping one trial's state: when it is saved at a safe point, and what a notice has done there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from sweeps import Clock, no_room_after

from orchestrator.config.spec import CheckpointOptions
from orchestrator.core.messages import AttemptEnded, Cause, Progress, Resumed
from orchestrator.training.checkpoint.files import Checkpoints, Identity
from orchestrator.training.checkpoint.manager import LEAVE, SAVE, STAY, CheckpointManager, Interrupted, left
from orchestrator.training.checkpoint.serialization import Tree

WRITER = "0123456789abcdef" * 2


class Kept:
    """A keeper on a clock that stands still until it is set, and all that it says."""

    def __init__(self, folder: Path, every: str = "1h") -> None:
        self.clock = Clock()
        self.words: list[str] = []
        self.said: list[str] = []
        self.told: list[Any] = []
        self.waits = 0
        self.later: list[str] = []
        self.checkpoints = Checkpoints(folder, Identity(sweep="s", trial=0), WRITER, say=self.said.append)
        self.keeper = CheckpointManager(
            self.checkpoints,
            CheckpointOptions(every=every),
            hears=self._hears,
            tells=self.told.append,
            say=self.said.append,
            clock=self.clock,
            sleep=self._sleep,
        )

    def _hears(self) -> list[str]:
        found, self.words = self.words, []
        return found

    def _sleep(self, seconds: float) -> None:
        """While it waits for a word, one comes."""
        self.waits += 1
        self.clock.now += seconds
        self.words, self.later = [*self.words, *self.later[:1]], self.later[1:]

    def look(self, step: int, *words: str, epochs: int = 0, take: Callable[[], Tree] | None = None) -> None:
        self.words += words
        self.keeper.look(step, epochs, take or (lambda: {"step": step, "weights": torch.ones(3)}))

    @property
    def steps(self) -> list[int]:
        """Of which there are checkpoints; nothing is under way any more."""
        self.keeper.close()
        return sorted(int(path.name[:12]) for path in self.checkpoints.files())


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    found = Kept(tmp_path / "trial")
    yield found
    found.keeper.close()


# Notices


@pytest.mark.parametrize("words", [[LEAVE], [SAVE, LEAVE], [LEAVE, SAVE], [LEAVE, STAY]])
def test_who_is_asked_to_leave_is_saved_at_that_step(kept: Kept, words: list[str]) -> None:
    with pytest.raises(Interrupted) as interrupted:
        kept.look(7, *words)
    assert interrupted.value.answer == left(7)
    assert left(7) == AttemptEnded(cause=Cause.PREEMPTED, detail="saved at step 7, to go on later", step=7)
    assert kept.steps == [7]


def test_who_is_asked_to_save_waits_a_moment_for_the_word_that_says_whether_to_leave(kept: Kept) -> None:
    kept.later = [LEAVE]
    with pytest.raises(Interrupted):
        kept.look(7, SAVE)
    assert kept.waits == 1
    assert kept.steps == [7]


@pytest.mark.parametrize("later", [[STAY], []])
def test_who_may_stay_or_hears_nothing_more_is_saved_and_goes_on(kept: Kept, later: list[str]) -> None:
    kept.later = later
    kept.look(7, SAVE)
    assert kept.said == ["--- saved at step 7 after a notice, and goes on"]
    assert kept.clock.now == pytest.approx(0.005 if later else 2.0, abs=0.01)
    assert kept.steps == [7]


def test_signals_of_one_event_are_one_save_and_a_later_one_is_another(kept: Kept) -> None:
    for step, now in ((1, 0.0), (2, 1.0), (3, 4.9), (4, 30.0)):
        kept.clock.now = now
        kept.look(step, SAVE, STAY)
    assert kept.steps == [1, 4]


def test_where_the_trial_cannot_go_on_from_a_notice_waits_for_the_next_safe_point(kept: Kept) -> None:
    kept.words = [LEAVE]
    kept.keeper.look(7, 0, None)
    assert kept.keeper.look_s == 0.0, "it looks again at once"
    with pytest.raises(Interrupted) as interrupted:
        kept.look(8)
    assert interrupted.value.answer.step == 8


def test_before_the_first_step_there_is_nothing_to_save() -> None:
    assert left(0).detail == "left before its first step, to go on later"


def test_with_checkpoints_off_a_notice_changes_nothing(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "trial", every="off")
    kept.look(7, LEAVE)
    assert not kept.keeper.has_saved
    assert kept.keeper.newest() is None
    assert kept.told == [Resumed(step=0)]
    assert kept.said == ["--- begins anew: no checkpoint was left"]


# When


def test_steps_and_epochs_are_counted_from_where_the_last_save_was(tmp_path: Path) -> None:
    by_steps = Kept(tmp_path / "steps", every="3 steps")
    for step in range(1, 8):
        by_steps.look(step)
        by_steps.keeper._is_durable()  # else how many are saved depends on the disk
    assert by_steps.steps == [3, 6]
    by_epochs = Kept(tmp_path / "epochs", every="2 epochs")
    for step in range(1, 13):
        by_epochs.look(step, epochs=step // 2)
        by_epochs.keeper._is_durable()
    assert by_epochs.steps == [8, 12]
    assert by_epochs.keeper.only_epochs
    assert not by_steps.keeper.only_epochs


def test_a_clock_is_looked_at_only_when_something_may_be_due(kept: Kept) -> None:
    kept.look(1)
    assert kept.keeper.look_s == 1.0, "when it next tells where it is"
    kept.clock.now = 1.5
    kept.look(20)
    assert kept.told == [Progress(step=20, saved=None)]
    assert kept.keeper.look_s == 2.5


def test_where_it_is_is_told_with_the_last_step_that_is_saved(kept: Kept) -> None:
    kept.keeper.resumed(5, 0)
    kept.clock.now = 2.0
    kept.look(6)
    kept.look(7, SAVE, STAY)
    kept.clock.now = 10.0
    kept.look(8)
    assert kept.told == [
        Resumed(step=5),
        Progress(step=6, saved=5),
        Progress(step=8, saved=7),
    ]
    assert kept.said[0] == "--- goes on from step 5"


# What goes wrong


def test_fault_18_without_room_who_is_to_leave_says_so_and_who_may_stay_goes_on(kept: Kept) -> None:
    with no_room_after(100):
        for step in (1, 2):
            kept.clock.now += 60.0
            kept.look(step, SAVE, STAY)
        with pytest.raises(Interrupted) as interrupted:
            kept.look(3, LEAVE)
    assert "can't be written: File too large" in str(interrupted.value.answer.reason)
    [said] = kept.said
    assert said.startswith("--- a checkpoint could not be written, and the trial goes on: "), "it is said once"
    kept.clock.now += 60.0
    kept.look(4, SAVE, STAY)
    assert kept.steps == [4]


def test_who_finds_its_folder_gone_stops_quietly(kept: Kept) -> None:
    kept.look(1, SAVE, STAY)
    for path in kept.checkpoints.files():
        path.unlink()
    kept.checkpoints.folder.rmdir()
    with pytest.raises(Interrupted) as interrupted:
        kept.look(2, LEAVE)
    assert "has vanished: someone else has finished this trial" in str(interrupted.value.answer.reason)


def test_a_state_that_cannot_be_told_ends_checkpoints_and_not_the_trial(kept: Kept) -> None:
    def take() -> Tree:
        raise ValueError("no state today")

    kept.look(1, LEAVE, take=take)
    assert kept.said == ["--- no checkpoints: if this trial is interrupted, it begins anew: no state today"]
    kept.look(2, LEAVE)
    assert kept.steps == []


def test_a_warning_is_said_once(kept: Kept) -> None:
    kept.keeper.warn("it goes on at epochs")
    kept.keeper.warn("it goes on at epochs")
    assert kept.said == ["--- it goes on at epochs"]


def test_what_other_ranks_have_written_is_refused_with_the_reason(kept: Kept) -> None:
    other = Checkpoints(kept.checkpoints.folder, Identity(sweep="s", trial=0, world_size=2), WRITER)
    keeper = CheckpointManager(other, CheckpointOptions(every="1h"), hears=lambda: [SAVE, STAY])
    keeper.look(5, 0, lambda: {"step": 5})
    with pytest.raises(Interrupted) as interrupted:
        kept.keeper.newest()
    assert "is of 2 ranks and can't be resumed with 1" in cast(str, interrupted.value.answer.reason)
