"""Random numbers that belong to a sample, and images that are cut out by them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.training.augment import crop_and_flip, integers, keys_of, uniform

WORD = (1 << 64) - 1


def mixed(word: int) -> int:
    """The finalizer of SplitMix64, in numbers without end."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


@given(seed=st.integers(0, (1 << 63) - 1), index=st.integers(0, 1 << 40), draw=st.integers(-3, 1000))
def test_keys_and_numbers_are_those_of_the_hash(seed: int, index: int, draw: int) -> None:
    gamma = 0x9E3779B97F4A7C15
    key = mixed(mixed((index * gamma + seed) & WORD) + gamma & WORD) & (1 << 63) - 1
    keys = keys_of(seed, torch.tensor([index]))
    assert keys.tolist() == [key]
    bits = mixed((key + (draw + 1) * gamma) & WORD) >> 32
    assert integers(keys, draw, 1000).tolist() == [bits * 1000 >> 32]
    assert uniform(keys, draw).tolist() == [(bits >> 8) / 2**24]


def test_the_generator_is_that_of_the_paper() -> None:
    # What Java's SplittableRandom(1234567) gives first.
    assert [mixed(1234567 + n * 0x9E3779B97F4A7C15 & WORD) for n in (1, 2)] == [
        6457827717110365317,
        3203168211198807973,
    ]


def test_keys_differ_by_seed_and_sample_and_numbers_are_spread_evenly() -> None:
    keys = torch.cat([keys_of(seed, torch.arange(5000)) for seed in (1, 2, 1 << 62)])
    assert len(keys.unique()) == 15_000
    counts = torch.stack([integers(keys, draw, 9).bincount(minlength=9) for draw in range(4)])
    assert ((counts - 15_000 / 9).abs() < 5 * (15_000 / 9) ** 0.5).all()
    found = uniform(keys, 0)
    assert (found >= 0).all()
    assert (found < 1).all()
    assert found.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("below", [0, -1, (1 << 31) + 1])
def test_a_range_that_is_none_is_told(below: int) -> None:
    with pytest.raises(ValueError, match=r"below must be in 1..2\*\*31"):
        integers(torch.tensor([1]), 0, below)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("pad", "shape"), [(4, (3, 32, 32)), (2, (1, 5, 7)), (0, (2, 4, 3))])
def test_each_image_is_cut_out_at_its_own_place(dtype: torch.dtype, pad: int, shape: tuple[int, int, int]) -> None:
    x = torch.randint(1, 255, (40, *shape)).to(dtype)
    before, keys = x.clone(), keys_of(5, torch.arange(40))
    found = crop_and_flip(x, keys, pad)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert torch.equal(x, before)
    height, width = shape[1:]
    places = set()
    for image, cut in zip(x, found, strict=True):
        padded = F.pad(image, (pad,) * 4)
        cuts = {
            (row, column): padded[:, row : row + height, column : column + width]
            for row in range(2 * pad + 1)
            for column in range(2 * pad + 1)
        }
        [place] = [
            (at, flip) for at, one in cuts.items() for flip in (0, 1) if torch.equal(cut, one.flip(2) if flip else one)
        ]
        places.add(place)
    assert len(places) == 2 if pad == 0 else len(places) > 10


def test_neither_batch_nor_order_matters() -> None:
    x, keys = torch.rand(30, 3, 8, 8), keys_of(1, torch.arange(30))
    order = torch.randperm(30)
    whole = crop_and_flip(x, keys)
    parts = [crop_and_flip(x[rows], keys[rows]) for rows in order.split(7)]
    assert torch.equal(torch.cat(parts), whole[order])


@pytest.mark.parametrize(("shape", "num"), [((4, 8, 8), 4), ((4, 1, 8, 8), 3)])
def test_images_of_another_shape_are_told(shape: tuple[int, ...], num: int) -> None:
    with pytest.raises(ValueError, match="expected images of shape"):
        crop_and_flip(torch.zeros(shape), torch.zeros(num, dtype=torch.int64))
