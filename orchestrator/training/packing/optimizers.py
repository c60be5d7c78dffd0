"""The optimizers of a pack: each member's own step, on the parameters of all at once.

    opt = PackedOptimizer.of([each member's torch.optim.SGD or AdamW], stack.slots)
    opt.step()                              after a backward

The members' optimizers stay what they are, and hold what they would hold alone: learning rates and the like are read
from their `param_groups` at each step, so schedulers work on them, and the tensors in their `state` are views of this
one's. The formulas are those of torch.optim, with a factor for each member where torch has one number; so the last bits
can differ from torch's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from operator import itemgetter
from typing import ClassVar, TypeAlias, cast

import torch

from orchestrator.training.packing.members import Each, Unpackable
from orchestrator.training.packing.stack import Slot

__all__ = ["PackedOptimizer"]

Row: TypeAlias = "tuple[float, ...]"


class _Factors:
    """Numbers by member, shaped to multiply a stack.

    Args:
        values: shape (members,), float64, on the CPU.
    """

    __slots__ = ("_made", "values")

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self._made: dict[tuple[torch.dtype, torch.device, int], torch.Tensor] = {}

    def like(self, stack: torch.Tensor) -> torch.Tensor:
        """Shape (members, 1, ...), of the dtype and device of `stack`."""
        key = (stack.dtype, stack.device, stack.dim())
        if key not in self._made:
            self._made[key] = self.values.to(stack.device, stack.dtype).view(-1, *repeat(1, stack.dim() - 1))
        return self._made[key]


class PackedOptimizer(ABC):
    """Steps all members of a pack, each by its own optimizer's rule and numbers.

    Args:
        opts: each member's optimizer, of one class and equal in their switches.
        slots: the parameters of the networks.

    Raises:
        Unpackable: they can't step together; the text says why.
    """

    numbers: ClassVar[tuple[str, ...]]
    """Keys of a group that may differ by member."""
    switches: ClassVar[tuple[str, ...]]
    """Keys of a group that may not."""

    def __init__(self, opts: Sequence[torch.optim.Optimizer], slots: Sequence[Slot]) -> None:
        self._opts = opts
        self._groups = _slots_by_group(opts, slots)
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        """By parameter and by what torch calls it: shape (members, ...)."""
        self._slots = {slot.name: slot for group in self._groups for slot in group}
        self._getter = itemgetter(*self.numbers)
        self._rows: list[list[object]] = [[] for _ in self._groups]
        for number in range(len(self._groups)):
            self._check(number)
            self._refresh(number)

    @staticmethod
    def of(opts: Sequence[torch.optim.Optimizer | None], slots: Sequence[Slot]) -> PackedOptimizer:
        """The one for these optimizers.

        Raises:
            Unpackable: there is none.
        """
        for opt in opts:
            if type(opt) not in _KINDS:
                found = "none" if opt is None else f"{type(opt).__module__}.{type(opt).__qualname__}"
                raise Unpackable(f"trials of a pack are trained by torch.optim.SGD or AdamW, and build gave {found}")
            if type(opt) is not type(opts[0]):
                raise Unpackable("trials of one pack must have one class of optimizer, and build gave SGD and AdamW")
        return _KINDS[type(opts[0])](cast("Sequence[torch.optim.Optimizer]", opts), slots)

    @classmethod
    def are_alike(cls, one: torch.optim.Optimizer | None, other: torch.optim.Optimizer | None) -> bool:
        """Whether two members' optimizers are of one kind."""
        if one is None or other is None or type(one) is not type(other) or type(one) not in _KINDS:
            return type(one) is type(other)
        switches = _KINDS[type(one)].switches
        ours, theirs = ([[group[key] for key in switches] for group in opt.param_groups] for opt in (one, other))
        return ours == theirs

    def _check(self, number: int) -> None:
        for member, opt in enumerate(self._opts):
            group, first = opt.param_groups[number], self._opts[0].param_groups[number]
            for key in self.switches:
                if group[key] != first[key]:
                    raise Unpackable(
                        f"trials of one pack must have equal switches of their optimizers: {key} is {first[key]} in "
                        f"member 0 and {group[key]} in member {member}"
                    )
            if group.get("capturable") or group["differentiable"] or isinstance(group["lr"], torch.Tensor):
                raise Unpackable(
                    "an optimizer in a pack can't be capturable or differentiable, nor its lr a tensor: give a number"
                )

    # Stepping

    @property
    def param_groups(self) -> Each:
        """Those of every member."""
        return cast(Each, Each(self._opts).param_groups)

    @torch.no_grad()
    def step(self) -> None:
        """One step of every member, by the gradients of the stacks; those are used up."""
        for number, slots in enumerate(self._groups):
            self._refresh(number)
            for slot in slots:
                if slot.stack.grad is not None:
                    self._update(number, slot, slot.stack.grad)
        for opt in self._opts:
            opt._opt_called = True  # type: ignore[attr-defined]  # else schedulers warn that it was never stepped

    def _refresh(self, number: int) -> None:
        """Take the numbers of a group anew, where they have changed."""
        rows = [self._getter(opt.param_groups[number]) for opt in self._opts]
        if rows != self._rows[number]:
            self._rows[number] = rows
            columns = zip(*(_flattened(row) for row in rows), strict=True)
            self._take(number, [torch.tensor(column, dtype=torch.float64, device="cpu") for column in columns])

    def _is_on(self, number: int, key: str) -> bool:
        return bool(self._opts[0].param_groups[number][key])

    @abstractmethod
    def _take(self, number: int, columns: Sequence[torch.Tensor]) -> None:
        """The numbers of a group have changed to these; each shape (members,), float64."""

    @abstractmethod
    def _update(self, number: int, slot: Slot, grad: torch.Tensor) -> None:
        """Step a parameter of a group; `grad` may be changed."""

    def _made(self, slot: Slot, key: str, value: torch.Tensor, members: Iterable[int] | None = None) -> torch.Tensor:
        """Begin to keep a state, which each of `members` has a view of."""
        self.state.setdefault(slot.name, {})[key] = value
        for member in range(len(self._opts)) if members is None else members:
            self._opts[member].state[slot.members[member]][key] = value[member]
        return value

    # For a checkpoint

    def state_dict(self) -> dict[str, object]:
        """The state of all members, and the numbers of their groups."""
        groups = [[_without_parameters(group) for group in opt.param_groups] for opt in self._opts]
        return {"state": {name: dict(of) for name, of in self.state.items()}, "groups": groups}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Put back what `state_dict` gave."""
        groups = cast("list[list[dict[str, object]]]", state["groups"])
        for opt, saved in zip(self._opts, groups, strict=True):
            for group, numbers in zip(opt.param_groups, saved, strict=True):
                group.update(numbers)
        for number in range(len(self._groups)):
            self._refresh(number)
        for name, values in cast("dict[str, dict[str, torch.Tensor]]", state["state"]).items():
            slot = self._slots[name]
            for key, value in values.items():
                # Of the counts of steps torch keeps on the CPU what it reads there.
                self._kept(slot, key, value if key == "step" else value.to(slot.stack.device))

    @abstractmethod
    def _kept(self, slot: Slot, key: str, value: torch.Tensor) -> None:
        """Keep a state that was saved, as `_made`."""


class _Sgd(PackedOptimizer):
    """As torch.optim.SGD: momentum by Sutskever et al. 2013, without the learning rate inside."""

    numbers = ("lr", "momentum", "dampening", "weight_decay")
    switches = ("nesterov", "maximize", "differentiable")

    def _take(self, number: int, columns: Sequence[torch.Tensor]) -> None:
        lr, momentum, dampening, decay = columns
        has_momentum = momentum != 0
        if number not in self._has_momentum:
            self._has_momentum[number] = has_momentum
        elif not torch.equal(self._has_momentum[number], has_momentum):
            raise Unpackable("in a pack a member's momentum can't become 0, nor other than 0, while it trains")
        self._factors[number] = {
            "rate": _Factors(-lr),
            "momentum": _Factors(momentum),
            "gain": _Factors(torch.where(has_momentum, 1 - dampening, 1.0)),
            "decay": _Factors(decay),
        }
        self._decays[number] = bool(decay.any())
        self._dampens[number] = bool((has_momentum & (dampening != 0)).any())

    def __init__(self, opts: Sequence[torch.optim.Optimizer], slots: Sequence[Slot]) -> None:
        self._has_momentum: dict[int, torch.Tensor] = {}
        self._decays: dict[int, bool] = {}
        self._dampens: dict[int, bool] = {}
        self._factors: dict[int, dict[str, _Factors]] = {}
        super().__init__(opts, slots)

    def _update(self, number: int, slot: Slot, grad: torch.Tensor) -> None:
        stack, factors = slot.stack, self._factors[number]
        if self._is_on(number, "maximize"):
            grad.neg_()
        if self._decays[number]:
            grad.addcmul_(stack, factors["decay"].like(stack))
        if self._has_momentum[number].any():
            buffer = self.state.get(slot.name, {}).get("momentum_buffer")
            momentum = factors["momentum"].like(stack)
            if buffer is None:
                buffer = self._begun(number, slot, grad.clone())
            elif self._dampens[number]:
                buffer.mul_(momentum).addcmul_(grad, factors["gain"].like(stack))
            else:
                torch.addcmul(grad, buffer, momentum, out=buffer)
            grad = grad.addcmul_(buffer, momentum) if self._is_on(number, "nesterov") else buffer
        stack.addcmul_(grad, factors["rate"].like(stack))

    def _begun(self, number: int, slot: Slot, value: torch.Tensor) -> torch.Tensor:
        # A member without momentum has no such state; here its part is the last gradient, and counts for nothing.
        members = self._has_momentum[number].nonzero()[:, 0].tolist()
        return self._made(slot, "momentum_buffer", value, members)

    def _kept(self, slot: Slot, key: str, value: torch.Tensor) -> None:
        number = next(number for number, slots in enumerate(self._groups) if slot in slots)
        self._begun(number, slot, value)


class _AdamW(PackedOptimizer):
    """As torch.optim.AdamW: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, algorithm 2."""

    numbers = ("lr", "betas", "eps", "weight_decay")
    switches = ("amsgrad", "maximize", "differentiable", "capturable")

    def __init__(self, opts: Sequence[torch.optim.Optimizer], slots: Sequence[Slot]) -> None:
        self._columns: dict[int, Sequence[torch.Tensor]] = {}
        self._factors: dict[int, dict[str, _Factors]] = {}
        self._corrections: dict[tuple[int, float], tuple[_Factors, _Factors]] = {}
        super().__init__(opts, slots)

    def _take(self, number: int, columns: Sequence[torch.Tensor]) -> None:
        lr, beta1, beta2, eps, decay = self._columns[number] = columns
        self._factors[number] = {
            "kept": _Factors(1 - lr * decay),
            "new": _Factors(1 - beta1),
            "beta2": _Factors(beta2),
            "new2": _Factors(1 - beta2),
            "eps": _Factors(eps),
        }
        self._corrections.clear()

    def step(self) -> None:
        """As its base says."""
        self._corrections.clear()
        super().step()

    def _correction(self, number: int, step: float) -> tuple[_Factors, _Factors]:
        """The step's size, negative, and the root of the second moment's correction for its begin at zero."""
        if (number, step) not in self._corrections:
            lr, beta1, beta2, _, _ = self._columns[number]
            found = _Factors(-lr / (1 - beta1**step)), _Factors((1 - beta2**step).sqrt())
            self._corrections[number, step] = found
        return self._corrections[number, step]

    def _update(self, number: int, slot: Slot, grad: torch.Tensor) -> None:
        stack, factors = slot.stack, self._factors[number]
        state = self.state.get(slot.name) or self._begun(number, slot)
        if self._is_on(number, "maximize"):
            grad.neg_()
        state["step"] += 1
        size, root = self._correction(number, float(state["step"][0]))
        stack.mul_(factors["kept"].like(stack))
        state["exp_avg"].lerp_(grad, factors["new"].like(stack))
        seconds = state["exp_avg_sq"].mul_(factors["beta2"].like(stack))
        seconds.addcmul_(grad.mul_(grad), factors["new2"].like(stack))
        if self._is_on(number, "amsgrad"):
            seconds = torch.maximum(state["max_exp_avg_sq"], seconds, out=state["max_exp_avg_sq"])
        below = seconds.sqrt().div_(root.like(stack)).add_(factors["eps"].like(stack))
        stack.addcmul_(torch.div(state["exp_avg"], below, out=below), size.like(stack))

    def _begun(self, number: int, slot: Slot) -> dict[str, torch.Tensor]:
        self._made(slot, "step", torch.zeros(len(self._opts), device="cpu"))
        moments = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self._is_on(number, "amsgrad") else []))
        for key in moments:
            self._made(slot, key, torch.zeros_like(slot.stack))
        return self.state[slot.name]

    def _kept(self, slot: Slot, key: str, value: torch.Tensor) -> None:
        self._made(slot, key, value)


_KINDS: dict[type, type[PackedOptimizer]] = {torch.optim.SGD: _Sgd, torch.optim.AdamW: _AdamW}


def _slots_by_group(opts: Sequence[torch.optim.Optimizer], slots: Sequence[Slot]) -> list[list[Slot]]:
    """The slots of each group of parameters; the groups of all members must be of the same ones.

    Raises:
        Unpackable: they aren't, or are of parameters that are not the network's.
    """
    found: list[list[Slot]] = []
    for member, opt in enumerate(opts):
        names = {id(slot.members[member]): slot for slot in slots}
        try:
            own = [[names[id(parameter)] for parameter in group["params"]] for group in opt.param_groups]
        except KeyError:
            raise Unpackable("an optimizer in a pack can have parameters of its network only") from None
        if member and [[slot.name for slot in group] for group in own] != [[s.name for s in group] for group in found]:
            raise Unpackable(f"the optimizers of members 0 and {member} of a pack have other groups of parameters")
        found = own
    return found


def _flattened(row: object) -> Row:
    """The numbers of a group in a row, pairs in it taken apart."""
    assert isinstance(row, tuple)
    return tuple(float(one) for part in row for one in (part if isinstance(part, tuple | list) else (part,)))


def _without_parameters(group: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in group.items() if key != "params"}
