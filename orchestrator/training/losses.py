"""Losses and the like as per-sample values, shape (batch,): what a job's `losses` gives, to train on and to validate.

    def losses(net, batch):
        x, y = batch
        z = net(x)
        return {"loss": cross_entropy(z, y), "accuracy": accuracy(z, y)}

A mean that is taken of per-sample values at the end, exactly, depends on neither batches nor ranks; one of batches'
means does. What no mean of samples gives, such as R² or a calibration error, comes from several sums: `regression` and
`calibration` give the values for these, and `training.metrics` what comes of them. Their names begin with "_", so
`trial.validate` folds them and doesn't report them.

Of predictions and targets of more dimensions than one, a sample's value is the mean over the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

__all__ = [
    "accuracy",
    "calibration",
    "cross_entropy",
    "hinge",
    "kl_divergence",
    "mae",
    "mse",
    "regression",
    "top_k",
]


def _each(values: torch.Tensor) -> torch.Tensor:
    """The mean over all dimensions but the first."""
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def _check_alike(prediction: torch.Tensor, target: torch.Tensor) -> None:
    # (batch, 1) less (batch,) would be (batch, batch), and train on nonsense.
    if prediction.shape != target.shape or not prediction.dim():
        raise ValueError(
            f"predictions and targets must be of one shape, (batch, ...); found {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )


def _check_classes(z: torch.Tensor, y: torch.Tensor) -> None:
    if z.dim() < 2 or y.shape != z.shape[:1] + z.shape[2:]:
        raise ValueError(
            "scores must be of shape (batch, classes, ...) and labels of the same without classes; found "
            f"{tuple(z.shape)} and {tuple(y.shape)}"
        )


# Classes


def cross_entropy(z: torch.Tensor, y: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross entropy of the softmax of scores, in nats: logsumexp(z) - z[y].

    Args:
        z: scores, shape (batch, classes, ...).
        y: labels, int64, shape (batch, ...); or probabilities of the shape of `z`.
        label_smoothing: this share of the target is spread over all classes.
    """
    return _each(F.cross_entropy(z, y, reduction="none", label_smoothing=label_smoothing))


def hinge(z: torch.Tensor, y: torch.Tensor, *, margin: float = 1.0, p: int = 1) -> torch.Tensor:
    """Multi-class hinge: the sum over the wrong classes of max(0, margin - z[y] + z)**p, over the number of classes.

    Args:
        z: scores, shape (batch, classes).
        y: labels, int64, shape (batch,).
        margin: by how much the right class is to lead.
        p: 1 or 2.
    """
    return F.multi_margin_loss(z, y, p=p, margin=margin, reduction="none")


def kl_divergence(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the target from softmax(scores), in nats: sum target * log(target / softmax).

    Args:
        z: scores, shape (batch, classes, ...).
        target: probabilities of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    _check_alike(z, target)
    return _each(F.kl_div(F.log_softmax(z, dim=1), target, reduction="none").sum(1))


def accuracy(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 where the first of the largest scores is that of the label, else 0; float32.

    Args:
        z: scores, shape (batch, classes, ...).
        y: labels, int64, shape (batch, ...).

    Raises:
        ValueError: the shapes are not as said.
    """
    _check_classes(z, y)
    return _each((z.argmax(1) == y).float())


def top_k(z: torch.Tensor, y: torch.Tensor, k: int = 5) -> torch.Tensor:
    """1 where fewer than `k` classes stand before the label's, else 0; float32. Of equal scores, the first class leads.

    Args:
        z: scores, shape (batch, classes, ...); where one is NaN, the value is 0.
        y: labels, int64, shape (batch, ...).
        k: at least 1.

    Raises:
        ValueError: the shapes are not as said, or `k` is below 1.
    """
    _check_classes(z, y)
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    label = y.unsqueeze(1)
    own = z.gather(1, label)
    # Counted, since which of equal scores torch.topk takes is not said.
    number = torch.arange(z.shape[1], device=z.device).view(1, -1, *[1] * (z.dim() - 2))
    num_before = ((z > own) | ((z == own) & (number < label))).sum(1)
    return _each(((num_before < k) & ~z.isnan().any(1)).float())


def calibration(z: torch.Tensor, y: torch.Tensor, *, bins: int = 15) -> dict[str, torch.Tensor]:
    """What `metrics.calibration_error` needs: for each bin of confidences, by how much each sample in it is righter.

    A sample's confidence is its largest probability; bin m of M has those in (m / M, (m + 1) / M]. Its value there is
    its accuracy less its confidence, and 0 in all other bins.

    Args:
        z: scores, shape (batch, classes).
        y: labels, int64, shape (batch,).
        bins: at least 1.

    Raises:
        ValueError: the shapes are not as said, or there is no bin.
    """
    _check_classes(z, y)
    if z.dim() != 2 or bins < 1:
        raise ValueError(
            f"expected scores of shape (batch, classes) and at least 1 bin, found {tuple(z.shape)}, {bins}"
        )
    confidence = z.detach().softmax(1).amax(1)
    # In float64, where the difference of 1 and a float32 is exact.
    gap = (z.argmax(1) == y).double() - confidence.double()
    # A NaN belongs to no bin; in all of them it is seen.
    number = (confidence.double() * bins).ceil().sub(1).clamp(0, bins - 1)
    return {f"_gap_{m:02}": torch.where((number == m) | gap.isnan(), gap, 0.0) for m in range(bins)}


# Numbers


def mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error.

    Raises:
        ValueError: the shapes differ.
    """
    _check_alike(prediction, target)
    return _each(F.mse_loss(prediction, target, reduction="none"))


def mae(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute error.

    Raises:
        ValueError: the shapes differ.
    """
    _check_alike(prediction, target)
    return _each(F.l1_loss(prediction, target, reduction="none"))


def regression(prediction: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `metrics.rmse`, `mae`, `mape`, `wmape` and `r2` need.

    Returns:
        "_square" and "_absolute", the errors; "_magnitude", the absolute target; "_relative", the sum of the absolute
        errors over the absolute targets, where these are not 0; "_nonzero" and "_zero", how many targets are not 0, and
        how many are; with one target a sample "_target", the target itself.

    Raises:
        ValueError: the shapes differ.
    """
    _check_alike(prediction, target)
    prediction, target = prediction.detach().unsqueeze(-1).flatten(1), target.detach().unsqueeze(-1).flatten(1)
    size, is_zero = target.abs(), target == 0
    error = (prediction - target).abs()
    found = {
        "_square": error.square().mean(1),
        "_absolute": error.mean(1),
        "_magnitude": size.mean(1),
        # In float64, for a target near 0 takes it beyond float32.
        "_relative": torch.where(is_zero, 0.0, error.double() / torch.where(is_zero, 1.0, size.double())).sum(1),
        "_nonzero": (~is_zero).sum(1),
        "_zero": is_zero.sum(1),
    }
    return found | {"_target": target[:, 0]} if target.shape[1] == 1 else found
