"""Several ranks train as one: the gradients of one process, the same bits on every rank and after every resume."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its customary name)
from crew import together
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.distributed.rendezvous import RankContext
from orchestrator.training.data_parallel import MicroBatch, NoGradient, Replica, Shard, wrapped

NUM = 50
BATCH = 16
"""The last batch has 2 samples: with 3 and 4 ranks, some have none."""
SMALL_MB = 0.001
"""Gradients of the nets below, in MiB, are several times this: they make several buckets."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(NUM, 20, generator=generator), torch.randint(0, 4, (NUM,), generator=generator)


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    wide = [nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 40), nn.Dropout(0.2), nn.Linear(40, 40), nn.ReLU()]
    return nn.Sequential(*wide, nn.Linear(40, 4))


def plain(seed: int) -> nn.Module:
    net = mlp(seed)
    net[3] = nn.Identity()
    return net


def loss(net: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y, reduction="none")


def digest(net: nn.Module) -> str:
    """Of every bit of its state."""
    parts = [value.detach().numpy().tobytes() for value in net.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def order(epoch: int) -> torch.Tensor:
    return torch.randperm(NUM, generator=torch.Generator().manual_seed(epoch))


def steps(
    replica: Replica, opt: torch.optim.Optimizer, party: RankContext, first: int, last: int, *, micro_batches: int = 1
) -> None:
    """The steps from `first` to before `last` of epochs of four batches."""
    x, y = data()
    for step in range(first, last):
        batch = order(step // 4)[step % 4 * BATCH :][:BATCH]
        part = Shard.of(len(batch), party.rank, party.world_size)
        mine = batch[part.first : part.last]
        opt.zero_grad()
        cut = mine.chunk(min(micro_batches, len(mine)))
        replica.gradients(loss, [MicroBatch((x[c], y[c]), len(c) if part.num else 0) for c in cut], len(batch))
        opt.step()


def train(
    party: RankContext, num_steps: int, micro_batches: int = 1, build: Callable[[int], nn.Module] = plain
) -> list[float]:
    """All weights after so many steps; ranks begin with different ones."""
    net = build(party.rank)
    replica = Replica(net, party, bucket_mb=SMALL_MB)
    opt = sgd(net)
    steps(replica, opt, party, 0, num_steps, micro_batches=micro_batches)
    return torch.nn.utils.parameters_to_vector(net.parameters()).tolist()


@pytest.mark.parametrize(("world_size", "micro_batches"), [(2, 1), (3, 1), (4, 1), (2, 3), (3, 2)])
def test_ranks_follow_one_process_on_the_same_batches(place: Path, world_size: int, micro_batches: int) -> None:
    alone = torch.tensor(train(RankContext.alone(), 12))
    found = torch.tensor(together(place, world_size, train, 12, micro_batches))
    assert (found == found[0]).all()
    # Twelve steps with uneven last batches: what is left is the rounding of float32 sums in another order.
    torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=2e-6)


def test_one_process_does_what_a_plain_loop_does_bit_for_bit() -> None:
    net = plain(0)
    opt, (x, y) = sgd(net), data()
    for step in range(6):
        batch = order(step // 4)[step % 4 * BATCH :][:BATCH]
        opt.zero_grad()
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        opt.step()
    assert train(RankContext.alone(), 6) == torch.nn.utils.parameters_to_vector(net.parameters()).tolist()


def own_loop(party: RankContext, num_steps: int, stop: int) -> tuple[str, str]:
    """The state after a loop with a backward of its own, undisturbed and wrapped anew after `stop` steps."""
    digests = []
    for stops in ((), (stop,)):
        net = plain(party.rank)
        opt, (x, y) = sgd(net), data()
        model = wrapped(net, party, bucket_mb=SMALL_MB)
        for step in range(num_steps):
            if step in stops:
                model = wrapped(net, party, bucket_mb=SMALL_MB)
            batch = order(step // 3)[step % 3 * BATCH :][:BATCH]
            part = Shard.of(len(batch), party.rank, party.world_size)
            mine = batch[part.first : part.last]
            opt.zero_grad()
            F.cross_entropy(model(x[mine]), y[mine]).backward()
            opt.step()
        digests.append(digest(net))
    return digests[0], digests[1]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_loop_of_one_s_own_trains_as_one_and_goes_on_with_the_same_bits(place: Path, world_size: int) -> None:
    found = together(place, world_size, own_loop, 7, 4)
    assert len({one for pair in found for one in pair}) == 1


def test_alone_a_network_stays_itself() -> None:
    net = plain(0)
    assert wrapped(net, RankContext.alone()) is net


# Resume


def generators(state: torch.Tensor | None = None) -> torch.Tensor:
    if state is not None:
        torch.set_rng_state(state)
    return torch.get_rng_state()


def resumed(party: RankContext, stop: int, num_steps: int) -> tuple[str, str]:
    """The state after `num_steps`, undisturbed and stopped after `stop`, with everything saved and built anew."""
    net = mlp(0)
    opt = sgd(net)
    replica = Replica(net, party, bucket_mb=SMALL_MB)
    torch.manual_seed(party.rank)
    steps(replica, opt, party, 0, stop)
    kept = copy.deepcopy((net.state_dict(), opt.state_dict(), generators()))
    steps(replica, opt, party, stop, num_steps)
    undisturbed = digest(net)
    net = mlp(77)
    opt = sgd(net)
    net.load_state_dict(kept[0])
    opt.load_state_dict(kept[1])
    replica = Replica(net, party, bucket_mb=SMALL_MB)
    generators(kept[2])
    steps(replica, opt, party, stop, num_steps)
    return undisturbed, digest(net)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stop", [1, 6])
def test_a_resume_in_mid_epoch_ends_with_the_bits_of_an_undisturbed_run(
    place: Path, world_size: int, stop: int
) -> None:
    found = together(place, world_size, resumed, stop, 10)
    assert len({one for pair in found for one in pair}) == 1


def layouts(party: RankContext) -> list[list[int]]:
    """The sizes of the buckets before the first step and after it."""
    net = plain(0)
    replica = Replica(net, party, bucket_mb=SMALL_MB)
    assert replica._wrapped is not None
    found = []
    for last in (1, 3):
        steps(replica, sgd(net), party, last - 1, last)
        found.append(replica._wrapped._get_ddp_logging_data()["rebuilt_bucket_sizes"])
    return found


def test_there_are_several_buckets_and_they_stay_as_they_are(place: Path) -> None:
    for first, later in together(place, 2, layouts):
        assert len(first.split(",")) >= 3
        assert first == later


# What a replica leaves alone


class Noisy(nn.Module):
    """Has a buffer that a forward changes, and takes random numbers from everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(20, 4), nn.Linear(20, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return F.dropout(self.used(x), 0.5)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def untouched(party: RankContext) -> bool:
    net = Noisy()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    before = torch.get_rng_state()
    Replica(net, party)
    kept = all(bool((parameter.grad == 2.0).all()) for parameter in net.parameters())
    return kept and bool(net.count == 0) and torch.equal(torch.get_rng_state(), before)


def test_gradients_buffers_and_generators_stay_as_they_were(place: Path) -> None:
    assert together(place, 2, untouched) == [True, True]


def start(party: RankContext) -> tuple[str, list[str]]:
    torch.manual_seed(party.rank)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[1].running_mean += party.rank
    Replica(net, party)
    return digest(net), list(net.state_dict())


def test_rank_0_s_weights_and_buffers_are_everyones_under_the_names_of_one_process(place: Path) -> None:
    found = together(place, 3, start)
    assert len({state for state, _ in found}) == 1
    assert found[0][1][0] == "0.weight"


# Parameters without gradient


def leaves_out(party: RankContext) -> tuple[float, bool, bool]:
    net = Noisy()
    replica = Replica(net, party)
    x, y = data()
    for step in range(3):
        for parameter in net.parameters():
            parameter.grad = None
        replica.gradients(loss, [MicroBatch((x[step::9], y[step::9]), len(x[step::9]))])
    return float(net.count), net.spare.weight.grad is None, bool(net.used.weight.grad.any())


def test_a_parameter_that_the_loss_leaves_out_is_left_out(place: Path) -> None:
    assert together(place, 2, leaves_out) == [(3.0, True, True)] * 2


def drawn(party: RankContext) -> tuple[list[float], list[float]]:
    """What follows from the generator after the first step, with a parameter left out and without one."""
    found = []
    for spare in (True, False):
        net = Noisy()
        if not spare:
            del net.spare
        replica = Replica(net, party)
        torch.manual_seed(3)
        replica.gradients(loss, [MicroBatch(data(), NUM)], 2 * NUM)
        found.append(torch.rand(3).tolist())
    return found[0], found[1]


def test_looking_for_such_parameters_takes_no_random_numbers(place: Path) -> None:
    for with_spare, without in together(place, 2, drawn):
        assert with_spare == without


def sometimes(party: RankContext) -> None:
    net = Noisy()
    replica = Replica(net, party)

    def all_used(net: nn.Module, batch: Any) -> torch.Tensor:
        return loss(net, batch) + loss(net.spare, batch)

    replica.gradients(all_used, [MicroBatch(data(), NUM)], 2 * NUM)
    net.zero_grad()
    replica.gradients(loss, [MicroBatch(data(), NUM)], 2 * NUM)


def test_a_parameter_that_loses_its_gradient_later_is_named(place: Path) -> None:
    for rank, text in enumerate(together(place, 2, sometimes)):
        assert text.startswith(f"{NoGradient.__name__}: the loss gave spare.weight no gradient on rank {rank}, though")


def by_other_names(party: RankContext) -> bool:
    net = Noisy()
    del net.spare
    replica = Replica(net, party)
    x, _ = data()
    replica.gradients(lambda net, batch: net.encode(batch).sum(1), [MicroBatch(x + party.rank, NUM)], 2 * NUM)
    return torch.allclose(net.used.weight.grad[0], (x + 0.5).mean(0), atol=1e-6)


def test_a_loss_may_use_any_method_of_the_network(place: Path) -> None:
    assert together(place, 2, by_other_names) == [True, True]


def thawed(party: RankContext) -> list[float]:
    net = plain(0)
    replica, opt = Replica(net, party, bucket_mb=SMALL_MB), sgd(net)
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    steps(replica, opt, party, 0, 3)
    for parameter in net[0].parameters():
        parameter.requires_grad_(True)
    steps(replica, opt, party, 3, 6)
    return torch.nn.utils.parameters_to_vector(net.parameters()).tolist()


def test_parameters_may_be_frozen_and_released_on_the_way(place: Path) -> None:
    found = torch.tensor(together(place, 3, thawed))
    assert (found == found[0]).all()
    torch.testing.assert_close(found[0], torch.tensor(thawed(RankContext.alone())), rtol=1e-4, atol=2e-6)


def sparse(party: RankContext) -> None:
    Replica(nn.Sequential(nn.Embedding(3, 2, sparse=True)), party)


def test_sparse_gradients_are_refused_by_name(place: Path) -> None:
    assert (
        together(place, 2, sparse)
        == ["NoGradient: 0.weight has sparse gradients, which several ranks don't sum: make it sparse=False"] * 2
    )


# Parts


@given(num=st.integers(1, 200), world_size=st.integers(1, 20))
def test_parts_are_contiguous_even_and_whole(num: int, world_size: int) -> None:
    parts = [Shard.of(num, rank, world_size) for rank in range(world_size)]
    dealt = [index for part in parts if part.num for index in range(part.first, part.last)]
    assert dealt == list(range(num))
    assert max(part.num for part in parts) - min(part.num for part in parts) <= 1
    assert all(0 <= part.first < part.last <= num for part in parts)
