"""Sweeps and distributed training on Slurm that cannot lose or double-count a trial.

    import orchestrator as orc

    orc.State                    what a job's `build` returns
    orc.current()                the trial that a script is, which a `command:` has started
    orc.read_mnist(folder)       data sets from files: read_cifar10, read_cifar100, read_idx, read_npz, read_safetensors
    orc.losses, orc.metrics      per-sample values, and what comes of their exact sums
    orc.augment                  augmentation by the samples' keys
    orc.curvature                how the loss curves; gradient_norms and activation_norms likewise
    orc.Sweep.open(folder)       a sweep's best trials, summary and status, from Python
    orc.Summary                  the exact monoid behind every answer
    orc.SummaryMap               a mapping of them; SummaryPair and TopN likewise

Names load their modules on first use, so `import orchestrator` itself imports neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from orchestrator.errors import DataError
    from orchestrator.stats.containers import SummaryMap, SummaryPair, TopN
    from orchestrator.stats.summary import Summary
    from orchestrator.sweep import Sweep
    from orchestrator.training import augment, losses, metrics
    from orchestrator.training.datasets import (
        read_cifar10,
        read_cifar100,
        read_idx,
        read_mnist,
        read_npz,
        read_safetensors,
    )
    from orchestrator.training.diagnostics.diagnostics import activation_norms, gradient_norms
    from orchestrator.training.diagnostics.hessian import curvature
    from orchestrator.training.trial import State, Trial
    from orchestrator.worker.current import Attempt, current

_HOMES = {
    "Attempt": "orchestrator.worker.current",
    "DataError": "orchestrator.errors",
    "State": "orchestrator.training.trial",
    "Summary": "orchestrator.stats.summary",
    "SummaryMap": "orchestrator.stats.containers",
    "SummaryPair": "orchestrator.stats.containers",
    "Sweep": "orchestrator.sweep",
    "TopN": "orchestrator.stats.containers",
    "Trial": "orchestrator.training.trial",
    "current": "orchestrator.worker.current",
    "activation_norms": "orchestrator.training.diagnostics.diagnostics",
    "curvature": "orchestrator.training.diagnostics.hessian",
    "gradient_norms": "orchestrator.training.diagnostics.diagnostics",
    "read_cifar10": "orchestrator.training.datasets",
    "read_cifar100": "orchestrator.training.datasets",
    "read_idx": "orchestrator.training.datasets",
    "read_mnist": "orchestrator.training.datasets",
    "read_npz": "orchestrator.training.datasets",
    "read_safetensors": "orchestrator.training.datasets",
}
_MODULES = {"augment", "losses", "metrics"}

__all__ = [
    "Attempt",
    "DataError",
    "State",
    "Summary",
    "SummaryMap",
    "SummaryPair",
    "Sweep",
    "TopN",
    "Trial",
    "__version__",
    "activation_norms",
    "augment",
    "current",
    "curvature",
    "gradient_norms",
    "losses",
    "metrics",
    "read_cifar10",
    "read_cifar100",
    "read_idx",
    "read_mnist",
    "read_npz",
    "read_safetensors",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"orchestrator.training.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
