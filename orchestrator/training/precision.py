"""In which numbers a network computes, and the optimizer's step that goes with them.

    precision = Precision.of("bf16", device)        "float32" (the default), "bf16", or "fp16" on CUDA
    losses = precision.applied(losses)              the same, computed by torch.autocast
    values.backward(precision.scale(start))
    precision.step(opt, parameters, clip_norm=1.0)  clips the gradients' norm, and has the optimizer step

Weights and optimizer stay in float32 (Micikevicius et al. 2018, Mixed Precision Training, ICLR, section 3.1). The
gradients of fp16 would underflow, so what the backward begins with is scaled, by a factor that follows what overflows
(section 3.2); bf16 has the range of float32 and needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

__all__ = ["Losses", "Precision"]

Losses: TypeAlias = "Callable[[torch.nn.Module, object], torch.Tensor | Mapping[str, torch.Tensor]]"

_DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALED = ["cuda"]
"""Devices on which fp16 is worth its trouble."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How a network computes.

    Args:
        device: where.
        dtype: of what autocast computes in short; None for float32 throughout.
        scaler: of fp16's gradients; its state belongs to the trial's.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None

    @classmethod
    def of(cls, name: str, device: torch.device) -> Precision:
        """The precision of that name.

        Raises:
            ValueError: there is none, or not on this device.
        """
        if name not in _DTYPES:
            raise ValueError(f"precision {name!r} is not known: expected one of {', '.join(_DTYPES)}")
        if name != "fp16":
            return cls(device=device, dtype=_DTYPES[name])
        if device.type not in _SCALED:
            raise ValueError(f"precision 'fp16' needs a CUDA device, and this trial runs on {device}: use 'bf16'")
        return cls(device=device, dtype=torch.float16, scaler=torch.amp.GradScaler(device.type))

    def applied(self, losses: Losses) -> Losses:
        """`losses`, computed in this precision; the values come as float32 at least."""
        if self.dtype is None:
            return losses

        def found(net: torch.nn.Module, batch: object) -> torch.Tensor | Mapping[str, torch.Tensor]:
            with torch.autocast(self.device.type, self.dtype):
                values = losses(net, batch)
            if isinstance(values, torch.Tensor):
                return _widened(values)
            return {name: _widened(value) for name, value in values.items()}

        return found

    @property
    def scale(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What is to be done with that which a backward begins with; None for nothing."""
        return None if self.scaler is None else self.scaler.scale

    def step(
        self,
        opt: torch.optim.Optimizer,
        parameters: Iterable[torch.Tensor],
        *,
        clip_norm: float | None = None,
        look: Callable[[], None] | None = None,
    ) -> bool:
        """Have the optimizer step; returns whether it has, which it does not where fp16 overflowed.

        Args:
            opt: the optimizer.
            parameters: whose gradients are clipped.
            clip_norm: the most that the norm of all gradients together may be (Pascanu et al. 2013, On the difficulty
                of training recurrent neural networks, ICML, algorithm 1); None for no limit.
            look: called when the gradients are what the loss gave, before they are clipped.

        Raises:
            ValueError: `clip_norm` is not positive.
        """
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm is the largest norm of the gradients, a positive number, not {clip_norm}")
        scaler = self.scaler
        if scaler is not None:
            scaler.unscale_(opt)
        if look is not None:
            look()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        if scaler is None:
            opt.step()
            return True
        before = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        return scaler.get_scale() >= before


def _widened(values: torch.Tensor) -> torch.Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
