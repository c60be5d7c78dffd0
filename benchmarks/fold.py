"""How fast records become answers, beside a plain parse of the same lines and beside Optuna's journal.

    python benchmarks/fold.py [--trials 1000000] [--few 100000] [--runs 5] [--folder DIR]

A finished sweep is laid out as record files: outcomes as workers write them, of trials in blocks, in 16 files. Every
run is a process of its own, ways in turn; medians. Parsing and folding are timed inside the process, commands from
outside, beside a start of `orc` that does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson

from orchestrator.config.plan import SweepPlan, write_plan
from orchestrator.config.spec import Metric, SweepSpec
from orchestrator.core.atomic import checked
from orchestrator.core.paths import SweepPaths
from orchestrator.results import fold as folding
from orchestrator.results import records
from orchestrator.results.fold import Fold
from orchestrator.results.records import Status

NUM_FILES = 16
NUM_BLOCKS = 100
NUM_NEW = 1000
TOP = 10
NO_CACHE = 1 << 62
ORC = [sys.executable, "-P", "-m", "orchestrator"]


# What is read


def outcome(trial: int, value: float) -> bytes:
    """An outcome line as a worker writes it."""
    payload = {"value": value, "step": 9, "metrics": {"val_loss": value, "val_error": value / 3}, "model": None}
    return checked(records.outcome(trial=trial, attempt=0, status=Status.COMPLETE, payload=payload, seconds=0.1234))


def write_records(paths: SweepPaths, trials: range, mode: str) -> None:
    """Outcomes of trials, block by block to the record files in turn; the same ones in every run."""
    rng = random.Random(trials.start)
    size = -(-len(trials) // NUM_BLOCKS)
    files = [paths.record(f"{number:032x}").open(mode) for number in range(NUM_FILES)]
    for number, file in enumerate(files):
        if not file.tell():
            file.write(checked({"kind": "writer", "writer": f"{number:032x}", "host": f"node{number}"}))
    for trial in trials:
        files[(trial - trials.start) // size % NUM_FILES].write(outcome(trial, rng.random()))
    for file in files:
        file.close()


def make_sweep(runs: Path, num_trials: int, num_done: int) -> SweepPaths:
    """A sweep of which the first trials are done."""
    spec = SweepSpec(
        name=f"bench{num_trials}",
        method="random",
        parameters={"lr": {"min": 0.001, "max": 0.1}, "width": {"values": [16, 32, 64]}},
        metric=Metric(),
        command=("true",),
        run_cap=num_trials,
    )
    plan = SweepPlan(spec=spec, code="0" * 64)
    paths = SweepPaths(runs / plan.id)
    for folder in paths.folders:
        folder.mkdir(parents=True, exist_ok=True)
    write_plan(plan, paths.plan)
    write_records(paths, range(num_done), "ab")
    return paths


# Ways to read it, each in a process of its own


def plain(paths: SweepPaths, num_trials: int) -> None:
    """Parse every line, and nothing else."""
    loads = orjson.loads
    for path in sorted(paths.records.iterdir()):
        with path.open("rb") as file:
            for line in file:
                loads(line)


def fold_alone(paths: SweepPaths, num_trials: int) -> None:
    """A fold by one process."""
    Fold(paths, num_trials).update()


def fold_many(paths: SweepPaths, num_trials: int) -> None:
    """A fold by as many processes as there are cores."""
    folding._SAVED_BYTES = NO_CACHE
    Fold(paths, num_trials, eager=True).update()


def fold_and_save(paths: SweepPaths, num_trials: int) -> None:
    """The same, and the cache."""
    Fold(paths, num_trials, eager=True).update()


WAYS: dict[str, Callable[[SweepPaths, int], None]] = {
    "plain orjson parse, one thread": plain,
    "fold, one process": fold_alone,
    "fold, a process a core": fold_many,
    "fold, a process a core, and the cache written": fold_and_save,
}


def own_memory_kb(pid: int) -> int:
    """Memory of a process and its children; what several share counts once."""
    found = Path(f"/proc/{pid}/smaps_rollup").read_text()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found.partition("\nPss:")[2].split()[0]) + sum(map(own_memory_kb, map(int, children)))


def one_run(way: str, folder: str, num_trials: str) -> None:
    """A run in this process: prints how long it took, and says before it begins, for whoever watches its memory."""
    paths = SweepPaths(Path(folder))
    paths.fold_cache.unlink(missing_ok=True)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    WAYS[way](paths, int(num_trials))
    print(time.perf_counter() - began, flush=True)


def run(way: str, paths: SweepPaths, num_trials: int, *, watch: bool = False) -> tuple[float, float]:
    """(seconds, MB that it took at most over what it had before) of a run in a new process."""
    argv = [sys.executable, "-P", __file__, "--one", way, str(paths.root), str(num_trials)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        before = most = own_memory_kb(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), not watch)
        while not (said := process.stdout.readline()):
            time.sleep(0.01)
            # A child may end between being listed and being looked at.
            try:
                most = max(most, own_memory_kb(process.pid))
            except OSError:
                continue
    return float(said), (most - before) / 1000


# Commands


def timed(*argv: str, runs: Path) -> float:
    """Wall seconds of a command."""
    env = {**os.environ, "ORC_DIR": str(runs)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True, env=env)
    return time.perf_counter() - began


OPTUNA = """
import optuna, sys
optuna.logging.set_verbosity(optuna.logging.ERROR)
storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(sys.argv[1]))
study = optuna.load_study(study_name="bench", storage=storage)
done = [one for one in study.get_trials(deepcopy=False) if one.value is not None]
print([one.number for one in sorted(done, key=lambda one: (one.value, one.number))[:10]])
"""


def write_journal(path: Path, num_trials: int) -> None:
    """The same trials as Optuna's journal, collected first, for it would wait for the disk at every one."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

    class Collected(BaseJournalBackend):
        """A journal in memory."""

        def __init__(self) -> None:
            self.lines: list[dict[str, object]] = []

        def append_logs(self, logs: list[dict[str, object]]) -> None:
            self.lines += json.loads(json.dumps(logs))

        def read_logs(self, log_number_from: int) -> Iterator[dict[str, object]]:
            yield from self.lines[log_number_from:]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    collected = Collected()
    storage = JournalStorage(collected)
    study = optuna.create_study(study_name="bench", storage=storage)
    kinds = {
        "lr": optuna.distributions.FloatDistribution(0.001, 0.1),
        "width": optuna.distributions.IntDistribution(16, 64),
    }
    rng = random.Random(0)
    for _ in range(num_trials):
        params = {"lr": rng.uniform(0.001, 0.1), "width": rng.choice([16, 32, 64])}
        trial = optuna.trial.create_trial(params=params, distributions=kinds, value=rng.random())
        storage.create_new_trial(study._study_id, template_trial=trial)
    JournalFileBackend(str(path)).append_logs(collected.lines)


