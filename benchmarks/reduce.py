"""What it costs to reduce a Summary over ranks, and what exactness costs a validation.

    python benchmarks/reduce.py [--ranks 8] [--top 100] [--repeats 7]

First, ranks on gloo over loopback, each with the Summary of 360 samples that keeps 100 values at each end: our
reduction beside an all_reduce of as many bytes as one message of it has, and beside what one would write with the
collectives at hand (a sum of the sums, limb by limb, and of the buckets, a minimum and a maximum, a gather of the best
values to rank 0, and a broadcast of the result). Then a validation pass of a small CNN on one thread, in processor
time: without any statistics, and whole, with the means that are reported; and what these and the whole Summaries take
of it, by themselves. All in turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F  # noqa: N812  # as everyone names it

from orchestrator.config.spec import Metric
from orchestrator.distributed.control_group import ControlGroup
from orchestrator.stats import wire
from orchestrator.stats.summary import Summary
from orchestrator.training.data.dataset import dealt
from orchestrator.training.trial import Trial

CALLS = 30
SAMPLES = 360
LIMBS = 128  # of 32 bits each: as many as the sums of values and of squares need
BUCKETS = 4096  # of a dense sketch: 64 octaves of 64
CPU = torch.device("cpu")
BARE = "the network and its losses alone"


# Ranks


def ours(group: ControlGroup, summary: Summary) -> None:
    group.reduce(summary)


def all_reduce(group: ControlGroup, summary: Summary) -> None:
    words = torch.zeros(wire.FRAME_BYTES // 8, dtype=torch.int64)
    dist.all_reduce(words)


def collectives(group: ControlGroup, summary: Summary) -> None:
    """A sum, a minimum, a maximum, a gather and a broadcast, of tensors of fixed sizes."""
    sums = torch.zeros(4 + LIMBS + BUCKETS, dtype=torch.int64)
    extremes = torch.tensor([summary.low[0][0], summary.high[0][0]], dtype=torch.float64)
    best = torch.tensor([*summary.low, *summary.high], dtype=torch.float64)
    dist.all_reduce(sums)
    dist.all_reduce(extremes, op=dist.ReduceOp.MIN)
    everyone = [torch.empty_like(best) for _ in range(group.world_size)] if group.rank == 0 else None
    dist.gather(best, everyone)
    if everyone is not None:
        both = torch.stack(everyone).reshape(group.world_size, 2, -1, 2)
        best = torch.cat([half.reshape(-1, 2).sort(dim=0).values[: summary.top] for half in both.unbind(1)])
    dist.broadcast(best, 0)


WAYS = {
    "reduce of a Summary": ours,
    "all_reduce of as many bytes": all_reduce,
    "sum, minimum, gather, broadcast": collectives,
}


def time_ranks(rank: int, world_size: int, top: int, repeats: int, store: str, results: multiprocessing.Queue) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    group = ControlGroup.of()
    generator = torch.Generator().manual_seed(rank)
    losses = torch.randn(SAMPLES, generator=generator).exp()
    summary = Summary.of_samples(losses, first_key=SAMPLES * rank, top=top)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats + 1):  # the first one warms up
        for name, way in WAYS.items():
            group.barrier()
            began = time.perf_counter()
            for _ in range(CALLS):
                way(group, summary)
            group.barrier()
            found[name].append((time.perf_counter() - began) / CALLS)
    if rank == 0:
        results.put((len(wire.encode(summary)), {name: times[1:] for name, times in found.items()}))
    group.barrier()
    dist.destroy_process_group()


def reduce_over(world_size: int, top: int, repeats: int) -> None:
    forks = multiprocessing.get_context("fork")  # torch has not computed anything yet, so it has no threads to lose
    with tempfile.TemporaryDirectory() as folder:
        results = forks.Queue()
        arguments = (world_size, top, repeats, str(Path(folder, "store")), results)
        processes = [forks.Process(target=time_ranks, args=(rank, *arguments)) for rank in range(world_size)]
        for process in processes:
            process.start()
        num_bytes, found = results.get(timeout=600)
        for process in processes:
            process.join()
    print(f"\n{world_size} ranks, top {top}, {num_bytes} bytes a Summary, {wire.FRAME_BYTES} a message:\n")
    table("over the ranks", found, base="all_reduce of as many bytes")


# A validation pass


class Cnn(torch.nn.Module):
    """Two convolutions and a linear layer, for images of 28 by 28."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3),
            torch.nn.BatchNorm2d(16),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 3),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(32 * 25, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.body(x)


def losses_of(net: torch.nn.Module, batch: object) -> dict[str, torch.Tensor]:
    x, y = batch  # type: ignore[misc]
    z = net(x)
    return {"loss": F.cross_entropy(z, y, reduction="none"), "error": (z.argmax(-1) != y).float()}


def passes(num: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(num, 1, 28, 28, generator=generator), torch.randint(10, (num,), generator=generator)
    trial = Trial(index=0, params={}, seed=0, metric=Metric(), emit=lambda _: None, device=CPU)
    net, _ = trial.prepare(net=Cnn())
    batch_size = 512

    @torch.no_grad()
    def bare() -> None:
        net.eval()
        for batch in dealt(samples, batch_size, num, CPU, 0, 1):
            losses_of(net, batch)

    def whole() -> None:
        trial.validate(losses_of, samples, batch_size=batch_size)

    kept = {"loss": torch.randn(num, generator=generator).exp(), "error": (samples[1] > 0).float()}
    return {
        BARE: bare,
        "validate": whole,
        "of which the exact means": lambda: [Summary.mean_of(value) for value in kept.values()],
        "the whole Summaries": lambda: [Summary.of_samples(value) for value in kept.values()],
    }


def validate(num: int, repeats: int) -> None:
    torch.set_num_threads(1)
    ways = passes(num)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            found[name].append(time.process_time() - began)
    print(f"\nA validation pass of a small CNN, {num} samples, two values a sample, one thread:\n")
    table("pass", {name: times[1:] for name, times in found.items()}, base=BARE)


def table(what: str, found: dict[str, list[float]], *, base: str) -> None:
    print(f"| {what} | median | min | max | to: {base} |\n| --- | ---: | ---: | ---: | ---: |")
    for name, times in found.items():
        # In turn, so that what slows the machine for a while slows both of a pair.
        ratio = statistics.median(mine / other for mine, other in zip(times, found[base], strict=True))
        columns = (f"{value * 1000:.2f} ms" for value in (statistics.median(times), min(times), max(times)))
        print(f"| {name} | {' | '.join(columns)} | {ratio:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="how many (8)")
    parser.add_argument("--top", type=int, default=100, help="values kept at each end (100)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each, in turn (7)")
    given = parser.parse_args()
    reduce_over(given.ranks, given.top, given.repeats)
    for num in (SAMPLES, 4_000):
        validate(num, given.repeats if num > SAMPLES else 5 * given.repeats)


if __name__ == "__main__":
    main()
