"""Saving beside the training: consistent, never in the way, and what goes wrong is heard of."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import Clock, until

import orchestrator as orc
from orchestrator.errors import OrcError
from orchestrator.training.checkpoint.async_writer import AsyncWriter
from orchestrator.training.checkpoint.files import Checkpoints, Gone, Identity
from orchestrator.training.checkpoint.interval import SaveInterval
from orchestrator.training.checkpoint.serialization import Packed, encode, pack
from orchestrator.training.checkpoint.state import capture

ME = "1" * 32


class Slow(Checkpoints):
    """Writes when it is let, and then fails if it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Identity(sweep="s", trial=0), ME)
        self.may_write = threading.Event()
        self.error: Exception | None = None
        self.written: list[int] = []

    def save(self, step: int, packed: Packed) -> Path | None:
        assert self.may_write.wait(20)
        if self.error is not None:
            raise self.error
        self.written.append(step)
        return super().save(step, packed)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    found = Slow(tmp_path / "0")
    yield found
    found.may_write.set()


def every_step() -> SaveInterval:
    return SaveInterval(clock=Clock(), every_steps=1)


def nothing_is_under_way() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint of")]


def stored(checkpoints: Checkpoints) -> Any:
    found = Checkpoints(checkpoints.folder, checkpoints.identity, "2" * 32).newest()
    return None if found is None else found.state


def test_the_state_is_that_of_the_moment_of_the_call(slow: Slow) -> None:
    saver, weights, losses = AsyncWriter(slow, every_step()), torch.zeros(1000), [1.0]
    saver.save(1, lambda: {"weights": weights, "losses": losses})
    weights.fill_(9)
    losses.append(2.0)
    slow.may_write.set()
    saver.wait()
    assert stored(slow)["losses"] == [1.0]
    assert not stored(slow)["weights"].any()


def test_memory_for_the_copy_is_used_again_and_its_content_is_not(slow: Slow) -> None:
    slow.may_write.set()
    saver = AsyncWriter(slow, every_step())
    for step, weights in enumerate([torch.zeros(3, 4), torch.ones(3, 4), torch.ones(4, 3).double(), torch.ones(2)]):
        saver.save(step, lambda: {"weights": weights})  # noqa: B023 (it is called at once)
        saver.wait()
        assert torch.equal(stored(slow)["weights"], weights)


def test_one_save_is_under_way_at_most_and_training_does_not_wait_for_it(slow: Slow) -> None:
    saver = AsyncWriter(slow, every_step())
    assert saver.due(1)
    saver.save(1, dict)
    assert not saver.due(2)
    slow.may_write.set()
    until(lambda: saver.due(3))
    saver.save(3, dict)
    saver.save(4, dict)
    saver.wait()
    assert slow.written == [1, 3, 4]


def test_at_a_notice_the_one_under_way_is_finished_and_then_the_last_state_saved(slow: Slow) -> None:
    saver = AsyncWriter(slow, every_step())
    saver.save(1, lambda: {"at": 1})
    threading.Timer(0.01, slow.may_write.set).start()
    path = saver.save_now(2, lambda: {"at": 2})
    assert path is not None
    assert path.exists()
    assert slow.written == [1, 2]
    assert stored(slow) == {"at": 2}


@pytest.mark.parametrize("call", ["due", "save", "wait"])
def test_what_goes_wrong_beside_the_training_is_raised_by_the_next_call_once(slow: Slow, call: str) -> None:
    saver = AsyncWriter(slow, every_step())
    slow.error = OrcError("the disk is full")
    saver.save(1, dict)
    slow.may_write.set()
    until(nothing_is_under_way)
    calls = {"due": lambda: saver.due(2), "save": lambda: saver.save(2, dict), "wait": saver.wait}
    with pytest.raises(OrcError, match="the disk is full"):
        calls[call]()
    saver.wait()
    assert saver.cost is None


