"""How learning depends on the size of batches: the same small network, with batches of 8 to 512 digits.

    orc run jobs/batch_size_curves.yaml                                  on this machine
    orc submit jobs/batch_size_curves.yaml                               on Slurm
    orc summary --curve val_loss --by batch_size                         the curves: mean and spread over the seeds
    orc run jobs/batch_size_curves.yaml scaling=linear,sqrt,none         and by how the rate follows the size

With scaling=linear the rate is `lr` for batches of 32 and grows with their size (Goyal et al. 2017, Accurate, large
minibatch SGD, section 2.1); with sqrt it grows as its root; with none it stays. Every trial sees as many samples, so
the larger its batches, the fewer its steps. The data are scikit-learn's digits, 1,797 images of 8x8 pixels, of which
360 are for validation. Needs scikit-learn (pip install 'slurm-orchestrator[examples]').
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F  # noqa: N812

import orchestrator as orc

Samples = tuple[torch.Tensor, torch.Tensor]

POWERS = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}


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


def build(*, lr: float = 0.1, batch_size: int = 32, scaling: str = "linear") -> orc.State:
    net = torch.nn.Sequential(torch.nn.Linear(64, 50), torch.nn.Tanh(), torch.nn.Linear(50, 10))
    scaled = lr * (batch_size / 32) ** POWERS[scaling]
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=scaled))


def losses(net: torch.nn.Module, batch: Samples) -> dict[str, torch.Tensor]:
    """Per-sample values, shape (batch,); "loss" is trained on."""
    x, y = batch
    z = net(x)
    return {"loss": F.cross_entropy(z, y, reduction="none"), "error": (z.argmax(-1) != y).float()}


def train(trial: orc.Trial, *, epochs: int = 10, batch_size: int = 32) -> None:
    train_set, val_set = data()
    trial.build(build)
    for _ in trial.epochs(epochs):
        for batch in trial.batches(train_set, batch_size):
            trial.step(losses, batch)
        trial.validate(losses, val_set)
