"""Residual networks on CIFAR-10: those of He et al. 2015, Deep residual learning for image recognition, section 4.2.

    CIFAR10=/data/cifar-10 orc run jobs/cifar_resnet.yaml                    on this machine
    orc submit jobs/cifar_resnet.yaml data=/data/cifar-10 slurm.gres=gpu:1   on Slurm, a GPU each
    orc submit jobs/cifar_resnet.yaml data=/data/cifar-10 launch.ranks_per_node=4 slurm.gres=gpu:4

The folder holds CIFAR-10 (Krizhevsky 2009) in its binary or its Python form, as unpacked. Nothing is downloaded.

6n+2 layers with 16, 32 and 64 filters, shortcuts without parameters (option A), He's initialisation, weight decay 1e-4,
momentum 0.9, batches of 128, a rate of 0.1 that is divided by 10 at 1/2 and 3/4 of 64,000 iterations; 110 layers begin
with 0.01 for 400 iterations. Images are cut out of ones with 4 pixels of padding, and flipped. The paper's test errors
(table 6), trained on all 50,000 images (held_out=0): 8.75 % with 20 layers, 7.51 % with 32, 7.17 % with 44, 6.97 % with
56, and 6.43 % with 110, the best of five (6.61 % +- 0.16).
"""

from __future__ import annotations

import functools
import itertools
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import orchestrator as orc

Samples = tuple[torch.Tensor, torch.Tensor]

WARM_UP = 400
"""Iterations; in the paper, until the training error is below 80 %, which it says takes about as many."""


# Data


class Data(NamedTuple):
    """Samples to train on as bytes, shape (n, 3, 32, 32); others scaled, with the mean image and deviation of these."""

    train: Samples
    val: Samples
    test: Samples
    mean: torch.Tensor
    std: torch.Tensor

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """Bytes to numbers about 0."""
        return (x.float() - self.mean.to(x.device)) / self.std.to(x.device)


@functools.cache
def load(folder: str, held_out: int) -> Data:
    """The last `held_out` images of the training set are for validation; without any, the test set is."""
    (x, y), (x_test, y_test) = orc.read_cifar10(folder)
    num = len(x) - held_out
    train = (x[:num], y[:num])
    found = Data(train, train, train, train[0].float().mean(0), train[0].float().std(dim=(0, 2, 3))[:, None, None])
    test = (found.scaled(x_test), y_test)
    return found._replace(val=(found.scaled(x[num:]), y[num:]) if held_out else test, test=test)


# The network


class Block(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.stride = num_out // num_in
        self.conv1 = nn.Conv2d(num_in, num_out, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.stride > 1:  # option A: every other pixel, and zeros for the filters that are new
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return F.relu(x + y)


def resnet(layers: int) -> nn.Sequential:
    """A network for images of shape (batch, 3, 32, 32); gives logits, shape (batch, 10)."""
    each, rest = divmod(layers - 2, 6)
    if rest or each < 1:
        raise ValueError(f"layers must be 6n+2, such as 20, 32, 44, 56 or 110, not {layers}")
    widths = [16] * (each + 1) + [32] * each + [64] * each
    blocks = [Block(num_in, num_out) for num_in, num_out in itertools.pairwise(widths)]
    first = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    net = nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.zeros_(net[-1].bias)
    return net


# Training


def rate(iteration: int, iterations: int, layers: int) -> float:
    """By what the learning rate is multiplied."""
    if layers >= 110 and iteration < WARM_UP:
        return 0.1
    return 0.1 ** ((iteration >= iterations // 2) + (iteration >= iterations * 3 // 4))


def build(
    *,
    layers: int = 20,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    iterations: int = 64_000,
) -> orc.State:
    net = resnet(layers)
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    each_step = torch.optim.lr_scheduler.LambdaLR(opt, lambda iteration: rate(iteration, iterations, layers))
    return orc.State(net=net, opt=opt, each_step=each_step)


def losses(net: nn.Module, batch: Samples) -> dict[str, torch.Tensor]:
    """Per-sample values, shape (batch,); "loss" is trained on."""
    x, y = batch
    z = net(x)
    return {"loss": F.cross_entropy(z, y, reduction="none"), "error": (z.argmax(-1) != y).float()}


def train(
    trial: orc.Trial,
    *,
    data: str = "",
    iterations: int = 64_000,
    batch_size: int = 128,
    held_out: int = 5_000,
    micro_batches: int = 1,
    precision: str = "float32",
) -> None:
    found = load(data or os.environ.get("CIFAR10", "cifar-10"), held_out)
    per_epoch = -(-len(found.train[0]) // batch_size)
    trial.build(build, precision=precision)
    for _ in trial.epochs(-(-iterations // per_epoch)):
        for x, y, keys in trial.batches(found.train, batch_size, keyed=True):
            if trial.num_steps == iterations:
                break
            trial.step(losses, (orc.augment.crop_and_flip(found.scaled(x), keys), y), micro_batches=micro_batches)
        trial.validate(losses, found.val)
    trial.validate(losses, found.test, prefix="test_")
