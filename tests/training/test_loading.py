"""Samples by key, here and in loader processes: the same batches, and nothing left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import orchestrator as orc
from orchestrator.config.spec import CheckpointOptions, Metric
from orchestrator.distributed.control_group import ControlGroup
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.training.augment import keys_of
from orchestrator.training.checkpoint.files import Checkpoints, Identity
from orchestrator.training.checkpoint.manager import LEAVE, CheckpointManager, Interrupted
from orchestrator.training.data import dataset
from orchestrator.training.team import TrialRanks
from orchestrator.training.trial import Result, Trial, stream

CPU = torch.device("cpu")
X = torch.arange(46.0).reshape(23, 2)
Y = torch.arange(23)

# A machine of one processor is told that it has few; that is no fault here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Noisy(Dataset[Any]):
    """Samples with numbers from all three global generators, and the process that read them."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        noise = torch.tensor([torch.rand(()).item(), random.random(), float(np.random.rand())])
        return X[index], Y[index], noise, os.getpid()


def jittered(sample: Any, generator: torch.Generator) -> Any:
    x, y, *_ = sample
    x += torch.rand((), generator=generator)  # in place, as jobs do
    return x, y


def trial(seed: int = 7, **more: Any) -> Trial:
    return Trial(index=0, params={}, seed=seed, metric=Metric(), emit=lambda report: None, device=CPU, **more)


def epochs(of: Trial, samples: object, num: int = 2, **options: Any) -> list[list[Any]]:
    return [list(of.batches(samples, 5, **options)) for _ in of.epochs(num)]


def by_sample(batches: list[Any], at: int = 0) -> dict[int, list[float]]:
    """What is at one place of the batches, by label."""
    return {int(y): row.tolist() for batch in batches for y, row in zip(batch[1], batch[at], strict=True)}


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has asked yet how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


# Keys

TENSORS = [(X, Y), [X, Y], TensorDataset(X, Y)]


@pytest.mark.parametrize("samples", [*TENSORS, Noisy()])
def test_keys_follow_from_seed_epoch_and_sample_alone(samples: object) -> None:
    found = epochs(trial(), samples, keyed=True)
    assert by_sample(found[0], -1) == by_sample(epochs(trial(), (X, Y), shuffle=False, keyed=True)[0], -1)
    keys = [by_sample(one, -1) for one in (*found, *epochs(trial(seed=8), samples, num=1, keyed=True))]
    assert len({key for one in keys for key in one.values()}) == 3 * len(X)
    wanted = keys_of(stream(7, "sample/0"), torch.arange(len(X))).tolist()
    assert [keys[0][index] for index in range(len(X))] == wanted


class Named(Noisy):
    def __getitem__(self, index: int) -> Any:
        return {"x": X[index]}


class Alone(Noisy):
    def __getitem__(self, index: int) -> Any:
        return X[index]


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: [x], lambda x: {"x": (x, "name")}, lambda x: x.numpy()])
def test_augmentation_in_place_changes_nothing_of_a_data_set_that_gives_views(kind: Callable[[Any], Any]) -> None:
    def zeroed(sample: Any, generator: torch.Generator) -> Any:
        inner = sample["x"][0] if isinstance(sample, dict) else sample[0] if isinstance(sample, list) else sample
        inner *= 0
        return sample

    class Views(Noisy):
        def __getitem__(self, index: int) -> Any:
            return kind(X[index])

    before = X.clone()
    list(trial().batches(Views(), 5, augment=zeroed))
    assert torch.equal(X, before)


