"""Jobs that are displaced once, beside submitit's own checkpointing; and trials that are killed once, without notice.

    python benchmarks/preempt.py                    on a private Slurm of this machine (`orc lab`): about an hour
    python benchmarks/preempt.py --trials 4 --seconds 20 --hold released
    python benchmarks/preempt.py --killed           on this machine: SIGKILL to each worker once, at a random moment

Everybody makes the same steps of the same small training, as many jobs as trials, all at the same time, on one thread
each; a step waits until its time is over, so that jobs don't slow each other down. When every job has made half of its
steps, one of higher priority displaces all of them for a second. Rows are run one after the other, each on a Slurm of
its own that holds requeued jobs for two minutes, as is usual. `released`: the hold is ended (`scontrol update
StartTime=now`), by `orc submit --watch` for orchestrator and by this script for submitit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from orchestrator.slurm import commands
from orchestrator.slurm.lab import Lab, LabOptions

PEERS = Path(__file__).parent / "peers"
ORC = str(Path(sys.executable).with_name("orc"))
STEPS_AN_EPOCH = 8
PERIOD_S = 0.1
HOLD_S = 120
POLL_S = 0.25
OURS, THEIRS, PLAIN = "orchestrator", "submitit, Checkpointable", "submitit, a function"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What everybody trains: `trials` jobs of `seconds` each, of a network whose hidden layer is so wide."""

    trials: int
    seconds: float
    width: int

    @property
    def epochs(self) -> int:
        """Of one trial."""
        return round(self.seconds / PERIOD_S / STEPS_AN_EPOCH)

    @property
    def steps(self) -> int:
        """Of one trial."""
        return self.epochs * STEPS_AN_EPOCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a Slurm displaces jobs."""

    name: str
    options: LabOptions


def ways(cpus: int) -> list[Way]:
    """From the most notice to the least."""
    notice = LabOptions(nodes=1, cpus=cpus, cred_expire_s=HOLD_S, grace_time_s=30, send_user_signal=True)
    term = LabOptions(nodes=1, cpus=cpus, cred_expire_s=HOLD_S, grace_time_s=10)
    kill = LabOptions(nodes=1, cpus=cpus, cred_expire_s=HOLD_S, grace_time_s=0, kill_wait_s=1)
    return [
        Way(name="the signal asked for", options=notice),
        Way(name="TERM, KILL after 10 s", options=term),
        Way(name="KILL, 1 s after TERM", options=kill),
    ]


@dataclass(slots=True, kw_only=True)
class Row:
    """What came of one run.

    Args:
        computed: steps, of all trials together.
        finished: trials.
        wall_s: until the last result was there.
        hold_s: of it, what a job waited in Slurm's hold, on average.
    """

    way: str
    who: str
    released: bool
    computed: int = 0
    finished: int = 0
    wall_s: float = 0.0
    hold_s: float = 0.0


# Everybody's jobs


class Marks:
    """The steps that were made: a file a trial, a line a step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lines(self, trial: int) -> list[list[str]]:
        """Process, step, time of every step, in the order in which they were made."""
        file = self.folder / str(trial)
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def reached(self, trial: int) -> int:
        """The highest step of a trial so far; 0 before the first."""
        return max((int(line[1]) for line in self.lines(trial)), default=0)


@dataclass(slots=True)
class Jobs:
    """Jobs that were handed over.

    Args:
        marks: of their steps.
        num_finished: how many trials have a result.
        watcher: what stays until the end, if anything does.
    """

    marks: Marks
    num_finished: Callable[[], int]
    watcher: subprocess.Popen[bytes] | None = None


def sweep_file(load: Load, *, slurm_options: Mapping[str, object]) -> str:
    fixed = {"epochs": load.epochs, "period_s": PERIOD_S, "width": load.width}
    values: dict[str, object] = {name: {"value": value} for name, value in fixed.items()}
    return yaml.safe_dump(
        {
            "program": "steps.py",
            "method": "grid",
            "parameters": {**values, "number": {"values": [*range(load.trials)]}},
            "launch": {"trials_per_task": 1, "notice_s": 30},
            "reduce": {"visibility_s": 1},
            "slurm": dict(slurm_options),
        }
    )


def prepare(folder: Path, load: Load, **slurm_options: object) -> None:
    """A folder with our sweep file and its program."""
    folder.mkdir(parents=True)
    (folder / "steps.py").write_bytes((PEERS / "steps.py").read_bytes())
    (folder / "sweep.yaml").write_text(sweep_file(load, slurm_options=slurm_options))


