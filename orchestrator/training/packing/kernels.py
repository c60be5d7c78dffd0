"""What is computed another way for a pack than for a trial, because torch's way is slow for many small rows.

    with Kernels():
        values = losses(net, batch)             within torch.func.vmap

The values are the same but for rounding, and so are the gradients and what is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

__all__ = ["Kernels", "cross_entropy"]

_MOST_CLASSES = 15
"""With 16 classes of float32 a row fills a vector of the processor, and the kernel for rows is the faster one."""
_IGNORED = -100
"""The label that F.cross_entropy leaves out by default."""
_PLAIN = {"weight": None, "size_average": None, "ignore_index": _IGNORED, "reduce": None, "label_smoothing": 0.0}


class Kernels(TorchFunctionMode):
    """While it is entered, functions of torch are computed as this module says."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """As torch asks of each function that is called."""
        return _OURS.get(func, func)(*args, **(kwargs or {}))


def cross_entropy(z: torch.Tensor, y: torch.Tensor, *others: object, **options: object) -> torch.Tensor:
    """As F.cross_entropy: with few classes and one label a sample, the softmax is taken over columns instead of rows.

    torch's kernel for the last dimension takes one row after the other, however short; that for another dimension takes
    as many as fit into a vector: of 10 classes, five times as fast.
    """
    if others or not _is_plain(options) or not _is_small(z, y):
        return F.cross_entropy(z, y, *others, **options)  # type: ignore[arg-type]  # as it was called
    ignored = y == _IGNORED
    labels = torch.where(ignored, 0, y)[None]
    return torch.where(ignored, 0.0, -F.log_softmax(z.mT, dim=-2).gather(-2, labels).squeeze(-2))


def _is_plain(options: Mapping[str, object]) -> bool:
    """Whether options of F.cross_entropy ask for each sample's value, and for nothing else."""
    return options.get("reduction") == "none" and all(
        _PLAIN.get(name, value) == value for name, value in options.items()
    )


def _is_small(z: torch.Tensor, y: torch.Tensor) -> bool:
    return z.dim() == 2 and y.shape == z.shape[:1] and y.dtype == torch.int64 and 0 < z.shape[1] <= _MOST_CLASSES


_OURS: dict[Callable[..., object], Callable[..., object]] = {F.cross_entropy: cross_entropy}
