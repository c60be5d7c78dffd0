"""Which samples an epoch takes, in which order: a function of a seed alone, so that a trial can go on in mid-epoch.

Order.of(1000).indices(seed)                                        each once, shuffled
Order.of(1000, weights=weights).indices(seed)                       1000 drawn by weight, with replacement
Order.of(1000, weights=weights, replacement=False, num=600)         600 of them, none twice
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

__all__ = ["Order", "Weights"]

Weights: TypeAlias = "Sequence[float] | torch.Tensor"
"""A number a sample, finite and not negative; one of weight 0 is never drawn."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """How the samples of an epoch are taken; made by `of`.

    Args:
        num: how many are taken.
        shuffle: in random order.
        weights: by which they are drawn, float64 on the CPU; None to take each once.
        replacement: whether one can be drawn again.
    """

    num: int
    shuffle: bool
    weights: torch.Tensor | None
    replacement: bool

    @classmethod
    def of(
        cls,
        size: int,
        *,
        shuffle: bool = True,
        weights: Weights | None = None,
        replacement: bool = True,
        num: int | None = None,
    ) -> Order:
        """That of a data set of `size` samples; the other arguments are those of `Trial.batches`.

        Raises:
            ValueError: a weight is negative or not finite, or all are 0; there are not as many as samples; fewer have a
                weight above 0 than are to be drawn without replacement; or the arguments don't go together.
        """
        if weights is None:
            if num is not None or not replacement:
                raise ValueError(
                    "num and replacement say how samples are drawn by weights: give weights, or leave them out"
                )
            return cls(num=size, shuffle=shuffle, weights=None, replacement=False)
        if not shuffle:
            raise ValueError("samples are drawn by weights in random order: leave out shuffle=False, or the weights")
        found = _checked(weights, size)
        num_positive = int(found.count_nonzero())
        if num is None:
            num = size if replacement else num_positive
        if num < 0 or (num and not num_positive) or (num > num_positive and not replacement):
            kind = "with" if replacement else "without"
            raise ValueError(
                f"can't draw {num} samples {kind} replacement: {num_positive} of {size} have a weight above 0"
            )
        return cls(num=num, shuffle=True, weights=found, replacement=replacement)

    def indices(self, seed: int) -> torch.Tensor | None:
        """The samples, int64, shape (num,); None for all of them in their own order.

        Drawn one after the other, each with a probability in proportion to its weight; without replacement, in
        proportion among those that are left, by one exponential waiting time a sample, the shortest first (Efraimidis
        and Spirakis 2006, Weighted random sampling with a reservoir, Inf. Process. Lett. 97).

        Args:
            seed: decides which; equal seeds give equal samples.
        """
        if not self.shuffle:
            return None
        generator = torch.Generator(device="cpu").manual_seed(seed)
        if self.weights is None:
            return torch.randperm(self.num, generator=generator, device="cpu")
        if not self.replacement:
            waits = torch.empty_like(self.weights).exponential_(generator=generator) / self.weights
            longest = torch.finfo(waits.dtype).max  # of a weight near 0; those of 0 wait for ever
            return waits.where(self.weights == 0, waits.clamp(max=longest)).argsort(stable=True)[: self.num]
        if not self.num:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        sums = self.weights.cumsum(0)
        points = torch.rand(self.num, generator=generator, dtype=torch.float64, device="cpu") * sums[-1]
        # Rounding can bring a point up to the whole sum: that falls to the last sample of any weight.
        return torch.searchsorted(sums, points, right=True).clamp_(max=int(self.weights.nonzero()[-1]))


def _checked(weights: Weights, size: int) -> torch.Tensor:
    found = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
    if found.shape != (size,):
        raise ValueError(f"expected a weight for each of {size} samples, found a shape of {tuple(found.shape)}")
    wrong = (~(found.isfinite() & (found >= 0))).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"a weight must be finite and not negative, found {float(found[at])} at sample {at}")
    if not found.sum().isfinite():
        raise ValueError("the weights add up to more than a float64 holds: scale them")
    return found
