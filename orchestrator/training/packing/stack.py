"""The networks of several trials as one, each tensor stacked (Roeder et al., torch.func, "Model ensembling").

    stack = Stack([net, other, ...])                        one architecture
    values = stack(losses, Stacked((x, y)))                 by name, shape (members, batch)
    values["loss"].sum().backward()                         each member's gradient, in stack.slots

The networks stay as they are, but for their memory: their parameters and buffers are views of the stack. So each has
at any moment the weights that it would have alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import NoReturn, TypeAlias, cast

import torch

from orchestrator.training.packing.kernels import Kernels
from orchestrator.training.packing.members import REMEDY, Stacked, Unpackable

__all__ = ["Slot", "Stack", "are_alike"]

Losses: TypeAlias = "Callable[[torch.nn.Module, object], Mapping[str, torch.Tensor]]"
_Place: TypeAlias = "tuple[dict[str, torch.Tensor | None], str]"

_OF_TORCH = frozenset(vars(torch.nn.Module()))
"""What every module has; of these, hooks and the flag alone can differ in what they do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A parameter of all members.

    Args:
        name: in a member's network.
        stack: shape (members, ...).
        members: each member's parameter, a view of that.
    """

    name: str
    stack: torch.nn.Parameter
    members: tuple[torch.nn.Parameter, ...]


class Stack(torch.nn.Module):
    """Networks of one architecture. Its own parameters and buffers are those of all members, stacked.

    Args:
        nets: by member. What they are but for parameters and buffers must be equal: only the first is ever called.

    Raises:
        Unpackable: they differ; the text says where.
    """

    def __init__(self, nets: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        for number, net in enumerate(nets):
            _check_alike(nets[0], net, number)
        self._template = (nets[0],)  # in a tuple, so that it is no part of this one
        self._places: list[tuple[torch.Tensor, list[_Place]]] = []
        self.slots: list[Slot] = []
        with torch.no_grad():
            for name in _names(nets[0], "_parameters"):
                self._add_parameter(name, nets)
            for name in _names(nets[0], "_buffers"):
                self._add_buffer(name, nets)
        self._num_parameters = len(self.slots)
        self.training = nets[0].training

    @property
    def template(self) -> torch.nn.Module:
        """The network that `losses` gets; its flags are everybody's."""
        return self._template[0]

    def _add_parameter(self, name: str, nets: Sequence[torch.nn.Module]) -> None:
        own = tuple(net.get_parameter(name) for net in nets)
        stacked = torch.stack([one.detach() for one in own])
        if isinstance(nets[0].get_submodule(name.rpartition(".")[0]), torch.nn.Linear) and stacked.dim() == 3:
            # As its gradient comes out of a batch of matrix products, which is copied where its strides are others.
            stacked = stacked.mT.contiguous().mT
        stack = torch.nn.Parameter(stacked, requires_grad=own[0].requires_grad)
        for one, part in zip(own, stack.detach(), strict=True):
            one.data = part
        self.register_parameter(_flat(name), stack)
        self.slots.append(Slot(name=name, stack=stack, members=own))
        self._places.append((stack, list(_places(nets[0], "_parameters", own[0]))))

    def _add_buffer(self, name: str, nets: Sequence[torch.nn.Module]) -> None:
        own = [net.get_buffer(name) for net in nets]
        stack = torch.stack(own)
        places = [list(_places(net, "_buffers", one)) for net, one in zip(nets, own, strict=True)]
        for part, held in zip(stack, places, strict=True):
            for holder, key in held:
                holder[key] = part
        self.register_buffer(_flat(name), stack)
        self._places.append((stack, places[0]))

    # As a module

    def train(self, mode: bool = True) -> Stack:
        """Set the flags of all members."""
        self.training = mode
        self.template.train(mode)
        return self

    def get_extra_state(self) -> dict[str, bool]:
        """The flags of the template's modules, which a checkpoint keeps."""
        return {name: module.training for name, module in self.template.named_modules()}

    def set_extra_state(self, state: Mapping[str, bool]) -> None:
        """Put back what `get_extra_state` gave."""
        modules = dict(self.template.named_modules())
        for name, training in state.items():
            modules[name].training = training

    def _apply(self, fn: object, recurse: bool = True) -> NoReturn:
        raise Unpackable("the job moves or converts its network after trial.build, and a pack stays as it was built")

    # Evaluation

    def forward(self, losses: Losses, batch: object) -> dict[str, torch.Tensor]:
        """Every member's values by name, shape (members, ...).

        Args:
            losses: as a job's, by name.
            batch: of each member its own where it is `Stacked`, else the same for all.

        Raises:
            Exception: whatever comes of `losses`; with a note where it may be for want of a rule of torch.func.
        """
        own = isinstance(batch, Stacked)
        stacks = tuple(stack for stack, _ in self._places)

        def one(
            tensors: tuple[torch.Tensor, ...], batch: object
        ) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
            return self._of_one(losses, tensors, batch)

        call = torch.func.vmap(one, in_dims=(0, 0 if own else None), randomness="different")
        try:
            found, replaced = call(stacks, batch.parts if isinstance(batch, Stacked) else batch)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            error.add_note(f"(`losses` was computed for all trials of a pack at once by torch.func.vmap; {REMEDY})")
            raise
        with torch.no_grad():
            for number, value in replaced.items():
                stacks[number].copy_(value)
        return found

    def _of_one(
        self, losses: Losses, tensors: tuple[torch.Tensor, ...], batch: object
    ) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
        """Within vmap: the values, and the buffers that the network has replaced instead of changing them in place."""
        before = [holder[key] for _, places in self._places for holder, key in places]
        for (_, places), tensor in zip(self._places, tensors, strict=True):
            for holder, key in places:
                holder[key] = tensor
        try:
            with Kernels():
                values = dict(losses(self.template, batch))
            return values, dict(self._replaced(tensors))
        finally:
            old = iter(before)
            for _, places in self._places:
                for holder, key in places:
                    holder[key] = next(old)

    def _replaced(self, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        for number in range(self._num_parameters, len(tensors)):
            holder, key = self._places[number][1][0]
            found = holder[key]
            if found is not tensors[number]:
                if found is None or found.shape != tensors[number].shape:
                    raise Unpackable(f"the network gives its buffer {key!r} another shape while it trains")
                yield number, found.detach()


def _flat(name: str) -> str:
    return name.replace(".", "/")  # a module's own names have no dots


def _names(net: torch.nn.Module, kind: str) -> list[str]:
    """Names of the parameters or buffers, each tensor once."""
    named = net.named_parameters() if kind == "_parameters" else net.named_buffers()
    return [name for name, _ in named]


def _places(net: torch.nn.Module, kind: str, tensor: torch.Tensor) -> Iterator[_Place]:
    """Where a network holds a tensor, all of it."""
    for module in net.modules():
        holder = cast("dict[str, torch.Tensor | None]", getattr(module, kind))
        yield from ((holder, key) for key, value in holder.items() if value is tensor)


# Whether networks are alike


def are_alike(first: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two networks can be stacked."""
    try:
        _check_alike(first, other, 1)
    except Unpackable:
        return False
    return True


def _check_alike(first: torch.nn.Module, other: torch.nn.Module, number: int) -> None:
    ours, theirs = dict(first.named_modules(remove_duplicate=False)), dict(other.named_modules(remove_duplicate=False))
    for name in (*ours, *theirs):
        if type(ours.get(name)) is not type(theirs.get(name)):
            raise Unpackable(
                f"trials of one pack must be of one architecture: the network's {name!r} is {_class(ours.get(name))} "
                f"in member 0 and {_class(theirs.get(name))} in member {number}"
            )
    if _ties(first) != _ties(other):
        raise Unpackable(f"the networks of members 0 and {number} of a pack share other parameters among their modules")
    for name, module in ours.items():
        where = f"the network's {name!r}" if name else "the network"
        _check_tensors(where, module, theirs[name], number)
        _check_rest(where, module, theirs[name], number)


def _class(module: torch.nn.Module | None) -> str:
    if module is None:
        return "not there"
    made = type(module).__qualname__
    return f"a {made}, a class that is made anew each time" if "<locals>" in made else f"a {made}"


def _ties(net: torch.nn.Module) -> list[int]:
    """For each parameter and buffer, the first that it is the same as."""
    parameters, buffers = net.named_parameters(remove_duplicate=False), net.named_buffers(remove_duplicate=False)
    found = [id(value) for _, value in (*parameters, *buffers)]
    return [found.index(one) for one in found]


def _check_tensors(where: str, module: torch.nn.Module, other: torch.nn.Module, number: int) -> None:
    for ours, theirs in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
        for key in dict.fromkeys((*ours, *theirs)):
            kinds = [_kind(where, key, one.get(key)) for one in (ours, theirs)]
            if kinds[0] != kinds[1]:
                raise Unpackable(
                    f"trials of one pack must be of one architecture: {where} has {key} as {kinds[0]} in member 0 and "
                    f"as {kinds[1]} in member {number}"
                )


def _kind(where: str, key: str, value: torch.Tensor | None) -> str:
    if value is None:
        return "nothing"
    if torch.nn.parameter.is_lazy(value):
        raise Unpackable(f"{where} makes {key} when it is first used, and a pack is stacked before")
    grad = "" if value.requires_grad else ", without a gradient"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)} on {value.device}{grad}"


def _check_rest(where: str, module: torch.nn.Module, other: torch.nn.Module, number: int) -> None:
    """Everything else that a module does is done by member 0's for all."""
    ours, theirs = ({key: _compared(key, value) for key, value in vars(one).items()} for one in (module, other))
    for key in sorted(ours.keys() | theirs.keys()):
        if not _is_same(ours.get(key), theirs.get(key), 0):
            raise Unpackable(
                f"trials of one pack may differ in parameters and buffers only: {where} has {key} = "
                f"{_shown(ours.get(key))} in member 0 and {_shown(theirs.get(key))} in member {number}"
            )


def _compared(key: str, value: object) -> object:
    if key not in _OF_TORCH or key == "training":
        return value
    # Hooks are numbered as they are made. Of parameters and buffers the kinds have been looked at.
    return list(value.values()) if "hooks" in key and isinstance(value, Mapping) else None


def _shown(value: object) -> str:
    found = repr(value)
    return found if len(found) <= 60 else found[:57] + "..."


_DEEPEST = 20


def _is_same(one: object, other: object, depth: int) -> bool:
    """Whether two values are known to be equal; of what can't be compared, only the same object is."""
    if one is other:
        return True
    if type(one) is not type(other) or depth > _DEEPEST:
        return False
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = list(one) == list(other)
        return keys and all(_is_same(one[key], other[key], depth + 1) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other, [depth + 1] * len(one)))
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        return one.__code__ is other.__code__ and all(
            _is_same(getattr(one, part), getattr(other, part), depth + 1)
            for part in ("__defaults__", "__kwdefaults__", "__closure__")
        )
    if isinstance(one, torch.nn.Module):
        return False  # held aside from its parent's modules, so that its tensors are out of sight
    if type(one).__name__ == "cell":
        return _is_same(one.cell_contents, other.cell_contents, depth + 1)  # type: ignore[attr-defined]  # cells
    try:
        return bool(one == other)
    except (TypeError, ValueError):  # an array of answers, say
        return False
