"""How the loss curves: products of its Hessian with vectors, and the Hessian's largest eigenvalue.

    orc.curvature(losses, net, batch)               Curvature(value=12.3, error=0.01)
    hessian = Hessian(loss, net, [(batch, 1.0)])
    hessian.times(vector)                           the second derivatives of the batch's mean loss, times a vector

A product costs about as much as two backwards: the gradient is differentiated once more, along the vector (Pearlmutter
1994, Fast exact multiplication by the Hessian, Neural Computation 6). From products alone the iteration of Lanczos
(1950, J. Res. Nat. Bur. Standards 45) finds the largest eigenvalue, in fewer of them than power iteration, and the
largest one where that of the largest size is negative. It keeps three vectors and makes none orthogonal again: what
rounding does then is to find eigenvalues twice, not other ones (Paige 1976, J. Inst. Maths Applics 18). Of what this
eigenvalue tells: Cohen et al. 2021, Gradient descent on neural networks typically occurs at the edge of stability,
ICLR; above 2 / learning rate, gradient descent does not settle.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from orchestrator.errors import OrcError
from orchestrator.training.data.dataset import Batch
from orchestrator.training.isolated import aside, copied
from orchestrator.training.precision import Losses
from orchestrator.training.values import trained_on

__all__ = ["Curvature", "Hessian", "NoCurvature", "curvature"]

PRODUCTS = 20
"""Hessian-vector products for an eigenvalue, if nothing else is said."""

PerSample = Callable[[torch.nn.Module, Batch], torch.Tensor]
Summed = Callable[[torch.Tensor], torch.Tensor]


class NoCurvature(OrcError):
    """The loss has no second derivatives here; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curvature:
    """The Hessian's largest eigenvalue.

    Args:
        value: as far as it was found; never above the true one but for rounding.
        error: an eigenvalue lies within so much of `value`.
    """

    value: float
    error: float


def curvature(
    losses: Losses, net: torch.nn.Module, batch: Batch, *, products: int = PRODUCTS, seed: int = 0
) -> Curvature:
    """The largest eigenvalue of the Hessian of a batch's mean loss, over all parameters that are in training.

    The network is taken in the mode in which it is, and left as it was, with its gradients, buffers and the generators
    of random numbers; dropout draws one mask for all of it.

    Args:
        losses: per-sample values, as for `trial.step`.
        net: the network.
        batch: what `losses` takes.
        products: how many Hessian-vector products to make; more find it more exactly.
        seed: of the vector with which it begins.

    Raises:
        NoCurvature: nothing is in training, or something in the network can't be differentiated twice.
        ValueError: `products` is not positive.
    """
    if products < 1:
        raise ValueError(f"products is how many Hessian-vector products to make, at least 1, not {products}")
    return Hessian(partial(trained_on, losses), net, [(batch, 1.0)]).largest(products, seed)


