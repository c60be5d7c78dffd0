"""What a job sees: one trial, from its parameters to its outcome.

    def train(trial, *, epochs=10, batch_size=64):
        trial.build(build)                                  # or net, opt = trial.prepare(net=net, opt=opt)
        for epoch in trial.epochs(epochs):
            for batch in trial.batches(train_set, batch_size):
                trial.step(losses, batch)
            trial.validate(losses, val_set)                 # reports val_loss and whatever else `losses` gives

`losses(net, batch)` returns per-sample values, shape (batch,): a tensor, or a dict of tensors of which "loss" is
trained on. Every `next()` of `epochs` and `batches` is a safe point, where a trial can be saved, stopped, and resumed
later with the bits that it would have had.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias, cast

import torch
from safetensors.torch import save as to_safetensors

from orchestrator.config.spec import Metric
from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import say
from orchestrator.core.messages import AttemptEnded, Cause, Status
from orchestrator.distributed.control_group import ControlGroup
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.results.objective import Diverged, Objective, finite
from orchestrator.stats import wire
from orchestrator.stats.containers import Key, SummaryMap
from orchestrator.stats.summary import Summary
from orchestrator.training.checkpoint.files import Checkpoint
from orchestrator.training.checkpoint.manager import CheckpointManager, Interrupted
from orchestrator.training.checkpoint.serialization import Tree
from orchestrator.training.checkpoint.state import Misfit, capture, restore
from orchestrator.training.data import dataset
from orchestrator.training.data.loading import Augment
from orchestrator.training.data.sampling import Order, Weights
from orchestrator.training.diagnostics.diagnostics import Wanted, Watch, line
from orchestrator.training.metrics import Derived
from orchestrator.training.precision import Losses, Precision
from orchestrator.training.resume import Astray, Loop, LoopReplay, Place
from orchestrator.training.team import TrialRanks
from orchestrator.training.torch_state import refuse_inexact
from orchestrator.training.values import named, trained_on

__all__ = ["Diverged", "State", "Trial", "derive", "stream"]

Reported: TypeAlias = "float | torch.Tensor | Summary"

_PROGRESS = 1
"""Version of what a checkpoint says of a trial beside the state of its training."""

_VALIDATION_BATCH = 512
"""Samples in a validation batch. It decides the result's last bits, so only the job can change it."""


def stream(seed: int, purpose: str) -> int:
    """A seed for one purpose of a trial, 63 bit: sha256 of seed and purpose, so purposes don't share random numbers."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Schedule(Protocol):
    """What changes the learning rate as training goes on, such as the schedulers of `torch.optim.lr_scheduler`."""

    def step(self) -> None:
        """Another step, or another epoch, is done."""


class State:
    """What belongs to a trial in training; what `build` returns.

    Args:
        net: the network.
        opt: its optimizer.
        each_step: a scheduler that steps with the optimizer, in `trial.step`.
        each_epoch: a scheduler that steps at the end of each epoch of `trial.epochs`.
        others: whatever else has a state, such as averages, and schedulers that the job itself steps, by name; each has
            `state_dict` and `load_state_dict`.

    Raises:
        TypeError: a scheduler that can't step by itself.
    """

    def __init__(
        self,
        *,
        net: torch.nn.Module,
        opt: torch.optim.Optimizer | None = None,
        each_step: Schedule | None = None,
        each_epoch: Schedule | None = None,
        **others: object,
    ) -> None:
        self.net = net
        self.opt = opt
        self.each_step = each_step
        self.each_epoch = each_epoch
        schedules = {"each_step": each_step, "each_epoch": each_epoch}
        for name, one in schedules.items():
            if isinstance(one, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise TypeError(f"{name} wants no metric to step: give a {type(one).__name__} another name and step it")
        self.others = {**others, **{name: one for name, one in schedules.items() if one is not None}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a trial came to: the outcome's status and payload, and the bytes of its model if it may rank."""

    status: Status
    payload: JsonObject
    model: bytes | None = None


