"""What a trial's ranks do together: a part of each batch each, the gradients of all, one answer to what is reported.

team = TrialRanks(party, seed)                            None, where one process trains alone
for batch in team.batches(samples, order, ...):     this rank's part of every batch
    mean = team.gradients(net, loss, batch)
    opt.step()
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Mapping

import torch
import torch.distributed as dist

from orchestrator.distributed.rendezvous import RankContext
from orchestrator.training.data import dataset
from orchestrator.training.data.dataset import Batch, Samples
from orchestrator.training.data_parallel import Loss, MicroBatch, Replica, Scale, Shard, wrapped

__all__ = ["TrialRanks", "cut"]


class TrialRanks:
    """The ranks of one trial, as one of them takes part.

    Args:
        party: the ranks, more than one.
        stream: gives a seed for one purpose of the trial.
    """

    def __init__(self, party: RankContext, stream: Callable[[str], int]) -> None:
        self._party = party
        self._stream = stream
        self._replica: Replica | None = None
        self._share: tuple[int, int] | None = None
        self._is_apart = False
        self._is_timed = False

    def part_ways(self) -> None:
        """From here on each rank draws random numbers of its own; the first draws what one process would.

        Until the first loop all draw the same, since they must build the same, and split the same data in the same way.
        """
        rank, was_apart, self._is_apart = self._party.rank, self._is_apart, True
        if was_apart or rank == 0:
            return
        torch.manual_seed(self._stream(f"train/{rank}"))
        random.seed(self._stream(f"python/{rank}"))
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(self._stream(f"numpy/{rank}") % 2**32)

    def batches(
        self,
        samples: Samples,
        order: torch.Tensor | None,
        batch_size: int,
        num: int,
        device: torch.device,
        begin: int = 0,
    ) -> Generator[Batch, None, None]:
        """The part of every batch that is this rank's; the arguments are those of `data.batches`.

        A rank for which no sample of a batch is left is given the batch's first one, which `gradients` doesn't count.
        """
        order = torch.arange(num, device="cpu") if order is None else order
        whole = num // batch_size
        begun = order[: whole * batch_size].view(whole, batch_size)
        try:
            yield from self._parts(samples, begun, device, begin)
            if num % batch_size:
                yield from self._parts(samples, order[None, whole * batch_size :], device, max(0, begin - whole))
        finally:
            self._share = None

    def _parts(
        self, samples: Samples, rows: torch.Tensor, device: torch.device, begin: int
    ) -> Generator[Batch, None, None]:
        """Of batches of one size, a row of sample indices each."""
        part = Shard.of(rows.shape[1], self._party.rank, self._party.world_size)
        mine = rows[:, part.first : part.last].reshape(-1)
        for batch in dataset.batches(samples, mine, part.last - part.first, len(mine), device, begin):
            self._share = part.num, rows.shape[1]
            yield batch

    def gradients(
        self, net: torch.nn.Module, loss: Loss, batch: Batch, *, micro_batches: int = 1, scale: Scale | None = None
    ) -> torch.Tensor:
        """Give the parameters the gradient of the whole batch's mean loss; returns this rank's own mean, shape ().

        Within a loop over `batches` it is known how many samples the others have; elsewhere the ranks ask each other.

        Args:
            net: the network.
            loss: per-sample values.
            batch: this rank's part.
            micro_batches: in how many parts it passes through the network; only the last waits for other ranks.
            scale: as for `Replica.gradients`.

        Raises:
            TypeError: the batch can't be cut into micro-batches.
            ValueError: `micro_batches` is not positive.
        """
        if self._replica is None or self._replica.net is not net:
            self._replica = Replica(net, self._party)
            if self._is_timed:
                self._replica.time_waits()
        num, total = self._share or (dataset.length(batch), None)
        found = self._replica.gradients(loss, cut(batch, num, micro_batches), total, scale=scale)
        return found[0].mean() if len(found) == 1 else torch.cat(found).mean()

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self._party.world_size

    @property
    def share(self) -> tuple[int, int] | None:
        """Of the batch that was given last: how many samples of it are this rank's, and how many it has in all."""
        return self._share

    def time_waits(self) -> None:
        """From here on count how long backwards wait for other ranks; see `Replica.time_waits`."""
        self._is_timed = True
        if self._replica is not None:
            self._replica.time_waits()

    @property
    def waited_s(self) -> float:
        """How long they have, in seconds."""
        return 0.0 if self._replica is None else self._replica.waited_s

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of what each rank has, the same bits on all; for what is large, over the gradients' way."""
        found = tensor.clone()
        dist.all_reduce(found, group=self._party.main)
        return found

    def wrapped(self, net: torch.nn.Module) -> torch.nn.Module:
        """The network for a loop of the job's own; see `replica.wrapped`."""
        return wrapped(net, self._party)

    def agreed(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The first rank's numbers, on every rank: what they decide must not differ."""
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device="cpu")
        self._party.group.broadcast([values])
        return dict(zip(numbers, values.tolist(), strict=True))


def cut(batch: Batch, num: int, micro_batches: int) -> list[MicroBatch]:
    """A batch of which `num` samples count, in micro-batches as even as can be.

    Raises:
        TypeError: it can't be cut.
        ValueError: `micro_batches` is not positive.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches is in how many parts a batch is taken, at least 1, not {micro_batches}")
    if micro_batches == 1 or num < 2:
        return [MicroBatch(batch, num)]
    parts = [Shard.of(num, number, min(micro_batches, num)) for number in range(min(micro_batches, num))]
    return [MicroBatch(dataset.part(batch, one.first, one.last), one.num) for one in parts]
