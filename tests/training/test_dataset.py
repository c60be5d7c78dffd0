"""How batches are taken from samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.training.data import dataset

CPU = torch.device("cpu")


@given(
    num=st.integers(0, 50),
    batch_size=st.integers(1, 60),
    piece=st.sampled_from([1, 100, 1000, 1 << 20]),
    shuffled=st.booleans(),
)
def test_pieces_change_nothing(num: int, batch_size: int, piece: int, shuffled: bool) -> None:
    x, y = torch.arange(3.0 * num).reshape(num, 3), torch.arange(num)
    order = torch.randperm(num) if shuffled else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_PIECE_BYTES", piece)
        found = list(dataset.batches((x, y), order, batch_size, num, CPU))
    wanted = [range(num)[first : first + batch_size] for first in range(0, num, batch_size)]
    picked = [[int(order[i]) if order is not None else i for i in batch] for batch in wanted]
    assert [b[1].tolist() for b in found] == picked  # type: ignore[index]
    assert all(torch.equal(b[0], x[rows]) for b, rows in zip(found, picked, strict=True))  # type: ignore[index]


@pytest.mark.parametrize("order", [None, torch.arange(10)])
def test_a_batch_may_be_changed_in_place(order: torch.Tensor | None) -> None:
    x = torch.arange(20.0).reshape(10, 2)
    before = x.clone()
    first, second = dataset.batches((x,), order, 5, 10, CPU)
    first[0].zero_()  # type: ignore[index]
    assert torch.equal(second[0], before[5:])  # type: ignore[index]
    assert torch.equal(x, before)


def test_tensors_without_columns_or_bytes_are_samples_too() -> None:
    empty = torch.empty(7, 0)
    assert [len(b[0]) for b in dataset.batches((empty,), None, 3, 7, CPU)] == [3, 3, 1]  # type: ignore[index]


def test_the_length_of_a_batch_is_that_of_its_first_tensor() -> None:
    x = torch.zeros(3, 2)
    assert [dataset.length(batch) for batch in (x, (x, 1), {"name": "a", "x": [x]}, ([x], torch.zeros(9)))] == [3] * 4
    for batch in ("text", (), torch.tensor(1.0)):
        with pytest.raises(TypeError, match="a batch is a tensor with its samples along the first dimension"):
            dataset.length(batch)
