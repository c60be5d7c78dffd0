"""What a training is like from within: norms of gradients and activations, curvature, and where the time goes.

    trial.watch(curvature=20)                       in a job, after trial.build: a report of it at each epoch's end
    orc.gradient_norms(net)                         for a loop of one's own, after its backward
    orc.activation_norms(losses, net, batch)
    orc.curvature(losses, net, batch)               see `orchestrator.training.diagnostics.hessian`

Nothing of it changes a bit of the training: gradients are looked at where they are, and what needs a forward has one of
its own, on a copy of a batch, after which buffers and generators are as they were.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import torch

from orchestrator.training.data.dataset import Batch, length
from orchestrator.training.data_parallel import MicroBatch
from orchestrator.training.diagnostics.hessian import Hessian
from orchestrator.training.isolated import aside, copied
from orchestrator.training.precision import Losses
from orchestrator.training.team import TrialRanks, cut
from orchestrator.training.values import trained_on

__all__ = ["Wanted", "Watch", "activation_norms", "gradient_norms", "line"]

T = TypeVar("T")

_ROOT: Final = "(net)"
"""What the network itself is called, where a parameter belongs to none of its layers."""
_KINDS: Final = ("data", "compute", "communication", "checkpoint", "validation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is watched.

    Args:
        norms: of gradients and activations, by layer.
        throughput: samples and steps per second, and shares of the time.
        curvature: how many Hessian-vector products to make for the largest eigenvalue; 0 for none of it.
        every: steps from one report to the next; None for one at the end of each epoch.

    Raises:
        ValueError: a number is out of range.
    """

    norms: bool = True
    throughput: bool = True
    curvature: int = 0
    every: int | None = None

    def __post_init__(self) -> None:
        if self.curvature < 0:
            raise ValueError(f"curvature is a number of Hessian-vector products, at least 0, not {self.curvature}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every is how many steps lie between reports, at least 1, not {self.every}")

    @property
    def looks_again(self) -> bool:
        """Whether it takes a batch to look at the network with."""
        return self.norms or self.curvature > 0


# Norms


def gradient_norms(net: torch.nn.Module) -> dict[str, float]:
    """The norm of the gradient that is there, by the layer whose parameters they are, and in all as "".

    A parameter without a gradient counts as 0.
    """
    found = _Layers(net)
    return dict(zip(found.names, found.norms().tolist(), strict=True))


class _Layers:
    """The parameters of a network by the module that has them; in front of all, under "", those of all together."""

    def __init__(self, net: torch.nn.Module) -> None:
        named = [(name.rpartition(".")[0] or _ROOT, one) for name, one in net.named_parameters()]
        layers = list(dict.fromkeys(layer for layer, _ in named))
        self.names = ["", *layers]
        self._parameters = [one for _, one in named]
        self._places = torch.tensor([1 + layers.index(layer) for layer, _ in named], dtype=torch.int64, device="cpu")

    def norms(self) -> torch.Tensor:
        """Of the gradients, shape (names,), float64, on the parameters' device."""
        gradients = [(at, one.grad) for at, one in enumerate(self._parameters) if one.grad is not None]
        if not gradients:
            return torch.zeros(len(self.names), dtype=torch.float64, device="cpu")
        device = gradients[0][1].device
        parts = torch._foreach_norm([one.coalesce().values() if one.is_sparse else one for _, one in gradients])
        squares = torch.stack([part.to(device, torch.float64) for part in parts]).square()
        if self._places.device != device:
            self._places = self._places.to(device)
        places = self._places if len(gradients) == len(self._places) else self._places[[at for at, _ in gradients]]
        found = torch.zeros(len(self.names), dtype=torch.float64, device=device).index_add_(0, places, squares)
        found[0] = squares.sum()
        return found.sqrt()


