"""Sweeps and distributed training on Slurm that cannot lose or double-count a trial.

    import orchestrator as orc

    orc.State                    what a job's `build` returns
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
    from orchestrator.algebra import SummaryMap, SummaryPair, TopN
    from orchestrator.summary import Summary
    from orchestrator.sweep import Sweep
    from orchestrator.trial import State, Trial

_HOMES = {
    "State": "orchestrator.trial",
    "Summary": "orchestrator.summary",
    "SummaryMap": "orchestrator.algebra",
    "SummaryPair": "orchestrator.algebra",
    "Sweep": "orchestrator.sweep",
    "TopN": "orchestrator.algebra",
    "Trial": "orchestrator.trial",
}

__all__ = ["State", "Summary", "SummaryMap", "SummaryPair", "Sweep", "TopN", "Trial", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
