"""A training that is captured, built anew and restored ends with the bits of an undisturbed one."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import orchestrator as orc
from orchestrator.training.checkpoint import state as capturing
from orchestrator.training.checkpoint.files import CheckpointError, Checkpoints, Identity
from orchestrator.training.checkpoint.serialization import decode, encode, pack, unpack
from orchestrator.training.checkpoint.state import Misfit, capture, gather, restore

Build = Callable[[], orc.State]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01, t0=2),
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "rprop": torch.optim.Rprop,
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3, history_size=4),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4))


def built(optimizer: str = "momentum", dtype: torch.dtype = torch.float32) -> orc.State:
    torch.manual_seed(1)
    net = network().to(dtype)
    return orc.State(net=net, opt=OPTIMIZERS[optimizer](net.parameters()))


def step(state: Any) -> None:
    """A step on data from the global generators."""
    first = next(iter(state.net.parameters()))
    x = torch.randn(6, 4).to(first.dtype) + random.random() + float(np.random.rand())

    def closure() -> torch.Tensor:
        state.opt.zero_grad()
        loss = (state.net(x) - x).float().square().mean()
        loss.backward()
        return loss

    state.opt.step(closure)
    for name, other in state.others.items():
        if name == "schedule":
            other.step(*([1.0] if isinstance(other, lr_scheduler.ReduceLROnPlateau) else []))


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def through_bytes(tree: object) -> Any:
    return unpack(decode(b"".join(encode(pack(tree), {})))[0])


def everything(state: Any) -> bytes:
    """All bits of a training, in one canonical form."""
    return b"".join(encode(pack(capture(state, None, gradients=True)), {}))


def assert_resumes(build: Build, advance: Callable[[Any], None] = step, *, gradients: bool = False) -> Any:
    """Three steps, save, restore into a fresh build, three more: as six in one go."""
    whole = build()
    seed(2)
    for _ in range(6):
        advance(whole)
    first = build()
    seed(2)
    for _ in range(3):
        advance(first)
    saved = through_bytes(capture(first, {"epoch": 1}, gradients=gradients))
    second = build()
    seed(99)
    random.gauss(0, 1)
    assert restore(second, saved) == {"epoch": 1}
    for _ in range(3):
        advance(second)
    assert everything(second) == everything(whole)
    return second


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes_in_every_bit(optimizer: str) -> None:
    assert_resumes(lambda: built(optimizer))


def test_every_optimizer_of_torch_that_takes_such_parameters_is_among_them() -> None:
    special = {"Optimizer", "SparseAdam", "Muon"}  # their own tests: sparse gradients, matrices alone
    kinds = {kind for kind in dir(torch.optim) if isinstance(getattr(torch.optim, kind), type)} - special
    tried = {type(make(network().parameters())).__name__ for make in OPTIMIZERS.values()}
    assert kinds <= tried


def test_muon_resumes() -> None:
    def build() -> orc.State:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 4, bias=False))
        return orc.State(net=net, opt=torch.optim.Muon(net.parameters(), lr=0.01))

    assert_resumes(build)


def test_sparse_gradients_resume() -> None:
    def build() -> orc.State:
        torch.manual_seed(1)
        net = nn.Embedding(8, 3, sparse=True)
        return orc.State(net=net, opt=torch.optim.SparseAdam(net.parameters()))

    def advance(state: Any) -> None:
        state.opt.zero_grad()
        state.net(torch.randint(0, 8, (4,))).square().mean().backward()
        state.opt.step()
        state.opt.zero_grad()

    assert_resumes(build, advance)


class Wide(torch.optim.SGD):
    """Keeps its state in float32 whatever the parameters are, and other things beside."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("sum", torch.zeros_like(p, dtype=torch.float32))
                state["sum"].mul_(0.9).add_(p.grad)
                state.setdefault("name", "a string")
                state["history"] = [*state.get("history", []), state["sum"].double().mean()][-2:]
                p.data.add_(state["sum"], alpha=-group["lr"])
        return loss


def test_float32_state_of_bfloat16_parameters_stays_what_it_is() -> None:
    def build() -> orc.State:
        state = built(dtype=torch.bfloat16)
        return orc.State(net=state.net, opt=Wide(state.net.parameters(), lr=0.05))

    second = assert_resumes(build)
    entry = next(iter(second.opt.state.values()))
    assert entry["sum"].dtype == torch.float32
    assert [value.dtype for value in entry["history"]] == [torch.float64] * 2
    assert entry["name"] == "a string"


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=10),
        lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
        lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
        ),
    ],
)
def test_schedules_resume(make: Any) -> None:
    def build() -> orc.State:
        state = built()
        return orc.State(net=state.net, opt=state.opt, schedule=make(state.opt))

    assert_resumes(build)