def activation_norms(losses: Losses, net: torch.nn.Module, batch: Batch) -> dict[str, float]:
    """The norm of what each layer gives for a sample, mean over the batch, by the layer's name.

    Layers are the modules that have none inside; one that is called several times counts with the mean of its calls,
    one that is not called is left out. What a layer gives is taken to have the samples along its first dimension.
    The network is taken in the mode in which it is, and left as it was.

    Args:
        losses: what calls the network, as for `trial.step`.
        net: the network.
        batch: what `losses` takes.
    """
    names = _leaves(net)
    sums = _activations(losses, net, [MicroBatch(batch, length(batch))])
    return {name: total / num for name, (total, num) in zip(names, sums.tolist(), strict=True) if num}


def _leaves(net: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name or _ROOT: module for name, module in net.named_modules() if next(module.children(), None) is None}


@torch.no_grad()
def _activations(losses: Losses, net: torch.nn.Module, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """For each leaf the sum of its outputs' norms, and their number: shape (leaves, 2), float64, on the CPU."""
    leaves = _leaves(net)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in leaves}

    def take(name: str, module: torch.nn.Module, given: object, output: object) -> None:
        value = _first_tensor(output)
        if value is not None and value.dim() and value.is_floating_point():
            norms = torch.linalg.vector_norm(value.reshape(len(value), -1), dim=1, dtype=_wide(value.dtype))
            found[name].append(torch.stack([norms.sum(dtype=torch.float64), norms.new_tensor(len(norms))]).cpu())

    hooks = [module.register_forward_hook(partial(take, name)) for name, module in leaves.items()]
    try:
        with aside(net):
            for micro_batch in micro_batches:
                if micro_batch.num:
                    trained_on(losses, net, copied(micro_batch.batch))
    finally:
        for hook in hooks:
            hook.remove()
    none = torch.zeros(2, dtype=torch.float64, device="cpu")
    return torch.stack([torch.stack([none, *parts]).sum(dim=0) for parts in found.values()])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _first_tensor(output: object) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


# Watching


