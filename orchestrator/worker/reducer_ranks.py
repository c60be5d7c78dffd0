"""One reducer of several ranks: each folds a part of the trials, and they merge what they have by torch.distributed.

    srun --ntasks=4 python -P -m orchestrator.worker.reducer_ranks --dir SWEEP --submission TOKEN

The first rank writes the summary, with the bytes that one process would have written.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from orchestrator.core.paths import SweepPaths
from orchestrator.results import reducer

__all__ = ["main"]

_TIMEOUT_S = 600.0
"""How long ranks wait for each other: one that has more to read than the others keeps them waiting."""


def main(argv: list[str] | None = None) -> int:
    """Entry of each rank; returns its exit code, which is 0 but for the first one's: others must not end the step."""
    # A step hears of a preemption before the job is taken away. Whoever leaves by itself then is not requeued.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    directory: Path = reducer.arguments("orchestrator.worker.reducer_ranks").parse_args(argv).dir
    paths = SweepPaths(directory.absolute())
    return reducer.run(paths, lambda: _reduce(paths))


def _reduce(paths: SweepPaths) -> int:
    if find_spec("torch") is None:
        # What the sweep runs may need none. One rank does it all, and the bytes are the same.
        return reducer.reduce(paths, alone=False) if os.environ.get("SLURM_PROCID", "0") == "0" else 0
    from orchestrator.core.slurm_env import StepTask
    from orchestrator.distributed.step import joined

    seat = StepTask.of(os.environ)
    with joined(paths, seat, timeout_s=_TIMEOUT_S) as group:
        code = reducer.reduce(paths, alone=False, company=group)
    return code if seat.rank == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
