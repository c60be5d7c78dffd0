"""docs/adopt.md: its scripts become trials by the lines that it shows, run, and go on where a notice has ended them.

This runs what `test_readme.py` runs of other documents; some of it with a notice in the middle.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import sweeps
from documents import ROOT, Block, Reader, blocks

from orchestrator.config.plan import PlanFile
from orchestrator.core.paths import SweepPaths

DOCUMENT = ROOT / "docs" / "adopt.md"
HOLD = """
import os, signal, time
from pathlib import Path

def hold_at(count):
    from orchestrator.worker.current import Attempt
    report = Attempt.report
    done = []

    def held(self, *args, **metrics):
        report(self, *args, **metrics)
        done.append(1)
        if len(done) == count and self.rank == 0:
            wait()

    Attempt.report = held

def wait():
    noticed, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *found: [noticed.append(1), before(*found)])
    Path(os.environ["HOLD"]).touch()
    while not noticed:
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, before)

if os.environ.get("ORC_ATTEMPT") == "0" and "HOLD" in os.environ:
    hold_at(2)
"""
"""Has a script's first attempt wait in its second report until a notice has come, and take it as it would then."""


def of(stem: str) -> list[Block]:
    """The blocks of one script: its files and, after them, its commands."""
    found: dict[str, list[Block]] = {}
    for block in blocks(DOCUMENT):
        name = Path(block.file).stem if block.file else next(reversed(found))
        found.setdefault(name, []).append(block)
    return found[stem]


def reader(folder: Path, stem: str) -> Reader:
    """Somebody who has the script, has changed the lines that the document says, and has its sweep file."""
    (folder / "hold").mkdir()
    (folder / "hold" / "sitecustomize.py").write_text(HOLD)
    found = Reader(folder, {"PYTHONPATH": str(folder / "hold")})
    for block in of(stem):
        if block.file:
            found.do(block)
        if block.kind == "diff":
            found.run("git", "apply", "-p0", str(block.file))
    return found


def commands(stem: str) -> list[list[str]]:
    return [line.split() for block in of(stem) if block.kind == "console" for line in block.commands]


def interrupted(one: Reader, *argv: str) -> SweepPaths:
    """The sweep of a command that is interrupted from the keyboard once its trial has made two reports."""
    flag = one.folder / "held"
    environment = {**one.environment, "HOLD": str(flag)}
    with subprocess.Popen(argv, cwd=one.folder, env=environment, stdin=subprocess.DEVNULL) as process:
        try:
            sweeps.until(lambda: flag.exists() or process.poll() is not None, 240.0)
            process.send_signal(signal.SIGINT)
            assert process.wait(120.0) == 75
        finally:
            process.kill()
    return only_sweep(one.folder)


def only_sweep(folder: Path) -> SweepPaths:
    (found,) = [path for path in (folder / "runs").iterdir() if path.is_dir()]
    return SweepPaths(found)


def steps(paths: SweepPaths, attempt: int) -> list[int]:
    return [line["step"] for line in sweeps.records(paths, "report") if line["attempt"] == attempt]


def values(paths: SweepPaths) -> list[float]:
    return [line["payload"]["value"] for line in sweeps.records(paths, "outcome") if line["trial"] == 0]


@pytest.mark.parametrize(("stem", "num_trials"), [("hf", 1), ("app", 2)])
def test_it_runs_as_the_document_says(tmp_path: Path, stem: str, num_trials: int) -> None:
    one = reader(tmp_path, stem)
    for command in commands(stem):
        one.run(*command)
    assert sweeps.counts(only_sweep(tmp_path)) == {"complete": num_trials}


def test_a_plain_loop_ends_with_the_numbers_that_it_gives_by_hand_undisturbed(tmp_path: Path) -> None:
    one, ((*command,),) = reader(tmp_path, "loop"), commands("loop")
    paths = interrupted(one, *command, "lr=0.1")
    one.run(*command, "lr=0.1")
    assert (steps(paths, 0), steps(paths, 1)) == ([0, 1], [2, 3, 4, 5])
    one.variables.update(ORC_SEED=str(PlanFile.open(paths.plan).trial(0).seed), OMP_NUM_THREADS="1")
    by_hand = [json.loads(line) for line in one.run("python", "loop.py").splitlines()]
    assert values(paths) == [by_hand[-1]["val_loss"]]


def test_ranks_leave_together_and_go_on_from_what_the_first_one_saved(tmp_path: Path) -> None:
    one, ((*command,),) = reader(tmp_path, "ddp"), commands("ddp")
    paths = interrupted(one, *command)
    one.run(*command)
    assert (steps(paths, 0), steps(paths, 1)) == ([0, 1], [2, 3, 4, 5])
    assert sweeps.counts(paths) == {"complete": 1}


def test_lightning_goes_on_in_a_later_epoch(tmp_path: Path) -> None:
    one, ((*command,),) = reader(tmp_path, "lit"), commands("lit")
    paths = interrupted(one, *command)
    one.run(*command)
    assert steps(paths, 0) == [8, 16]
    assert steps(paths, 1)[0] > 8
    assert steps(paths, 1)[-2:] == [40, 40]  # at the end of training, and once more after it
    assert sweeps.counts(paths) == {"complete": 1}
