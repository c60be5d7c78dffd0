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


def batches(samples: Samples, order: torch.Tensor | None, batch_size: int, num: int) -> Iterator[Batch]:
    """The samples in `order`, `batch_size` at a time, the last batch maybe smaller.

    Args:
        samples: see the module.
        order: sample indices, shape (num,), int64; None for their own order, which needs no copy.
        batch_size: samples a batch.
        num: how many samples there are.
    """
    tensors = _tensors(samples)
    for first in range(0, num, batch_size):
        if order is None:
            picked: torch.Tensor | range = range(first, min(first + batch_size, num))
        else:
            picked = order[first : first + batch_size]
        if tensors is None:
            assert not isinstance(samples, (tuple, list))
            yield default_collate([samples[int(i)] for i in picked])
        elif isinstance(picked, range):
            yield tuple(part[picked.start : picked.stop] for part in tensors)
        else:
            yield tuple(part[picked] for part in tensors)


def is_loader(samples: object) -> bool:
    """Whether it brings its own batches."""
    return isinstance(samples, DataLoader)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor in it on `device`; containers are kept."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, (tuple, list)):
        moved: list[Batch] = [to_device(part, device) for part in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    if isinstance(batch, dict):
        return {key: to_device(part, device) for key, part in batch.items()}
    return batch
