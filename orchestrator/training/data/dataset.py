"""Samples by index: what a job may pass as a data set, and how a batch is taken from it.

(x, y)                 tensors with the samples along the first dimension; the fastest form
TensorDataset          the same
Dataset                any map-style data set; samples are collated by torch
DataLoader             for training only; it brings its own batches and order
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import TypeAlias, cast

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from orchestrator.training.augment import keys_of
from orchestrator.training.data.loading import Augment, ByIndex, Prepared, fetched

__all__ = ["Batch", "Samples", "batches", "dealt", "length", "num_samples", "part", "prepared", "to_device"]

Samples: TypeAlias = "Sequence[torch.Tensor] | Dataset[object]"
Batch: TypeAlias = object
"""What a job's `losses` gets: a tuple of tensors, or whatever the data set collates to."""

_PIECE_BYTES = 16 << 20
"""About as much of a data set is copied at a time."""


def _tensors(samples: Samples) -> tuple[torch.Tensor, ...] | None:
    if isinstance(samples, TensorDataset):
        return samples.tensors
    if isinstance(samples, (tuple, list)) and all(isinstance(part, torch.Tensor) for part in samples):
        return tuple(samples)
    return None


def num_samples(samples: Samples) -> int:
    """How many samples there are.

    Raises:
        TypeError: it is none of the forms of this module, or its tensors differ in length.
    """
    tensors = _tensors(samples)
    if tensors is None:
        if not hasattr(samples, "__len__") or not hasattr(samples, "__getitem__"):
            raise TypeError(f"a data set is a tuple of tensors or a map-style Dataset, not {type(samples).__name__}")
        return len(samples)
    if len({len(part) for part in tensors}) != 1:
        raise TypeError(f"the tensors of a data set differ in length: {[len(part) for part in tensors]}")
    return len(tensors[0])


def prepared(
    samples: Samples, seed: int, *, augment: Augment | None = None, keyed: bool = False, num_workers: int = 0
) -> Samples:
    """The samples of one epoch, in a form of this module again; the same ones, where nothing is to be done.

    Keys are no more than another tensor where the samples are tensors; to augment these, or to read them in other
    processes, takes them one by one, which is far slower.

    Args:
        samples: see the module.
        seed: of the trial's epoch, from which the keys follow.
        augment: applied to each sample; None to leave it as it is.
        keyed: whether each sample is followed by its key.
        num_workers: how many processes read them.

    Raises:
        ValueError: `num_workers` is negative.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers is a number of processes, at least 0, found {num_workers}")
    tensors = _tensors(samples)
    if tensors is not None and augment is None and not num_workers:
        return (*tensors, keys_of(seed, torch.arange(len(tensors[0]), device="cpu"))) if keyed else samples
    if augment is None and not keyed and not num_workers:
        return samples
    one_by_one = _Rows(tensors) if tensors is not None else cast(ByIndex, samples)
    return Prepared(one_by_one, seed, augment=augment, keyed=keyed, num_loaders=num_workers)


class _Rows:
    """The samples of tensors one by one."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[index] for part in self._tensors)


def batches(
    samples: Samples, order: torch.Tensor | None, batch_size: int, num: int, device: torch.device, begin: int = 0
) -> Generator[Batch, None, None]:
    """The samples in `order`, `batch_size` at a time, the last batch maybe smaller, on a device.

    Tensors are taken many batches at a time, which is several times faster than one at a time. Their batches are views
    of a copy that don't overlap, so a job may change them in place and leaves its data set as it is.

    Args:
        samples: see the module.
        order: sample indices, shape (num,), int64; None for the first `num` in their own order.
        batch_size: samples a batch.
        num: how many samples there are.
        device: where the batches are to be.
        begin: the first batch that is wanted; samples of those before it are not touched.
    """
    tensors = _tensors(samples)
    if tensors is not None:
        yield from _cut(tensors, order, batch_size, num, device, begin)
        return
    assert not isinstance(samples, (tuple, list))
    indices = range(num) if order is None else order.tolist()
    rows = [indices[first : first + batch_size] for first in range(begin * batch_size, num, batch_size)]
    with contextlib.closing(fetched(cast(ByIndex, samples), rows)) as found:
        for batch in found:
            yield to_device(batch, device)