def test_a_last_save_that_works_makes_good_for_the_one_before_it(slow: Slow) -> None:
    saver = AsyncWriter(slow, every_step())
    slow.error = OrcError("the disk is full")
    slow.may_write.set()
    saver.save(1, dict)
    until(nothing_is_under_way)
    slow.error = None
    assert saver.save_now(2, lambda: {"at": 2}) is not None


def test_a_trial_that_someone_else_has_finished_is_heard_of_by_every_call(slow: Slow) -> None:
    saver = AsyncWriter(slow, every_step())
    slow.may_write.set()
    for call in (lambda: saver.save_now(2, dict), saver.wait):
        slow.error = Gone("finished")
        saver.save(1, dict)
        with pytest.raises(Gone):
            call()


def test_when_the_trial_has_an_outcome_nothing_is_raised(slow: Slow) -> None:
    saver = AsyncWriter(slow, every_step())
    slow.error = Gone("finished")
    saver.save(1, dict)
    slow.may_write.set()
    saver.close()
    saver.close()
    assert nothing_is_under_way()


def test_what_a_checkpoint_cannot_hold_is_said_at_once(slow: Slow) -> None:
    saver = AsyncWriter(slow, every_step())
    for save in (saver.save, saver.save_now):
        with pytest.raises(TypeError, match=r"state\['loader'\] is of type object"):
            save(1, lambda: {"loader": object()})


def test_the_cost_is_measured_and_decides_the_pace(slow: Slow) -> None:
    pace = SaveInterval(clock=Clock())
    saver = AsyncWriter(slow, pace)
    saver.save(1, lambda: {"weights": torch.zeros(1000)})
    threading.Timer(0.6, slow.may_write.set).start()
    saver.wait()
    assert saver.cost is not None
    assert saver.cost.num_bytes == 4000
    assert saver.cost.whole_s >= 0.5
    assert 0 < saver.cost.held_up_s < saver.cost.whole_s
    assert pace.interval_s == pytest.approx(5 * saver.cost.whole_s)


def test_the_other_ranks_take_part_and_write_nothing(tmp_path: Path) -> None:
    saver, taken = AsyncWriter(None, every_step()), []
    assert saver.due(1)
    saver.save(1, lambda: taken.append(1))
    assert saver.save_now(2, lambda: taken.append(2)) is None
    assert taken == [1, 2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_that_is_forked_in_the_middle_has_no_part_in_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "0", Identity(sweep="s", trial=0), ME)
    saver = AsyncWriter(checkpoints, every_step())
    children = []
    for step in range(1, 11):
        saver.save(step, lambda: {"at": step, "weights": torch.full((300_000,), step)})  # noqa: B023 (called at once)
        child = os.fork()
        if child == 0:
            try:
                idle = not saver.due(99) and saver.save_now(99, dict) is None
                saver.save(99, dict)
                saver.wait()
            finally:
                os._exit(0 if idle else 1)
        children.append(child)
    saver.wait()
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 10
    assert stored(checkpoints)["at"] == 10
    assert [int(path.name[:12]) for path in checkpoints.files()] == [10, 9]


def trained(saver: AsyncWriter | None) -> bytes:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Dropout(0.5), torch.nn.Linear(30, 20))
    state = orc.State(net=net, opt=torch.optim.AdamW(net.parameters()))
    for step in range(25):
        x = torch.randn(8, 20)
        net.zero_grad()
        net(x).sub(x).square().mean().backward()
        assert state.opt is not None
        state.opt.step()
        if saver is not None and saver.due(step):
            saver.save(step, lambda: capture(state, step))  # noqa: B023 (called at once)
    return b"".join(encode(pack(capture(state, None)), {}))


def test_results_do_not_depend_on_saving(tmp_path: Path) -> None:
    saver = AsyncWriter(Checkpoints(tmp_path / "0", Identity(sweep="s", trial=0), ME), every_step())
    assert trained(saver) == trained(None)
    saver.wait()
    assert saver.cost is not None
