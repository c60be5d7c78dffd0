"""Torch's settings come back, whichever of its interfaces changed them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from orchestrator.training.torch_state import Settings

B: Any = torch.backends


@pytest.fixture(autouse=True)
def settings() -> Iterator[Settings]:
    found = Settings()
    yield found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.restore()


def flushes() -> bool:
    return not (torch.tensor(1e-40) * 1).item()


def asked(question: Callable[[], object]) -> object:
    """The answer; "mixed" where torch refuses it since one setting was made in two ways."""
    try:
        return question()
    except RuntimeError:
        return "mixed"


def seen() -> list[object]:
    """What torch computes by, asked of torch and not of `Settings`."""
    precisions = (B, B.cudnn, B.cudnn.conv, B.cudnn.rnn, B.mkldnn, B.mkldnn.matmul, B.mkldnn.conv, B.cuda.matmul)
    return [
        *(torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        *(torch.get_deterministic_debug_mode(), torch.is_anomaly_enabled(), asked(torch.get_float32_matmul_precision)),
        *(B.mkldnn.enabled, B.mkldnn.deterministic, B.cudnn.enabled, B.cudnn.benchmark, B.cudnn.deterministic),
        *(B.cudnn.benchmark_limit, B.opt_einsum.enabled, B.quantized.engine, asked(lambda: B.cuda.matmul.allow_tf32)),
        *(owner.fp32_precision for owner in precisions),
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_device("meta"),
        lambda: torch.set_grad_enabled(False),
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.set_deterministic_debug_mode("warn"),
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(B, "fp32_precision", "tf32"),
        lambda: setattr(B.mkldnn, "enabled", False),
        lambda: setattr(B.mkldnn, "fp32_precision", "tf32"),
        lambda: setattr(B.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda: setattr(B.cudnn, "enabled", False),
        lambda: setattr(B.cudnn, "benchmark", True),
        lambda: setattr(B.cudnn, "deterministic", True),
        lambda: setattr(B.cudnn, "allow_tf32", False),
        lambda: setattr(B.cudnn.conv, "fp32_precision", "ieee"),
        lambda: setattr(B.cuda.matmul, "allow_tf32", True),
        lambda: setattr(B.opt_einsum, "enabled", not B.opt_einsum.enabled),
    ],
)
def test_a_setting_that_was_changed_is_set_back(settings: Settings, change: Callable[[], object]) -> None:
    before = seen()
    change()
    assert seen() != before
    settings.restore()
    assert seen() == before


def test_denormal_numbers_come_back(settings: Settings) -> None:
    torch.set_flush_denormal(True)
    settings.restore()
    assert not flushes()


def test_what_the_job_chose_at_import_is_kept(settings: Settings) -> None:
    torch.set_default_dtype(torch.float64)
    B.cudnn.benchmark = True
    chosen = Settings()
    torch.set_default_dtype(torch.float32)
    B.cudnn.benchmark = False
    chosen.restore()
    assert (torch.get_default_dtype(), B.cudnn.benchmark) == (torch.float64, True)
