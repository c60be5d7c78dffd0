"""What ranks do together: real processes on gloo, real kills."""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import rank_processes as jobs
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import image, run

from orchestrator.distributed.control_group import ControlGroup
from orchestrator.stats.containers import SummaryMap, TopN
from orchestrator.stats.summary import Summary
from orchestrator.training.data import dataset

WORLD_SIZES = [1, 2, 3, 4, 7]


# Reductions


def test_ranks_reduce_to_what_one_process_merges() -> None:
    num_cases = 12
    found = run(jobs.reduced, 7, num_cases)
    for world_size in range(1, 8):
        cases = [[jobs.held(seed, rank) for rank in range(world_size)] for seed in range(num_cases)]
        wanted = [image(type(case[0]).merge_all(case)) for case in cases]
        assert [one[world_size] for one in found[:world_size]] == [wanted] * world_size


ONE = Summary.of(1.0, key=1)
UNFIT = {
    "another top": (Summary.empty(top=3), "can't be merged: summaries of different types can't be merged: top"),
    "another kind": (TopN.empty(3), "can't be merged: a "),
    "a kind of its own": (SummaryMap.of({"a": ONE}), "hold, or were given, can't be merged: a "),
    "no monoid": ({"a": 1}, "what rank 2 holds can't be sent: expected a Summary, SummaryMap, SummaryPair or TopN"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("world_size", [3, 5])
def test_values_that_do_not_fit_are_told_on_every_rank(name: str, world_size: int) -> None:
    other, text = UNFIT[name]
    found = run(jobs.reduce_given, world_size, [other if rank == 2 else ONE for rank in range(world_size)])
    assert len(set(found)) == 1
    assert found[0][0] == "ValueError"
    assert text in found[0][1]


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_ranks_agree_on_what_they_all_hold(world_size: int) -> None:
    assert run(jobs.agree_on, world_size, [{"b": [1, None], "a": "x"}] * world_size) == [None] * world_size


def test_ranks_that_hold_something_else_are_named_to_all() -> None:
    text = "ranks differ in the data: rank 0 has [1], rank 2 has [2], rank 4 has {}"
    assert run(jobs.agree_on, 5, [[1], [1], [2], [1], {}]) == [("ValueError", text)] * 5


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_everyone_gets_rank_0_s_tensors_and_everyone_s(world_size: int) -> None:
    assert (
        run(jobs.broadcast_and_gathered, world_size)
        == [(True, [[rank, rank + 1, rank + 2] for rank in range(world_size)])] * world_size
    )


def test_a_group_without_gloo_gets_one_beside_it(tmp_path: Path) -> None:
    assert run(jobs.reduce_beside_another_backend, 3, str(tmp_path / "store")) == [("fake", "gloo", 3)] * 3


@pytest.mark.parametrize(("world_size", "missing"), [(2, 1), (4, 0)])
def test_ranks_that_make_different_calls_are_told(world_size: int, missing: int) -> None:
    found = run(jobs.reduce_beside, world_size, missing)
    assert {name for name, _ in found} <= {"ValueError", "PeerLost"}
    assert any("can't be merged: " in text or "ranks don't make the same calls" in text for _, text in found)


def test_one_process_is_a_group() -> None:
    group = ControlGroup.of()
    assert (group, group.rank, group.world_size) == (ControlGroup.alone(), 0, 1)
    assert group.reduce(ONE) is ONE
    group.agree("nothing", None)
    group.barrier()
    group.broadcast([torch.ones(2)])
    assert group.all_gather(torch.ones(2))[0].tolist() == [1.0, 1.0]


# Ranks that are gone


@pytest.mark.parametrize(("world_size", "missing"), [(2, 0), (4, 1), (5, 4), (7, 0)])
def test_a_killed_rank_is_named(world_size: int, missing: int) -> None:
    with jobs.ranks(jobs.reduce_until_lost, world_size, missing, "killed", 20.0) as found:
        answers = [jobs.answer(pipe) for rank, (_, pipe) in enumerate(found) if rank != missing]
    assert {name for name, _, _ in answers} == {"PeerLost"}
    assert all(f"lost rank {missing} of {world_size}: rank " in text for _, text, _ in answers), answers
    assert all(took < 10 for _, _, took in answers)


@pytest.mark.parametrize(("world_size", "missing"), [(2, 1), (4, 0)])
def test_a_rank_that_stands_still_is_given_up(world_size: int, missing: int) -> None:
    with jobs.ranks(jobs.reduce_until_lost, world_size, missing, "stopped", 1.0) as found:
        answers = [jobs.answer(pipe) for rank, (_, pipe) in enumerate(found) if rank != missing]
        os.kill(found[missing][0].pid, signal.SIGCONT)
    assert {name for name, _, _ in answers} == {"PeerLost"}
    assert any(f"{missing}" in text.partition(" of ")[0] and "waited" in text for _, text, _ in answers), answers
    assert all(took < 10 for _, _, took in answers)


# Validation


@cache
def alone(name: str, num: int, batch_size: int) -> Any:
    """What one process finds, in a process like those of the ranks."""
    return run(jobs.validated, 1, name, num, batch_size)[0]


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_validation_is_the_same_in_every_byte_whatever_the_ranks(name: str, world_size: int) -> None:
    means, images = alone(name, 360, 32)
    assert means["val_loss.count"] == 360
    assert run(jobs.validated, world_size, name, 360, 32) == [(means, images)] * world_size


@pytest.mark.parametrize("form", ["listed", "columns"])
def test_the_form_of_the_samples_changes_nothing_for_any_ranks(form: str) -> None:
    one = run(jobs.validated, 1, "cnn", 100, 7, form)
    assert run(jobs.validated, 3, "cnn", 100, 7, form) == one * 3


@pytest.mark.parametrize(("num", "batch_size"), [(1, 4), (2, 1), (5, 2), (97, 8), (3, 512)])
@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_fault_25_odd_shards_count_every_sample_once(num: int, batch_size: int, world_size: int) -> None:
    means, images = alone("cnn", num, batch_size)
    assert means["val_loss.count"] == means["val_error.count"] == num
    assert run(jobs.validated, world_size, "cnn", num, batch_size) == [(means, images)] * world_size


@pytest.mark.parametrize("world_size", [1, 3])
def test_fault_25_odd_shards_of_no_sample_are_an_error_on_every_rank(world_size: int) -> None:
    text = "there is nothing to validate: expected at least 1 sample, found a data set of 0"
    assert run(jobs.validated, world_size, "mlp", 0, 8) == [("ValueError", text)] * world_size


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("a mean", "val_loss: losses must give one value a sample: expected 10, found 7"),
        (
            "other data",
            'ranks differ in what is validated: rank 0 has {"batch_size":4,"buffer_bytes":0,"samples":10}, '
            'rank 1 has {"batch_size":4,"buffer_bytes":0,"samples":11}, '
            'rank 2 has {"batch_size":4,"buffer_bytes":0,"samples":12}',
        ),
    ],
)
def test_what_is_wrong_on_one_rank_is_told_on_all(given: str, text: str) -> None:
    assert run(jobs.validate_badly, 3, given) == [("ValueError", text)] * 3


@given(num=st.integers(0, 50), batch_size=st.integers(1, 60), world_size=st.integers(1, 9))
def test_batches_are_dealt_each_once_and_whole(num: int, batch_size: int, world_size: int) -> None:
    x = torch.arange(num)
    hands = [list(dataset.dealt((x,), batch_size, num, torch.device("cpu"), r, world_size)) for r in range(world_size)]
    wanted = [x[first : first + batch_size].tolist() for first in range(0, num, batch_size)]
    assert [[b[0].tolist() for b in hand] for hand in hands] == [wanted[r::world_size] for r in range(world_size)]  # type: ignore[index]
