"""What a job sees: one trial, from its parameters to its outcome.

    def train(trial, *, epochs=10, batch_size=64):
        trial.build(build)                                  # or net, opt = trial.keep(net=net, opt=opt)
        for epoch in trial.epochs(epochs):
            for batch in trial.batches(train_set, batch_size):
                trial.step(losses, batch)
            trial.validate(losses, val_set)                 # reports val_loss and whatever else `losses` gives

`losses(net, batch)` returns per-sample values, shape (batch,): a tensor, or a dict of tensors of which "loss" is
trained on. Every `next()` of `epochs` and `batches` is a safe point, where a trial can be stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from safetensors.torch import save as to_safetensors

from orchestrator import data
from orchestrator.objective import Diverged, Objective, finite
from orchestrator.records import Status
from orchestrator.spec import Metric
from orchestrator.store import JsonObject
from orchestrator.summary import Summary

__all__ = ["Diverged", "State", "Trial", "stream"]

Losses: TypeAlias = "Callable[[torch.nn.Module, object], torch.Tensor | Mapping[str, torch.Tensor]]"
Reported: TypeAlias = "float | torch.Tensor | Summary"

_VALIDATION_BATCH = 512
"""Samples in a validation batch. It decides the result's last bits, so only the job can change it."""


def stream(seed: int, purpose: str) -> int:
    """A seed for one purpose of a trial, 63 bit: sha256 of seed and purpose, so purposes don't share random numbers."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class State:
    """What belongs to a trial in training; what `build` returns.

    Args:
        net: the network.
        opt: its optimizer.
        others: schedulers, scalers and the like, by name; each has `state_dict` and `load_state_dict`.
    """

    def __init__(self, *, net: torch.nn.Module, opt: torch.optim.Optimizer | None = None, **others: object) -> None:
        self.net = net
        self.opt = opt
        self.others = others


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
    ) -> None:
        self.index = index
        self.params = params
        self.seed = seed
        self.attempt = attempt
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.epoch = 0
        self.num_steps = 0
        self.state: State | None = None
        self._metric = metric
        self._emit = emit
        self._asked_to_stop = asked_to_stop
        self._build_params = params if build_params is None else build_params
        self._num_reports = 0
        self._objective = Objective(metric)
        self._best_weights: dict[str, torch.Tensor] | None = None

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
            raise RuntimeError("call trial.build(build) or trial.keep(net=..., opt=...) before training")
        return self.state

    def build(self, build: Callable[..., State]) -> State:
        """Seed, call `build` with the parameters that it takes, and place what it returns on the trial's device.

        Raises:
            TypeError: `build` doesn't return `orc.State`, or doesn't fit the parameters.
        """
        torch.manual_seed(stream(self.seed, "build"))
        # Modules are made on the CPU anyway, and every operation in this context passes through Python.
        with contextlib.nullcontext() if self.device.type == "cpu" else self.device:
            state = build(**self._build_params)
        if not isinstance(state, State):
            raise TypeError(f"{build.__name__} must return orc.State(net=..., opt=...), not {type(state).__name__}")
        torch.manual_seed(stream(self.seed, "train"))
        self.state = state
        return state

    def keep(
        self, *, net: torch.nn.Module, opt: torch.optim.Optimizer | None = None, **others: object
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer | None]:
        """Place a network and its optimizer that the job made itself; returns them as they are to be used."""
        net.to(self.device)
        self.state = State(net=net, opt=opt, **others)
        return net, opt

    # Training

    def epochs(self, num: int) -> Iterator[int]:
        """The epochs from 0 to `num` - 1."""
        for epoch in range(num):
            self.epoch = epoch
            yield epoch

    def batches(
        self, samples: object, batch_size: int = 64, *, shuffle: bool = True, drop_last: bool = False
    ) -> Iterator[data.Batch]:
        """The batches of this epoch, on the trial's device.

        The order depends on the trial's seed and the epoch alone. A DataLoader is taken as it is, with its own batches.

        Args:
            samples: see `orchestrator.data`.
            batch_size: samples a batch.
            shuffle: in random order.
            drop_last: leave out a last batch that is smaller.
        """
        if not data.is_loader(samples):
            return self._in_order(samples, batch_size, shuffle=shuffle, drop_last=drop_last)
        assert hasattr(samples, "__iter__")
        return (data.to_device(batch, self.device) for batch in samples)

    def _in_order(self, samples: object, batch_size: int, *, shuffle: bool, drop_last: bool) -> Iterator[data.Batch]:
        num = data.num_samples(samples)  # type: ignore[arg-type]  # it checks what it is given
        order = None
        if shuffle:
            generator = torch.Generator().manual_seed(stream(self.seed, f"order/{self.epoch}"))
            order = torch.randperm(num, generator=generator)
        if drop_last:
            num -= num % batch_size
        picked = None if order is None else order[:num]
        return data.batches(samples, picked, batch_size, num, self.device)  # type: ignore[arg-type]

    def step(self, losses: Losses, batch: data.Batch) -> float | torch.Tensor:
        """One optimizer step on the mean of the batch's losses; returns that mean, detached, shape ()."""
        net, opt = self.net, self.opt
        if not net.training:
            net.train()
        _clear_gradients(opt)
        loss = _named(losses(net, batch))["loss"]
        # What backward() of the mean would pass on, bit for bit, without putting the mean into the graph.
        loss.backward(torch.full_like(loss, 1.0 / loss.numel()))  # type: ignore[no-untyped-call]  # torch's gap
        opt.step()
        self.num_steps += 1
        return loss.detach().mean()

    # Validation

    @torch.no_grad()
    def validate(
        self, losses: Losses, samples: object, *, batch_size: int = _VALIDATION_BATCH, prefix: str = "val_"
    ) -> dict[str, float]:
        """Evaluate all samples and report the exact mean of every value that `losses` gives, as `val_<name>`.

        The mean is that of the exact sum, correctly rounded, whatever the order of the batches. One sample that is NaN
        or infinite makes the mean NaN.

        Args:
            losses: as for `step`.
            samples: see `orchestrator.data`; not a DataLoader, since whole batches are dealt.
            batch_size: samples a batch, in the order of the data set.
            prefix: before each reported name.
        """
        net = self._state().net
        training = [module for module in net.modules() if module.training]
        net.eval()
        num = data.num_samples(samples)  # type: ignore[arg-type]  # it checks what it is given
        parts: dict[str, list[torch.Tensor]] = {}
        for batch in data.batches(samples, None, batch_size, num, self.device):  # type: ignore[arg-type]
            for name, values in _named(losses(net, batch)).items():
                parts.setdefault(name, []).append(values)
        for module in training:  # one by one: what the job itself has set to eval stays so
            module.training = True
        return self.report_all({prefix + name: torch.cat(values) for name, values in parts.items()})

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
        at = int(step) if step is not None else self.num_steps or self._num_reports
        self._num_reports += 1
        found = {name: _number(value) for name, value in metrics.items()}
        self._emit({"step": at, "metrics": finite(found)})
        if self._objective.take(at, found) and self._metric.at == "best":
            self._best_weights = self._weights(copy=True)
        return found

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
        """
        status, payload = self._objective.outcome()
        if status is not Status.COMPLETE or not self._may_rank(bar):
            return Result(status=status, payload=payload)
        weights = self._best_weights or self._weights(copy=False)
        if weights is None:
            return Result(status=status, payload=payload)
        model = _serialized(weights)
        return Result(status=status, payload={**payload, "model": hashlib.sha256(model).hexdigest()}, model=model)

    def _may_rank(self, bar: float | None) -> bool:
        value = self._objective.value
        return bar is None or (value is not None and (value == bar or self._objective.improves(value, bar)))


def _clear_gradients(opt: torch.optim.Optimizer) -> None:
    """As `opt.zero_grad()`, whose mark for the profiler costs a small network more than the work itself."""
    if type(opt).zero_grad is not torch.optim.Optimizer.zero_grad:
        opt.zero_grad()
        return
    for group in opt.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _named(values: torch.Tensor | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return {"loss": values}
    if "loss" not in values:
        raise KeyError(f'losses must give "loss", the values that are trained on; it gave {", ".join(values)}')
    return values


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