class Watch:
    """Looks at one trial's steps from report to report.

    Args:
        net: the network in training.
        wanted: what is watched.
        seed: of the vector with which the search for the curvature begins.
        team: the trial's ranks; None for one process.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        wanted: Wanted,
        *,
        seed: int,
        team: TrialRanks | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.wanted = wanted
        self._net, self._seed, self._team, self._clock = net, seed, team, clock
        self._device = next((one.device for one in net.parameters()), torch.device("cpu"))
        self._layers = _Layers(net) if wanted.norms else None
        self._look_at: tuple[Losses, list[MicroBatch], int] | None = None
        if team is not None and wanted.throughput:
            team.time_waits()
        self._begin()

    def _begin(self) -> None:
        """From here on, for the next report."""
        self._spent_s = dict.fromkeys(_KINDS, 0.0)
        self._num_steps = self._num_samples = self._num_normed = 0
        self._norms: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        self._waited_s = 0.0 if self._team is None else self._team.waited_s
        self._begin_s = self._clock()

    # While it trains

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Count the time within."""
        begin_s = self._clock()
        try:
            yield
        finally:
            self._spent_s[kind] += self._clock() - begin_s

    def batches(self, given: Iterator[T]) -> Iterator[T]:
        """The same batches; the time until each is there counts as that of the data."""
        ended = object()
        while True:
            with self.spent("data"):
                batch = next(given, ended)
            if batch is ended:
                return
            yield batch  # type: ignore[misc]  # it is none of ours

    @contextlib.contextmanager
    def step(self, losses: Losses, batch: Batch, micro_batches: int) -> Iterator[None]:
        """One step of the optimizer."""
        share = None if self._team is None else self._team.share
        num, total = share or (length(batch), length(batch) * (1 if self._team is None else self._team.world_size))
        if self.wanted.looks_again:  # the last batch that there is; which one that will be is not known
            self._look_at = (losses, cut(copied(batch), num, micro_batches), total)
        with self.spent("compute"):
            yield
            if self.wanted.throughput and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # else the next one to wait for the GPU would be charged with it
        self._num_steps += 1
        self._num_samples += total

    def look(self) -> None:
        """Look at the gradients of a step: of all ranks, and not clipped yet."""
        if self._layers is not None:
            self._seen = self._layers.norms()

    def stepped(self) -> None:
        """The optimizer has stepped: what was seen of its gradients counts."""
        if self._seen is not None:
            self._norms = self._seen if self._norms is None else self._norms + self._seen
            self._seen, self._num_normed = None, self._num_normed + 1

    # Reports

    def report(self) -> dict[str, float]:
        """All that is watched, since the last report, by name; every rank must call this.

        Raises:
            NoCurvature: something in the network can't be differentiated twice.
        """
        found = self._throughput() | self._gradients() | self._again()
        self._begin()
        return found

    def _throughput(self) -> dict[str, float]:
        passed_s = self._clock() - self._begin_s
        if not self.wanted.throughput or passed_s <= 0:
            return {}
        spent_s = dict(self._spent_s)
        waited_s = 0.0 if self._team is None else self._team.waited_s - self._waited_s
        spent_s["communication"] = min(waited_s, spent_s["compute"])
        spent_s["compute"] -= spent_s["communication"]
        spent_s["other"] = max(0.0, passed_s - sum(spent_s.values()))
        rates = {"samples_per_s": self._num_samples / passed_s, "steps_per_s": self._num_steps / passed_s}
        return rates | {f"share/{kind}": kind_s / passed_s for kind, kind_s in spent_s.items()}

    def _gradients(self) -> dict[str, float]:
        if self._layers is None or self._norms is None:
            return {}
        means = (self._norms / self._num_normed).tolist()
        return {_under("gradient_norm", name): mean for name, mean in zip(self._layers.names, means, strict=True)}

    def _again(self) -> dict[str, float]:
        """What takes another look at the last step's batch, in training as it was."""
        if self._look_at is None:
            return {}
        (losses, micro_batches, total), self._look_at = self._look_at, None
        training = [(module, module.training) for module in self._net.modules()]
        if not self._net.training:  # as a step has it
            self._net.train()
        found = self._activations(losses, micro_batches) | self._curvature(losses, micro_batches, total)
        for module, was in training:
            module.training = was
        return found

    def _activations(self, losses: Losses, micro_batches: list[MicroBatch]) -> dict[str, float]:
        if not self.wanted.norms:
            return {}
        sums = _activations(losses, self._net, micro_batches)
        if self._team is not None:
            sums = self._team.summed(sums.to(self._device)).cpu()
        named = zip(_leaves(self._net), sums.tolist(), strict=True)
        return {_under("activation_norm", name): total / num for name, (total, num) in named if num}

    def _curvature(self, losses: Losses, micro_batches: list[MicroBatch], total: int) -> dict[str, float]:
        if not self.wanted.curvature:
            return {}
        summed = (lambda part: part) if self._team is None else self._team.summed
        shares = [(one.batch, one.num / total) for one in micro_batches]
        hessian = Hessian(partial(trained_on, losses), self._net, shares, summed=summed)
        found = hessian.largest(self.wanted.curvature, self._seed)
        return {"curvature": found.value, "curvature_error": found.error}


def _under(what: str, name: str) -> str:
    return f"{what}/{name}" if name else what


# For people


def line(step: int, found: Mapping[str, float]) -> str:
    """What a report says, without its layers, as a line of a log."""
    shares = {name.partition("/")[2]: value for name, value in found.items() if name.startswith("share/")}
    parts = [f"{_rate(found[f'{unit}_per_s'])} {unit}/s" for unit in ("samples", "steps") if f"{unit}_per_s" in found]
    parts += [", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())] if shares else []
    parts += [f"gradient norm {found['gradient_norm']:.4g}"] if "gradient_norm" in found else []
    if "curvature" in found:
        parts.append(f"curvature {found['curvature']:.4g} +- {found['curvature_error']:.1g}")
    return f"--- step {step}: {'; '.join(parts)}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