def num_complete(folder: Path) -> int:
    """Trials in a summary that has all of them."""
    found = [json.loads(path.read_bytes()) for path in folder.glob("runs/*/summary.json")]
    return sum(one["count"] for one in found if not one["missing"])


def submit_ours(folder: Path, load: Load, env: Mapping[str, str], *, released: bool) -> Jobs:
    prepare(folder, load, time=60, partition="low", nodelist="n0")
    argv = [ORC, "submit", "sweep.yaml", "--dir", "runs"]
    jobs = Jobs(Marks(folder / "marks"), lambda: num_complete(folder))
    with (folder / "orc.out").open("wb") as out:
        if released:
            jobs.watcher = subprocess.Popen([*argv, "--watch"], cwd=folder, env=env, stdout=out, stderr=out)
        else:
            subprocess.run(argv, cwd=folder, env=env, stdout=out, stderr=out, check=True)
    return jobs


def submit_theirs(folder: Path, load: Load, env: Mapping[str, str], *, plain: bool) -> Jobs:
    argv = [sys.executable, PEERS / "submitit_steps.py", "--trials", load.trials, "--epochs", load.epochs]
    argv += ["--period", PERIOD_S, "--width", load.width, "--folder", folder, "--partition", "low", "--node", "n0"]
    argv += ["--plain"] if plain else []
    folder.mkdir(parents=True)
    done = subprocess.run([*map(str, argv)], env=env, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    results = [Path(line.split()[1]) for line in done.stdout.splitlines()]
    return Jobs(Marks(folder / "marks"), lambda: sum(path.exists() for path in results))


# A run on Slurm


@dataclass(slots=True)
class Run:
    """One row in the making: looks at the queue, displaces once, and counts until the end."""

    row: Row
    load: Load
    jobs: Jobs
    releases: bool
    began: float
    is_displaced: bool = False
    is_alive: bool = True
    held: set[str] = field(default_factory=set)
    total_hold_s: float = 0.0

    def follow(self, limit_s: float, folder: Path) -> Row:
        """Return the row once all trials have a result, nothing is left that could give one, or time is over."""
        looked = time.monotonic()
        while (now := time.monotonic()) - self.began < limit_s:
            self.look(now - looked)
            looked = now
            self.row.finished = self.jobs.num_finished()
            if self.row.finished == self.load.trials or (self.is_displaced and not self.is_alive):
                break
            self.displace(folder)
            time.sleep(POLL_S)
        self.row.wall_s = time.monotonic() - self.began
        self.row.hold_s = self.total_hold_s / self.load.trials
        self.row.computed = sum(len(self.jobs.marks.lines(trial)) for trial in range(self.load.trials))
        return self.row

    def look(self, passed_s: float) -> None:
        """See in the queue who waits in Slurm's hold."""
        rows = [row for row in commands.queue() if row.is_live and row.partition == "low"]
        held = {row.job_id for row in rows if (row.state, row.reason) == ("PENDING", "BeginTime")}
        self.total_hold_s += passed_s * len(held & self.held)
        self.held, self.is_alive = held, bool(rows)
        for job in sorted(held) if self.releases else ():
            commands.start_now(job)

    def displace(self, folder: Path) -> None:
        """Take the node away for a second, once everybody has made half of the steps."""
        reached = [self.jobs.marks.reached(trial) for trial in range(self.load.trials)]
        if self.is_displaced or min(reached) < self.load.steps / 2:
            return
        self.is_displaced = True
        script = folder / "urgent.sh"
        script.write_text("#!/bin/sh\nsleep 1\n")
        argv = ["sbatch", "-p", "high", "-w", "n0", "--exclusive", "-o", "/dev/null", str(script)]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def lab_of(folder: Path, options: LabOptions) -> Iterator[None]:
    """A private Slurm, and this process's own Slurm for as long."""
    lab = Lab(folder)
    lab.up(options)
    os.environ.update(lab.env())
    try:
        yield
    finally:
        lab.down()


def environment() -> dict[str, str]:
    """Everybody's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SUBMITIT_", "ORC_"))}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**kept, **threads, "PYTHONPATH": str(PEERS)}


def one(way: Way, who: str, load: Load, folder: Path, *, released: bool) -> Row:
    with lab_of(folder / "lab", way.options):
        began = time.monotonic()
        if who == OURS:
            jobs = submit_ours(folder / "ours", load, environment(), released=released)
        else:
            jobs = submit_theirs(folder / "theirs", load, environment(), plain=who == PLAIN)
        row = Row(way=way.name, who=who, released=released)
        limit_s = 4 * load.seconds + 3 * HOLD_S + 120
        row = Run(row, load, jobs, releases=released and who != OURS, began=began).follow(limit_s, folder)
        if jobs.watcher is not None:
            jobs.watcher.terminate()
            jobs.watcher.wait()
    return row


def table(rows: Sequence[Row], load: Load) -> Iterator[str]:
    """The table, as Markdown."""
    yield "| displaced by | jobs of | steps computed / needed | useful | finished | hold | time in all | of it hold |"
    yield "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |"
    needed = load.trials * load.steps
    for row in rows:
        useful = f"{needed / row.computed:.1%}" if row.finished == load.trials else "-"
        yield (
            f"| {row.way} | {row.who} | {row.computed:,} / {needed:,} | {useful} | {row.finished} of {load.trials} "
            f"| {'released' if row.released else 'as it is'} | {row.wall_s:.0f} s | {row.hold_s:.0f} s |"
        )


def on_lab(load: Load, holds: Sequence[bool]) -> None:
    rows = []
    for way in ways(load.trials + 2):
        for who in (OURS, THEIRS, PLAIN):
            for released in holds:
                with tempfile.TemporaryDirectory(prefix="orc-bench-") as name:
                    rows.append(one(way, who, load, Path(name), released=released))
                print(*[*table(rows[-1:], load)][2:], file=sys.stderr, flush=True)
    print(*table(rows, load), sep="\n")


# Killed without notice, on this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A worker that was killed: when, by time.time(), and after which step of its trial."""

    at: float
    step: int


def kill_each(jobs: Jobs, load: Load, process: subprocess.Popen[bytes], chance: random.Random) -> dict[int, Kill]:
    """SIGKILL to the worker of each trial once, after a step drawn at random; returns when `process` has ended."""
    fatal = {trial: chance.randrange(load.steps // 10, load.steps * 19 // 20) for trial in range(load.trials)}
    done: dict[int, Kill] = {}
    while process.poll() is None:
        for trial in set(fatal) - set(done):
            lines = jobs.marks.lines(trial)
            if lines and int(lines[-1][1]) >= fatal[trial]:
                os.kill(int(lines[-1][0]), signal.SIGKILL)
                done[trial] = Kill(at=time.time(), step=int(jobs.marks.lines(trial)[-1][1]))
        time.sleep(0.02)
    return done


def killed(load: Load, workers: int, seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="orc-bench-") as name:
        folder = Path(name) / "ours"
        prepare(folder, load)
        jobs = Jobs(Marks(folder / "marks"), lambda: num_complete(folder))
        argv = [ORC, "run", "sweep.yaml", "--dir", "runs", "--workers", str(workers)]
        with (folder / "orc.out").open("wb") as out:
            process = subprocess.Popen(argv, cwd=folder, env=environment(), stdout=out, stderr=out)
            kills = kill_each(jobs, load, process, random.Random(seed))
        if process.returncode or len(kills) < load.trials:
            sys.exit(f"exit code {process.returncode}, {len(kills)} kills:\n{(folder / 'orc.out').read_text()[-3000:]}")
        print(*kill_table(jobs, load, kills), sep="\n")


def kill_table(jobs: Jobs, load: Load, kills: Mapping[int, Kill]) -> Iterator[str]:
    yield "| trial | killed after step | went on from | steps done again | useful | restart |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: |"
    computed, restarts = 0, []
    for trial, kill in sorted(kills.items()):
        lines = jobs.marks.lines(trial)
        again = next(line for line in lines if float(line[2]) > kill.at and line[0] != lines[0][0])
        computed += len(lines)
        restarts.append(float(again[2]) - kill.at)
        lost = len(lines) - load.steps
        useful = f"{load.steps / len(lines):.1%}"
        yield f"| {trial} | {kill.step} | {int(again[1]) - 1} | {lost} | {useful} | {restarts[-1]:.2f} s |"
    share = f"{load.trials * load.steps / computed:.1%}"
    yield f"| all | | | {computed - load.trials * load.steps} | {share} | {statistics.median(restarts):.2f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Jobs that are displaced or killed once.")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one trial")
    parser.add_argument("--width", type=int, default=64, help="of the hidden layer: 75 weights each")
    parser.add_argument("--hold", choices=["as-it-is", "released", "both"], default="both")
    parser.add_argument("--killed", action="store_true", help="on this machine, without Slurm")
    parser.add_argument("--workers", type=int, default=2, help="trials at the same time, with --killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, with --killed")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the lab goes down and the folder goes
    load = Load(trials=given.trials, seconds=given.seconds, width=given.width)
    if given.killed:
        killed(load, given.workers, given.seed)
    else:
        on_lab(load, {"as-it-is": [False], "released": [True], "both": [False, True]}[given.hold])


if __name__ == "__main__":
    main()
