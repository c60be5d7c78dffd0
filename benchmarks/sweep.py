"""A whole sweep beside the alternatives: 200 trials of the same digits training, whole commands, interleaved runs.

    python benchmarks/sweep.py                    on this machine, two processes each; ours with packs, too
    python benchmarks/sweep.py --where lab        on a private Slurm of this machine (`orc lab`), two jobs each

Every run starts a new process in a new, empty folder; its wall time ends when the command does. CPU time is that of the
command and all it left behind, also of processes that detached themselves; what Slurm's daemons start is not theirs and
not counted. One thread a trial for everyone; byte code is there beforehand, as on any machine in use.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
PEERS = HERE / "peers"
OURS = "orchestrator"
PACKED = "orchestrator, packed in two"
ONE_A_TASK = "submitit, one trial per task"
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command that is timed.

    Args:
        name: its row in the table.
        argv: what is run; `{folder}` stands for the run's own folder.
        trials: how many trials it trains.
    """

    name: str
    argv: tuple[str, ...]
    trials: int


@dataclass(slots=True)
class Times:
    """Seconds of each run of a command."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def local_commands(trials: int) -> list[Command]:
    """What is compared on this machine."""
    sweep = HERE.parent / "jobs" / "digits_mlp.yaml"
    ours = (str(Path(sys.executable).with_name("orc")), "run", str(sweep), f"run_cap={trials}", "--dir", "{folder}")
    half = -(-trials // 2)
    packed = (*ours, f"launch.pack={half}", f"launch.trials_per_task={half}")
    two = ("--trials", str(trials), "--processes", "2")
    optuna = (*_peer("optuna_random"), *two, "--folder", "{folder}")
    return [
        Command(name=OURS, argv=ours, trials=trials),
        Command(name=PACKED, argv=packed, trials=trials),
        Command(name="submitit, 2 tasks", argv=(*_submitit(trials, 2), "--cluster", "local"), trials=trials),
        Command(name="Optuna, 2 processes", argv=optuna, trials=trials),
        Command(name="plain fork of 2", argv=(*_peer("fork"), *two), trials=trials),
    ]


def lab_commands(trials: int, few: int) -> list[Command]:
    """What is compared on Slurm: the same partition, two tasks of one processor at a time."""
    both = ("--trials", str(trials), "--tasks", "2", "--folder", "{folder}")
    one = (*_submitit(few, few), "--cluster", "slurm")
    return [
        Command(name=OURS, argv=(*_peer("orc_submit"), *both), trials=trials),
        Command(name="submitit, 2 tasks", argv=(*_submitit(trials, 2), "--cluster", "slurm"), trials=trials),
        Command(name=ONE_A_TASK, argv=one, trials=few),
    ]


def _peer(name: str) -> tuple[str, str]:
    return sys.executable, str(PEERS / f"{name}.py")


def _submitit(trials: int, tasks: int) -> tuple[str, ...]:
    return (*_peer("submitit_array"), "--trials", str(trials), "--tasks", str(tasks), "--folder", "{folder}")


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """The same for every command."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "SLURM_", "SBATCH_", "SUBMITIT_", "ORC_"))
    }
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**kept, **threads, "PYTHONPATH": str(HERE), **more}


def timed(command: Command, env: Mapping[str, str], folder: Path, *, adopting: bool) -> tuple[float, float]:
    """Run a command in an empty folder; wall seconds of the command, CPU seconds of it and its descendants.

    With `adopting`, those too that detached themselves, and all of them have ended when this returns.

    Raises:
        SystemExit: it failed; the end of what it printed is in the text.
    """
    folder.mkdir()
    output = folder.with_suffix(".out")
    argv = [part.format(folder=folder) for part in command.argv]
    with output.open("wb") as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            argv, env=env, cwd=folder.parent, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command.name}: exit code {process.returncode}\n{output.read_text(errors='replace')[-3000:]}")
    return wall_s, usage.ru_utime + usage.ru_stime + (_orphans_cpu_s() if adopting else 0.0)


def _orphans_cpu_s() -> float:
    """CPU seconds of the processes that detached themselves and came to us, once all of them have ended."""
    total = 0.0
    while True:
        try:
            _, _, usage = os.wait4(-1, 0)
        except ChildProcessError:
            return total
        total += usage.ru_utime + usage.ru_stime


def measure(
    commands: Sequence[Command], runs: int, env: Mapping[str, str], folder: Path, *, adopting: bool
) -> dict[str, Times]:
    """Every command once, then every command again, `runs` times."""
    found = {command.name: Times() for command in commands}
    for run in range(runs):
        for number, command in enumerate(commands):
            wall_s, cpu_s = timed(command, env, folder / f"{run}-{number}", adopting=adopting)
            found[command.name].wall_s.append(wall_s)
            found[command.name].cpu_s.append(cpu_s)
            print(f"run {run + 1} of {runs}: {command.name}: {wall_s:.2f} s", file=sys.stderr, flush=True)
    return found


def table(commands: Sequence[Command], found: Mapping[str, Times], *, with_cpu: bool) -> Iterator[str]:
    """The table, as Markdown."""
    ours_s = statistics.median(found[OURS].wall_s)
    yield "| command | trials | wall, median | min | max | CPU, median | wall to ours |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for command in commands:
        times = found[command.name]
        scale = commands[0].trials / command.trials
        median_s = statistics.median(times.wall_s)
        cpu = f"{statistics.median(times.cpu_s):.1f} s" if with_cpu else "-"
        ratio = f"{median_s * scale / ours_s:.3f}{' (scaled)' if scale != 1 else ''}"
        spread = f"{min(times.wall_s):.2f} s | {max(times.wall_s):.2f} s"
        yield f"| {command.name} | {command.trials} | {median_s:.2f} s | {spread} | {cpu} | {ratio} |"


@contextmanager
def lab_environment(folder: Path) -> Iterator[Mapping[str, str]]:
    """A private Slurm for as long as it is needed: two nodes of one processor, so that two tasks run at a time."""
    from orchestrator.slurm.lab import Lab, LabOptions

    lab = Lab(folder / "lab")
    lab.up(LabOptions(nodes=2, cpus=1))
    try:
        yield lab.env()
    finally:
        lab.down()


def main() -> None:
    parser = argparse.ArgumentParser(description="A sweep beside the alternatives.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--few", type=int, default=8, help="trials of the row with one trial per task")
    parser.add_argument("--where", choices=["local", "lab"], default="local")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the lab goes down and the folder goes
    is_local = given.where == "local"
    commands = local_commands(given.trials) if is_local else lab_commands(given.trials, given.few)
    small = local_commands(4) if is_local else lab_commands(4, 2)
    if is_local:
        # Only here: the lab's daemons are children of ours, and don't end.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(prefix="orc-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        env = environment({} if is_local else stack.enter_context(lab_environment(folder)))
        (folder / "warm").mkdir()
        # A small run of each before the timing, so that byte code and file cache are warm for all.
        measure(small, 1, env, folder / "warm", adopting=is_local)
        found = measure(commands, given.runs, env, folder, adopting=is_local)
    print(*table(commands, found, with_cpu=is_local), sep="\n")


if __name__ == "__main__":
    main()
