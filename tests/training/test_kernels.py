"""What a pack computes another way than a trial is the same but for rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.func import vmap

from orchestrator.training.packing.kernels import Kernels, cross_entropy

GENERATOR = torch.Generator().manual_seed(0)
Y = torch.tensor([[0, 1, 2, -100, 2], [2, 2, -100, 0, 1]])


def values_and_gradients(num_classes: int, loss: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    z = torch.randn(2, 5, num_classes, generator=generator, dtype=torch.float64).mul_(30).requires_grad_()
    found = vmap(loss)(z, Y)
    found.backward(torch.linspace(0.1, 1.0, found.numel(), dtype=torch.float64).view_as(found))
    assert z.grad is not None
    return found.detach(), z.grad


def named(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with Kernels():
        return F.cross_entropy(z, y, reduction="none")


def plain(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z, y, reduction="none")


@pytest.mark.parametrize("num_classes", [3, 10, 15, 16, 40])
def test_cross_entropy_is_torch_s_in_values_and_gradients(num_classes: int) -> None:
    for ours, theirs in zip(
        values_and_gradients(num_classes, named), values_and_gradients(num_classes, plain), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert torch.equal(ours == 0.0, theirs == 0.0)  # of the labels that are left out


def test_few_classes_are_taken_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.training.packing.kernels.F.cross_entropy", None)
    z = torch.randn(5, 10, generator=GENERATOR)
    assert cross_entropy(z, Y[0], reduction="none", label_smoothing=0.0).shape == (5,)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "mean"},
        {"reduction": "none", "label_smoothing": 0.1},
        {"reduction": "none", "weight": torch.tensor([1.0, 2.0, 3.0])},
        {"reduction": "none", "ignore_index": 2},
        {},
    ],
)
def test_whatever_else_is_asked_for_is_left_to_torch(options: dict[str, object]) -> None:
    z, y = torch.randn(5, 3, generator=GENERATOR), Y[0].clamp(min=0)
    with Kernels():
        found = F.cross_entropy(z, y, **options)  # type: ignore[arg-type]  # as torch takes them
    assert torch.equal(found, F.cross_entropy(z, y, **options))  # type: ignore[arg-type]  # as torch takes them


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused_as_ever(label: int) -> None:
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        vmap(named)(torch.zeros(2, 5, 3), torch.full((2, 5), label))
