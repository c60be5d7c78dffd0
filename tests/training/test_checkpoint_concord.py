"""A keeper of several ranks: what one of them wishes at a safe point, all do at the same later one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from crew import together

from orchestrator.config.spec import CheckpointOptions
from orchestrator.core.messages import Message, Unable
from orchestrator.distributed.consensus import Agreement
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.errors import OrcError
from orchestrator.training.checkpoint.concord import RankCheckpointManager
from orchestrator.training.checkpoint.files import Checkpoints, Identity
from orchestrator.training.checkpoint.manager import LEAVE, SAVE, STAY, Interrupted, left
from orchestrator.training.checkpoint.serialization import Tree

WRITER = "0123456789abcdef" * 2
STEPS = 12


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


Came = tuple[dict[str, Any], list[int], list[str], list[dict[str, Any]]]


def trained(
    party: RankContext,
    folder: Path,
    words: dict[tuple[int, int], list[str]],
    every: str = "1h",
    blocked: bool = False,
    clumsy: int | None = None,
) -> Came:
    """What a rank answers, where it gave its state, what it said and what it told.

    Args:
        party: the ranks.
        folder: of checkpoints.
        words: (rank, step) -> what that rank hears there.
        every: how often to save.
        blocked: nothing can be written.
        clumsy: the step at which the job can't tell its state.
    """
    said: list[str] = []
    told: list[Any] = []
    given: list[int] = []
    step = 0

    def take() -> Tree:
        given.append(step)
        if step == clumsy:
            raise ValueError("no state today")
        return {"step": step, "weights": torch.full((3,), float(step))}

    whose = Identity(sweep="s", trial=0, world_size=party.world_size)
    checkpoints = Checkpoints(folder / ("file/below" if blocked else "trial"), whose, WRITER, say=said.append)
    keeper = RankCheckpointManager(
        checkpoints,
        CheckpointOptions(every=every),
        party,
        hears=lambda: words.get((party.rank, step), []),
        tells=told.append,
        say=said.append,
    )
    keeper._agreement = Agreement(party, every_s=0.0)  # at every step, though they take no time
    answer: Message | None = None
    try:
        for step in range(1, STEPS):
            keeper.look(step, 0, take)
    except Interrupted as interrupted:
        answer = interrupted.answer
        if isinstance(answer, Unable):  # which is one rank's own end, and no leaving together
            raise OrcError(answer.reason) from interrupted
    finally:
        keeper.close()
    return answer, given, said, told


def newest(folder: Path, world_size: int) -> int | None:
    found = Checkpoints(folder / "trial", Identity(sweep="s", trial=0, world_size=world_size), WRITER).newest()
    if found is None:
        return None
    assert bool((cast(Any, found.state)["weights"] == found.step).all())
    return found.step


@pytest.mark.parametrize(("world_size", "who"), [(2, 0), (2, 1), (3, 2)])
def test_fault_01_a_notice_that_one_rank_hears_has_all_save_at_one_step_and_leave(
    place: Path, world_size: int, who: int
) -> None:
    found: list[Came] = together(place, world_size, trained, place, {(who, 4): [LEAVE]})
    answers, given = [one[0] for one in found], [one[1] for one in found]
    assert answers == [answers[0]] * world_size
    assert given == [given[0]] * world_size
    [step] = given[0]
    assert 5 <= step < STEPS, "what one wished at a step, all are told at a later one"
    assert answers[0] == left(step)
    assert newest(place, world_size) == step


def test_a_wish_to_save_has_all_give_their_state_once_and_go_on(place: Path) -> None:
    words = {(rank, step): [SAVE, STAY] for rank in range(2) for step in (3, 4)}
    found: list[Came] = together(place, 2, trained, place, words)
    assert [one[0] for one in found] == [None, None]
    assert found[0][1] == found[1][1]
    [step] = found[0][1]
    assert newest(place, 2) == step


def test_a_save_that_becomes_a_leave_is_one_save(place: Path) -> None:
    words = {(0, step): [SAVE] if step == 3 else [LEAVE] for step in range(3, STEPS)}
    found: list[Came] = together(place, 2, trained, place, words)
    assert {each[0].cause for each in found} == {"preempted"}
    assert found[0][1] == found[1][1]
    assert len(found[0][1]) == 1


def test_only_the_first_rank_s_steps_decide_when_a_save_is_due_and_only_it_writes(place: Path) -> None:
    found: list[Came] = together(place, 3, trained, place, {}, "4 steps")
    assert found[0][1] == found[1][1] == found[2][1] != []
    assert [one[0] for one in found] == [None] * 3
    assert newest(place, 3) in found[0][1]
    assert not found[1][3], "where the trial is, the first one tells"


def test_ranks_of_which_the_first_cannot_write_do_not_leave_in_silence(place: Path) -> None:
    (place / "file").touch()
    first, second = together(place, 2, trained, place, {(1, 4): [LEAVE]}, "1h", True)
    assert isinstance(first, str)
    assert "can't be made: Not a directory" in first
    assert isinstance(second, str)
    assert second.startswith("PeerLost: rank 0 (pid ")


def test_a_state_that_cannot_be_told_ends_checkpoints_on_all_ranks_and_nothing_else(place: Path) -> None:
    found: list[Came] = together(place, 2, trained, place, {(0, 4): [LEAVE]}, "1h", False, 5)
    assert found[0][1] == found[1][1]
    for answer, given, said, _ in found:
        assert answer is None
        assert given[0] == 5
        assert any("no checkpoints: if this trial is interrupted, it begins anew" in line for line in said)
    assert newest(place, 2) is None


def test_with_checkpoints_off_nobody_asks_nobody_saves_and_a_notice_changes_nothing(place: Path) -> None:
    found: list[Came] = together(place, 2, trained, place, {(0, 4): [LEAVE]}, "off")
    assert [(answer, given) for answer, given, _, _ in found] == [(None, []), (None, [])]


def apart(party: RankContext) -> str:
    """Ranks that come to a safe point from different steps."""
    checkpoints = Checkpoints(Path("/nowhere"), Identity(sweep="s", trial=0, world_size=2), WRITER)
    keeper = RankCheckpointManager(checkpoints, CheckpointOptions(every="1h"), party)
    keeper._agreement = Agreement(party, every_s=0.0)
    try:
        for step in range(5):
            keeper.look(step + (party.rank if step > 2 else 0), 0, dict)
    except OrcError as error:
        return str(error)
    return "nothing is wrong"


def test_ranks_at_different_steps_are_told_so(place: Path) -> None:
    found = together(place, 2, apart)
    assert all("the ranks are at different steps, from 3 to 4" in text for text in found), found
