"""Torch's global settings, which a job may change and the next trial must not find changed.

fresh = Settings()          once the job is imported, whose own choices at import are part of it
fresh.restore()             before each trial
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import TypeAlias

import torch

from orchestrator.errors import UsageError

__all__ = ["Settings", "refuse_inexact"]

Get: TypeAlias = "Callable[[], object]"
Set: TypeAlias = "Callable[[object], object]"

_ATTRIBUTES = (
    "mkldnn.enabled",
    "mkldnn.deterministic",
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.benchmark_limit",
    "cudnn.deterministic",
    "opt_einsum.enabled",
    "opt_einsum.strategy",
    "quantized.engine",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_accumulation",
    # Each may change those after it.
    "cudnn.allow_tf32",
    "fp32_precision",
    "cudnn.fp32_precision",
    "mkldnn.fp32_precision",
    "cuda.matmul.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
)
"""Settings below `torch.backends`; one that this version of torch lacks is passed over."""


def _flushes() -> bool:
    """Whether denormal numbers become zero; torch can set this, but doesn't tell."""
    return not (torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1).item()


def _device() -> torch.device | None:
    found = torch.get_default_device()
    # "cpu" itself would pass every operation through Python.
    return None if found == torch.device("cpu") else found


def _algorithms() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


_FUNCTIONS: list[tuple[Get, Set]] = [
    (torch.get_default_dtype, lambda value: torch.set_default_dtype(value)),  # type: ignore[arg-type]
    (_device, lambda value: torch.set_default_device(value)),  # type: ignore[arg-type]
    (torch.is_grad_enabled, lambda value: torch.set_grad_enabled(bool(value))),
    # Its first call imports a compiler, which takes a second; so only after a job has called it.
    (_algorithms, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),  # type: ignore[index]
    (_anomaly, lambda value: torch.autograd.set_detect_anomaly(*value)),  # type: ignore[misc]
    (torch.get_float32_matmul_precision, lambda value: torch.set_float32_matmul_precision(str(value))),
]


def _attribute(name: str) -> tuple[Get, Set]:
    path, _, last = f"backends.{name}".rpartition(".")
    owner = operator.attrgetter(path)(torch)
    return lambda: getattr(owner, last), lambda value: setattr(owner, last, value)


def _read(get: Get) -> object:
    """Its value; an exception, which equals nothing, where torch finds two of its interfaces mixed."""
    try:
        return get()
    except RuntimeError as error:
        return error


def refuse_inexact() -> None:
    """Refuse what picks kernels by how fast they were just now, where a job has asked for the same bits every time.

    A trial that resumes would pick others and end with other bits than an undisturbed one.

    Raises:
        UsageError: `torch.use_deterministic_algorithms(True)` together with such a setting; names both.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return
    inductor = sys.modules.get("torch._inductor.config")
    chosen = {
        "torch.backends.cudnn.benchmark": torch.backends.cudnn.benchmark,
        "torch._inductor.config.max_autotune": getattr(inductor, "max_autotune", False),
    }
    for name, is_on in chosen.items():
        if is_on:
            raise UsageError(
                f"{name} is on, and so is torch.use_deterministic_algorithms: kernels that are chosen by a timing "
                f"differ from run to run, so a trial that resumes would end with other bits; turn {name} off"
            )


class Settings:
    """The settings of this process at one moment, as far as torch has them."""

    def __init__(self) -> None:
        self._flushes = _flushes()
        self._known: list[tuple[Get, Set, object]] = []
        for get, set_ in (*_FUNCTIONS, *self._attributes()):
            value = _read(get)
            if not isinstance(value, Exception):
                self._known.append((get, set_, value))

    @staticmethod
    def _attributes() -> list[tuple[Get, Set]]:
        found = []
        for name in _ATTRIBUTES:
            try:
                operator.attrgetter(f"backends.{name}")(torch)
            except (AttributeError, RuntimeError):
                continue
            found.append(_attribute(name))
        return found

    def restore(self) -> None:
        """Set them back. What has not changed costs a look."""
        torch.set_flush_denormal(self._flushes)
        for get, set_, value in self._known:
            if _read(get) != value:
                set_(value)