def test_a_key_finds_its_place_in_any_kind_of_sample() -> None:
    [[named, *_]] = epochs(trial(), Named(), num=1, keyed=True)
    assert named.keys() == {"x", "key"}
    [[alone, *_]] = epochs(trial(), Alone(), num=1, keyed=True)
    assert torch.equal(alone[1], named["key"])
    assert alone[1].dtype == torch.int64


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_rank_s_part_has_the_same_keys_and_augmentation(world_size: int, num_workers: int) -> None:
    order = torch.randperm(len(X))
    prepared = dataset.prepared((X, Y), 5, augment=jittered, keyed=True, num_workers=num_workers)
    whole = list(dataset.batches(dataset.prepared((X, Y), 5, augment=jittered, keyed=True), order, 5, len(X), CPU))
    for rank in range(world_size):
        team = TrialRanks(
            RankContext(group=ControlGroup(rank=rank, world_size=world_size, process_group=None)), partial(stream, 5)
        )
        mine = list(team.batches(prepared, order, 5, len(X), CPU))
        assert by_sample(mine).items() <= by_sample(whole).items()
        assert by_sample(mine, 2).items() <= by_sample(whole, 2).items()


# Augmentation and loaders


@pytest.mark.parametrize("samples", [*TENSORS, Noisy()])
def test_augmentation_depends_on_neither_order_nor_loaders_and_leaves_the_samples_alone(samples: object) -> None:
    before = X.clone()
    first, second = epochs(trial(), samples, augment=jittered)
    wanted = by_sample(first)
    assert by_sample(epochs(trial(), samples, num=1, augment=jittered, shuffle=False)[0]) == wanted
    assert [by_sample(one) for one in epochs(trial(), samples, num=1, augment=jittered, num_workers=2)] == [wanted]
    assert by_sample(second) != wanted
    assert len({row[0] - 2 * index for index, row in wanted.items()}) == len(X)
    assert torch.equal(X, before)


def test_a_data_set_that_draws_numbers_gives_the_same_whatever_loader_reads_it() -> None:
    state = torch.get_rng_state()
    two, three = (epochs(trial(), Noisy(), num=1, num_workers=loaders)[0] for loaders in (2, 3))
    assert torch.equal(torch.get_rng_state(), state)  # what a trial resumes is left as it was
    assert [by_sample(one, 2) for one in (two,)] == [by_sample(three, 2)]
    pids = {int(pid) for batch in three for pid in batch[3]}
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert len({tuple(noise) for noise in by_sample(two, 2).values()}) == len(X)


def readers(batches: Iterator[Any]) -> set[int]:
    """The processes that read for a loop, which has begun."""
    next(batches)
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def ended(batches: Iterator[Any]) -> None:
    list(batches)


def left(batches: Iterator[Any]) -> None:
    batches.close()  # type: ignore[attr-defined]  # as leaving a loop does


def thrown(batches: Iterator[Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        batches.throw(KeyboardInterrupt())  # type: ignore[attr-defined]


@pytest.mark.parametrize("end", [ended, left, thrown])
def test_loaders_are_gone_when_the_loop_ends_however_it_ends(end: Callable[[Iterator[Any]], None]) -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    batches = trial().batches(Noisy(), 5, num_workers=2)
    pids = readers(batches) - before
    assert len(pids) == 2
    end(batches)
    assert all(map(is_gone, pids))


class Broken(Noisy):
    def __getitem__(self, index: int) -> Any:
        if index == 11:
            raise ZeroDivisionError("sample 11")
        return super().__getitem__(index)


def test_an_error_in_a_loader_is_told_and_ends_all_of_them() -> None:
    before = multiprocessing.active_children()
    with pytest.raises(ZeroDivisionError, match="sample 11"):
        list(trial().batches(Broken(), 5, num_workers=2))
    assert multiprocessing.active_children() == before


def test_a_notice_leaves_loaders_to_who_trains() -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    batches = trial().batches(Noisy(), 5, shuffle=False, num_workers=2)
    for pid in readers(batches) - before:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(pid, number)
    assert [int(y) for batch in batches for y in batch[1]] == list(range(5, len(X)))


def test_loaders_end_with_who_trains_even_if_that_is_killed(tmp_path: Path) -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            batches = trial().batches(Noisy(), 5, num_workers=2)
            found = readers(batches) - before
            (tmp_path / "new").write_text(" ".join(map(str, found)))
            (tmp_path / "new").rename(tmp_path / "pids")
            signal.pause()
        os._exit(1)
    until((tmp_path / "pids").exists)
    pids = [int(one) for one in (tmp_path / "pids").read_text().split()]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(pids) == 2
    until(lambda: all(map(is_gone, pids)))


@pytest.mark.parametrize(
    "option", [{"keyed": True}, {"num_workers": 1}, {"augment": jittered}, {"weights": [1.0] * 23}]
)
def test_a_dataloader_has_its_own_ways(option: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="a DataLoader has its own order and samples"):
        trial().batches(DataLoader(TensorDataset(X, Y)), **option)


def test_a_negative_number_of_loaders_is_told() -> None:
    with pytest.raises(ValueError, match="num_workers is a number of processes, at least 0, found -1"):
        list(trial().batches((X, Y), num_workers=-1))


# Resuming


def build() -> orc.State:
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9))


