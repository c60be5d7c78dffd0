"""`orc submit --on slurm`, then waiting until the reducer has written a summary without gaps.

python benchmarks/peers/orc_submit.py --trials 200 --tasks 2 --folder FOLDER
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

POLL_S = 0.05
SWEEP = Path(__file__).parents[2] / "jobs" / "digits_mlp.yaml"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    orc = Path(sys.executable).with_name("orc")
    settings = [f"run_cap={given.trials}", f"launch.trials_per_task={given.trials // given.tasks}"]
    subprocess.run([orc, "submit", SWEEP, *settings, "--on", "slurm", "--dir", given.folder], check=True)
    while not (found := list(given.folder.glob("*/summary.json"))) or json.loads(found[0].read_bytes())["missing"]:
        time.sleep(POLL_S)
    subprocess.run([orc, "best", "--top", "1", "--dir", given.folder], check=True)


if __name__ == "__main__":
    main()
