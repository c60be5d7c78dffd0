"""Trials of one architecture that train together as one, each as it would alone.

    pack = PackedTrial([Member(...), Member(...)], metric=spec.metric, device=device)
    train(pack, **for_train)                            the job, as it is for a single trial
    results = pack.results(bar)                         each member's

A pack has the face of a `Trial`. Networks are built one by one, each by its own parameters and seed, and then stacked;
`losses` is computed for all members at once by torch.func.vmap. Each has its own order of the data, its own optimizer
and its own outcome. A member that ends early goes on in the arithmetic, which costs nothing, but not in its record.

The last bits of a member differ from those that it would have alone, and may depend on how many members there are and
on its place among them. On who the others are they do not depend, and a pack gives the same bits each time; but a
network that draws random numbers, as dropout does, draws them for the whole pack.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn, cast

import torch

from orchestrator.config.spec import Metric
from orchestrator.core.atomic import JsonObject
from orchestrator.results.objective import Diverged
from orchestrator.stats.summary import Summary
from orchestrator.training.checkpoint.files import Checkpoint
from orchestrator.training.checkpoint.manager import CheckpointManager
from orchestrator.training.checkpoint.serialization import Tree
from orchestrator.training.data import dataset
from orchestrator.training.data.loading import Augment
from orchestrator.training.data.sampling import Order, Weights
from orchestrator.training.metrics import Derived
from orchestrator.training.packing.members import Each, PerMember, Stacked, Unlike, Unpackable, of_member
from orchestrator.training.packing.optimizers import PackedOptimizer
from orchestrator.training.packing.stack import Stack, are_alike
from orchestrator.training.precision import Losses
from orchestrator.training.resume import Loop
from orchestrator.training.trial import Reported, Result, State, Trial, derive, stream

__all__ = ["Member", "PackedTrial", "seed_of"]

_VALIDATION_BATCH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A trial of a pack.

    Args:
        index: in the plan.
        params: its parameters.
        seed: its own seed.
        emit: takes its reports.
        build_params: those of `params` that `build` takes; None for all of them.
    """

    index: int
    params: JsonObject
    seed: int
    emit: Callable[[JsonObject], None]
    build_params: JsonObject | None = None


class _Own(Trial):
    """A member as it builds, reports and ends: a trial whose network lies in the stack."""

    is_over = False

    @property
    def value(self) -> float | None:
        """Its objective, as it counts so far."""
        return self._objective.value

    def end(self) -> None:
        """It takes part no more: of what it is now nothing changes."""
        self.is_over = True
        self._best_weights = self._best_weights or self._weights(copy=True)

    def to_tree(self) -> JsonObject:
        """What a checkpoint keeps of it beside its part of the stack."""
        return cast(
            JsonObject,
            {
                "index": self.index,
                "objective": self._objective.to_tree(),
                "best": self._best_weights,
                "reports": self._num_reports,
                "over": self.is_over,
            },
        )

    def take_tree(self, tree: Mapping[str, object]) -> None:
        """Go on from what `to_tree` gave."""
        self._objective.take_tree(cast(JsonObject, tree["objective"]))
        self._best_weights = cast("dict[str, torch.Tensor] | None", tree["best"])
        self._num_reports, self.is_over = cast(int, tree["reports"]), cast(bool, tree["over"])


