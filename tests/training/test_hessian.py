"""Products with the Hessian are the slope of the gradient, the eigenvalue is the largest, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import orchestrator as orc
from orchestrator.training.diagnostics.hessian import Hessian, NoCurvature
from orchestrator.training.isolated import aside

GENERATOR = torch.Generator().manual_seed(2)
X = torch.randn(10, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 3, (10,), generator=GENERATOR)


class Attention(nn.Module):
    """As a transformer computes it, over the samples' six numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.out = nn.Linear(1, 12), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.asked(x[:, None, :, None]).split(4, dim=-1)
        return self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True).flatten(1))


class Images(nn.Module):
    """Convolutions with the running averages of batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.reshape(-1, 1, 2, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "norm": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)),
    "attention": Attention,
    "images": Images,
}


def net_of(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[kind]().double()


def loss(net: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y, reduction="none")


def direction(size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_at(net: nn.Module, weights: torch.Tensor) -> torch.Tensor:
    """Of the mean loss, at other weights; with the random numbers that the next forward would have."""
    kept = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    with aside(net):
        nn.utils.vector_to_parameters(weights, net.parameters())
        found = torch.autograd.grad(loss(net, (X, Y)).mean(), list(net.parameters()))
        nn.utils.vector_to_parameters(kept, net.parameters())
    return torch.cat([one.reshape(-1) for one in found])


@pytest.mark.parametrize("kind", NETS)
def test_a_product_is_the_finite_difference_of_gradients(kind: str) -> None:
    net = net_of(kind)
    hessian = Hessian(loss, net, [((X, Y), 1.0)])
    along, at = direction(hessian.size), nn.utils.parameters_to_vector(net.parameters()).detach()
    along /= along.norm()
    step = 1e-5  # the error of the difference is about its square
    slope = (gradient_at(net, at + step * along) - gradient_at(net, at - step * along)) / (2 * step)
    torch.testing.assert_close(hessian.times(along), slope, rtol=1e-6, atol=1e-8)


@given(first=st.integers(0, 1000), second=st.integers(0, 1000), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_the_hessian_is_symmetric_and_linear(first: int, second: int, seed: int) -> None:
    hessian = Hessian(loss, net_of("norm", seed), [((X, Y), 1.0)])
    u, v = direction(hessian.size, first), direction(hessian.size, second)
    of_u, of_v = hessian.times(u), hessian.times(v)
    torch.testing.assert_close(u @ of_v, v @ of_u, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(hessian.times(2 * u - v), 2 * of_u - of_v, rtol=1e-9, atol=1e-10)


def whole(net: nn.Module) -> torch.Tensor:
    """The Hessian as a matrix, a product for each column."""
    hessian = Hessian(loss, net, [((X, Y), 1.0)])
    return torch.stack([hessian.times(column) for column in torch.eye(hessian.size, dtype=torch.float64)])


@pytest.mark.parametrize("kind", NETS)
def test_the_eigenvalue_is_the_largest_one(kind: str) -> None:
    net = net_of(kind)
    wanted = float(torch.linalg.eigvalsh(whole(net))[-1])
    found = orc.curvature(loss, net, (X, Y), products=30)
    assert found.value == pytest.approx(wanted, rel=1e-6)
    few = orc.curvature(loss, net, (X, Y), products=3)
    assert few.value <= wanted + 1e-12
    eigenvalues = torch.linalg.eigvalsh(whole(net))
    assert (eigenvalues - few.value).abs().min() <= few.error + 1e-12


class Weights(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize(
    ("curves", "largest"), [([3.0, -50.0, 1.0], 3.0), ([-2.0, -7.0], -2.0), ([4.0, 4.0, 4.0, 4.0], 4.0), ([0.0], 0.0)]
)
def test_it_is_the_largest_and_not_that_of_the_largest_size(curves: list[float], largest: float) -> None:
    found = orc.curvature(
        lambda net, batch: (net.weights.square() @ batch)[None] / 2,
        Weights(*range(len(curves))),
        torch.tensor(curves, dtype=torch.float64),
    )
    assert found.value == pytest.approx(largest, abs=1e-9)
    assert found.error == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["layers", "attention"])
def test_portions_add_up_to_the_whole(kind: str) -> None:
    net = net_of(kind)
    parts = [((X[:3], Y[:3]), 0.3), ((X[3:4], Y[3:4]), 0.1), ((X[4:], Y[4:]), 0.6)]
    one, several = (Hessian(loss, net, micro_batches) for micro_batches in ([((X, Y), 1.0)], parts))
    torch.testing.assert_close(several.times(direction(one.size)), one.times(direction(one.size)))
    assert several.largest().value == pytest.approx(one.largest().value)


def test_dropout_draws_one_mask_for_all_products_with_portions_too() -> None:
    hessian = Hessian(loss, net_of("dropout"), [((X[:5], Y[:5]), 0.5), ((X[5:], Y[5:]), 0.5)])
    along = direction(hessian.size)
    assert torch.equal(hessian.times(along), hessian.times(along))


def weighted(net: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    return {"loss": loss(net, batch), "weight": torch.full((len(batch[0]),), 3.0)}


def test_samples_have_their_weights() -> None:
    net = net_of("layers")
    found, plain = orc.curvature(weighted, net, (X, Y)), orc.curvature(loss, net, (X, Y))
    assert found.value == pytest.approx(3 * plain.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", NETS)
def test_everything_is_left_as_it_was(kind: str, training: bool) -> None:
    net = net_of(kind).train(training)
    loss(net, (X, Y)).mean().backward()
    tensors = [*net.parameters(), *net.buffers(), *(one.grad for one in net.parameters())]
    before = [(one, one._version, one.detach().clone()) for one in tensors if one is not None]
    state = torch.get_rng_state()
    orc.curvature(loss, net, (X, Y), products=4)
    after = [*net.parameters(), *net.buffers(), *(one.grad for one in net.parameters())]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module in net.modules())
    for (one, version, value), now in zip(before, after, strict=True):
        assert now is one
        assert one._version == version
        assert torch.equal(one, value)


def test_buffers_are_put_back_after_an_error_too() -> None:
    net = net_of("norm")

    def bad(net: nn.Module, batch: Any) -> torch.Tensor:
        net(X)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        orc.curvature(bad, net, (X, Y))
    assert net[1].num_batches_tracked == 0


def test_the_batch_is_left_as_it_is_and_gradients_may_be_switched_off_around() -> None:
    net, x = net_of("layers"), X.clone()

    def changes_it(net: nn.Module, batch: Any) -> torch.Tensor:
        batch["x"].mul_(2)
        return loss(net, (batch["x"], batch["y"]))

    with torch.no_grad():
        found = orc.curvature(changes_it, net, {"x": x, "y": Y})
    assert torch.equal(x, X)
    assert found.value == pytest.approx(orc.curvature(loss, net, (2 * X, Y)).value)


def test_a_compiled_network_is_taken_as_it_was_written() -> None:
    net = net_of("layers")
    plain = orc.curvature(loss, net, (X, Y)).value
    net.compile(backend="aot_eager")  # which has no second derivatives
    loss(net, (X, Y)).mean().backward()
    assert orc.curvature(loss, net, (X, Y)).value == plain


# What has none


def test_a_line_has_no_curvature_and_what_is_not_finite_is_told_as_nan() -> None:
    assert orc.curvature(lambda net, batch: net(batch).sum(dim=1), nn.Linear(2, 1).double(), X[:, :2]).value == 0
    found = orc.curvature(loss, net_of("layers"), (X / 0, Y))
    assert math.isnan(found.value)
    assert math.isnan(found.error)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


def test_what_can_t_be_differentiated_twice_is_said() -> None:
    with pytest.raises(NoCurvature, match=r"can't be differentiated twice, so its curvature can't be measured: .*once"):
        orc.curvature(lambda net, batch: Once.apply(loss(net, batch)).square(), net_of("layers"), (X, Y))


def test_mistakes_are_told() -> None:
    net = net_of("layers").requires_grad_(False)
    with pytest.raises(NoCurvature, match="no parameters in training"):
        orc.curvature(loss, net, (X, Y))
    with pytest.raises(ValueError, match="at least 1, not 0"):
        orc.curvature(loss, net_of("layers"), (X, Y), products=0)
    with pytest.raises(KeyError, match='must give "loss"'):
        orc.curvature(lambda net, batch: {"error": loss(net, batch)}, net_of("layers"), (X, Y))
