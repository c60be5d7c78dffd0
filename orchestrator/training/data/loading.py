"""Samples one by one, from a map-style data set: prepared by key, here or in loader processes.

    prepared = Prepared(data_set, seed, augment=augment, keyed=True, num_loaders=2)
    for batch in fetched(prepared, [[3, 1], [4, 0]]): ...       batches of samples 3 and 1, then 4 and 0

Which samples make a batch is decided by who asks, so processes that read ahead change nothing: a trial that goes on in
the middle of an epoch asks for the batches that are left.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from orchestrator.training.augment import keys_of

__all__ = ["Augment", "ByIndex", "Prepared", "fetched"]

Augment: TypeAlias = "Callable[[object, torch.Generator], object]"
"""Takes a sample and a generator that is seeded by the sample's key; returns the sample to train on.

The sample's tensors and arrays are copies, which may be changed in place.
"""

_NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_LAST_S = 5.0
"""How long to wait for a loader that was killed, in seconds."""


class ByIndex(Protocol):
    """A map-style data set."""

    def __getitem__(self, index: int, /) -> object:
        """A sample."""

    def __len__(self) -> int:
        """How many there are."""


class Prepared(Dataset[object]):
    """Samples of one epoch of a trial, as the trial wants them.

    In a loader process the global generators of torch, Python and NumPy are seeded by each sample's key before it is
    read, so a data set that draws from them gives the same sample whichever process reads it.

    Args:
        samples: a map-style data set.
        seed: of the trial's epoch, from which the keys follow.
        augment: applied to each sample; None to leave it as it is.
        keyed: whether each sample is followed by its key: (x, y) becomes (x, y, key), a dict gets "key", and anything
            else x becomes (x, key).
        num_loaders: how many processes read them; 0 for none beside this one.
    """

    def __init__(
        self,
        samples: ByIndex,
        seed: int,
        *,
        augment: Augment | None = None,
        keyed: bool = False,
        num_loaders: int = 0,
    ) -> None:
        self.num_loaders = num_loaders
        self.seed = seed
        self._samples = samples
        self._augment = augment
        self._keyed = keyed

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> object:
        key = int(keys_of(self.seed, torch.tensor(index, device="cpu")))
        if get_worker_info() is not None:
            _seed_all(key)
        sample = self._samples[index]
        if self._augment is not None:
            sample = self._augment(_copied(sample), torch.Generator(device="cpu").manual_seed(key))
        return _with_key(sample, key) if self._keyed else sample


def _copied(sample: object) -> object:
    """The sample with tensors of its own, since a data set may give views of itself."""
    if isinstance(sample, torch.Tensor):
        return sample.clone()
    if isinstance(sample, dict):
        return {name: _copied(part) for name, part in sample.items()}
    if isinstance(sample, (tuple, list)):
        found = [_copied(part) for part in sample]
        return sample._make(found) if hasattr(sample, "_make") else type(sample)(found)
    return sample.copy() if type(sample).__module__ == "numpy" and hasattr(sample, "copy") else sample


def _with_key(sample: object, key: int) -> object:
    if isinstance(sample, dict):
        return {**sample, "key": key}
    return (*sample, key) if isinstance(sample, (tuple, list)) else (sample, key)


def _seed_all(key: int) -> None:
    torch.default_generator.manual_seed(key)  # torch.manual_seed would look at every other device too
    random.seed(key)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(key % 2**32)


def fetched(samples: ByIndex, rows: Sequence[Sequence[int]]) -> Generator[object, None, None]:
    """Batches, collated by torch, on the CPU.

    The processes of a `Prepared` that has some begin with the first batch, and are gone when this iterator is at its
    end, is closed or raises.

    Args:
        samples: a map-style data set.
        rows: the indices of each batch's samples.
    """
    if isinstance(samples, Prepared) and samples.num_loaders and rows:
        yield from _loaded(samples, rows)
        return
    for row in rows:
        yield default_collate([samples[index] for index in row])


def _loaded(samples: Prepared, rows: Sequence[Sequence[int]]) -> Iterator[object]:
    loader = DataLoader(
        samples,
        batch_sampler=rows,  # type: ignore[arg-type]  # it takes any sequence of sequences
        num_workers=min(samples.num_loaders, len(rows)),
        multiprocessing_context="fork",  # the job's own modules can't be imported by a process that begins anew
        worker_init_fn=partial(_begin, os.getpid()),
        # Its own, for it draws a number from it, where the global one is part of what a trial resumes.
        generator=torch.Generator(device="cpu").manual_seed(samples.seed),
    )
    before = set(multiprocessing.active_children())
    with _notices_wait():
        batches = iter(loader)
    mine = set(multiprocessing.active_children()) - before
    try:
        yield from batches
    finally:
        _end(batches, mine)


@contextlib.contextmanager
def _notices_wait() -> Iterator[None]:
    """Keep notices back while loaders are forked: until they ignore them, they would die of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOTICES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(parent: int, _number: int) -> None:
    """In a loader: a notice is for who trains, and a loader ends with it, however that ends."""
    for number in _NOTICES:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOTICES)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _end(batches: Iterator[object], processes: set[multiprocessing.process.BaseProcess]) -> None:
    # What its __del__ calls; but an exception in flight would keep the object, and with it the processes.
    with contextlib.suppress(AttributeError):
        batches._shutdown_workers()  # type: ignore[attr-defined]
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join(_LAST_S)
