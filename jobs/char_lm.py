"""A small language model: a decoder-only transformer on characters, of Python's own manual or of a text of yours.

    orc run jobs/char_lm.yaml                                            on this machine
    orc run jobs/char_lm.yaml data=/data/shakespeare.txt                 on another text
    orc submit jobs/char_lm.yaml precision=bf16 slurm.gres=gpu:1         on Slurm

The manual is what `help()` shows for topics, half a million characters that come with every Python, and may differ from
one version to the next. Characters are bytes, so any file will do; its last tenth is for validation. Blocks normalise
first (Radford et al. 2019), the optimizer is AdamW with a norm of the gradients of at most 1, its rate warms up and
follows a cosine. "bits" are bits per character.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import orchestrator as orc

Samples = tuple[torch.Tensor]


@functools.cache
def load(file: str, context: int) -> tuple[Samples, Samples]:
    """Training and validation samples: pieces of `context` + 1 bytes, the last of each the first of the next."""
    if file:
        text = Path(file).read_bytes()
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics)).encode()
    characters = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    parts = characters.split(len(text) - len(text) // 10)
    if len(parts) < 2 or len(parts[1]) <= context:
        raise ValueError(f"a tenth of the text must be longer than the context of {context}; it has {len(text)} bytes")
    train_part, val_part = (part.unfold(0, context + 1, context) for part in parts[:2])
    return (train_part,), (val_part,)


class Block(nn.Module):
    """Attention to the characters before, and two layers on each."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.asked, self.found = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        split = self.asked(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (batch, heads, context, width / heads)
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + F.dropout(self.found(seen.transpose(1, 2).flatten(2)), dropout, self.training)
        return x + F.dropout(self.inner(self.norm2(x)), dropout, self.training)


class Transformer(nn.Module):
    """Bytes, shape (batch, n), to logits of the next ones, shape (batch, n, 256); n is at most `context`."""

    def __init__(self, *, layers: int, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.what, self.where = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        found: torch.Tensor = self.out(self.norm(self.blocks(self.what(x) + self.where(places))))
        return found


def rate(step: int, steps: int, warm_up: int) -> float:
    """By what the learning rate is multiplied: up in a line, then down to a tenth along a cosine."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up)))


def build(
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    context: int = 128,
    dropout: float = 0.0,
    steps: int = 1000,
    warm_up: int = 50,
) -> orc.State:
    net = Transformer(layers=layers, width=width, heads=heads, context=context, dropout=dropout)
    opt = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    each_step = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: rate(step, steps, warm_up))
    return orc.State(net=net, opt=opt, each_step=each_step)


def losses(net: nn.Module, batch: Samples) -> dict[str, torch.Tensor]:
    """Per-sample values, shape (batch,), the means over a sample's characters; "loss" is trained on."""
    pieces = batch[0].long()
    z = net(pieces[:, :-1])
    found = F.cross_entropy(z.transpose(1, 2), pieces[:, 1:], reduction="none").mean(1)
    return {"loss": found, "bits": found / math.log(2)}


def train(
    trial: orc.Trial,
    *,
    data: str = "",
    context: int = 128,
    steps: int = 1000,
    batch_size: int = 32,
    micro_batches: int = 1,
    precision: str = "float32",
) -> None:
    train_set, val_set = load(data, context)
    per_epoch = -(-len(train_set[0]) // batch_size)
    trial.build(build, precision=precision)
    for _ in trial.epochs(-(-steps // per_epoch)):
        for batch in trial.batches(train_set, batch_size):
            if trial.num_steps == steps:
                break
            trial.step(losses, batch, micro_batches=micro_batches, clip_norm=1.0)
        trial.validate(losses, val_set)
