"""A small network on a table: how a disease progresses within a year, from ten measurements of 442 diabetes patients.

    orc run jobs/tabular_regression.yaml                                 on this machine
    orc submit jobs/tabular_regression.yaml                              on Slurm

The data are scikit-learn's (Efron et al. 2004, Least angle regression); 88 patients, drawn once and for all, are for
validation. Columns and target are scaled by the training part's mean and deviation, and what is reported is in the
target's own unit (25 to 346): the root of the mean squared error, the mean absolute error, that in parts of the target
(MAPE, 0.1 for 10 %), and R². Guessing the mean gives an RMSE of 81, a linear fit of 53. Needs scikit-learn
(pip install 'slurm-orchestrator[examples]').
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import nn

import orchestrator as orc

Samples = tuple[torch.Tensor, torch.Tensor]


class Data(NamedTuple):
    """Scaled columns, shape (n, 10), and targets, shape (n,), in units of `std` from `mean`."""

    train: Samples
    val: Samples
    mean: torch.Tensor
    std: torch.Tensor


@functools.cache
def load() -> Data:
    from sklearn.datasets import load_diabetes

    table, targets = load_diabetes(return_X_y=True, scaled=False)
    x, y = torch.from_numpy(table).float(), torch.from_numpy(targets).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, val = order[:-88], order[-88:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    mean, std = y[train].mean(), y[train].std()
    scaled = (y - mean) / std
    return Data((x[train], scaled[train]), (x[val], scaled[val]), mean, std)


def preload() -> None:
    """Runs once before workers are forked, so that they share what it loads."""
    load()


def build(*, lr: float = 1e-3, hidden: int = 32, dropout: float = 0.1, weight_decay: float = 0.01) -> orc.State:
    net = nn.Sequential(nn.Linear(10, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1), nn.Flatten(0))
    return orc.State(net=net, opt=torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay))


def losses(net: nn.Module, batch: Samples) -> dict[str, torch.Tensor]:
    """Per-sample values, shape (batch,); "loss" is trained on, the others are what the metrics are made of."""
    x, y = batch
    z = net(x)
    values = {"loss": orc.losses.mse(z, y)}
    if not net.training:
        mean, std = (one.to(y.device) for one in load()[2:])
        values |= orc.losses.regression(z * std + mean, y * std + mean)
    return values


METRICS = {"rmse": orc.metrics.rmse, "mae": orc.metrics.mae, "mape": orc.metrics.mape, "r2": orc.metrics.r2}


def train(trial: orc.Trial, *, epochs: int = 60, batch_size: int = 32) -> None:
    found = load()
    trial.build(build)
    for _ in trial.epochs(epochs):
        for batch in trial.batches(found.train, batch_size):
            trial.step(losses, batch)
        trial.validate(losses, found.val, derived=METRICS)
