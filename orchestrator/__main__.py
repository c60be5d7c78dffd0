"""`orc`, and `python -m orchestrator`."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, also where a standard stream is closed: that stream then leads nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123 (for as long as the process runs)
    from orchestrator.cli import main as cli

    cli.main()


if __name__ == "__main__":
    main()