def test_hyperparameters_that_have_changed_are_restored() -> None:
    def advance(state: Any) -> None:
        for group in state.opt.param_groups:
            group["lr"] *= 0.5
            group["note"] = ("kept", 1)
        step(state)

    assert assert_resumes(built, advance).opt.param_groups[0]["note"] == ("kept", 1)


def test_a_gradient_scaler_resumes() -> None:
    def build() -> orc.State:
        state = built()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return orc.State(net=state.net, opt=state.opt, scaler=scaler)

    def advance(state: Any) -> None:
        scaler = state.others["scaler"]
        state.opt.zero_grad()
        scaler.scale(state.net(torch.randn(6, 4)).square().mean()).backward()
        scaler.step(state.opt)
        scaler.update()

    assert assert_resumes(build, advance).others["scaler"].get_scale() == 64.0


def test_averages_second_optimizers_and_own_generators_resume() -> None:
    def build() -> orc.State:
        state = built()
        average = torch.optim.swa_utils.AveragedModel(state.net, use_buffers=True)
        second = torch.optim.Adam(state.net[0].parameters())
        return orc.State(net=state.net, opt=state.opt, average=average, second=second, noise=torch.Generator())

    def advance(state: Any) -> None:
        step(state)
        state.others["second"].step()
        state.others["average"].update_parameters(state.net)
        with torch.no_grad():
            state.net[0].bias.add_(torch.randn(5, generator=state.others["noise"]))

    assert_resumes(build, advance)


class Tied(nn.Module):
    """Tied weights, a buffer that its state leaves out, one that is made in training, and one that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("late", None, persistent=False)
        self.register_buffer("grows", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.mean()
        self.late = self.seen.clone()
        self.grows = torch.cat([self.grows, self.seen[None]])
        return self.outer(self.inner(x)) + self.seen + self.grows.sum()


def test_tied_weights_and_hidden_buffers_resume() -> None:
    def build() -> orc.State:
        torch.manual_seed(1)
        net = Tied()
        return orc.State(net=net, opt=OPTIMIZERS["amsgrad"](net.parameters()))

    second = assert_resumes(build)
    assert second.net.outer.weight is second.net.inner.weight


def test_flags_are_restored() -> None:
    state, fresh = built(), built()
    state.net[1].eval()  # type: ignore[index]
    state.net[4].bias.requires_grad_(False)  # type: ignore[index]
    restore(fresh, through_bytes(capture(state, None)))
    assert [module.training for module in fresh.net] == [True, False, True, True, True]  # type: ignore[union-attr]
    assert [name for name, value in fresh.net.named_parameters() if not value.requires_grad] == ["4.bias"]


def test_gradients_that_are_being_gathered_resume_when_asked_for() -> None:
    def advance(state: Any) -> None:
        (state.net(torch.randn(6, 4)).square().mean()).backward()
        state.count = getattr(state, "count", 0) + 1
        if state.count % 3 == 2:
            state.opt.step()
            state.opt.zero_grad()

    assert_resumes(built, advance, gradients=True)


def test_what_was_put_around_a_network_does_not_matter() -> None:
    state, compiled, fresh = built(), nn.Module(), built()
    step(state)
    compiled._orig_mod = state.net  # as torch.compile does it
    restore(fresh, through_bytes(capture(orc.State(net=compiled, opt=state.opt), None, gradients=True)))
    assert everything(fresh) == everything(state)


# What doesn't fit


def other(make: Callable[[], nn.Module]) -> orc.State:
    net = make()
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: other(lambda: nn.Sequential(*list(network())[:-1], nn.Linear(5, 3))), "net['4.weight']"),
        (lambda: other(lambda: nn.Sequential(*network(), nn.Linear(4, 4))), "it lacks '5.weight', '5.bias'"),
        (lambda: other(lambda: network()[:-1]), "it has '4.weight', '4.bias', which the job no longer builds"),
        (lambda: built(dtype=torch.bfloat16), "holds torch.float32 of shape (5, 4), and the job builds torch.bfloat16"),
        (lambda: orc.State(net=network()), "the state: it has 'opt'"),
        (
            lambda: orc.State(net=(net := network()), opt=torch.optim.SGD([{"params": [p]} for p in net.parameters()])),
            "doesn't fit opt",
        ),
    ],
)
def test_what_does_not_fit_is_named(make: Build, words: str) -> None:
    state = built()
    step(state)
    saved = through_bytes(capture(state, None))
    with pytest.raises(Misfit) as error:
        restore(make(), saved)
    assert words in str(error.value)


def test_a_part_without_a_state_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"schedule, a object, has no state_dict\(\) and load_state_dict\(\)"):
        capture(orc.State(net=network(), schedule=object()), None)


# Ranks


class Threads:
    """Ranks as threads, that exchange tensors at a barrier."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.slots: list[torch.Tensor] = [torch.empty(0)] * world_size

    def run(self, body: Callable[[Any], object]) -> list[Any]:
        found: list[Any] = [None] * self.world_size

        def rank(number: int) -> None:
            try:
                found[number] = body(Rank(self, number))
            except CheckpointError as error:
                found[number] = error

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class Rank:
    def __init__(self, ranks: Threads, rank: int) -> None:
        self._ranks, self.rank, self.world_size = ranks, rank, ranks.world_size

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._ranks.slots[self.rank] = tensor.clone()
        self._ranks.barrier.wait()
        found = list(self._ranks.slots)
        self._ranks.barrier.wait()
        assert len({(value.shape, value.dtype) for value in found}) == 1
        return found