class Trial:
    """One trial in training.

    Args:
        index: its index in the plan.
        params: its parameters, as the sweep file names them.
        seed: its own seed; everything random in it is derived from that.
        metric: the objective.
        emit: takes each report, `{"step": n, "metrics": {...}}`.
        build_params: those of `params` that `build` takes; None for all of them.
        attempt: how often it was started before.
        device: where it trains; the first CUDA device if there is one, else the CPU.
        asked_to_stop: whether a notice has arrived.
        party: the ranks that work on this trial together; this process alone by default.
        keeper: keeps its state; None where it is not kept.
        found: the state in which it goes on; None to begin.
    """

    def __init__(
        self,
        *,
        index: int,
        params: JsonObject,
        seed: int,
        metric: Metric,
        emit: Callable[[JsonObject], None],
        build_params: JsonObject | None = None,
        attempt: int = 0,
        device: torch.device | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
        party: RankContext | None = None,
        keeper: CheckpointManager | None = None,
        found: Checkpoint | None = None,
    ) -> None:
        self.index = index
        self.params = params
        self.seed = seed
        self.attempt = attempt
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.group = ControlGroup.alone() if party is None else party.group
        self._team = None if party is None or party.world_size == 1 else TrialRanks(party, partial(stream, seed))
        self._steps = self._team or TrialRanks(RankContext.alone(), partial(stream, seed))
        self._precision = Precision(device=self.device)
        self.epoch = 0
        self.num_steps = 0
        self.state: State | None = None
        self.extra_state: dict[str, object] = {}
        """What the job wants to have again where it goes on, such as a counter: numbers, texts, tensors, lists."""
        self._metric = metric
        self._emit = emit
        self._asked_to_stop = asked_to_stop
        self._build_params = params if build_params is None else build_params
        self._num_reports = 0
        self._objective = Objective(metric)
        self._best_weights: dict[str, torch.Tensor] | None = None
        self._validated: dict[str, torch.Tensor | Summary] = {}
        self._num_own = 0
        self._num_epochs = 0
        self._generators: list[torch.Generator] = []
        self._generator_states: list[torch.Tensor] = []
        self._keeper = keeper
        self._found = found
        self._watch: Watch | None = None
        place = None if found is None else self._place_of(found)
        self._course = LoopReplay(self._mark, place)

    # State

    @property
    def net(self) -> torch.nn.Module:
        """The network, as it is trained."""
        return self._state().net

    @property
    def opt(self) -> torch.optim.Optimizer:
        """The optimizer."""
        opt = self._state().opt
        if opt is None:
            raise RuntimeError("this trial has no optimizer: give one as orc.State(net=..., opt=...)")
        return opt

    @property
    def should_stop(self) -> bool:
        """Whether a notice has arrived: the job may soon be stopped. A job need not look; safe points do."""
        return self._asked_to_stop()

    def _state(self) -> State:
        if self.state is None:
            raise RuntimeError("call trial.build(build) or trial.prepare(net=..., opt=...) before training")
        return self.state

    def build(self, build: Callable[..., State], *, precision: str = "float32") -> State:
        """Seed, call `build` with the parameters that it takes, and place what it returns on the trial's device.

        Args:
            build: makes network and optimizer.
            precision: of what `step` and `validate` compute: "float32", "bf16", or "fp16" on CUDA; weights are float32.

        Raises:
            TypeError: `build` doesn't return `orc.State`, or doesn't fit the parameters.
            ValueError: there is no such precision on the trial's device.
        """
        self._precision = Precision.of(precision, self.device)
        torch.manual_seed(stream(self.seed, "build"))
        # Modules are made on the CPU anyway, and every operation in this context passes through Python.
        with contextlib.nullcontext() if self.device.type == "cpu" else self.device:
            state = build(**self._build_params)
        if not isinstance(state, State):
            raise TypeError(f"{build.__name__} must return orc.State(net=..., opt=...), not {type(state).__name__}")
        if (scaler := self._precision.scaler) is not None and state.others.setdefault("scaler", scaler) is not scaler:
            raise TypeError("precision 'fp16' brings its own scaler: leave the one of orc.State out")
        torch.manual_seed(stream(self.seed, "train"))
        self.state = state
        return state

    def prepare(
        self,
        *,
        net: torch.nn.Module,
        opt: torch.optim.Optimizer | None = None,
        each_step: Schedule | None = None,
        each_epoch: Schedule | None = None,
        **others: object,
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer | None]:
        """Place a network and its optimizer that the job made itself; returns them as they are to be used.

        The arguments are those of `State`.

        With several ranks the network that is returned averages the gradients of all ranks in each backward.
        """
        net.to(self.device)
        self.state = State(net=net, opt=opt, each_step=each_step, each_epoch=each_epoch, **others)
        return net if self._team is None else self._team.wrapped(net), opt

    def watch(
        self, *, norms: bool = True, throughput: bool = True, curvature: int = 0, every: int | None = None
    ) -> None:
        """From here on report what the training is like, at the end of each epoch of `epochs`; call it after `build`.

        These reports are lines of their own, with names that no other report should have. They never are the trial's
        result, and what is watched changes nothing of it: not one bit of the training, its outcome or its model.

        - "gradient_norm", and "gradient_norm/<layer>" for each layer that has parameters: the mean over the steps since
          the last report, of all ranks' gradient together, before it is clipped.
        - "activation_norm/<layer>" for each layer that has none inside: the norm of what it gives for a sample, the
          mean over the last step's batch, of all ranks.
        - "samples_per_s", "steps_per_s", and where the time went: "share/data", "share/compute",
          "share/communication", "share/checkpoint", "share/validation", "share/other", which are 1 together. Compute is
          `step`, but for the time in which its backward had nothing left to do but to wait for other ranks, which is
          communication. With ranks it is the first one's time. The diagnostics' own is left out.
        - "curvature": the largest eigenvalue of the loss's Hessian on the last step's batch, of all ranks, in float32,
          and "curvature_error": an eigenvalue lies within so much of it.

        Args:
            norms: whether the norms are reported.
            throughput: whether it is reported where the time goes. On a GPU each step is then waited for.
            curvature: how many Hessian-vector products to make for it, such as 20; each costs as much as two
                backwards. 0 leaves it out.
            every: steps from one report to the next, in place of epochs.

        Raises:
            ValueError: a number is out of range.
        """
        wanted = Wanted(norms=norms, throughput=throughput, curvature=curvature, every=every)
        self._watch = Watch(self.net, wanted, seed=stream(self.seed, "curvature"), team=self._team)

    def _spent(self, kind: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._watch is None else self._watch.spent(kind)

    def _report_watched(self, watch: Watch) -> None:
        found = watch.report()
        if self._team is not None:
            found = self._team.agreed(found)
        step = self.num_steps or self.epoch
        if found:
            self._emit({"step": step, "metrics": finite(found)})
        if found and not self.group.rank:
            say(line(step, found))

    # Training

    def epochs(self, num: int) -> Iterator[int]:
        """The epochs from 0 to `num` - 1, or those that are left."""
        return self._each_epoch(self._course.begin(opens=True), num)

    def _each_epoch(self, loop: Loop, num: int) -> Iterator[int]:
        try:
            for epoch in range(self._first(loop, num), num):
                self.epoch = epoch
                self._course.give(loop)
                before = self._at
                yield epoch
                self._course.take(loop)
                self._num_epochs += 1
                if self.state is not None and self.state.each_epoch is not None:
                    self.state.each_epoch.step()
                self._num_own += self._at == before  # for a job whose steps and batches are its own
                if self._watch is not None and self._watch.wanted.every is None:
                    self._report_watched(self._watch)
                if epoch + 1 < num:
                    self._pass(loop)
        finally:
            self._course.end(loop)

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
        """The batches of this epoch, on the trial's device, or those that are left.

        The order depends on the trial's seed and the epoch alone. A DataLoader is taken as it is, with its own batches;
        a trial that takes them is resumed at the begin of an epoch. With several ranks each is given its part of every
        batch.

        A sample's key is a whole number that depends on the trial's seed, the epoch and the sample's index alone.

        Args:
            samples: see `orchestrator.training.data.dataset`.
            batch_size: samples a batch.
            shuffle: in random order.
            drop_last: leave out a last batch that is smaller.
            weights: one for each sample, finite and not negative: the epoch's samples are drawn by these, in place of
                each once.
            replacement: whether a sample can be drawn again, by `weights`.
            num: how many samples are drawn by `weights`; by default as many as there are, without replacement those of
                weight above 0.
            augment: called as `augment(sample, generator)` for each sample, with a generator seeded by its key; gives
                the sample to train on.
            keyed: each batch ends with the keys of its samples, int64, shape (batch,): (x, y, keys); see
                `orchestrator.training.augment` for what draws from them. A batch that is a dict gets them as "key".
            num_workers: how many processes read the samples; for a data set that takes its time for each.

        Raises:
            TypeError: it is a DataLoader, and there are several ranks, or something is given that it would decide.
            ValueError: the weights don't fit the samples, or not to what else is given; or `num_workers` is negative.
        """
        if dataset.is_loader(samples):
            return self._loaded(samples, is_plain=weights is None and augment is None and not keyed and not num_workers)
        size = dataset.num_samples(samples)  # type: ignore[arg-type]  # it checks what it is given
        order = Order.of(size, shuffle=shuffle, weights=weights, replacement=replacement, num=num)
        num_kept = order.num - order.num % batch_size if drop_last else order.num
        whole = self._keeper is not None and self._keeper.only_epochs
        loop = self._course.begin(opens=False, is_own=not whole)

        def source(first: int) -> Generator[dataset.Batch, None, None]:
            indices = order.indices(stream(self.seed, f"order/{self.epoch}"))
            seed = stream(self.seed, f"sample/{self.epoch}")
            prepared = dataset.prepared(samples, seed, augment=augment, keyed=keyed, num_workers=num_workers)  # type: ignore[arg-type]
            taken = dataset.batches if self._team is None else self._team.batches
            return taken(
                prepared, None if indices is None else indices[:num_kept], batch_size, num_kept, self.device, first
            )

        return self._each_batch(loop, source, -(-num_kept // batch_size))

    def _loaded(self, loader: object, *, is_plain: bool) -> Iterator[dataset.Batch]:
        if not is_plain:
            raise TypeError("a DataLoader has its own order and samples: pass trial.batches the data set itself")
        if self._team is not None:
            raise TypeError(
                f"trial.batches was given a DataLoader, whose batches can't be dealt to {self.group.world_size} ranks: "
                "pass the data set itself, with the batch size"
            )
        assert hasattr(loader, "__iter__")
        self._know(dataset.generators(loader))
        loop = self._course.begin(opens=False, is_own=False)
        return self._each_batch(loop, lambda _: (dataset.to_device(batch, self.device) for batch in loader), 0)

    def _each_batch(
        self, loop: Loop, source: Callable[[int], Generator[dataset.Batch, None, None]], num: int
    ) -> Iterator[dataset.Batch]:
        keeper, num_own = self._keeper, self._num_own
        try:
            first = self._first(loop, num)
            if loop.is_behind:
                return
            with contextlib.closing(source(first)) as given:  # whatever ends this, loaders end with it
                for batch in given if self._watch is None else self._watch.batches(given):
                    loop.num_given += 1
                    before = self.num_steps
                    yield batch
                    self._num_own += self.num_steps == before
                    # Not after the last one: a job that went on there would lack what it had from it.
                    if keeper is not None and keeper.clock() >= keeper.look_s and loop.num_given != num:
                        self._pass(loop)
        finally:
            if not self._course.end(loop):
                self._num_own = num_own  # it was no training

    def step(
        self, losses: Losses, batch: dataset.Batch, *, micro_batches: int = 1, clip_norm: float | None = None
    ) -> float | torch.Tensor:
        """One optimizer step on the mean of the batch's losses; returns that mean, detached, shape ().

        With several ranks the step is that of the whole batch, and the mean that of this rank's part.

        Args:
            losses: per-sample values; see the module.
            batch: as `batches` gives it.
            micro_batches: in how many parts the batch, or each rank's part of it, passes through the network, to save
                memory. Their gradients add up to that of the whole.
            clip_norm: the most that the norm of all gradients together may be.

        Raises:
            TypeError: the batch can't be cut into micro-batches.
            ValueError: `micro_batches` or `clip_norm` is not positive.
        """
        if self._watch is None:
            return self._step(losses, batch, micro_batches, clip_norm)
        with self._watch.step(losses, batch, micro_batches):
            mean = self._step(losses, batch, micro_batches, clip_norm)
        if (every := self._watch.wanted.every) is not None and self.num_steps % every == 0:
            self._report_watched(self._watch)
        return mean

    def _step(
        self, losses: Losses, batch: dataset.Batch, micro_batches: int, clip_norm: float | None
    ) -> float | torch.Tensor:
        net, opt, precision, watch = self.net, self.opt, self._precision, self._watch
        if not net.training:
            net.train()
        _clear_gradients(opt)
        losses = precision.applied(losses)
        if self._team is None and micro_batches == 1 and precision.scaler is None:
            loss = trained_on(losses, net, batch)
            # What backward() of the mean would pass on, bit for bit, without putting the mean into the graph.
            loss.backward(torch.full_like(loss, 1.0 / loss.numel()))  # type: ignore[no-untyped-call]  # torch's gap
            mean = loss.detach().mean()
        else:
            mean = self._steps.gradients(
                net, partial(trained_on, losses), batch, micro_batches=micro_batches, scale=precision.scale
            )
        look = None if watch is None else watch.look
        has_stepped = precision.step(opt, net.parameters(), clip_norm=clip_norm, look=look)
        if has_stepped and watch is not None:
            watch.stepped()
        self.num_steps += 1
        if has_stepped and (schedule := self._state().each_step) is not None:
            schedule.step()
        return mean

    # Safe points

    @property
    def _at(self) -> int:
        """Where the trial is: optimizer steps, and batches or epochs in which the job has made its own."""
        return self.num_steps + self._num_own

    def _mark(self) -> int:
        """Changes when the network is trained, by whomever."""
        parameters = () if self.state is None else self.state.net.parameters()
        return self.num_steps + sum(one._version for one in parameters if not one.is_inference())

    def _pass(self, loop: Loop) -> None:
        """A safe point, between two items of a loop."""
        keeper = self._keeper
        if keeper is None or keeper.clock() < keeper.look_s:
            return
        take = partial(self._captured, loop) if self.state is not None and self._course.is_safe(loop) else None
        if not loop.is_own and not keeper.only_epochs:
            keeper.warn("this trial is saved at the ends of its epochs only, since a DataLoader gives its batches")
        with self._spent("checkpoint"):
            keeper.look(self._at, self._num_epochs, take)

    def _captured(self, loop: Loop) -> Tree:
        # A loop of the job's own may hold gradients back for a later step.
        return capture(self._state(), self._progress(loop), self.group, gradients=not self.num_steps)

    def _progress(self, loop: Loop) -> Tree:
        return {
            "version": _PROGRESS,
            "place": self._course.place(loop),
            "steps": self.num_steps,
            "own": self._num_own,
            "epoch": self.epoch,
            "epochs": self._num_epochs,
            "reports": self._num_reports,
            "objective": self._objective.to_tree(),
            "best": self._best_weights,
            "validated": {name: _as_tree(value) for name, value in self._validated.items()},
            "extra_state": self.extra_state,
            "generators": [one.get_state() for one in self._generators],
        }

    def _place_of(self, found: Checkpoint) -> Place:
        progress = cast("dict[str, object]", cast("dict[str, object]", found.state)["progress"])
        if progress["version"] != _PROGRESS:
            raise _astray(f"it is of version {progress['version']}, and this is version {_PROGRESS}")
        self.extra_state.update(copy.deepcopy(cast("dict[str, object]", progress["extra_state"])))
        return cast(Place, progress["place"])

    def _first(self, loop: Loop, num: int) -> int:
        """The first item that a loop of `num` gives here."""
        if self._team is not None:
            self._team.part_ways()
        if self.device.type == "cuda" and self._keeper is not None:
            refuse_inexact()
        if self._course.is_goal(loop):
            self._arrive()
        first = self._course.first(loop)
        return num if first is None else first

    def _arrive(self) -> None:
        """The job has come back to where it is to go on: put everything back."""
        assert self._found is not None
        if self.state is None:
            raise _astray("it has called neither trial.build nor trial.prepare on its way")
        try:
            progress = cast("dict[str, object]", restore(self.state, self._found.state, self.group))
        except Misfit as error:
            raise _astray(str(error)) from error
        self._found = None
        self._take(progress)
        self._course.arrive()
        if self._keeper is not None:
            self._keeper.resumed(self._at, self._num_epochs)

    def _take(self, progress: dict[str, object]) -> None:
        self.epoch = cast(int, progress["epoch"])
        self.num_steps, self._num_own = cast(int, progress["steps"]), cast(int, progress["own"])
        self._num_epochs, self._num_reports = cast(int, progress["epochs"]), cast(int, progress["reports"])
        self._objective.take_tree(cast(JsonObject, progress["objective"]))
        self._best_weights = cast("dict[str, torch.Tensor] | None", progress["best"])
        validated = cast("dict[str, torch.Tensor | bytes]", progress["validated"])
        self._validated = {name: _from_tree(value) for name, value in validated.items()}
        self.extra_state.clear()
        self.extra_state.update(cast("dict[str, object]", progress["extra_state"]))
        self._generator_states = cast("list[torch.Tensor]", progress["generators"])
        for generator, state in zip(self._generators, self._generator_states, strict=False):
            generator.set_state(state)

    def _know(self, generators: list[torch.Generator]) -> None:
        """Keep generators of a DataLoader; one that is met again goes on from where it was."""
        for one in generators:
            if not any(one is known for known in self._generators):
                if len(self._generators) < len(self._generator_states):
                    one.set_state(self._generator_states[len(self._generators)])
                self._generators.append(one)

    def _answered(self) -> dict[str, float]:
        """What a report was answered before, on the way to where the trial goes on."""
        try:
            return dict(cast("dict[str, float]", self._course.answer()))
        except Astray as error:
            raise _astray(str(error)) from error

    # Validation

    @torch.no_grad()
    def validate(
        self,
        losses: Losses,
        samples: object,
        *,
        batch_size: int = _VALIDATION_BATCH,
        prefix: str = "val_",
        derived: Mapping[str, Derived] | None = None,
    ) -> dict[str, float]:
        """Evaluate all samples and report the exact mean of every value that `losses` gives, as `val_<name>`.

        The mean is that of the exact sum, correctly rounded, whatever the order of the batches. One sample that is NaN
        or infinite makes the mean NaN. `summaries` then has more than the means.

        Values named "weight" are the samples' weights in all means. Those whose names begin with "_" are not reported:
        they are there for what is `derived`.

        With several ranks all call this. Batch j goes to rank j mod world size, with rank 0's buffers, so the result is
        the same in every bit whatever their number, and there may be fewer batches than ranks.

        Args:
            losses: as for `step`.
            samples: see `orchestrator.training.data.dataset`; not a DataLoader, since whole batches are dealt.
            batch_size: samples a batch, in the order of the data set.
            prefix: before each reported name.
            derived: what is reported beside the means, by name: functions of the Summaries of all values that `losses`
                gives, by their names, such as those of `orchestrator.training.metrics`.

        Raises:
            ValueError: there is no sample, or `losses` gives other than one value a sample; or ranks differ in how
                many samples they have; or something is derived under a name that `losses` gives. Every rank raises.
            PeerLost: a rank is gone or silent.
        """
        if self._course.is_under_way:
            return self._answered()
        with self._spent("validation"):
            return self._validate(losses, samples, batch_size, prefix, derived)

    def _validate(
        self,
        losses: Losses,
        samples: object,
        batch_size: int,
        prefix: str,
        derived: Mapping[str, Derived] | None,
    ) -> dict[str, float]:
        num = self._agreed(samples, batch_size)
        losses = self._precision.applied(losses)
        values = self._evaluated(losses, dataset.dealt(samples, batch_size, num, self.device, *self._seat))  # type: ignore[arg-type]
        found = self._reduced({name: torch.cat(parts) for name, parts in values.items()}, batch_size)
        for name, value in found.items():
            if _num_values(value) != num:
                raise ValueError(
                    f"{prefix}{name}: losses must give one value a sample: expected {num}, found {_num_values(value)}"
                )
        self._validated.update({prefix + name: value for name, value in found.items()})
        reported = {name: value for name, value in found.items() if not name.startswith("_")}
        further = derive({name: _summary(value) for name, value in found.items()}, derived) if derived else {}
        return self.report_all({prefix + name: value for name, value in (reported | further).items()})

    @property
    def summaries(self) -> Mapping[str, Summary]:
        """The whole Summary behind each mean that `validate` has reported, the last of each name; keys are samples."""
        found = {name: _summary(value) for name, value in self._validated.items()}
        self._validated.update(found)
        return found

    @property
    def _seat(self) -> tuple[int, int]:
        return self.group.rank, self.group.world_size

    def _agreed(self, samples: object, batch_size: int) -> int:
        """How many samples there are. Ranks that differ in what they validate are told, all of them."""
        num = dataset.num_samples(samples)  # type: ignore[arg-type]  # it checks what it is given
        buffers = list(self._state().net.buffers())
        sizes = [one.numel() * one.element_size() for one in buffers]
        self.group.agree("what is validated", {"samples": num, "batch_size": batch_size, "buffer_bytes": sum(sizes)})
        if not num:
            raise ValueError("there is nothing to validate: expected at least 1 sample, found a data set of 0")
        self.group.broadcast(buffers)
        return num

    def _evaluated(self, losses: Losses, batches: Iterator[dataset.Batch]) -> dict[str, list[torch.Tensor]]:
        """Per-sample values by name, on their device, in the order of the batches."""
        net = self._state().net
        training = [module for module in net.modules() if module.training]
        net.eval()
        values: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            for name, found in named(losses(net, batch)).items():
                values.setdefault(name, []).append(found if found.dim() == 1 else found.reshape(-1))
        for module in training:  # one by one: what the job itself has set to eval stays so
            module.training = True
        return values

    def _reduced(self, values: Mapping[str, torch.Tensor], batch_size: int) -> Mapping[str, torch.Tensor | Summary]:
        """The Summary of all ranks' values by name. One process has them all: its means take a fifth of the time."""
        weights = values.get("weight")
        values = {name: one for name, one in values.items() if name != "weight"}
        if self.group.world_size == 1 and weights is None:
            return values
        mine: list[tuple[Key, Summary]] = []
        for name, one in values.items():
            keys = _sample_keys(len(one), batch_size, *self._seat).numpy()
            mine.append((name, Summary.of_samples(one, weights, keys=keys)))
        return {str(name): one for name, one in self.group.reduce(SummaryMap.of(mine)).entries}

    def report(self, *, step: int | None = None, **metrics: Reported) -> dict[str, float]:
        """Report metrics; the objective must be among some report's.

        Args:
            step: optimizer steps so far; by default those counted by `step`, or the number of reports before this one.
            metrics: numbers, per-sample tensors or Summaries; of the latter two, the mean counts.

        Raises:
            Diverged: the objective is NaN or infinite. The trial ends here, as diverged.
        """
        return self.report_all(metrics, step=step)

    def report_all(self, metrics: Mapping[str, Reported], *, step: int | None = None) -> dict[str, float]:
        """As `report`, for names that are no identifiers."""
        if self._course.is_under_way:
            return self._answered()
        at = int(step) if step is not None else self.num_steps or self._num_reports
        self._num_reports += 1
        found = {name: _number(value) for name, value in metrics.items()}
        if self._team is not None:
            found = self._team.agreed(found)
        self._emit({"step": at, "metrics": finite(found)})
        if self._objective.take(at, found) and self._metric.at == "best":
            self._best_weights = self._weights(copy=True)
        self._course.note(found)
        return dict(found)

    # Outcome

    def _weights(self, *, copy: bool) -> dict[str, torch.Tensor] | None:
        if self.state is None:
            return None
        weights = {name: value.detach() for name, value in self.state.net.state_dict().items()}
        return {name: value.clone() for name, value in weights.items()} if copy else weights

    def result(self, bar: float | None) -> Result:
        """What the trial came to, after the job has returned or raised `Diverged`.

        Args:
            bar: a value that the trial must at least equal for its model to be kept; None keeps it.

        Raises:
            NoResult: the objective was never reported; the text says what was.
            Interrupted: the job has ended before it came back to where it was to go on.
        """
        if self._course.is_under_way:
            raise _astray("it has ended before it came back to where it was to go on")
        status, payload = self._objective.outcome()
        if status is not Status.COMPLETE or not self._may_rank(bar) or self.group.rank:
            return Result(status=status, payload=payload)
        weights = self._best_weights or self._weights(copy=False)
        if weights is None:
            return Result(status=status, payload=payload)
        model = _serialized(weights)
        return Result(status=status, payload={**payload, "model": hashlib.sha256(model).hexdigest()}, model=model)

    def _may_rank(self, bar: float | None) -> bool:
        value = self._objective.value
        return bar is None or (value is not None and (value == bar or self._objective.improves(value, bar)))


def _astray(text: str) -> Interrupted:
    detail = (
        f"it can't go on from its checkpoint: {text}; a job must build the same and go the same way each time, and "
        "`orc resume --failed` has this trial begin anew"
    )
    return Interrupted(AttemptEnded(cause=Cause.ERROR, detail=detail))


def _as_tree(value: torch.Tensor | Summary) -> Tree:
    return wire.encode(value) if isinstance(value, Summary) else value


def _from_tree(value: torch.Tensor | bytes) -> torch.Tensor | Summary:
    return cast(Summary, wire.decode(value)) if isinstance(value, bytes) else value


def _clear_gradients(opt: torch.optim.Optimizer) -> None:
    """As `opt.zero_grad()`, whose mark for the profiler costs a small network more than the work itself."""
    if type(opt).zero_grad is not torch.optim.Optimizer.zero_grad:
        opt.zero_grad()
        return
    for group in opt.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def derive(found: Mapping[str, Summary], metrics: Mapping[str, Derived]) -> dict[str, float]:
    """What `metrics` give of the Summaries `found`.

    Raises:
        ValueError: there is something of that name already.
    """
    if twice := found.keys() & metrics.keys():
        raise ValueError(f"derived: {', '.join(sorted(twice))}: losses gives values of that name; derive under another")
    return {name: metric(found) for name, metric in metrics.items()}


def _summary(value: torch.Tensor | Summary) -> Summary:
    return value if isinstance(value, Summary) else Summary.of_samples(value)


def _num_values(value: torch.Tensor | Summary) -> int:
    return value.count + value.num_diverged if isinstance(value, Summary) else value.numel()


def _sample_keys(num: int, batch_size: int, rank: int, world_size: int) -> torch.Tensor:
    """The samples to which `num` values belong, those of a rank's batches one after the other."""
    positions = torch.arange(num, device="cpu")
    batches = positions // batch_size * world_size + rank
    return batches * batch_size + positions % batch_size


def _number(value: Reported) -> float:
    if isinstance(value, torch.Tensor):
        mean = Summary.mean_of(value)
        return math.nan if mean is None else mean
    if isinstance(value, Summary):
        found = value.compute()
        return math.nan if found.mean is None or found.diverged else float(found.mean)
    return float(value)


def _serialized(weights: Mapping[str, torch.Tensor]) -> bytes:
    """The weights as safetensors bytes; each tensor is stored on its own, since that format has no aliases."""
    seen: set[int] = set()
    separate = {}
    for name, value in weights.items():
        value = value.cpu().contiguous()
        separate[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return bytes(to_safetensors(separate))