def losses(net: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    return {"loss": (net(batch[0])[:, 0] - batch[1]).square(), "weight": 1.0 + batch[1] % 3}


def train(options: dict[str, Any], samples: object, of: Trial) -> None:
    of.build(build)
    for _ in of.epochs(2):
        for batch in of.batches(samples, 5, **options):
            of.step(losses, batch)
        of.validate(losses, (X, Y))


def attempt(folder: Path, job: Callable[[Trial], None], number: int, leave_after: int) -> Result | None:
    """The result; None if it has left, as it was told to after some safe points."""
    hears = iter([[]] * leave_after)
    torch.manual_seed(3)
    checkpoints = Checkpoints(folder, Identity(sweep="s", trial=0), "a" * 32)
    keeper = CheckpointManager(checkpoints, CheckpointOptions(every="1 steps"), hears=lambda: next(hears, [LEAVE]))
    try:
        of = trial(keeper=keeper, attempt=number, found=keeper.newest() if number else None)
        job(of)
        return of.result(None)
    except Interrupted:
        return None
    finally:
        keeper.close()


RESUMED = {
    "weights": ({"weights": Y + 1.0, "num": 17}, (X, Y)),
    "without replacement": ({"weights": Y % 4 + 0.0, "replacement": False}, (X, Y)),
    "augmented": ({"augment": jittered}, (X, Y)),
    "keyed": ({"keyed": True}, (X, Y)),
    "loaders": ({"num_workers": 2}, Noisy()),
    "all": ({"num_workers": 1, "weights": Y + 1.0, "augment": jittered, "keyed": True, "drop_last": True}, Noisy()),
}


@pytest.mark.parametrize("form", RESUMED)
def test_a_trial_goes_on_in_mid_epoch_to_the_same_bits(tmp_path: Path, form: str) -> None:
    before = multiprocessing.active_children()
    job = partial(train, *RESUMED[form])
    calm = attempt(tmp_path / "calm", job, 0, 99)
    assert calm is not None
    for place in (0, 1, 4, 6):
        assert attempt(tmp_path / str(place), job, 0, place) is None
        assert multiprocessing.active_children() == before  # loaders leave with who is interrupted
        found = attempt(tmp_path / str(place), job, 1, 99)
        assert found is not None
        assert (found.payload, found.model) == (calm.payload, calm.model)


def test_a_step_weighs_each_sample_s_loss() -> None:
    one, two = trial(), trial()
    for of in (one, two):
        of.build(build).net.eval()
        for module in of.net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    one.step(losses, (X, Y))
    loss = (two.net(X)[:, 0] - Y).square() * (1.0 + Y % 3)
    loss.mean().backward()
    two.opt.step()
    for mine, wanted in zip(one.net.parameters(), two.net.parameters(), strict=True):
        assert torch.allclose(mine, wanted)
    with pytest.raises(ValueError, match="as many weights as losses, found 1 for 23"):
        one.step(lambda net, batch: losses(net, batch) | {"weight": torch.ones(1)}, (X, Y))