def dealt(
    samples: Samples, batch_size: int, num: int, device: torch.device, rank: int, world_size: int
) -> Iterator[Batch]:
    """Every `world_size`-th batch of the samples in their own order, from batch `rank` on; no other sample is touched.

    A batch is the same in every bit, and lies in memory in the same way, whoever it is dealt to. So each is a copy of
    its own: where a view of several begins would depend on those before it.

    Args:
        samples: see the module.
        batch_size: samples a batch; the last one may be smaller.
        num: how many samples there are.
        device: where the batches are to be.
        rank: of this process.
        world_size: how many processes share the batches.
    """
    tensors = _tensors(samples)
    rows = [
        range(first, min(first + batch_size, num)) for first in range(rank * batch_size, num, world_size * batch_size)
    ]
    if tensors is not None:
        for row in rows:
            yield tuple(_taken(part, None, row.start, row.stop, device) for part in tensors)
        return
    assert not isinstance(samples, (tuple, list))
    for batch in fetched(cast(ByIndex, samples), rows):
        yield to_device(batch, device)


def _cut(
    tensors: tuple[torch.Tensor, ...],
    order: torch.Tensor | None,
    batch_size: int,
    num: int,
    device: torch.device,
    begin: int,
) -> Iterator[tuple[torch.Tensor, ...]]:
    # Whole batches, counted from the first one, so that no batch depends on where the pieces end.
    per_piece = max(1, _PIECE_BYTES // (batch_size * sum(map(_sample_bytes, tensors)) or 1))
    # Of the piece in which it begins all is taken, since a batch is to lie in memory as it does without `begin`.
    pieces, skipped = divmod(begin, per_piece)
    for first in range(pieces * per_piece * batch_size, num, per_piece * batch_size):
        last = min(first + per_piece * batch_size, num)
        taken = (_taken(part, order, first, last, device) for part in tensors)
        yield from islice(zip(*(torch.split(part, batch_size) for part in taken), strict=True), skipped, None)
        skipped = 0


def _taken(part: torch.Tensor, order: torch.Tensor | None, first: int, last: int, device: torch.device) -> torch.Tensor:
    if order is None:
        # A view would let the job change its own data set, for this trial and those after it.
        return part[first:last].to(device, non_blocking=True, copy=True)
    # Five times as fast as part[order].
    return part.index_select(0, order[first:last].to(part.device)).to(device, non_blocking=True)


def _sample_bytes(part: torch.Tensor) -> int:
    return part.nbytes // max(1, len(part))


def generators(loader: object) -> list[torch.Generator]:
    """The generators of a DataLoader's own, and those of its samplers."""
    holders = [loader]
    for name in ("sampler", "batch_sampler"):
        if (holder := getattr(loader, name, None)) is not None:
            holders += [holder, getattr(holder, "sampler", None)]
    found = (getattr(holder, "generator", None) for holder in holders)
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def length(batch: Batch) -> int:
    """How many samples a batch has: the length of the first tensor in it.

    Raises:
        TypeError: there is none.
    """
    found = _first_tensor(batch)
    if found is None or not found.dim():
        raise TypeError(f"a batch is a tensor with its samples along the first dimension, or has one in it: {batch!r}")
    return len(found)


def part(batch: Batch, first: int, last: int) -> Batch:
    """The samples of a batch from `first` to before `last`, in the same containers.

    Raises:
        TypeError: there is something in it of which it can't be told what belongs to which sample.
    """
    num = length(batch)

    def cut(of: Batch) -> Batch:
        if isinstance(of, torch.Tensor) and of.dim() and len(of) == num:
            return of[first:last]
        if isinstance(of, (tuple, list)):
            found = [cut(inner) for inner in of]
            return of._make(found) if hasattr(of, "_make") else type(of)(found)
        if isinstance(of, dict):
            return {key: cut(inner) for key, inner in of.items()}
        what = f"a tensor of shape {tuple(of.shape)}" if isinstance(of, torch.Tensor) else repr(of)
        raise TypeError(
            f"a batch of {num} samples can be taken in micro-batches if all in it is tensors with the samples along "
            f"the first dimension; found {what}"
        )

    return cut(batch)


def _first_tensor(batch: Batch) -> torch.Tensor | None:
    if isinstance(batch, torch.Tensor):
        return batch
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def is_loader(samples: object) -> bool:
    """Whether it brings its own batches."""
    return isinstance(samples, DataLoader)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor in it on `device`; containers are kept."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, (tuple, list)):
        moved: list[Batch] = [to_device(part, device) for part in batch]
        return batch._make(moved) if hasattr(batch, "_make") else type(batch)(moved)
    if isinstance(batch, dict):
        return {key: to_device(part, device) for key, part in batch.items()}
    return batch