def test_every_rank_gets_what_each_gave() -> None:
    found = Threads(3).run(lambda group: gather({"rank": group.rank, "x": "x" * 100 * group.rank}, group))
    assert [tree["rank"] for tree in found[2]] == [0, 1, 2]
    assert all(tree == found[0] for tree in found)


def test_each_rank_gets_its_own_generators_back() -> None:
    def noisy(number: int) -> orc.State:
        return orc.State(net=network(), noise=torch.Generator().manual_seed(number))

    saved = through_bytes(Threads(3).run(lambda group: capture(noisy(group.rank), None, group))[0])
    fresh = noisy(77)
    for number in range(3):
        group = Rank(Threads(3), number)
        restore(fresh, saved, group)
        assert fresh.others["noise"].initial_seed() == number  # type: ignore[attr-defined]


def test_another_number_of_ranks_is_refused() -> None:
    saved = capture(built(), None)
    with pytest.raises(Misfit, match="the generators of 1 ranks, and there are 2"):
        restore(built(), saved, Rank(Threads(2), 0))


def of_rank(folder: Path, group: Any, said: list[str]) -> Checkpoints:
    identity = Identity(sweep="s", trial=0, world_size=group.world_size)
    return Checkpoints(folder, identity, f"{group.rank:032x}", say=said.append)


def test_all_ranks_resume_from_one_that_each_can_read(tmp_path: Path) -> None:
    writer = of_rank(tmp_path / "0", Rank(Threads(2), 0), [])
    for number in (1, 2):
        writer.save(number, pack({"at": number}))
    said: list[str] = []

    def body(group: Any) -> Any:
        own = of_rank(tmp_path / "0", group, said)
        if group.rank == 1:  # whose node does not see the newest file
            own.folder = tmp_path / "1"
        return capturing.newest(own, group, visible_s=0.0)

    (tmp_path / "1").mkdir()
    older = writer.files()[1]
    (tmp_path / "1" / older.name).write_bytes(older.read_bytes())
    assert [found.step for found in Threads(2).run(body)] == [1, 1]
    assert any("not visible here" in line for line in said)


def test_a_file_that_becomes_visible_later_is_waited_for(tmp_path: Path) -> None:
    writer = of_rank(tmp_path / "0", Rank(Threads(2), 0), [])
    writer.save(1, pack({"at": 1}))
    (tmp_path / "1").mkdir()

    def body(group: Any) -> Any:
        own = of_rank(tmp_path / str(group.rank), group, [])
        appear = lambda seconds: copy_all(tmp_path / "0", tmp_path / "1")  # noqa: E731
        return capturing.newest(own, group, sleep=appear)

    assert [found.step for found in Threads(2).run(body)] == [1, 1]


def copy_all(source: Path, target: Path) -> None:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_all_ranks_learn_that_there_is_none_or_none_that_fits(tmp_path: Path) -> None:
    assert Threads(2).run(lambda group: capturing.newest(of_rank(tmp_path / "0", group, []), group)) == [None, None]
    of_rank(tmp_path / "0", Rank(Threads(4), 0), []).save(1, pack({}))
    errors = Threads(2).run(lambda group: capturing.newest(of_rank(tmp_path / "0", group, []), group))
    assert ["is of 4 ranks and can't be resumed with 2" in str(error) for error in errors] == [True, True]