class Hessian:
    """The second derivatives of a loss by the parameters that are in training, as what it does to a vector.

    Vectors are flat, shape (size,): the parameters one after the other, in their order.

    Args:
        loss: per-sample values.
        net: the network; left as it was by whatever is done here.
        micro_batches: what `loss` takes, and which part of the whole each is; one at a time passes through.
        summed: the sum over all ranks of what each has; this process is alone by default.

    Raises:
        NoCurvature: nothing is in training.
    """

    def __init__(
        self,
        loss: PerSample,
        net: torch.nn.Module,
        micro_batches: Sequence[tuple[Batch, float]],
        *,
        summed: Summed = lambda part: part,
    ) -> None:
        self._loss, self._net, self._portions, self._summed = loss, net, micro_batches, summed
        self._parameters = [one for one in net.parameters() if one.requires_grad]
        if not self._parameters:
            raise NoCurvature("the network has no parameters in training, so there is nothing to differentiate by")
        self.size = sum(one.numel() for one in self._parameters)

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """The product with a vector, shape (size,).

        Raises:
            NoCurvature: something in the network can't be differentiated twice.
        """
        with self._opened() as product:
            return product(vector)

    def largest(self, products: int = PRODUCTS, seed: int = 0) -> Curvature:
        """The largest eigenvalue, by so many products; NaN, if some product is not finite.

        Raises:
            NoCurvature: something in the network can't be differentiated twice.
        """
        with self._opened() as product:
            return _largest(*self._iterated(product, self._start(seed), min(products, self.size)))

    # Products

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """What multiplies. The gradient's graph is made once and kept, where there is memory for a whole batch."""
        with aside(self._net), torch.enable_grad(), _twice_differentiable():
            try:
                gradients = self._gradients(self._portions[0][0]) if len(self._portions) == 1 else None
                yield partial(self._product, gradients)
            except NotImplementedError as error:
                raise _impossible(error) from error
            except RuntimeError as error:
                if "derivative" not in str(error) and "differentiable" not in str(error):
                    raise
                raise _impossible(error) from error

    def _product(self, gradients: Sequence[torch.Tensor] | None, vector: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(vector)
        for batch, share in self._portions:
            if gradients is not None:
                total += share * self._along(gradients, vector)
                continue
            with aside(self._net):  # the same random numbers for each vector
                total += share * self._along(self._gradients(batch), vector)
        return self._summed(total)

    def _gradients(self, batch: Batch) -> Sequence[torch.Tensor]:
        mean = self._loss(self._net, copied(batch)).mean()
        found = torch.autograd.grad(mean, self._parameters, create_graph=True, materialize_grads=True)
        _refuse_ends(found)
        return found

    def _along(self, gradients: Sequence[torch.Tensor], vector: torch.Tensor) -> torch.Tensor:
        parts = torch.split(vector, [one.numel() for one in self._parameters])
        curved = [
            (gradient, part.view_as(gradient).to(gradient.dtype))
            for gradient, part in zip(gradients, parts, strict=True)
            if gradient.requires_grad
        ]
        if not curved:  # a loss that is linear
            return torch.zeros_like(vector)
        of, along = zip(*curved, strict=True)
        found = torch.autograd.grad(of, self._parameters, along, retain_graph=True, materialize_grads=True)
        return torch.cat([one.reshape(-1) for one in found]).to(vector.dtype)

    # Eigenvalues

    def _start(self, seed: int) -> torch.Tensor:
        """A random direction, drawn on the CPU by a generator of its own: the same one everywhere."""
        generator = torch.Generator("cpu").manual_seed(seed)
        found = torch.randn(self.size, generator=generator, dtype=torch.float32, device="cpu")
        of = self._parameters[0]
        return found.to(of.device, torch.promote_types(of.dtype, torch.float32))

    def _iterated(
        self, product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, num: int
    ) -> tuple[list[float], list[float]]:
        """The diagonal, and what is beside it, of the tridiagonal matrix that the Hessian is in a Krylov space."""
        diagonal, beside = [], [0.0]
        before, vector = torch.zeros_like(start), start / _dot(start, start) ** 0.5
        for _ in range(num):  # all ranks so many, whatever they find
            found = product(vector)
            diagonal.append(_dot(found, vector))
            found = found - diagonal[-1] * vector - beside[-1] * before
            beside.append(_dot(found, found) ** 0.5)
            before, vector = vector, found / (beside[-1] or 1.0)
        return diagonal, beside[1:]


def _largest(diagonal: list[float], beside: list[float]) -> Curvature:
    if not all(map(math.isfinite, [*diagonal, *beside])):
        return Curvature(value=math.nan, error=math.nan)
    # Once nothing is left beside the diagonal, the space holds all that the start does: what follows is noise.
    noise = 1e-6 * max(map(abs, [*diagonal, *beside]))
    num = next((at for at, one in enumerate(beside, start=1) if one <= noise), len(beside))
    matrix = torch.diag(torch.tensor(diagonal[:num], dtype=torch.float64, device="cpu"))
    for at, one in enumerate(beside[: num - 1]):
        matrix[at, at + 1] = matrix[at + 1, at] = one
    values, vectors = torch.linalg.eigh(matrix)
    return Curvature(value=float(values[-1]), error=beside[num - 1] * abs(float(vectors[-1, -1])))


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """The fast forms of attention and of recurrent layers have a first derivative only."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cudnn.enabled = before


def _refuse_ends(gradients: Sequence[torch.Tensor]) -> None:
    """Where a function has no second derivative, torch has a node that raises, and leaves it out as no way leads on."""
    seen, ahead = set(), [one.grad_fn for one in gradients]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise _impossible(RuntimeError("a function in it is marked as once_differentiable"))
        ahead += [above for above, _ in node.next_functions]


def _impossible(error: Exception) -> NoCurvature:
    text = str(error).splitlines()[0]
    return NoCurvature(f"the loss can't be differentiated twice, so its curvature can't be measured: {text}")
