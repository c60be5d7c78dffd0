"""Ranks that hear of a notice at different steps save at the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from crew import together
from sweeps import Clock

from orchestrator.distributed.consensus import Agreement, Wish
from orchestrator.distributed.control_group import ControlGroup
from orchestrator.distributed.rendezvous import RankContext

STEPS = 12


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def noticed(party: RankContext, at: list[int | None], every_s: float = 0.0) -> int | None:
    """The step at which this rank would leave, when it has a notice at step `at[rank]`, and at no other."""
    agreement = Agreement(party, every_s=every_s)
    for step in range(STEPS):
        if agreement.ask(Wish(notice=at[party.rank] == step), step).notice:
            return step
    return STEPS if agreement.last(STEPS).notice else None


@pytest.mark.parametrize(
    ("at", "leaves"),
    [
        ([3], 3),
        ([3, None], 4),
        ([None, 3, 7], 4),
        ([0, 0, 0, 0], 1),
        ([None, None, None], None),
        ([STEPS - 1, None], STEPS),
    ],
)
def test_fault_01_ranks_leave_together_a_step_after_the_first_has_heard(
    place: Path, at: list[int | None], leaves: int | None
) -> None:
    assert together(place, len(at), noticed, at) == [leaves] * len(at)


def saves(party: RankContext, due: list[int]) -> list[int]:
    """Where this rank saves, when rank 0's clock says so at the steps `due`."""
    agreement = Agreement(party, every_s=0.0)
    return [step for step in range(STEPS) if agreement.ask(Wish(save=party.rank == 0 and step in due), step).save]


@pytest.mark.parametrize("at", [[3, None, 7], [None, None, STEPS - 1]])
def test_fault_01_ranks_leave_together_when_steps_are_so_short_that_few_ask(place: Path, at: list[int | None]) -> None:
    assert len(set(together(place, 3, noticed, at, 60.0))) == 1


class Pacing:
    """A process group of this rank alone, which counts."""

    def __init__(self) -> None:
        self.num = 0

    def allreduce(self, words: object, how: object) -> Pacing:
        self.num += 1
        return self

    def wait(self) -> None:
        pass


@pytest.mark.parametrize(("step_s", "expected"), [(0.001, 8), (0.02, 34), (0.1, 101), (3.0, 101)])
def test_short_steps_ask_seldom_and_long_ones_each_time(step_s: float, expected: int) -> None:
    clock, group = Clock(), Pacing()
    party = RankContext(group=ControlGroup(rank=0, world_size=2, process_group=cast(Any, group)))
    agreement = Agreement(party, every_s=0.05, clock=clock)
    for step in range(101):
        clock.now += step_s
        agreement.ask(Wish(), step)
    assert group.num == expected


@pytest.mark.parametrize(("num_short", "most"), [(1, 2), (10, 10), (5000, 20)])
def test_where_steps_become_long_a_notice_waits_for_few_of_them(num_short: int, most: int) -> None:
    clock, group = Clock(), Pacing()
    agreement = Agreement(
        RankContext(group=ControlGroup(rank=0, world_size=2, process_group=cast(Any, group))), clock=clock
    )
    for step in range(num_short):
        clock.now += 1e-5
        agreement.ask(Wish(), step)
    asked = group.num
    for step in range(num_short, num_short + most):
        clock.now += 10.0
        agreement.ask(Wish(), step)
    assert group.num > asked


def test_a_save_that_one_rank_is_due_is_everyones_and_is_made_once(place: Path) -> None:
    assert together(place, 3, saves, [2, 3, 9]) == [[3, 10]] * 3


def stray(party: RankContext) -> Any:
    agreement = Agreement(party, every_s=0.0)
    for step in range(STEPS):
        agreement.ask(Wish(), step + (party.rank == 1 and step > 5))
    return agreement.last(STEPS)


def test_ranks_that_have_left_each_other_s_step_hear_of_it(place: Path) -> None:
    for text in together(place, 3, stray):
        assert text.startswith("OutOfStep: the ranks are at different steps, from 6 to 7")


def test_one_alone_decides_at_once() -> None:
    agreement = Agreement(RankContext.alone())
    wish = Wish(notice=True)
    assert agreement.ask(wish, 0) is wish
    assert agreement.last(1) == Wish()