class PackedTrial(Trial):
    """Several trials in training as one.

    Args:
        members: the trials, by place in the pack.
        metric: the objective.
        attempt: how often they were started before.
        device: where they train; the first CUDA device if there is one, else the CPU.
        asked_to_stop: whether a notice has arrived.
        keeper: keeps the state of all.
        found: the state in which they go on; None to begin.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        metric: Metric,
        attempt: int = 0,
        device: torch.device | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
        keeper: CheckpointManager | None = None,
        found: Checkpoint | None = None,
    ) -> None:
        if not members:
            raise ValueError("a pack needs at least 1 member, found none")
        super().__init__(
            index=members[0].index,
            params=_common([one.params for one in members]),
            seed=seed_of(one.seed for one in members),
            metric=metric,
            emit=lambda report: None,
            attempt=attempt,
            device=device,
            asked_to_stop=asked_to_stop,
            keeper=keeper,
            found=found,
        )
        self.members = tuple(
            _Own(
                index=one.index,
                params=one.params,
                seed=one.seed,
                metric=metric,
                emit=one.emit,
                build_params=one.build_params,
                attempt=attempt,
                device=self.device,
            )
            for one in members
        )

    # What can't be had for all at once

    @property
    def seed(self) -> int:
        """Of a pack there is none."""
        raise Unpackable("the job uses trial.seed, and the trials of a pack have one each")

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = seed

    @property
    def index(self) -> int:
        """Of a pack there is none."""
        raise Unpackable("the job uses trial.index, and the trials of a pack have one each")

    @index.setter
    def index(self, index: int) -> None:
        self._index = index

    def prepare(self, **parts: object) -> NoReturn:
        """A network that the job makes itself can't be stacked."""
        raise Unpackable("the job makes its network itself, by trial.prepare, and a pack needs trial.build(build)")

    def watch(self, **wanted: object) -> NoReturn:
        """What is watched would be the pack's, and no trial's."""
        raise Unpackable("the job calls trial.watch, which looks at one network at a time")

    def result(self, bar: float | None) -> NoReturn:
        """See `results`."""
        raise Unpackable("a pack has a result for each member")

    # State

    def build(self, build: Callable[..., State], *, precision: str = "float32") -> State:
        """As for a trial, once for each member; their networks are stacked, and their optimizers step together.

        Raises:
            TypeError: `build` doesn't return `orc.State`, or doesn't fit the parameters.
            Unpackable: what it has built differs by more than the values of parameters and buffers, or its optimizer is
                none that a pack can have.
        """
        if precision != "float32":
            # Within torch.func.vmap, torch.autocast has no effect.
            raise Unpackable(f"the job asks for precision {precision!r}, and a pack computes in that of its networks")
        states = [self._built(one, build) for one in self.members]
        try:
            net, opt, others = _together(states)
        except Unpackable as error:
            groups = _groups(states)
            raise error if len(groups) == 1 else Unlike(error.reason, groups) from None
        _seed(self._seed)
        torch.manual_seed(stream(self._seed, "train"))
        # It steps and is saved as an optimizer is, but knows no closures and the like.
        self.state = State(net=net, opt=cast(torch.optim.Optimizer, opt), **others)
        return self.state

    @staticmethod
    def _built(member: _Own, build: Callable[..., State]) -> State:
        _seed(member.seed)
        return member.build(build)

    @property
    def _stack(self) -> Stack:
        return cast(Stack, self._state().net)

    # Training

    def batches(
        self,
        samples: object,
        batch_size: int = 64,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        weights: Weights | None = None,
        replacement: bool = True,
        num: int | None = None,
        augment: Augment | None = None,
        keyed: bool = False,
        num_workers: int = 0,
    ) -> Iterator[dataset.Batch]:
        """As for a trial: each member's batches in its own order, for `step` alone. Without an order all share them.

        Raises:
            Unpackable: the samples are no tensors, or are to be prepared one by one.
            ValueError: the weights don't fit the samples, or not to what else is given.
        """
        tensors = _in_memory(samples)
        if augment is not None or keyed or num_workers:
            raise Unpackable(
                "trial.batches was given augment, keyed or num_workers, and a pack takes its samples as they are"
            )
        size = dataset.num_samples(tensors)
        order = Order.of(size, shuffle=shuffle, weights=weights, replacement=replacement, num=num)
        num_kept = order.num - order.num % batch_size if drop_last else order.num
        whole = self._keeper is not None and self._keeper.only_epochs
        loop = self._course.begin(opens=False, is_own=not whole)

        def source(first: int) -> Generator[dataset.Batch, None, None]:
            seeds = [stream(one.seed, f"order/{self.epoch}") for one in self.members]
            orders = [found for seed in seeds if (found := order.indices(seed)) is not None]
            if not orders:
                return dataset.batches(tensors, None, batch_size, num_kept, self.device, first)
            return self._stacked(tensors, torch.stack(orders)[:, :num_kept], batch_size, first)

        return self._each_batch(loop, source, -(-num_kept // batch_size))

    def _stacked(
        self, tensors: Sequence[torch.Tensor], orders: torch.Tensor, batch_size: int, begin: int
    ) -> Generator[Stacked, None, None]:
        """Batches by each member's order, shape (members, samples), from the one at `begin` on."""
        members, num = orders.shape
        for first in range(begin * batch_size, num, batch_size):
            mine = orders[:, first : first + batch_size].reshape(-1)
            taken = [part.index_select(0, mine.to(part.device)).to(self.device) for part in tensors]
            yield Stacked(tuple(part.view(members, -1, *part.shape[1:]) for part in taken))

    def step(
        self, losses: Losses, batch: dataset.Batch, *, micro_batches: int = 1, clip_norm: float | None = None
    ) -> torch.Tensor:
        """As for a trial, of each member; returns each one's mean, detached, as a `PerMember`."""
        if micro_batches < 1:
            raise ValueError(f"micro_batches is in how many parts a batch is taken, at least 1, not {micro_batches}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm is the largest norm of the gradients, a positive number, not {clip_norm}")
        stack, opt = self._stack, self.opt
        if not stack.training:
            stack.train()
        for slot in stack.slots:
            slot.stack.grad = None
        taken = [self._gradients(losses, part, share) for part, share in _cut(batch, micro_batches)]
        if clip_norm is not None:
            _clip([slot.stack.grad for slot in stack.slots if slot.stack.grad is not None], clip_norm)
        opt.step()
        self.num_steps += 1
        if (schedule := self._state().each_step) is not None:
            schedule.step()
        return PerMember.of(taken[0] if len(taken) == 1 else torch.stack(taken).sum(dim=0))

    def _gradients(self, losses: Losses, batch: dataset.Batch, share: float) -> torch.Tensor:
        """Add the gradients of a part of the batch; returns its part of each member's mean."""
        found = self._values(losses, batch)
        if "loss" not in found:
            raise KeyError(f'losses must give "loss", the values that are trained on; it gave {", ".join(found)}')
        loss = _weighted(found["loss"], found.get("weight"))
        loss.backward(torch.full_like(loss, share * len(loss) / loss.numel()))  # type: ignore[no-untyped-call]  # torch's gap
        return loss.detach().reshape(len(loss), -1).mean(dim=1).mul_(share)

    def _values(self, losses: Losses, batch: dataset.Batch) -> dict[str, torch.Tensor]:
        def named(net: torch.nn.Module, batch: dataset.Batch) -> Mapping[str, torch.Tensor]:
            values = losses(net, batch)
            return {"loss": values} if isinstance(values, torch.Tensor) else values

        return self._stack(named, batch)  # type: ignore[no-any-return]  # a module's call is untyped

    # Validation and reports

    @torch.no_grad()
    def validate(  # type: ignore[override]  # a number for each member
        self,
        losses: Losses,
        samples: object,
        *,
        batch_size: int = _VALIDATION_BATCH,
        prefix: str = "val_",
        derived: Mapping[str, Derived] | None = None,
    ) -> dict[str, PerMember]:
        """As for a trial, of each member: the exact mean over all samples of every value that `losses` gives.

        Raises:
            ValueError: there is no sample, or `losses` gives other than one value a sample; or something is derived
                under a name that `losses` gives.
        """
        if self._course.is_under_way:
            return self._answered()
        num = dataset.num_samples(samples)  # type: ignore[arg-type]  # it checks what it is given
        if not num:
            raise ValueError("there is nothing to validate: expected at least 1 sample, found a data set of 0")
        values = self._evaluated_by_member(losses, dataset.dealt(samples, batch_size, num, self.device, 0, 1))  # type: ignore[arg-type]
        found = {name: torch.cat(parts, dim=1) for name, parts in values.items()}
        for name, value in found.items():
            if value.shape[1] != num:
                raise ValueError(
                    f"{prefix}{name}: losses must give one value a sample: expected {num}, found {value.shape[1]}"
                )
        weight = found.pop("weight", None)
        if weight is not None:
            # Beside each value its weight; of float32 and the like this is exact.
            found = {name: torch.stack((value.double(), weight.double())) for name, value in found.items()}
        self._validated.update({prefix + name: value for name, value in found.items()})
        reported = {name: _by_member(value) for name, value in found.items() if not name.startswith("_")}
        further = self._derived(found, derived) if derived else {}
        return self.report_all({prefix + name: value for name, value in (reported | further).items()})  # type: ignore[misc]

    def _derived(self, found: Mapping[str, torch.Tensor], metrics: Mapping[str, Derived]) -> dict[str, Each]:
        """What `metrics` give for each member; NaN for one that has ended."""
        summaries = {name: _summaries(value) for name, value in found.items()}
        rows = [
            dict.fromkeys(metrics, math.nan)
            if member.is_over
            else derive({name: of[number] for name, of in summaries.items()}, metrics)
            for number, member in enumerate(self.members)
        ]
        return {name: Each([row[name] for row in rows]) for name in metrics}

    def _evaluated_by_member(self, losses: Losses, batches: Iterator[dataset.Batch]) -> dict[str, list[torch.Tensor]]:
        """Per-sample values by name, shape (members, batch) each, in the order of the batches."""
        net = self._stack.template
        training = [module for module in net.modules() if module.training]
        net.eval()
        values: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            for name, found in self._values(losses, batch).items():
                values.setdefault(name, []).append(found.reshape(len(self.members), -1))
        for module in training:  # one by one: what the job itself has set to eval stays so
            module.training = True
        return values

    @property
    def summaries(self) -> Mapping[str, Each]:  # type: ignore[override]  # a Summary for each member
        """The Summary of each member behind each mean that `validate` has reported, the last of each name."""
        validated = cast("dict[str, torch.Tensor]", self._validated)
        return {name: Each(_summaries(value)) for name, value in validated.items()}

    def report_all(  # type: ignore[override]  # a number for each member
        self, metrics: Mapping[str, Reported], *, step: int | None = None
    ) -> dict[str, PerMember]:
        """As for a trial, of each member: of what is one value a member its own, and of all else the same.

        A member whose objective is NaN or infinite ends here, as diverged, and the others go on.

        Returns:
            The numbers; NaN for a member that has ended.

        Raises:
            Diverged: no member is left.
        """
        if self._course.is_under_way:
            return self._answered()
        at = int(step) if step is not None else self.num_steps or self._num_reports
        self._num_reports += 1
        found = torch.full((len(metrics), len(self.members)), torch.nan, dtype=torch.float64, device="cpu")
        for number, member in enumerate(self.members):
            if not member.is_over:
                own = {name: of_member(value, number) for name, value in metrics.items()}
                found[:, number] = self._reported(member, cast("dict[str, Reported]", own), at)
        answers = dict(zip(metrics, found, strict=True))
        self._course.note(answers)
        self._go_on()
        return {name: PerMember.of(one) for name, one in answers.items()}

    @staticmethod
    def _reported(member: _Own, metrics: dict[str, Reported], step: int) -> torch.Tensor:
        try:
            found = member.report_all(metrics, step=step)
        except Diverged:
            member.is_over = True
            return torch.full((len(metrics),), torch.nan, dtype=torch.float64, device="cpu")
        return torch.tensor(list(found.values()), dtype=torch.float64, device="cpu")

    def _answered(self) -> dict[str, PerMember]:  # type: ignore[override]  # a number for each member
        answers = cast("dict[str, torch.Tensor]", super()._answered())
        return {name: PerMember.of(one) for name, one in answers.items()}

    def stop(self, member: int) -> None:
        """End a member early, with what it has come to; the others go on.

        Args:
            member: its place in the pack.

        Raises:
            Diverged: no member is left.
        """
        self.members[member].end()
        self._go_on()

    def _go_on(self) -> None:
        if all(member.is_over for member in self.members):
            raise Diverged("every trial of the pack has ended")

    # Safe points

    def _progress(self, loop: Loop) -> Tree:
        progress = cast("dict[str, Tree]", super()._progress(loop))
        return {**progress, "members": [member.to_tree() for member in self.members]}

    def _take(self, progress: dict[str, object]) -> None:
        super()._take(progress)
        for member, saved in zip(self.members, cast("list[Mapping[str, object]]", progress["members"]), strict=True):
            member.take_tree(saved)

    # Outcome

    def results(self, bar: float | None) -> list[Result]:
        """What each member came to, after the job has returned or raised `Diverged`.

        Args:
            bar: as for `Trial.result`.

        Raises:
            NoResult: the objective was never reported; the text says what was.
            Interrupted: the job has ended before it came back to where it was to go on.
        """
        self.check_end()
        return [member.result(bar) for member in self.members]

    def check_end(self) -> None:
        """Look whether the job may have ended.

        Raises:
            Interrupted: it has ended before it came back to where it was to go on.
        """
        if self._course.is_under_way:
            super().result(None)

    def bar(self, bar: float | None, top: int, among: Iterable[int]) -> float | None:
        """The value that a member must at least equal to be one of the `top` best of those `among`, and to reach `bar`.

        Args:
            bar: None if there is none.
            top: how many rank.
            among: indices of members.
        """
        sign = 1.0 if self._metric.goal == "minimize" else -1.0
        of = set(among)
        values = [member.value for member in self.members if member.index in of]
        ranked = sorted(sign * value for value in values if value is not None and math.isfinite(value))
        bars = [*ranked[top - 1 : top], *([] if bar is None else [sign * bar])]
        return sign * min(bars) if bars else None


def seed_of(seeds: Iterable[int]) -> int:
    """What a pack draws for all of its members together is seeded by this: 63 bit of the sha256 of their seeds."""
    digest = hashlib.sha256("/".join(map(str, seeds)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _together(states: Sequence[State]) -> tuple[Stack, PackedOptimizer, dict[str, Any]]:
    """What the members have built, as one.

    Raises:
        Unpackable: that can't be.
    """
    names = list(states[0].others)
    if any(list(state.others) != names for state in states):
        raise Unpackable("the trials of one pack must give orc.State the same names")
    net = Stack([state.net for state in states])
    opt = PackedOptimizer.of([state.opt for state in states], net.slots)
    return net, opt, {name: Each([state.others[name] for state in states]) for name in names}


def _groups(states: Sequence[State]) -> list[list[int]]:
    """Places of members that have built alike, the groups in the order of their first."""
    groups: list[list[int]] = []
    for place, state in enumerate(states):
        found = next((group for group in groups if _are_alike(states[group[0]], state)), None)
        if found is None:
            groups.append([place])
        else:
            found.append(place)
    return groups


def _are_alike(one: State, other: State) -> bool:
    is_opt_alike = PackedOptimizer.are_alike(one.opt, other.opt)
    return is_opt_alike and list(one.others) == list(other.others) and are_alike(one.net, other.net)


def _seed(seed: int) -> None:
    """Seed the generators that `build` may draw from and torch's manual seed doesn't reach, as before each trial."""
    random.seed(stream(seed, "python"))
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(stream(seed, "numpy") % 2**32)


def _weighted(loss: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        return loss
    if weight.shape != loss.shape:
        raise ValueError(f"losses must give as many weights as losses, found {weight[0].numel()} for {loss[0].numel()}")
    return loss * weight.detach()


def _summaries(value: torch.Tensor) -> list[Summary]:
    """Each member's Summary of values, shape (members, samples), or of values and weights, (2, members, samples)."""
    if value.dim() == 2:
        return [Summary.of_samples(one) for one in value]
    return [Summary.of_samples(one, weights) for one, weights in zip(*value, strict=True)]


def _by_member(value: torch.Tensor) -> Each:
    return Each(list(value) if value.dim() == 2 else _summaries(value))


def _common(params: Sequence[JsonObject]) -> JsonObject:
    """The parameters that are the same for all."""
    first = params[0]
    return {name: value for name, value in first.items() if all(name in one and one[name] == value for one in params)}


def _in_memory(samples: object) -> tuple[torch.Tensor, ...]:
    if isinstance(samples, torch.utils.data.TensorDataset):
        return samples.tensors
    if isinstance(samples, (tuple, list)) and all(isinstance(part, torch.Tensor) for part in samples):
        return tuple(samples)
    raise Unpackable(
        "a pack takes its batches from data in memory, tensors with the samples along the first dimension; "
        f"trial.batches was given a {type(samples).__name__}"
    )


def _cut(batch: dataset.Batch, micro_batches: int) -> list[tuple[dataset.Batch, float]]:
    """Parts of a batch, and each one's share of its samples."""
    if micro_batches == 1:
        return [(batch, 1.0)]
    own = batch.parts[0].shape[1] if isinstance(batch, Stacked) else dataset.length(batch)
    bounds = [own * number // min(micro_batches, own) for number in range(min(micro_batches, own) + 1)]
    return [(_part(batch, first, last), (last - first) / own) for first, last in pairwise(bounds)]


def _part(batch: dataset.Batch, first: int, last: int) -> dataset.Batch:
    if isinstance(batch, Stacked):
        return Stacked(tuple(part[:, first:last] for part in batch.parts))
    return dataset.part(batch, first, last)


def _clip(gradients: Sequence[torch.Tensor], norm: float) -> None:
    """As torch.nn.utils.clip_grad_norm_, of each member."""
    norms = torch.stack([torch.linalg.vector_norm(one.reshape(len(one), -1), dim=1) for one in gradients])
    factors = (norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for one in gradients:
        one.mul_(factors.view(-1, *[1] * (one.dim() - 1)).to(one.dtype))
