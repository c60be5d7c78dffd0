"""What a durable outcome costs, and what a worker leaves behind.

    python benchmarks/outcome.py [--folder DIR]

The records of a trial as a supervisor writes them (a durable start for a block of ten, then each trial's outcome,
flushed at a bounded age) and with every outcome waiting for the disk, beside sqlite3 commits on the same disk,
in turn. Then a sweep of trials that do nothing, whole: what a trial costs besides its training, and the files left.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.core.atomic import JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.results import records
from orchestrator.results.records import RecordWriter, Status

BLOCK = 10
PAYLOAD: JsonObject = {"value": 0.0769163, "metrics": {"val_loss": 0.0769163, "val_accuracy": 0.988889}, "model": None}
JOB = """
def train(trial, *, x: float):
    trial.report(val_loss=x)
"""
SWEEP = """
program: nothing.py
metric: {name: val_loss, goal: minimize}
method: random
parameters: {x: {min: 0.0, max: 1.0}}
"""


def bounded(folder: Path, trials: int) -> float:
    """Seconds for the records of `trials` trials, as a supervisor writes them."""
    return _records(folder, trials, durable=False)


def at_once(folder: Path, trials: int) -> float:
    """The same, but every outcome waits for the disk."""
    return _records(folder, trials, durable=True)


def _records(folder: Path, trials: int, *, durable: bool) -> float:
    paths = SweepPaths(folder)
    paths.records.mkdir(parents=True)
    began = time.perf_counter()
    writer = RecordWriter(paths, {})
    for trial in range(trials):
        if trial % BLOCK == 0:
            block = range(trial, trial + BLOCK)
            writer.append(*(records.start(trial=one, attempt=0) for one in block), durable=True)
        outcome = records.outcome(trial=trial, attempt=0, status=Status.COMPLETE, payload=PAYLOAD, seconds=0.1)
        writer.append(outcome, durable=durable)
        writer.tick()
    writer.close()
    return time.perf_counter() - began


def sqlite(folder: Path, trials: int) -> float:
    """The same facts as rows, one commit a start and one an outcome; the write-ahead log, each commit durable."""
    folder.mkdir()
    began = time.perf_counter()
    base = sqlite3.connect(folder / "trials.db")
    base.execute("PRAGMA journal_mode=WAL")
    base.execute("PRAGMA synchronous=FULL")
    base.execute("CREATE TABLE trial (number INTEGER PRIMARY KEY, state TEXT, value REAL, payload TEXT)")
    for trial in range(trials):
        with base:
            base.execute("INSERT INTO trial VALUES (?, 'running', NULL, NULL)", (trial,))
        with base:
            base.execute("UPDATE trial SET state='complete', value=?, payload=? WHERE number=?", (0.1, "{}", trial))
    base.close()
    return time.perf_counter() - began


def empty_sweep(folder: Path, trials: int) -> tuple[float, dict[str, int], int]:
    """Run trials that do nothing in one worker: seconds, files by folder, and bytes of records a trial."""
    folder.mkdir()
    (folder / "nothing.py").write_text(JOB)
    (folder / "nothing.yaml").write_text(SWEEP)
    orc = Path(sys.executable).with_name("orc")
    runs = folder / "runs"
    argv = [orc, "run", folder / "nothing.yaml", f"run_cap={trials}", "--workers", "1", "--dir", runs]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ORC_"))}
    began = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True, env=env)
    seconds = time.perf_counter() - began
    paths = SweepPaths(next(path for path in runs.iterdir() if path.is_dir()))
    counts = {part.name: _num_files(part) for part in sorted(paths.root.iterdir()) if part.is_dir()}
    counts["(itself)"] = sum(part.is_file() for part in paths.root.iterdir())
    return seconds, counts, sum(path.stat().st_size for path in paths.records.iterdir()) // trials


def _num_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def _one_trial_s(folder: Path, trials: int) -> float:
    """What one more empty trial costs: the difference between many and few, so that starting up falls out."""
    few_s, _, _ = empty_sweep(folder / "few", BLOCK)
    many_s, counts, size = empty_sweep(folder / "many", trials)
    print(f"\n{trials:,} empty trials, one worker: {many_s:.2f} s, of which {few_s:.2f} s are start and end")
    print(f"files: {', '.join(f'{name} {number}' for name, number in counts.items())}; {size} bytes of records a trial")
    return (many_s - few_s) / (trials - BLOCK)


def main() -> None:
    parser = argparse.ArgumentParser(description="What an outcome costs.")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the file system that is to be measured")
    given = parser.parse_args()
    ways: dict[str, Callable[[Path, int], float]] = {
        "start durable by block, outcome on the disk within 0.5 s": bounded,
        "start durable by block, outcome on the disk at once": at_once,
        "sqlite3, a commit a start and an outcome": sqlite,
    }
    with tempfile.TemporaryDirectory(prefix="orc-bench-", dir=given.folder) as name:
        folder = Path(name)
        found: dict[str, list[float]] = {way: [] for way in ways}
        for run in range(given.runs):
            for number, (way, work) in enumerate(ways.items()):
                found[way].append(work(folder / f"{run}-{number}", given.trials) / given.trials * 1000)
        print("| a trial's records | median | min | max |\n| --- | ---: | ---: | ---: |")
        for way, each in found.items():
            print(f"| {way} | {statistics.median(each):.3f} ms | {min(each):.3f} ms | {max(each):.3f} ms |")
        print(f"an empty trial, from hand-over to outcome: {_one_trial_s(folder, given.trials) * 1000:.2f} ms")


if __name__ == "__main__":
    main()
