"""Trials that train together beside the same ones, one by one, in the same process: trials per second of one core.

    python benchmarks/packs.py [--trials 256] [--runs 5] [--epochs 10]

The digits job as it is, `jobs/digits_mlp.py`: 1,437 images, a validation each epoch, the model of each trial at its
end. Seconds are those of this process's CPU, on one thread, so that others on the machine count for little; each run
times the pack and then the trials, of which `--single` stand for all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from orchestrator.config.program import LoadedJob, load_job
from orchestrator.config.spec import Metric
from orchestrator.core.atomic import JsonObject
from orchestrator.training.packing.pack import Member, PackedTrial
from orchestrator.training.trial import Trial

JOBS = Path(__file__).parent.parent / "jobs"
CPU = torch.device("cpu")
TARGETS = {32: 8.0, 128: 3.5}


def drawn(num: int) -> list[JsonObject]:
    """Parameters as the sweep file beside the job would draw them, rates a little lower so that none diverges."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(num, 3, generator=generator).tolist()
    return [{"lr": 0.003 * 30**a, "momentum": 0.9 * b, "weight_decay": 1e-7 * 1e5**c} for a, b, c in points]


def packed(job: LoadedJob, params: list[JsonObject], epochs: int, batch_size: int) -> list[object]:
    members = [Member(index=n, params=one, seed=n, emit=lambda line: None) for n, one in enumerate(params)]
    pack = PackedTrial(members, metric=Metric(), device=CPU)
    job.train(pack, epochs=epochs, batch_size=batch_size)
    return [result.payload["value"] for result in pack.results(None)]


def one_by_one(job: LoadedJob, params: list[JsonObject], epochs: int, batch_size: int) -> list[object]:
    found: list[object] = []
    for number, one in enumerate(params):
        trial = Trial(index=number, params=one, seed=number, metric=Metric(), emit=lambda line: None, device=CPU)
        job.train(trial, epochs=epochs, batch_size=batch_size)
        found.append(trial.result(None).payload["value"])
    return found


def timed(run: Callable[[], list[object]]) -> tuple[float, list[object]]:
    """CPU seconds a trial, and what came of each."""
    began = time.process_time()
    found = run()
    return (time.process_time() - began) / len(found), found


def compared(job: LoadedJob, params: list[JsonObject], batch_size: int, given: argparse.Namespace) -> str:
    """A row of the table."""
    packs_s, singles_s, ratios = [], [], []
    some = params[: given.single]
    for _ in range(given.runs):
        pack_s, ours = timed(lambda: packed(job, params, given.epochs, batch_size))
        single_s, theirs = timed(lambda: one_by_one(job, some, given.epochs, batch_size))
        packs_s.append(pack_s)
        singles_s.append(single_s)
        ratios.append(single_s / pack_s)
    apart = max(abs(float(str(a)) - float(str(b))) for a, b in zip(ours, theirs, strict=False))
    pack_s, single_s = statistics.median(packs_s), statistics.median(singles_s)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    target = f"{TARGETS[batch_size]:.1f}x" if batch_size in TARGETS else "-"
    return (
        f"| {batch_size} | {len(params)} | {1 / pack_s:.1f} | {1 / single_s:.1f} | {statistics.median(ratios):.2f}x | "
        f"{spread} | {target} | {apart:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed trials beside the same ones, one by one.")
    parser.add_argument("--trials", type=int, default=256, help="in the pack")
    parser.add_argument("--single", type=int, default=24, help="of them one by one, in each run")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    given = parser.parse_args()
    torch.set_num_threads(1)
    job = load_job(JOBS, "digits_mlp.py")
    params = drawn(given.trials)
    packed(job, params[:4], 1, 32), one_by_one(job, params[:2], 1, 32)  # imports, data
    print("| batch | trials | packed, trials/s | one by one, trials/s | ratio | of the runs | target | apart |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for batch_size in given.batch_sizes:
        print(compared(job, params, batch_size, given), flush=True)


if __name__ == "__main__":
    main()
