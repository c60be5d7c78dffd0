"""Each rank's part of what a trial's ranks do together."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.distributed.control_group import ControlGroup
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.training.team import TrialRanks
from orchestrator.training.trial import stream

CPU = torch.device("cpu")


def team(rank: int, world_size: int) -> TrialRanks:
    """One of several ranks that needs the others for nothing here."""
    return TrialRanks(
        RankContext(group=ControlGroup(rank=rank, world_size=world_size, process_group=None)), partial(stream, 5)
    )


@given(
    num=st.integers(0, 50),
    batch_size=st.integers(1, 20),
    world_size=st.integers(2, 5),
    shuffled=st.booleans(),
    data=st.data(),
)
def test_parts_of_all_ranks_make_up_every_batch_wherever_one_begins(
    num: int, batch_size: int, world_size: int, shuffled: bool, data: st.DataObject
) -> None:
    order = torch.randperm(num) if shuffled else None
    wanted = (torch.arange(num) if order is None else order).tolist()
    begin = data.draw(st.integers(0, -(-num // batch_size)))
    samples = (torch.arange(num),)
    dealt = [
        [batch[0].tolist() for batch in team(rank, world_size).batches(samples, order, batch_size, num, CPU, begin)]  # type: ignore[index]
        for rank in range(world_size)
    ]
    for number, parts in enumerate(zip(*dealt, strict=True), start=begin):
        batch = wanted[number * batch_size :][:batch_size]
        with_samples = parts[: len(batch)]  # those for which none is left are given the first one
        assert [sample for part in with_samples for sample in part] == batch
        assert all(part == batch[:1] for part in parts[len(batch) :])
        assert max(map(len, with_samples)) - min(map(len, with_samples)) <= 1
    assert len(dealt[0]) == -(-num // batch_size) - begin


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(1)), random.random(), float(np.random.rand())


def test_each_rank_draws_its_own_numbers_from_the_first_loop_on_and_the_first_those_of_one_process() -> None:
    found = []
    for rank in range(3):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        one = team(rank, 3)
        one.part_ways()
        first = drawn()
        one.part_ways()
        found.append((first, drawn()))
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert found[0] == (drawn(), drawn())
    assert len({number for pair in found for numbers in pair for number in numbers}) == 18


def test_a_batch_that_has_no_samples_to_count_is_an_error() -> None:
    net = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="a batch is a tensor with its samples along the first dimension"):
        team(0, 1).gradients(net, lambda net, batch: net(torch.zeros(1, 1))[:, 0], "no tensor")
