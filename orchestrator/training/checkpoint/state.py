"""The state of a training, all of it, as a tree that a checkpoint can hold, and back.

    tree = capture(state, {"epoch": 3, "batch": 17})        state has net, opt and others; progress is the caller's
    progress = restore(fresh, tree)                         `fresh` is built anew, by the same code

What an interrupted training needs to end with the bits of an undisturbed one: the network with buffers that its own
state leaves out and its modules' flags; optimizers with each tensor's own dtype; schedulers, scalers, averages; every
generator of random numbers. Gradients are left out unless they are asked for, since a step begins by clearing them.

With ranks, the file holds rank 0's network and optimizer, which the others have too, and every rank's generators.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from orchestrator.training.checkpoint.files import Checkpoint, CheckpointError, Checkpoints, Refused
from orchestrator.training.checkpoint.serialization import Tree, decode, encode, pack, unpack

__all__ = ["Misfit", "StateGroup", "Training", "capture", "gather", "newest", "restore"]

Branch: TypeAlias = "dict[str, Tree]"


class Misfit(CheckpointError):
    """A checkpoint's state doesn't fit what the job has built; the text names the key."""


class Training(Protocol):
    """What a job trains: `orc.State`."""

    net: torch.nn.Module
    opt: torch.optim.Optimizer | None
    others: dict[str, object]


class StateGroup(Protocol):
    """The ranks that train one trial together."""

    @property
    def rank(self) -> int:
        """The place of this process among them."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What each rank gave, by rank; all of one shape and dtype, on the CPU."""


