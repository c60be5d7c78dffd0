"""A network that several ranks train as one: each works on its part of every batch, the gradients are those of all.

    replica = Replica(net, party)                        rank 0's weights and buffers are everyone's from here on
    part = Part.of(num, party.rank, party.world_size)    this rank's samples of a batch of `num`
    replica.gradients(loss, [MicroBatch(batch, part.num)], num)
    opt.step()

    net = wrapped(net, party)                            for a loop of one's own, with a backward of its own

`loss(net, batch)` gives per-sample values. What backward leaves in the parameters is the gradient of their mean over
the whole batch, on every rank the same bits, however unevenly the samples are dealt. One process alone does the same
with the same calls, and pays nothing for it.

The work is PyTorch's DistributedDataParallel (Li et al. 2020, PyTorch Distributed, VLDB 13). It sums gradients in
buckets, whose layout it chooses after the first backward by the order in which gradients came; three or more ranks sum
in another order in another layout, so a run that resumes would end with other bits. Here it chooses by two backwards of
nothing, before the first step and again after a resume, in which the order depends on the parameters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from orchestrator.distributed.rendezvous import RankContext
from orchestrator.errors import OrcError
from orchestrator.training.isolated import Generators

__all__ = ["Loss", "MicroBatch", "NoGradient", "Replica", "Scale", "Shard", "wrapped"]

Loss: TypeAlias = "Callable[[torch.nn.Module, object], torch.Tensor]"
"""Per-sample values, the samples along the first dimension."""
Scale: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


class NoGradient(OrcError):
    """A parameter is in training, and the loss gives it no gradient, or none that ranks can sum; names it."""


class Shard(NamedTuple):
    """One rank's samples of a batch, from `first` to before `last`.

    A rank for which none are left works on the first sample, which counts nothing there: it must take part in what the
    ranks do together, and not every network takes an empty batch.
    """

    first: int
    last: int
    num: int
    """How many of them count: all, or none."""

    @classmethod
    def of(cls, num_samples: int, rank: int, world_size: int) -> Shard:
        """Parts are contiguous and in the order of ranks; none is larger than another by more than one sample.

        Args:
            num_samples: in the batch; at least one.
            rank: whose part.
            world_size: among how many they are dealt.
        """
        each, more = divmod(num_samples, world_size)
        first = rank * each + min(rank, more)
        num = each + (rank < more)
        return cls(first, first + num, num) if num else cls(0, 1, 0)


class MicroBatch(NamedTuple):
    """Samples that pass through the network at once.

    Args:
        batch: what the loss takes.
        num: how many samples of it count: all, or none.
    """

    batch: object
    num: int


class Replica:
    """One rank's copy of a network.

    The job goes on using the network itself: nothing is wrapped around it that the job sees, and its state has the same
    names with any number of ranks.

    Args:
        net: on its device, built; its weights and buffers become rank 0's.
        party: the ranks.
        bucket_mb: how much of the gradients is summed at once, in MiB; None for PyTorch's choice. It decides last bits.

    Raises:
        NoGradient: a parameter's gradient is sparse, which several ranks don't sum.
    """

    def __init__(self, net: torch.nn.Module, party: RankContext, *, bucket_mb: float | None = None) -> None:
        self.net = net
        self._group = party.group
        self._main = party.main
        self._bucket_mb = bucket_mb
        self._parameters = list(net.named_parameters())
        self._trained: list[bool] = []
        self._wrapped: DistributedDataParallel | None = None
        self._has_begun = False
        self._is_timed = False
        self.waited_s = 0.0
        """How long backwards have waited for other ranks with nothing left to do, once `time_waits` was called."""
        if party.world_size > 1:
            _refuse_sparse(net)
            self._wrap(first=True)

    # Steps

    def gradients(
        self,
        loss: Loss,
        micro_batches: Sequence[MicroBatch],
        num_samples: int | None = None,
        *,
        scale: Scale | None = None,
    ) -> list[torch.Tensor]:
        """Add the gradient of the batch's mean loss to the parameters' gradients; every rank must call this.

        Args:
            loss: gives per-sample values; it gets the network itself, and may use any part of it.
            micro_batches: this rank's part, in as many as the memory needs; only the last waits for others.
            num_samples: of the batch, on all ranks together; None has the ranks ask each other, which costs time.
            scale: applied to what the backward begins with, such as `torch.amp.GradScaler.scale`.

        Returns:
            What `loss` gave for each micro_batch, detached.

        Raises:
            NoGradient: a parameter got no gradient, though it did in the first step.
        """
        if self._main is not None:
            self._look_at_parameters()
        if num_samples is None:
            num_samples = self._num_samples(micro_batches)
        *others, last = micro_batches
        found = [self._apart(loss, micro_batch, num_samples, scale) for micro_batch in others]
        found.append(self._backward(loss, last, num_samples, scale))
        if self._main is not None:
            self._check_all_came()
        if self._is_timed:
            self.waited_s += self._last_wait_s()
        return found

    def _num_samples(self, micro_batches: Sequence[MicroBatch]) -> int:
        own = torch.tensor([sum(micro_batch.num for micro_batch in micro_batches)], device="cpu")
        return sum(int(num) for num in self._group.all_gather(own))

    def _apart(self, loss: Loss, micro_batch: MicroBatch, num_samples: int, scale: Scale | None) -> torch.Tensor:
        if self._wrapped is None:
            return self._backward(loss, micro_batch, num_samples, scale)
        with self._wrapped.no_sync():
            return self._backward(loss, micro_batch, num_samples, scale)

    def _backward(self, loss: Loss, micro_batch: MicroBatch, num_samples: int, scale: Scale | None) -> torch.Tensor:
        values = self._forward(loss, micro_batch.batch)
        # The ranks' gradients are averaged, so each gives its part of the mean times their number. One division: alone,
        # it is what backward() of the mean would pass on, bit for bit, without putting the mean into the graph.
        weight = self._group.world_size * micro_batch.num / (num_samples * values.numel()) if micro_batch.num else 0.0
        start = torch.full_like(values, weight)
        values.backward(start if scale is None else scale(start))  # type: ignore[no-untyped-call]  # torch's gap
        return values.detach()

    def _forward(self, loss: Loss, batch: object) -> torch.Tensor:
        if self._wrapped is None:
            return loss(self.net, batch)
        if self._has_begun:
            return cast(torch.Tensor, self._wrapped(loss, self.net, batch))
        return self._first_forward(loss, batch)

    # Time

    def time_waits(self) -> None:
        """From here on count, in `waited_s`, by PyTorch's own clocks: on a GPU by its events, which costs some time."""
        self._is_timed = True
        if self._wrapped is not None:
            self._wrapped._set_ddp_runtime_logging_sample_rate(1)  # type: ignore[no-untyped-call]  # torch's gap

    def _last_wait_s(self) -> float:
        """Of the backward before the last one, since clocks are read when the next forward begins."""
        if self._wrapped is None:
            return 0.0
        found = self._wrapped._get_ddp_logging_data()  # type: ignore[no-untyped-call]  # torch's gap
        taken, beside = (int(found.get(f"backward_{name}_time", 0)) for name in ("comm", "compute_comm_overlap"))
        return max(0, taken - beside) / 1e9

    # Parameters without gradients

    def _first_forward(self, loss: Loss, batch: object) -> torch.Tensor:
        """As any other, but that it may be done twice: on some rank the loss may leave out a parameter."""
        assert self._wrapped is not None
        before = _Untrained(self.net)
        values = cast(torch.Tensor, self._wrapped(loss, self.net, batch))
        self._has_begun = True
        in_training = {id(parameter) for _, parameter in self._parameters if parameter.requires_grad}
        if not self._any(not in_training <= _reached(values)):
            return values
        before.put_back()
        self._wrap(first=False, some_unused=True)
        return cast(torch.Tensor, self._wrapped(loss, self.net, batch))

    def _any(self, flag: bool) -> bool:
        return any(bool(one) for one in self._group.all_gather(torch.tensor([int(flag)], device="cpu")))

    def _check_all_came(self) -> None:
        assert self._wrapped is not None
        if self._wrapped.find_unused_parameters:
            return
        for name, parameter in self._parameters:
            if parameter.grad is None and parameter.requires_grad:
                raise NoGradient(
                    f"the loss gave {name} no gradient on rank {self._group.rank}, though it did in the first step; "
                    "with several ranks, use every parameter in the first step's loss or in each, or freeze it with "
                    "requires_grad_(False)"
                )

    def _look_at_parameters(self) -> None:
        """A job may freeze and release parameters between steps, on all ranks alike."""
        if [parameter.requires_grad for _, parameter in self._parameters] != self._trained:
            self._wrap(first=False)

    # Wrapping

    def _wrap(self, *, first: bool, some_unused: bool = False) -> None:
        self._wrapped = None  # before there is a new one: both would listen to the parameters
        self._has_begun = some_unused
        self._trained = [parameter.requires_grad for _, parameter in self._parameters]
        self._wrapped = DistributedDataParallel(
            _Whole(self.net),
            process_group=self._main,
            init_sync=first,
            bucket_cap_mb=self._bucket_mb,
            find_unused_parameters=some_unused,
        )
        if self._is_timed:
            self.time_waits()
        if not some_unused:  # else the layout stays as it is
            _settle(self._wrapped, self.net, _roots)


