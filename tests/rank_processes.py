"""Real ranks on gloo, forked from a process that has imported torch once; and what tests have them do."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import orjson
import torch
import torch.distributed as dist
from torch.nn import functional as F  # noqa: N812  # as everyone names it
from torch.utils.data import Dataset

from orchestrator.config.spec import Metric
from orchestrator.distributed.control_group import ControlGroup
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.errors import OrcError
from orchestrator.stats.containers import SummaryMap, SummaryPair, TopN
from orchestrator.stats.summary import Summary
from orchestrator.training.trial import Trial

LIMIT_S = 60.0

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["torch._dynamo", "orchestrator.training.trial", "rank_processes"])


def _rank(job: Callable[..., Any], rank: int, world_size: int, store: str, pipe: Connection, *args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    rendezvous = dist.FileStore(store, world_size)
    dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=30))
    try:
        pipe.send(job(*args))
    except (OrcError, ValueError, TypeError) as error:
        pipe.send((type(error).__name__, str(error)))
    pipe.recv()  # A rank that leaves at once would look lost to those that still wait for others.


@contextmanager
def ranks(job: Callable[..., Any], world_size: int, *args: Any) -> Iterator[list[tuple[Any, Connection]]]:
    """Processes that run `job(*args)` as the ranks of one group, each with a pipe that gives what it returns."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for rank in range(world_size):
            here, there = _forks.Pipe()
            arguments = (job, rank, world_size, str(Path(folder, "store")), there, *args)
            found.append((_forks.Process(target=_rank, args=arguments), here))
            found[-1][0].start()
        try:
            yield found
        finally:
            for process, pipe in found:
                process.kill()
                process.join()
                pipe.close()


def answer(pipe: Connection) -> Any:
    assert pipe.poll(LIMIT_S), f"no answer of a rank within {LIMIT_S:g} s"
    return pipe.recv()


