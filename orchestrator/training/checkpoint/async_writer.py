"""Saving beside the training: a copy at the safe point, everything else in a thread of its own.

    saver = AsyncWriter(checkpoints, SaveInterval(clock=time.monotonic))
    if saver.due(step):                                     at every safe point
        saver.save(step, lambda: capture(state, progress))  returns once the state is copied
    saver.save_now(step, ...)                               at a notice: returns once it is durable
    saver.wait()                                            nothing is under way any more

One save is under way at most. What goes wrong beside the training is raised by the next call. The thread does no
arithmetic and draws no random numbers, so no result depends on it.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.errors import OrcError
from orchestrator.training.checkpoint.files import Checkpoints, Gone
from orchestrator.training.checkpoint.interval import SaveInterval
from orchestrator.training.checkpoint.serialization import Packed, Tree, pack

__all__ = ["AsyncWriter", "Cost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one save took.

    Args:
        held_up_s: how long the training stood still while the state was captured and copied, in seconds.
        busy_s: processor time of the thread, which the training may have wanted, in seconds.
        whole_s: from the start until the file was durable, in seconds.
        num_bytes: what the tensors hold.
    """

    held_up_s: float
    busy_s: float
    whole_s: float
    num_bytes: int


class _Staging:
    """Memory for one copy of a state, kept from save to save: fresh pages cost more than the copying."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def copy(self, packed: Packed) -> Packed:
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in packed.tensors.items()}
        for name, tensor in packed.tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in packed.tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return Packed(structure=packed.structure, tensors=self._buffers)

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        found = self._buffers.get(name)
        if found is not None and (found.shape, found.dtype) == (like.shape, like.dtype):
            return found
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)


class _Flight(threading.Thread):
    """One save under way."""

    def __init__(self, checkpoints: Checkpoints, step: int, packed: Packed, begin_s: float, held_up_s: float) -> None:
        # Not a daemon: a process that ends by itself first finishes what it has begun.
        super().__init__(name=f"checkpoint of step {step}")
        self._checkpoints = checkpoints
        self._packed = packed
        self._begin_s = begin_s
        self._held_up_s = held_up_s
        self.step = step
        self.error: BaseException | None = None
        self.cost: Cost | None = None

    def run(self) -> None:
        try:
            self._checkpoints.save(self.step, self._packed)
        except BaseException as error:
            self.error = error
        self.cost = Cost(
            held_up_s=self._held_up_s,
            busy_s=time.thread_time(),
            whole_s=time.monotonic() - self._begin_s,
            num_bytes=self._packed.num_bytes,
        )


class AsyncWriter:
    """Saves a trial's state; every method is for the thread that trains.

    A process that the job forks has no part in it: there, nothing is due and nothing is saved. It keeps as much memory
    as the state takes, for the copy.

    Args:
        checkpoints: where to; None on every rank but the first, which take part in capturing and write nothing.
        pace: when a save is due; it is told what each has cost.

    Raises:
        OrcError: from `due`, `save` and `wait`, when the last save has failed; see `Checkpoints.save`.
    """

    def __init__(self, checkpoints: Checkpoints | None, pace: SaveInterval) -> None:
        self._checkpoints = checkpoints
        self._pace = pace
        self._staging = _Staging()
        self._flight: _Flight | None = None
        self._is_ours = True
        self.cost: Cost | None = None
        """Of the last save that is done."""
        self._saved: int | None = None
        _SAVERS.add(self)

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._flight is not None and self._flight.is_alive()

    @property
    def saved(self) -> int | None:
        """The step of the last save of this process that is durable."""
        done = self._flight is not None and not self._flight.is_alive() and self._flight.error is None
        return self._flight.step if done and self._flight is not None else self._saved

    def due(self, step: int) -> bool:
        """Whether to save at this safe point. Never while a save is under way: training doesn't wait for a disk."""
        if not self._is_ours:
            return False
        if self._flight is not None and not self._flight.is_alive():
            self.wait()
        return self._pace.due(step, busy=self._flight is not None)

    def save(self, step: int, take: Callable[[], Tree]) -> None:
        """Copy the state that `take` gives and return; it becomes durable beside the training.

        Raises:
            TypeError: it holds something that a checkpoint can't.
        """
        if not self._is_ours:
            return
        begin_s = time.monotonic()
        self.wait()
        self._pace.begun(step)
        state = take()
        if self._checkpoints is None:
            return
        packed = self._staging.copy(pack(state))
        self._flight = _Flight(self._checkpoints, step, packed, begin_s, time.monotonic() - begin_s)
        self._flight.start()

    def save_now(self, step: int, take: Callable[[], Tree]) -> Path | None:
        """Save the state and return once it is durable, and the save that was under way before it, too.

        Returns:
            The file; None where `Checkpoints.save` gives none.

        Raises:
            TypeError: it holds something that a checkpoint can't.
        """
        if not self._is_ours:
            return None
        try:
            self.wait()
        except Gone:
            raise
        except OrcError:
            pass  # whether it can be saved now is what counts
        self._pace.begun(step)
        state = take()
        if self._checkpoints is None:
            return None
        found = self._checkpoints.save(step, pack(state))
        self._saved = step
        return found

    def wait(self) -> None:
        """Return once no save is under way."""
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        flight.join()
        if flight.error is not None:
            raise flight.error
        assert flight.cost is not None
        self.cost, self._saved = flight.cost, flight.step
        self._pace.measured(self.cost.held_up_s + self.cost.busy_s, self.cost.whole_s)

    def close(self) -> None:
        """Return once no save is under way, whatever came of it: the trial has an outcome, and needs none."""
        if self._flight is not None:
            self._flight.join()
        self._flight = None

    def forget(self) -> None:
        """In a child of the process that trains: the thread is not here, nor is the copy wanted."""
        self._is_ours = False
        self._flight = None
        self._staging = _Staging()


_SAVERS: weakref.WeakSet[AsyncWriter] = weakref.WeakSet()


def _forget_all() -> None:
    for saver in list(_SAVERS):
        saver.forget()


os.register_at_fork(after_in_child=_forget_all)
