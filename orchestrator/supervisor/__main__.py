"""The process that a job script starts: see `orchestrator.supervisor.main`."""

from __future__ import annotations

import sys

from orchestrator.core.signals import Signals

if __name__ == "__main__":
    signals = Signals()  # before the import below takes its tenth of a second: a notice may come at any time
    from orchestrator.supervisor.main import main

    sys.exit(main(signals=signals))
