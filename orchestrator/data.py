"""Samples by index: what a job may pass as a data set, and how a batch is taken from it.

(x, y)                 tensors with the samples along the first dimension; the fastest form
TensorDataset          the same
Dataset                any map-style data set; samples are collated by torch
DataLoader             for training only; it brings its own batches and order
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

__all__ = ["Batch", "Samples", "batches", "num_samples", "to_device"]

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


def batches(
    samples: Samples, order: torch.Tensor | None, batch_size: int, num: int, device: torch.device
) -> Iterator[Batch]:
    """The samples in `order`, `batch_size` at a time, the last batch maybe smaller, on a device.

    Tensors are taken many batches at a time, which is several times faster than one at a time. Their batches are views
    of a copy that don't overlap, so a job may change them in place and leaves its data set as it is.

    Args:
        samples: see the module.
        order: sample indices, shape (num,), int64; None for the first `num` in their own order.
        batch_size: samples a batch.
        num: how many samples there are.
        device: where the batches are to be.
    """
    tensors = _tensors(samples)
    if tensors is not None:
        yield from _cut(tensors, order, batch_size, num, device)
        return
    assert not isinstance(samples, (tuple, list))
    indices = range(num) if order is None else order.tolist()
    for first in range(0, num, batch_size):
        yield to_device(default_collate([samples[i] for i in indices[first : first + batch_size]]), device)


def _cut(
    tensors: tuple[torch.Tensor, ...], order: torch.Tensor | None, batch_size: int, num: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, ...]]:
    # Whole batches, counted from the first one, so that no batch depends on where the pieces end.
    piece = batch_size * max(1, _PIECE_BYTES // (batch_size * sum(map(_sample_bytes, tensors)) or 1))
    for first in range(0, num, piece):
        last = min(first + piece, num)
        taken = (_taken(part, order, first, last, device) for part in tensors)
        yield from zip(*(torch.split(part, batch_size) for part in taken), strict=True)


def _taken(part: torch.Tensor, order: torch.Tensor | None, first: int, last: int, device: torch.device) -> torch.Tensor:
    if order is None:
        # A view would let the job change its own data set, for this trial and those after it.
        return part[first:last].to(device, non_blocking=True, copy=True)
    # Five times as fast as part[order].
    return part.index_select(0, order[first:last].to(part.device)).to(device, non_blocking=True)


def _sample_bytes(part: torch.Tensor) -> int:
    return part.nbytes // max(1, len(part))


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