def wrapped(net: torch.nn.Module, party: RankContext, *, bucket_mb: float | None = None) -> torch.nn.Module:
    """The network for a loop of the job's own: called as it is, its backward leaves the ranks' mean gradient.

    Every rank must call this; alone, it is the network itself. A loss that leaves out a parameter ends in an error.

    Args:
        net: on its device; its weights and buffers become rank 0's.
        party: the ranks.
        bucket_mb: as for `Replica`.

    Raises:
        NoGradient: a parameter's gradient is sparse.
    """
    if party.world_size == 1:
        return net
    _refuse_sparse(net)
    found = DistributedDataParallel(net, process_group=party.main, bucket_cap_mb=bucket_mb)
    # What is called for the time being is not the network, but has its parameters.
    net.forward = _roots  # of this object alone
    try:
        _settle(found, net)
    finally:
        del net.forward
    return found


def _settle(wrapped: torch.nn.Module, net: torch.nn.Module, *ask: Callable[..., list[torch.Tensor]]) -> None:
    """Two backwards of nothing, in which gradients come in the reverse of the parameters' order."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    kept = [parameter.grad for parameter in trained]
    for _ in range(2):
        for parameter in trained:
            parameter.grad = None
        with torch.enable_grad():
            roots = wrapped(*ask, trained)
        torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])
    for parameter, grad in zip(trained, kept, strict=True):
        parameter.grad = grad


class _Whole(torch.nn.Module):
    """A network and what is asked of it as one forward, so that the loss may use the network as it likes."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ask: Callable[..., object], *of: object) -> object:
        return ask(*of)


def _roots(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.expand_as(parameter) for parameter in parameters]


def _refuse_sparse(net: torch.nn.Module) -> None:
    for name, module in net.named_modules():
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.sparse:
            raise NoGradient(f"{name}.weight has sparse gradients, which several ranks don't sum: make it sparse=False")


def _reached(values: torch.Tensor) -> set[int]:
    """The parameters, by id, to which a backward from `values` brings a gradient."""
    found, seen, ahead = set(), set(), [values.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        ahead += [above for above, _ in node.next_functions]
    return found


class _Untrained:
    """What a forward may change: buffers and the generators of random numbers, as they were."""

    def __init__(self, net: torch.nn.Module) -> None:
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in net.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._generators = Generators()

    @torch.no_grad()
    def put_back(self) -> None:
        for module, name, buffer, copy in self._buffers:
            buffer.copy_(copy)
            module._buffers[name] = buffer
        self._generators.put_back()
