"""Augmentation whose random numbers belong to the sample: the same ones wherever, and in which batch, it turns up.

    for x, y, keys in trial.batches(train_set, 128, keyed=True):
        x = crop_and_flip(x, keys)                       a batch at once
        noise = uniform(keys, 7)                         or numbers of one's own: per sample, from a numbered draw

A key is a whole number of 63 bits that follows from the trial's seed, the epoch and the sample's index alone. What is
drawn from it is a hash of key and number of the draw, so nothing has a state that position in the epoch, loaders, ranks
or a resume could change, and a batch needs no loop over its samples.

The hash is the finalizer of SplitMix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators,
OOPSLA), in whole numbers alone, so it is the same on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

__all__ = ["crop_and_flip", "integers", "keys_of", "uniform"]

_ROWS, _COLUMNS, _FLIPS = -1, -2, -3
"""The draws of `crop_and_flip`; those of a job's own are numbered from 0."""

_63_BITS = (1 << 63) - 1


def _signed(word: int) -> int:
    """A number of 64 bits as int64 has it."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Each word hashed, one to one; int64, which wraps around."""
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros from the left, where torch would repeat the sign."""
    return (words >> by) & (_63_BITS >> (by - 1))


def keys_of(seed: int, indices: torch.Tensor) -> torch.Tensor:
    """The keys of samples, int64 from 0 to below 2**63, of the shape of `indices`.

    Args:
        seed: of the trial's epoch.
        indices: of the samples in their data set, int64.
    """
    return _mixed(_mixed(indices * _GAMMA + _signed(seed & ((1 << 64) - 1))) + _GAMMA) & _63_BITS


def _bits(keys: torch.Tensor, draw: int) -> torch.Tensor:
    """32 random bits a key, int64 from 0 to below 2**32."""
    return _shifted(_mixed(keys + _signed((draw + 1) * _GAMMA & ((1 << 64) - 1))), 32)


def integers(keys: torch.Tensor, draw: int, below: int) -> torch.Tensor:
    """A random whole number a key, int64 from 0 to below `below`; each as likely to within one part in 2**32 / below.

    Args:
        keys: int64, as `trial.batches(..., keyed=True)` gives them.
        draw: which of a sample's draws this is, from 0; equal ones give equal numbers.
        below: at most 2**31.

    Raises:
        ValueError: `below` is not in 1..2**31.
    """
    if not 1 <= below <= 1 << 31:
        raise ValueError(f"below must be in 1..2**31, found {below}")
    return _bits(keys, draw) * below >> 32


def uniform(keys: torch.Tensor, draw: int) -> torch.Tensor:
    """A random number a key, float32 from 0 to below 1, a multiple of 2**-24; the arguments are those of `integers`."""
    return (_bits(keys, draw) >> 8).to(torch.float32) * 2.0**-24


def crop_and_flip(x: torch.Tensor, keys: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """Images cut out anew, at a random place of the image with zeros around it, half of them mirrored left to right.

    The augmentation of He et al. 2015 (Deep residual learning for image recognition, section 4.2), with pad 4.

    Args:
        x: images, shape (batch, channels, height, width), of any type.
        keys: shape (batch,), int64.
        pad: zeros at each side, at least 0.

    Returns:
        Images of the same shape and type; `x` stays as it is.

    Raises:
        ValueError: the shapes are not as said.
    """
    if x.dim() != 4 or keys.shape != x.shape[:1] or pad < 0:
        raise ValueError(
            f"expected images of shape (batch, channels, height, width) with a key each, and pad of at least 0; found "
            f"shapes {tuple(x.shape)} and {tuple(keys.shape)}, and pad {pad}"
        )
    num, channels, height, width = x.shape
    along, across = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows = integers(keys, _ROWS, 2 * pad + 1)[:, None] + along
    is_flipped = integers(keys, _FLIPS, 2)[:, None] == 1
    columns = integers(keys, _COLUMNS, 2 * pad + 1)[:, None] + torch.where(is_flipped, across.flip(0), across)
    places = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).reshape(num, 1, -1)
    padded = F.pad(x, (pad, pad, pad, pad)).reshape(num, channels, -1)
    return padded.gather(2, places.expand(num, channels, -1)).reshape(x.shape)