def run(job: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What each rank returned, or how it failed."""
    with ranks(job, world_size, *args) as found:
        return [answer(pipe) for _, pipe in found]


# What ranks do


def image(value: Any) -> str:
    return hashlib.sha256(orjson.dumps(value.to_json(), option=orjson.OPT_SORT_KEYS)).hexdigest()


def part(random: Random, first_key: int, num: int) -> Any:
    """A monoid made of every kind, of values that try the sums; short or too long for one message."""
    values = [random.choice([random.gauss(0, 1), 1e300 * random.random(), 5e-324, -0.0, math.nan]) for _ in range(num)]
    summary = Summary.of_samples(values, first_key=first_key, top=100)
    top = TopN.of_pairs([(abs(x), k) for k, x in enumerate(values, first_key) if x == x], n=3)
    by_key = SummaryMap.of([(random.choice([1, 1.0, True, None, "a"]), one) for one in (summary, Summary.empty(100))])
    return SummaryPair(first=by_key, second=SummaryPair(first=summary, second=top))


def held(seed: int, rank: int) -> Any:
    """What a rank holds in a case: much, little or nothing."""
    random = Random(f"{seed}/{rank}")
    return part(random, 1000 * rank, random.choice([0, 1, 7, 600]))


def reduced(num_cases: int) -> dict[int, list[str]]:
    """What groups of 1, 2, ... ranks reduce their parts to, by the size of the group."""
    rank, found = dist.get_rank(), {}
    for world_size in range(1, dist.get_world_size() + 1):
        process_group = dist.new_group(range(world_size))
        if rank < world_size:
            group = ControlGroup.of(process_group)
            found[world_size] = [image(group.reduce(held(seed, rank))) for seed in range(num_cases)]
    return found


def reduce_given(given: Sequence[Any]) -> str:
    return image(ControlGroup.of().reduce(given[dist.get_rank()]))


def agree_on(given: Sequence[Any]) -> None:
    ControlGroup.of().agree("the data", given[dist.get_rank()])


def reduce_beside(missing: int) -> None:
    """Reduce, though one rank does something else first."""
    group = ControlGroup.of(timeout_s=1.0)
    if group.rank == missing:
        group.broadcast([torch.zeros(3)])
    group.reduce(Summary.of(1.0, key=group.rank))


def reduce_beside_another_backend(store: str) -> tuple[str, str, int]:
    """The backends of a group without gloo and of the one made beside it, and what the latter counts."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # makes the backend known

    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("fake", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    group = ControlGroup.of(timeout_s=10.0)
    return dist.get_backend(), dist.get_backend(group.process_group), group.reduce(Summary.of(1.0, key=rank)).count


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    floats = torch.randn(3, 5, generator=generator)
    return [floats.to(torch.bfloat16).t(), torch.tensor(seed), floats > 0, floats.double(), torch.empty(0)]


def broadcast_and_gathered() -> tuple[bool, list[list[float]]]:
    """Whether this rank has rank 0's tensors then; and what all ranks have given."""
    group = ControlGroup.of()
    mine = tensors(group.rank)
    group.broadcast(mine)
    group.barrier()
    return all(map(torch.equal, mine, tensors(0))), [
        one.tolist() for one in group.all_gather(torch.arange(3.0) + group.rank)
    ]


def reduce_until_lost(missing: int, how: str, timeout_s: float) -> tuple[str, str, float]:
    """Reduce until a rank goes missing, which kills or stops itself after some rounds; returns how that is told."""
    group = ControlGroup.of(timeout_s=timeout_s)
    for turn in range(100_000):
        if group.rank == missing and turn == 20:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        began = time.monotonic()
        try:
            group.reduce(Summary.of(1.0, key=group.rank))
        except OrcError as error:
            return type(error).__name__, str(error), time.monotonic() - began
    raise AssertionError("no rank went missing")


# Validation


class Cnn(torch.nn.Module):
    """Convolutions, with the buffers of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()
        )
        self.out = torch.nn.Linear(4 * 36, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x.reshape(-1, 1, 8, 8)))


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(3)
    if name == "cnn":
        return Cnn()
    return torch.nn.Sequential(torch.nn.Linear(64, 20), torch.nn.Tanh(), torch.nn.Linear(20, 10))


def losses(net: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    x, y = batch
    z = net(x)
    return {"loss": F.cross_entropy(z, y, reduction="none"), "error": (z.argmax(-1) != y).float()}


class Listed(Dataset[Any]):
    """Digits one by one; remembers which were looked at."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y, self.seen = x, y, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(index)
        return self.x[index], self.y[index]


def validated(name: str, num: int, batch_size: int, form: str = "tensors") -> tuple[dict[str, float], dict[str, str]]:
    """The means and the images of the Summaries of a network whose buffers are right on rank 0 alone."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(num, 64, generator=generator), torch.randint(10, (num,), generator=generator)
    if form == "columns":
        x = x.t().contiguous().t()
    group = ControlGroup.of()
    trial = Trial(
        index=0,
        params={},
        seed=1,
        metric=Metric(),
        emit=lambda _: None,
        device=torch.device("cpu"),
        party=RankContext(group=group),
    )
    net = network(name)
    for buffer in net.buffers():
        buffer.add_(group.rank)
    trial.prepare(net=net)
    samples = Listed(x, y) if form == "listed" else (x, y)
    means = trial.validate(losses, samples, batch_size=batch_size)
    if isinstance(samples, Listed):
        assert {i // batch_size % group.world_size for i in samples.seen} <= {group.rank}
    counts = {f"{key}.count": one.count for key, one in trial.summaries.items()}
    return means | counts, {key: image(one) for key, one in trial.summaries.items()}


def validate_badly(given: str) -> None:
    group = ControlGroup.of()
    num = 10 + group.rank if given == "other data" else 10
    trial = Trial(
        index=0,
        params={},
        seed=1,
        metric=Metric(),
        emit=lambda _: None,
        device=torch.device("cpu"),
        party=RankContext(group=group),
    )
    trial.prepare(net=torch.nn.Linear(1, 1))

    def losses(net: torch.nn.Module, batch: Any) -> torch.Tensor:
        found: torch.Tensor = net(batch[0]).flatten()
        return found.mean() if given == "a mean" and group.rank == 1 else found

    trial.validate(losses, (torch.ones(num, 1),), batch_size=4)
