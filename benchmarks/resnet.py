"""How many steps a second jobs/cifar_resnet.py trains, beside plain torch.

    python benchmarks/resnet.py [--layers 20] [--steps 8] [--repeats 7] [--ranks 1,2]

ResNet-20, batches of 128 of made-up images in CIFAR's form, one thread a rank. With one rank, beside a plain loop: the
same network, loss, optimizer and schedule, batches by an index, the same cropping and flipping with numbers of its own.
With several (gloo, on this machine), beside what one would start with torchrun: the network in
DistributedDataParallel, an equal part of each batch for each rank. Ours is the job's own loop with all that a worker
has around it: safe points, and checkpoints at the interval that follows from what they cost. Both train in the same
processes, some steps of the one and some of the other in turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from orchestrator.cli.init import folder as jobs
from orchestrator.config import program
from orchestrator.config.spec import CheckpointOptions, Metric
from orchestrator.distributed.rendezvous import RankContext, RendezvousRequest, met
from orchestrator.training.augment import crop_and_flip
from orchestrator.training.checkpoint.concord import RankCheckpointManager
from orchestrator.training.checkpoint.files import Checkpoints, Identity
from orchestrator.training.checkpoint.manager import CheckpointManager
from orchestrator.training.trial import Trial

OURS, PLAIN = "jobs/cifar_resnet.py", "plain torch"
BATCH = 128
NUM = 20 * BATCH
ITERATIONS = 64_000
WRITER = "0123456789abcdef" * 2

resnet = program.load_job(jobs(), "cifar_resnet.py").module


def images() -> object:
    """Made-up samples, as the job has its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (NUM, 3, 32, 32), generator=generator).to(torch.uint8)
    samples = (x, torch.randint(0, 10, (NUM,), generator=generator))
    mean, std = x.float().mean(0), x.float().std(dim=(0, 2, 3))[:, None, None]
    return resnet.Data(samples, samples, samples, mean, std)


def keeper(folder: Path, party: RankContext) -> CheckpointManager:
    """Saves as a worker's does; nobody sends notices."""
    whose = Identity(sweep="benchmark", trial=0, world_size=party.world_size)
    checkpoints = Checkpoints(folder / "checkpoints", whose, WRITER, say=lambda _: None)
    told = {"hears": list, "tells": lambda _: None, "say": lambda _: None}
    if party.world_size == 1:
        return CheckpointManager(checkpoints, CheckpointOptions(), **told)
    return RankCheckpointManager(checkpoints, CheckpointOptions(), party, **told)


def ours(party: RankContext, kept: CheckpointManager, layers: int) -> Iterator[None]:
    """A step at each `next`."""
    params = {"layers": layers, "iterations": ITERATIONS}
    trial = Trial(index=0, params=params, seed=1, metric=Metric(), emit=lambda _: None, party=party, keeper=kept)
    found = images()
    trial.build(resnet.build)
    for _ in trial.epochs(ITERATIONS):
        for x, y, keys in trial.batches(found.train, BATCH, keyed=True):
            trial.step(resnet.losses, (crop_and_flip(found.scaled(x), keys), y))
            yield


def plain(party: RankContext, layers: int) -> Iterator[None]:
    """The same."""
    torch.manual_seed(1)
    state, found = resnet.build(layers=layers, iterations=ITERATIONS), images()
    net, (x, y) = state.net, found.train
    if party.main is not None:
        net = DistributedDataParallel(net, process_group=party.main)
    net.train()
    each = BATCH // party.world_size
    for epoch in range(ITERATIONS):
        order = torch.randperm(NUM, generator=torch.Generator().manual_seed(epoch))
        for first in range(each * party.rank, NUM, BATCH):
            picked = order[first : first + each]
            batch = crop_and_flip(found.scaled(x[picked]), torch.randint(0, 1 << 62, (each,)))
            state.opt.zero_grad()
            F.cross_entropy(net(batch), y[picked]).backward()
            state.opt.step()
            state.each_step.step()
            yield


def time_in_turn(party: RankContext, folder: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    """Steps a second of each way, each time."""
    kept = keeper(folder, party)
    ways = {OURS: ours(party, kept, given.layers), PLAIN: plain(party, given.layers)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(given.repeats + 1):  # the first one warms up
        # Who comes first changes from turn to turn: whatever the machine does beside this, it does to both.
        for name, steps in sorted(ways.items(), reverse=bool(turn % 2)):
            party.group.barrier()
            began = time.perf_counter()
            for _ in range(given.steps):
                next(steps)
            party.group.barrier()
            found[name].append(given.steps / (time.perf_counter() - began))
    kept.close()
    return {name: rates[1:] for name, rates in found.items()}


def work(rank: int, world_size: int, folder: Path, given: argparse.Namespace, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    if world_size == 1:
        results.put(time_in_turn(RankContext.alone(), folder, given))
        return
    with met(RendezvousRequest(folder=folder, whose="benchmark", rank=rank, world_size=world_size)) as party:
        found = time_in_turn(party, folder, given)
        if rank == 0:
            results.put(found)
        party.group.barrier()


def measure(world_size: int, given: argparse.Namespace) -> dict[str, list[float]]:
    forks = multiprocessing.get_context("fork")  # torch has not computed anything yet, so it has no threads to lose
    with tempfile.TemporaryDirectory() as name:  # nobody else may enter it, which the ranks insist on
        results = forks.Queue()
        processes = [
            forks.Process(target=work, args=(rank, world_size, Path(name), given, results))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        found: dict[str, list[float]] = results.get(timeout=3600)
        for process in processes:
            process.join()
    return found


def table(found: dict[int, dict[str, list[float]]]) -> Iterator[str]:
    """The table, as Markdown; the ratio is the median of those of each turn."""
    yield "| ranks | way | steps/s, median | min | max | to plain torch |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: |"
    for world_size, ways in found.items():
        for name, rates in ways.items():
            ratio = statistics.median(mine / theirs for mine, theirs in zip(rates, ways[PLAIN], strict=True))
            spread = f"{min(rates):.3f} | {max(rates):.3f}"
            yield f"| {world_size} | {name} | {statistics.median(rates):.3f} | {spread} | {ratio:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps a second, beside plain torch.")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8, help="of one way before the other's turn")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ranks", default="1,2")
    given = parser.parse_args()
    found = {}
    for world_size in map(int, given.ranks.split(",")):
        found[world_size] = measure(world_size, given)
        print(f"{world_size} ranks: done", file=sys.stderr, flush=True)
    print(*table(found), sep="\n")


if __name__ == "__main__":
    main()
