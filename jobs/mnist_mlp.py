"""A small network on handwritten digits: 784-50-10 on MNIST, plain SGD, three epochs.

    MNIST=/data/mnist orc run jobs/mnist_mlp.yaml                        on this machine
    orc submit jobs/mnist_mlp.yaml data=/data/mnist                      on Slurm
    orc submit jobs/mnist_mlp.yaml data=/data/mnist launch.ranks_per_node=4

The folder holds the four IDX files of LeCun, Cortes and Burges, as they are or as .gz: train-images-idx3-ubyte,
train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte. Nothing is downloaded. The last sixth of the
training images is for validation; the test images are looked at once, at the end.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

import orchestrator as orc

Samples = tuple[torch.Tensor, torch.Tensor]


class Data(NamedTuple):
    """Images, shape (n, 784), values in 0..1, and labels, shape (n,)."""

    train: Samples
    val: Samples
    test: Samples


@functools.cache
def load(folder: str) -> Data:
    (x, y), (x_test, y_test) = orc.read_mnist(folder)
    num = len(x) - len(x) // 6
    x, x_test = (images.flatten(1).float() / 255 for images in (x, x_test))
    return Data((x[:num], y[:num]), (x[num:], y[num:]), (x_test, y_test))


def preload() -> None:
    """Runs once before workers are forked, so that they share what it loads."""
    if "MNIST" in os.environ:
        load(os.environ["MNIST"])


def build(*, lr: float = 0.5, hidden: int = 50) -> orc.State:
    net = torch.nn.Sequential(torch.nn.Linear(784, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10))
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=lr))


def losses(net: torch.nn.Module, batch: Samples) -> dict[str, torch.Tensor]:
    """Per-sample values, shape (batch,); "loss" is trained on."""
    x, y = batch
    z = net(x)
    return {"loss": F.cross_entropy(z, y, reduction="none"), "error": (z.argmax(-1) != y).float()}


def train(trial: orc.Trial, *, data: str = "", epochs: int = 3, batch_size: int = 128) -> None:
    found = load(data or os.environ.get("MNIST", "mnist"))
    trial.build(build)
    for _ in trial.epochs(epochs):
        for batch in trial.batches(found.train, batch_size):
            trial.step(losses, batch)
        trial.validate(losses, found.val)
    trial.validate(losses, found.test, prefix="test_")
