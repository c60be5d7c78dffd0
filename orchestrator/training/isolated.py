"""A look at a network beside its training: whatever the look changes is as it was before, to the bit.

with aside(net):
    losses(net, batch)                          batch norm moves no average, dropout takes no random number
generators = Generators()                       of torch, Python and NumPy, as they are now
generators.put_back()
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Generator, Iterator

import torch

from orchestrator.training.data.dataset import Batch

__all__ = ["Generators", "aside", "copied"]


class Generators:
    """The generators of random numbers that are a process's own, as they are when this is made."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch's gap
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def put_back(self) -> None:
        """Have them go on from there."""
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextlib.contextmanager
def aside(net: torch.nn.Module) -> Iterator[None]:
    """Within it the network has copies of its buffers, and is computed as it was written, without `torch.compile`.

    Afterwards buffers and generators are as they were. What else a forward changes, such as a counter that is a mere
    number, stays changed.
    """
    generators = Generators()
    with _not_compiled(), _copies_for_buffers(net):
        try:
            yield
        finally:
            generators.put_back()


@contextlib.contextmanager
def _copies_for_buffers(net: torch.nn.Module) -> Iterator[None]:
    # The buffers themselves are not touched: autograd would take even the same values, written anew, for others.
    places = [
        (module._buffers, name, buffer)
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    copies = {id(buffer): buffer.detach().clone() for _, _, buffer in places}
    try:
        for buffers, name, buffer in places:
            buffers[name] = copies[id(buffer)]
        yield
    finally:
        for buffers, name, buffer in places:
            buffers[name] = buffer


@contextlib.contextmanager
def _not_compiled() -> Generator[None, None, None]:
    """A look from here would have the network compiled anew, and what is compiled has no second derivatives."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def copied(batch: Batch) -> Batch:
    """The batch with copies of its tensors, in the same containers: `losses` may change what it is given."""
    if isinstance(batch, torch.Tensor):
        return batch.detach().clone()
    if isinstance(batch, (tuple, list)):
        parts: list[Batch] = [copied(part) for part in batch]
        return batch._make(parts) if hasattr(batch, "_make") else type(batch)(parts)
    if isinstance(batch, dict):
        return {key: copied(part) for key, part in batch.items()}
    return batch