# Tables


def in_turn(ways: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Times of each way, the ways in turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            found[name].append(way())
    return found


def show(title: str, found: dict[str, list[float]], base: str, unit: str = "s") -> None:
    """A table of medians, beside that of `base`."""
    print(f"\n| {title} | median | min | max | to {base} |\n| --- | ---: | ---: | ---: | ---: |")
    against = statistics.median(found[base])
    factor, digits = (1000, 1) if unit == "ms" else (1, 3)
    for name, each in found.items():
        middle = statistics.median(each)
        cells = (f"{value * factor:.{digits}f} {unit}" for value in (middle, min(each), max(each)))
        print(f"| {name} | {' | '.join(cells)} | {middle / against:.3f} |")


def cold(runs: Path, num_trials: int, num_runs: int) -> SweepPaths:
    """Folds without a cache, and their memory."""
    paths = make_sweep(runs, num_trials, num_trials - NUM_NEW)
    size = sum(path.stat().st_size for path in paths.records.iterdir())
    print(f"{num_trials - NUM_NEW:,} outcomes in {NUM_FILES} files, {size / 1e6:.0f} MB")
    ways = {way: (lambda way=way: run(way, paths, num_trials)[0]) for way in WAYS}
    show("way", in_turn(ways, num_runs), next(iter(WAYS)))
    kept = 22 * num_trials / 1e6
    print(f"\n| memory, all processes | at most | over the table of {kept:.0f} MB |\n| --- | ---: | ---: |")
    for way in list(WAYS)[1:]:
        most = statistics.median(run(way, paths, num_trials, watch=True)[1] for _ in range(num_runs))
        print(f"| {way} | {most:.1f} MB | {most - kept:.1f} MB |")
    return paths


def warm(paths: SweepPaths, num_trials: int, num_runs: int) -> None:
    """Commands on a sweep that was folded before, a thousand outcomes ago."""
    timed(*ORC, "summary", paths.id, runs=paths.root.parent)
    write_records(paths, range(num_trials - NUM_NEW, num_trials), "ab")
    start = "orc --help"
    commands = {start: ["--help"], **{f"orc {verb}": [verb, paths.id] for verb in ("best", "status", "summary")}}
    ways = {name: (lambda words=words: timed(*ORC, *words, runs=paths.root.parent)) for name, words in commands.items()}
    found = in_turn(ways, num_runs)
    show(f"command, {num_trials:,} trials, {NUM_NEW:,} lines new", found, start, "ms")
    for name in list(ways)[1:]:
        print(
            f"{name}: {1000 * (statistics.median(found[name]) - statistics.median(found[start])):.1f} ms over a start"
        )


def beside_optuna(runs: Path, num_trials: int, num_runs: int) -> None:
    """The best ten of a finished sweep in a new process, never folded before, folded before, and by Optuna."""
    paths = make_sweep(runs, num_trials, num_trials)
    journal = runs / "journal.log"
    write_journal(journal, num_trials)
    best = [*ORC, "best", "--top", str(TOP), paths.id]

    def first() -> float:
        paths.fold_cache.unlink(missing_ok=True)
        return timed(*best, runs=runs)

    name = "Optuna, journal storage, load and sort"
    ways: dict[str, Callable[[], float]] = {
        name: lambda: timed(sys.executable, "-P", "-c", OPTUNA, str(journal), runs=runs),
        "orc best, for the first time": first,
        "orc best": lambda: timed(*best, runs=runs),
    }
    show(f"the best {TOP} of {num_trials:,} trials", in_turn(ways, num_runs), name)


def main() -> None:
    parser = argparse.ArgumentParser(description="What folding costs.")
    parser.add_argument("--trials", type=int, default=1_000_000)
    parser.add_argument("--few", type=int, default=100_000, help="trials of the sweep that Optuna has too; 0 for none")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the file system that is to be measured")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one_run(*given.one)
        return
    folder = Path(tempfile.mkdtemp(prefix="orc-bench-", dir=given.folder))
    try:
        warm(cold(folder, given.trials, given.runs), given.trials, given.runs)
        if given.few:
            beside_optuna(folder, given.few, given.runs)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
