"""A small network on handwritten digits: 64-50-10 on scikit-learn's digits, one trial in well under a second.

    orc run jobs/digits_mlp.yaml                     on this machine
    orc submit jobs/digits_mlp.yaml                  on Slurm

1,797 images of 8x8 pixels, of which 360, drawn once and for all, are for validation. Needs scikit-learn
(pip install 'slurm-orchestrator[examples]').
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F  # noqa: N812

import orchestrator as orc

Samples = tuple[torch.Tensor, torch.Tensor]


@functools.cache
def data() -> tuple[Samples, Samples]:
    """Training and validation samples: images, shape (n, 64), values in 0..1, and labels, shape (n,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.data).float() / 16
    y = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train_part, val_part = order[:-360], order[-360:]
    return (x[train_part], y[train_part]), (x[val_part], y[val_part])


def preload() -> None:
    """Runs once before workers are forked, so that they share what it loads."""
    data()


def build(*, lr: float, hidden: int = 50, momentum: float = 0.9, weight_decay: float = 0.0) -> orc.State:
    net = torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 10))
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return orc.State(net=net, opt=opt)


def losses(net: torch.nn.Module, batch: Samples) -> dict[str, torch.Tensor]:
    """Per-sample values, shape (batch,); "loss" is trained on."""
    x, y = batch
    z = net(x)
    values = {"loss": F.cross_entropy(z, y, reduction="none")}
    if not net.training:  # only reported, so only wanted when validating
        values["accuracy"] = (z.argmax(-1) == y).float()
    return values


def train(trial: orc.Trial, *, epochs: int = 10, batch_size: int = 64) -> None:
    train_set, val_set = data()
    trial.build(build)
    for _ in trial.epochs(epochs):
        for batch in trial.batches(train_set, batch_size):
            trial.step(losses, batch)
        trial.validate(losses, val_set)
