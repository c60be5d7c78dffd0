"""The training of jobs/digits_mlp.py as a plain torch loop: what one would write without orchestrator.

The same network, data, optimizer, 10 epochs, batch 64, and all 360 validation samples after each epoch. The mean is
torch's own instead of an exact one, and nothing is recorded.
"""

from __future__ import annotations

import functools
import math
import random

import torch
import torch.nn.functional as F  # noqa: N812

Samples = tuple[torch.Tensor, torch.Tensor]

torch.set_num_threads(1)


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


def draw(index: int) -> dict[str, float]:
    """Parameters of trial `index`, from the distributions of jobs/digits_mlp.yaml."""
    rng = random.Random(index)
    return {
        "lr": math.exp(rng.uniform(math.log(0.003), math.log(1.0))),
        "momentum": rng.uniform(0.0, 0.97),
        "weight_decay": math.exp(rng.uniform(math.log(1e-7), math.log(1e-2))),
    }


def train(*, lr: float, momentum: float, weight_decay: float, seed: int, hidden: int = 50) -> float:
    """The last validation loss."""
    epochs, batch_size = 10, 64
    (x, y), (x_val, y_val) = data()
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 10))
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    loss = math.nan
    for _ in range(epochs):
        net.train()
        order = torch.randperm(len(x))
        for first in range(0, len(x), batch_size):
            picked = order[first : first + batch_size]
            opt.zero_grad()
            F.cross_entropy(net(x[picked]), y[picked]).backward()
            opt.step()
        net.eval()
        with torch.no_grad():
            z = net(x_val)
            loss = F.cross_entropy(z, y_val).item()
            (z.argmax(-1) == y_val).float().mean().item()
    return loss


def train_block(first: int, last: int) -> list[tuple[float, int]]:
    """Trials `first` to `last` - 1 one after the other, as (value, index)."""
    return [(train(**draw(index), seed=index), index) for index in range(first, last)]
