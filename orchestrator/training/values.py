"""What a job's `losses(net, batch)` gives: per-sample values, and which of them are trained on.

named(found)["loss"]                            a tensor alone is the loss
trained_on(losses, net, batch)                  the loss of each sample, times the sample's weight
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from orchestrator.training.precision import Losses

__all__ = ["named", "trained_on"]


def named(values: torch.Tensor | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Per-sample values by name.

    Raises:
        KeyError: there is none that is trained on.
    """
    if isinstance(values, torch.Tensor):
        return {"loss": values}
    if "loss" not in values:
        raise KeyError(f'losses must give "loss", the values that are trained on; it gave {", ".join(values)}')
    return values


def trained_on(losses: Losses, net: torch.nn.Module, batch: object) -> torch.Tensor:
    """The values whose mean a step goes down; "weight", if there is one, is the samples' weight.

    Raises:
        KeyError: there is none that is trained on.
        ValueError: there are fewer weights than losses, or more.
    """
    values = named(losses(net, batch))
    loss, weight = values["loss"], values.get("weight")
    if weight is None:
        return loss
    if weight.shape != loss.shape:
        raise ValueError(f"losses must give as many weights as losses, found {len(weight)} for {len(loss)}")
    return loss * weight.detach()