def gather(tree: Tree, group: StateGroup | None) -> list[Tree]:
    """What each rank gave, by rank. Every rank must call this; None is a group of one."""
    if group is None or group.world_size == 1:
        return [tree]
    data = b"".join(encode(pack(tree), {}))
    sizes = [int(size) for size in group.all_gather(torch.tensor([len(data)], device="cpu"))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found = zip(group.all_gather(padded), sizes, strict=True)
    return [unpack(decode(part[:size].numpy().tobytes())[0]) for part, size in found]


def _named(of: Training) -> Iterator[tuple[str, object]]:
    yield "net", of.net
    if of.opt is not None:
        yield "opt", of.opt
    yield from of.others.items()


# Capture


@torch.no_grad()
def capture(training: Training, progress: Tree, group: StateGroup | None = None, *, gradients: bool = False) -> Tree:
    """The state of `training` at this moment. Its tensors are the live ones: pack and copy it before the next step.

    Args:
        training: the network, its optimizer, and what else the job has named.
        progress: where the trial is; whatever the caller wants back.
        group: the ranks, each of which must call this at the same step.
        gradients: keep those, too, for a job that stops between a backward and its step.

    Raises:
        TypeError: something has no state_dict, or a state that a checkpoint can't hold.
    """
    parts: Branch = {}
    for name, part in _named(training):
        if name in parts:
            raise TypeError(f"two parts of the state are called {name!r}: give one of them another name")
        parts[name] = _captured(name, part, gradients=gradients)
    return {"parts": parts, "ranks": gather(_generators(training), group), "progress": progress}


def _captured(name: str, part: object, *, gradients: bool) -> Tree:
    if isinstance(part, torch.nn.Module):
        return _module(_bare(part), gradients=gradients)
    if isinstance(part, torch.optim.Optimizer):
        return {"state": part.state_dict(), "on_cpu": _on_cpu(part)}
    if isinstance(part, torch.Generator):
        return None  # each rank has its own
    return {"state": _method(name, part, "state_dict")()}


def _bare(net: torch.nn.Module) -> torch.nn.Module:
    """The module that the job made, without what was put around it to compile or to distribute it."""
    while isinstance(net, DistributedDataParallel) or hasattr(net, "_orig_mod"):
        net = cast("torch.nn.Module", net.module if isinstance(net, DistributedDataParallel) else net._orig_mod)
    return net


def _module(net: torch.nn.Module, *, gradients: bool) -> Branch:
    weights = net.state_dict()
    return {
        "weights": dict(weights),
        "buffers": {name: buffer for name, buffer in _buffers(net) if name not in weights},
        "training": {name: module.training for name, module in net.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in _parameters(net)},
        "gradients": {name: p.grad for name, p in _parameters(net) if p.grad is not None} if gradients else {},
    }


def _buffers(net: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(net.named_buffers(remove_duplicate=False))


def _parameters(net: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(net.named_parameters(remove_duplicate=False))


def _method(name: str, part: object, method: str) -> Callable[..., object]:
    found = getattr(part, method, None)
    if not callable(found) or not callable(getattr(part, "load_state_dict", None)):
        raise TypeError(
            f"{name}, a {type(part).__qualname__}, has no state_dict() and load_state_dict(), so a checkpoint can't "
            "hold it: give it both, or keep it out of orc.State and make it anew from the parameters"
        )
    return cast("Callable[..., object]", found)


def _on_cpu(opt: torch.optim.Optimizer) -> list[Tree]:
    """(number of the parameter, key) of the state tensors on the CPU whose parameter is elsewhere."""
    found: list[Tree] = []
    for number, parameter in enumerate(_members(opt)):
        if parameter.device.type != "cpu":
            entries = opt.state.get(parameter, {}).items()
            found += [[number, key] for key, value in entries if _is_on_cpu(value)]
    return found


def _is_on_cpu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _members(opt: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in opt.param_groups for parameter in group["params"]]


# Generators


def _generators(training: Training) -> Branch:
    """The state of this rank's generators of random numbers."""
    version, words, gauss = random.getstate()
    own = {name: part.get_state() for name, part in _named(training) if isinstance(part, torch.Generator)}
    found: Branch = {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(),
        "python": {"version": version, "words": torch.tensor(words, device="cpu"), "gauss": gauss},
        "own": own,
    }
    if (numpy := sys.modules.get("numpy")) is not None:
        found["numpy"] = numpy.random.get_state(legacy=False)
    return found


def _cuda_states() -> list[torch.Tensor]:
    # Asking would set up a device that nobody uses.
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's gap
    return torch.cuda.get_rng_state_all() if used else []


def _seed(training: Training, saved: Branch) -> None:
    torch.set_rng_state(_tensor(saved["torch"]))
    # A state of a device that this process has not may stay where it is: nothing draws from it.
    states = cast("list[torch.Tensor]", saved["cuda"])
    for device, state in zip(range(torch.cuda.device_count()), states, strict=False):
        torch.cuda.set_rng_state(state, device)
    python = _branch(saved["python"])
    random.setstate((python["version"], tuple(_tensor(python["words"]).tolist()), python["gauss"]))
    if "numpy" in saved:
        import numpy as np

        np.random.set_state(cast("dict[str, object]", saved["numpy"]))
    own = _branch(saved["own"])
    for name, part in _named(training):
        if isinstance(part, torch.Generator):
            part.set_state(_tensor(own[name]))


def _tensor(tree: Tree) -> torch.Tensor:
    assert isinstance(tree, torch.Tensor)
    return tree


def _branch(tree: Tree) -> Branch:
    assert isinstance(tree, dict)
    return tree


# Restore


@torch.no_grad()
def restore(training: Training, tree: Tree, group: StateGroup | None = None) -> Tree:
    """Put a captured state into `training`, which was built anew by the code that built the captured one.

    Generators come last, so whatever restoring draws from them is undone.

    Returns:
        The progress that was captured.

    Raises:
        Misfit: it doesn't fit what was built; names the key. `training` may be restored in part.
    """
    saved = _branch(tree)
    parts, own = _branch(saved["parts"]), dict(_named(training))
    _same_keys("the state", parts, own)
    for name, part in own.items():
        try:
            _put(name, part, parts[name])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            raise Misfit(f"the checkpoint doesn't fit {name}: {type(error).__name__}: {error}") from error
    ranks = cast("list[Tree]", saved["ranks"])
    rank, world_size = (0, 1) if group is None else (group.rank, group.world_size)
    if len(ranks) != world_size:
        raise Misfit(f"the checkpoint holds the generators of {len(ranks)} ranks, and there are {world_size}")
    _seed(training, _branch(ranks[rank]))
    return saved["progress"]


def _put(name: str, part: object, saved: Tree) -> None:
    if isinstance(part, torch.Generator):
        return
    if isinstance(part, torch.nn.Module):
        _put_module(name, _bare(part), _branch(saved))
    elif isinstance(part, torch.optim.Optimizer):
        _put_optimizer(part, _branch(saved))
    else:
        _method(name, part, "load_state_dict")(_branch(saved)["state"])


def _same_keys(what: str, saved: Mapping[str, object], own: Mapping[str, object]) -> None:
    missing = [key for key in own if key not in saved]
    unknown = [key for key in saved if key not in own]
    if not missing and not unknown:
        return
    texts = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
    texts += [f"it has {', '.join(map(repr, unknown))}, which the job no longer builds"] if unknown else []
    raise Misfit(f"the checkpoint doesn't fit {what}: {'; '.join(texts)}")


def _put_module(name: str, net: torch.nn.Module, saved: Branch) -> None:
    weights, fresh = _branch(saved["weights"]), net.state_dict()
    _same_keys(name, weights, fresh)
    for key, value in weights.items():
        _same_kind(f"{name}[{key!r}]", value, fresh[key])
    net.load_state_dict(cast("dict[str, torch.Tensor]", weights))
    modules, parameters = dict(net.named_modules()), dict(_parameters(net))
    for flags, holders, flag in (("training", modules, "training"), ("requires_grad", parameters, "requires_grad")):
        _same_keys(f"the flags of {name}", _branch(saved[flags]), holders)
        for key, value in _branch(saved[flags]).items():
            setattr(holders[key], flag, value)
    for key, buffer in _branch(saved["buffers"]).items():
        _put_buffer(modules, key, _tensor(buffer))
    for key, gradient in _branch(saved["gradients"]).items():
        parameters[key].grad = _tensor(gradient).to(parameters[key].device)


def _same_kind(what: str, saved: Tree, fresh: object) -> None:
    if not isinstance(fresh, torch.Tensor) or torch.nn.parameter.is_lazy(fresh):
        return
    value = _tensor(saved)
    if (value.shape, value.dtype) != (fresh.shape, fresh.dtype):
        raise Misfit(
            f"the checkpoint doesn't fit {what}: it holds {value.dtype} of shape {tuple(value.shape)}, and the job "
            f"builds {fresh.dtype} of shape {tuple(fresh.shape)}"
        )


def _put_buffer(modules: Mapping[str, torch.nn.Module], key: str, value: torch.Tensor) -> None:
    """A buffer that is not in the state_dict: it may be made, or grow, in training."""
    module, _, name = key.rpartition(".")
    holder = modules[module]
    own = holder._buffers[name]
    if own is None:
        device = next((buffer.device for buffer in modules[""].parameters()), value.device)
        holder._buffers[name] = value.to(device)
    elif (own.shape, own.dtype) == (value.shape, value.dtype):
        own.copy_(value)
    else:
        holder._buffers[name] = value.to(own.device)


def _put_optimizer(opt: torch.optim.Optimizer, saved: Branch) -> None:
    state = _branch(saved["state"])
    homes = [{key: value.device for key, value in group.items() if _is_tensor(value)} for group in opt.param_groups]
    opt.load_state_dict(state)
    for group, home in zip(opt.param_groups, homes, strict=True):
        group.update({key: group[key].to(device) for key, device in home.items() if _is_tensor(group[key])})
    # It has cast the state to the dtype of the parameters, and turned strings and deques into something else.
    on_cpu = {(number, key) for number, key in cast("list[tuple[int, str]]", saved["on_cpu"])}
    numbers = dict(enumerate(_members(opt)))
    for number, entry in cast("dict[int, Branch]", state["state"]).items():
        if number not in numbers:
            continue
        own = opt.state[numbers[number]]
        for key, value in entry.items():
            own[key] = value if (number, key) in on_cpu else _placed(value, own[key], numbers[number].device)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _placed(value: Tree, loaded: object, device: torch.device) -> Tree:
    """`value` on the device that the optimizer has chosen for it, or on its parameter's where it is a container."""
    if isinstance(value, torch.Tensor):
        return value.to(loaded.device if isinstance(loaded, torch.Tensor) else device)
    if device.type == "cpu":
        return value
    if isinstance(value, dict):
        return type(value)((key, _placed(item, None, device)) for key, item in value.items())
    if isinstance(value, list):
        return [_placed(item, None, device) for item in value]
    return tuple(_placed(item, None, device) for item in value) if isinstance(value, tuple) else value


# The newest, for all ranks


def newest(
    checkpoints: Checkpoints,
    group: StateGroup | None = None,
    *,
    visible_s: float = 90.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Checkpoint | None:
    """The newest checkpoint that every rank can read; rank 0 chooses. Every rank must call this.

    Args:
        checkpoints: the trial's, as this rank sees them.
        group: the ranks.
        visible_s: how long a rank waits for a file that rank 0 sees already, in seconds.
        clock: seconds, monotonic.
        sleep: waits.

    Raises:
        CheckpointError: on all ranks, if it is raised on rank 0.
    """
    if group is None or group.world_size == 1:
        return checkpoints.newest()
    while True:
        found, chosen, failed = _choose(checkpoints) if group.rank == 0 else (None, "", "")
        name, error = cast("tuple[str, str]", gather((chosen, failed), group)[0])
        if error:
            raise CheckpointError(error)
        if not name:
            return None
        path = checkpoints.folder / name
        mine = found or _wait_for(checkpoints, path, clock() + visible_s, clock, sleep)
        if all(gather(mine is not None, group)):
            return mine
        checkpoints.refuse(path, "another rank could not read it")


def _choose(checkpoints: Checkpoints) -> tuple[Checkpoint | None, str, str]:
    """The newest, its file's name, and the text of the error that forbids to go on."""
    try:
        found = checkpoints.newest()
    except CheckpointError as error:
        return None, "", str(error)
    return found, "" if found is None else checkpoints.path(found.step, found.writer).name, ""


def _wait_for(
    checkpoints: Checkpoints, path: Path, deadline_s: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> Checkpoint | None:
    while True:
        try:
            return checkpoints.load(path)
        except (Refused, CheckpointError) as error:
            checkpoints.refuse(path, str(error))
            return None
        except FileNotFoundError:
            if clock() >= deadline_s:
                checkpoints.refuse(path, "it is not visible here")
                return None
            sleep(0.05)
