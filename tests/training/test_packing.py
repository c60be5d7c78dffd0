"""Trials that train together end as they would alone, but for the last bits, and don't touch each other."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resumed_training import WRITER
from torch.utils.data import DataLoader, Dataset, TensorDataset

import orchestrator as orc
from orchestrator.config.program import load_job
from orchestrator.config.spec import CheckpointOptions, Metric
from orchestrator.core.atomic import JsonObject
from orchestrator.core.messages import AttemptEnded, Unable
from orchestrator.results.objective import Diverged, NoResult
from orchestrator.results.records import Status
from orchestrator.training.checkpoint.files import Checkpoints, Identity
from orchestrator.training.checkpoint.manager import LEAVE, CheckpointManager, Interrupted
from orchestrator.training.packing.members import Each, PerMember, Unlike, Unpackable
from orchestrator.training.packing.pack import Member, PackedTrial
from orchestrator.training.trial import Result, Trial

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(44, 6, generator=GENERATOR, dtype=torch.float64)
Y = X[:, :1].sin() + 0.1 * torch.randn(44, 1, generator=GENERATOR, dtype=torch.float64)
CPU = torch.device("cpu")


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


Job = Callable[[Any], object]
Build = Callable[..., orc.State]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: threads that wait for each other would take longer than all the rest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def net_of(width: int = 7, *extra: torch.nn.Module) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(6, width), *extra, torch.nn.Tanh(), torch.nn.Linear(width, 1)).double()


def build(*, lr: float = 0.05, momentum: float = 0.9, width: int = 7) -> orc.State:
    net = net_of(width)
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum))


def losses(net: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    x, y = batch
    error = (net(x) - y).square().mean(dim=1)
    return {"loss": error, "far": (error > 0.5).to(error.dtype)}


def usual(trial: Any, build: Build = build, **step: Any) -> None:
    trial.build(build)
    for _ in trial.epochs(3):
        for batch in trial.batches((X, Y), 8):
            trial.step(losses, batch, **step)
        trial.validate(losses, (X, Y))


PARAMS: list[JsonObject] = [{"lr": 0.05}, {"lr": 0.01, "momentum": 0.0}, {"lr": 0.2, "momentum": 0.5}]


def pack_of(params: list[JsonObject] = PARAMS, seeds: list[int] | None = None, **options: Any) -> PackedTrial:
    lines: list[list[JsonObject]] = [[] for _ in params]
    members = [
        Member(index=10 + n, params=one, seed=seed, emit=lines[n].append)
        for n, (one, seed) in enumerate(zip(params, seeds or range(len(params)), strict=False))
    ]
    found = PackedTrial(members, **{"metric": Metric(), "device": CPU, **options})
    found.lines = lines  # type: ignore[attr-defined]
    return found


def lines(of: PackedTrial | Trial) -> Any:
    return of.lines  # type: ignore[union-attr]


def packed(job: Job, params: list[JsonObject] = PARAMS, seeds: list[int] | None = None, **options: Any) -> PackedTrial:
    found = pack_of(params, seeds, **options)
    with contextlib.suppress(Diverged):
        job(found)
    return found


def alone(job: Job, params: JsonObject, seed: int, **options: Any) -> Trial:
    own: list[JsonObject] = []
    found = Trial(
        index=0, params=params, seed=seed, **{"metric": Metric(), "emit": own.append, "device": CPU, **options}
    )
    with contextlib.suppress(Diverged):
        job(found)
    found.lines = own  # type: ignore[attr-defined]
    return found


def weights(of: Result) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    assert of.model is not None
    return load(of.model)


def check_as_alone(job: Job, params: list[JsonObject] = PARAMS) -> None:
    """Every report and every weight of each member is that of the trial alone, but for rounding."""
    pack = packed(job, params)
    for number, (one, result) in enumerate(zip(params, pack.results(None), strict=True)):
        single = alone(job, one, number)
        assert len(lines(single)) == len(lines(pack)[number]) > 0
        for ours, theirs in zip(lines(pack)[number], lines(single), strict=True):
            assert ours["step"] == theirs["step"]
            assert ours["metrics"] == close(theirs["metrics"])
        expected = single.result(None)
        assert result.payload["value"] == close(expected.payload["value"])
        assert weights(result).keys() == weights(expected).keys()
        for name, value in weights(result).items():
            torch.testing.assert_close(value, weights(expected)[name], rtol=1e-8, atol=1e-11)


# As alone


class Net(torch.nn.Module):
    """Batch norm, tied weights, a buffer that is replaced and one that no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net_of(7, torch.nn.BatchNorm1d(7))
        self.again = torch.nn.Linear(6, 7)
        self.again.weight = self.inner[0].weight  # type: ignore[assignment]
        self.seen: torch.Tensor
        self.hidden: torch.Tensor
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("hidden", torch.ones(()), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        if self.training:
            self.seen = 0.5 * self.seen + x.detach().abs().mean()
            self.hidden.mul_(0.9)
        return self.inner(x) + self.again(x).mean(1, keepdim=True) * self.hidden + self.seen


def normed(*, lr: float = 0.05, momentum: float = 0.9) -> orc.State:
    net = Net().double()
    rest = [one for name, one in net.named_parameters() if name != "inner.0.weight"]
    groups = [{"params": [net.inner[0].weight], "weight_decay": 0.1}, {"params": rest, "lr": lr / 2}]
    return orc.State(net=net, opt=torch.optim.SGD(groups, lr=lr, momentum=momentum))


def scheduled(*, lr: float = 0.05, momentum: float = 0.9) -> orc.State:
    state = build(lr=lr, momentum=momentum)
    assert state.opt is not None
    each_step = torch.optim.lr_scheduler.LambdaLR(state.opt, lambda step: 1 / (1 + lr * step))
    each_epoch = torch.optim.lr_scheduler.StepLR(state.opt, 2, 0.5)
    return orc.State(net=state.net, opt=state.opt, each_step=each_step, each_epoch=each_epoch)


def plateau(trial: Any) -> None:
    """A scheduler that the job steps itself, by what each member has reached."""

    def with_plateau(*, lr: float = 0.05, momentum: float = 0.9) -> orc.State:
        state = build(lr=lr, momentum=momentum)
        assert state.opt is not None
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(state.opt, factor=0.1, patience=0, threshold=0.5)
        return orc.State(net=state.net, opt=state.opt, schedule=schedule)

    trial.build(with_plateau)
    total = torch.zeros((), dtype=torch.float64)
    for _ in trial.epochs(4):
        for batch in trial.batches((X, Y), 11, drop_last=True):
            total = total + trial.step(losses, batch)
        found = trial.validate(losses, (X, Y))
        trial.state.others["schedule"].step(found["val_loss"])
        trial.report(lr=trial.opt.param_groups[0]["lr"], total=total, std=trial.summaries["val_loss"].compute().std)


def frozen(trial: Any) -> None:
    def part(*, lr: float = 0.05, momentum: float = 0.9) -> orc.State:
        state = build(lr=lr, momentum=momentum)
        state.net[0].requires_grad_(False)  # type: ignore[index]
        state.net[0].bias.requires_grad_(True)  # type: ignore[index,union-attr]
        return state

    usual(trial, part)


def weighed(trial: Any) -> None:
    def of(net: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y = batch
        z = net(x)
        return {"loss": (z - y).square().mean(dim=1), "weight": 1 + x[:, 0].abs(), "_z": z[:, 0]}

    def each_epoch(*, lr: float = 0.05, momentum: float = 0.9) -> orc.State:
        state = build(lr=lr, momentum=momentum)
        assert state.opt is not None
        return orc.State(
            net=state.net, opt=state.opt, each_epoch=torch.optim.lr_scheduler.ExponentialLR(state.opt, 0.5)
        )

    def widest(found: Any) -> float:
        return float(found["_z"].compute().max or 0.0)

    trial.build(each_epoch)
    for _ in trial.epochs(3):
        for batch in trial.batches((X, Y), 8):
            trial.step(of, batch)
        trial.validate(of, (X, Y), derived={"rmse": lambda found: found["loss"].compute().mean ** 0.5, "most": widest})


JOBS: dict[str, Job] = {
    "usual": usual,
    "weighed": weighed,
    "normed": lambda trial: usual(trial, normed),
    "scheduled": lambda trial: usual(trial, scheduled),
    "plateau": plateau,
    "frozen": frozen,
    "clipped": lambda trial: usual(trial, clip_norm=0.3),
    "micro_batches": lambda trial: usual(trial, micro_batches=3),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_member_ends_as_it_would_alone(name: str) -> None:
    check_as_alone(JOBS[name])


def in_order(trial: Any) -> None:
    trial.build(build)
    for _ in trial.epochs(2):
        for batch in trial.batches(TensorDataset(X, Y), 8, shuffle=False):
            trial.step(losses, batch)
        for batch in trial.batches((X, Y), 8, weights=list(range(44)), num=20):
            trial.step(losses, batch)
        trial.step(losses, (X, Y))
    trial.validate(losses, (X, Y))


def test_samples_come_to_each_member_as_they_would_alone() -> None:
    check_as_alone(in_order)


def test_what_is_derived_is_each_members_own_and_none_of_one_that_has_ended() -> None:
    def job(trial: Any) -> None:
        trial.build(build)
        trial.stop(1)
        trial.validate(losses, (X, Y), derived={"count": lambda found: found["far"].count + trial.num_steps})
        trial.validate(losses, (X, Y), derived={"loss": lambda found: 0.0})

    pack = pack_of()
    with pytest.raises(ValueError, match="losses gives values of that name"):
        job(pack)
    assert [[line["metrics"]["val_count"] for line in of] for of in lines(pack)] == [[44.0], [], [44.0]]


def test_a_job_of_the_examples_runs_packed_as_it_is() -> None:
    job = load_job(Path(__file__).parents[2] / "jobs", "digits_mlp.py")
    params: list[JsonObject] = [{"lr": 0.1}, {"lr": 0.5, "momentum": 0.5, "weight_decay": 1e-3}]
    pack = packed(lambda trial: job.train(trial, epochs=2, batch_size=128), params)
    for number, result in enumerate(pack.results(None)):
        single = alone(lambda trial: job.train(trial, epochs=2, batch_size=128), params[number], number)
        assert [line["step"] for line in lines(pack)[number]] == [12, 24]
        assert result.payload["value"] == pytest.approx(single.result(None).payload["value"], rel=1e-4)


def test_the_bits_of_an_example_s_member_don_t_depend_on_who_the_others_are() -> None:
    job = load_job(Path(__file__).parents[2] / "jobs", "digits_mlp.py")
    found = []
    for others in ([0.1, 0.2, 0.4], [1e30, 0.01, 0.0]):
        params: list[JsonObject] = [{"lr": others[0]}, {"lr": 0.3}, {"lr": others[1]}, {"lr": others[2]}]
        pack = packed(lambda trial: job.train(trial, epochs=1), params, seeds=[len(found), 4, 5 + len(found), 9])
        found.append(bits(pack, 1))
    assert found[0] == found[1]


def test_the_best_model_is_each_members_own() -> None:
    def job(trial: Any) -> None:
        trial.build(build)
        for epoch in trial.epochs(3):
            for batch in trial.batches((X, Y), 8):
                trial.step(losses, batch)
            trial.report(val_loss=PerMember.of([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]][epoch]))

    pack = packed(job, metric=Metric(at="best"))
    assert [one.payload["step"] for one in pack.results(None)] == [12, 6, 18]
    assert [one.payload["value"] for one in pack.results(None)] == [1.0, 1.0, 1.0]
    last = pack.members[0].net[0].weight  # type: ignore[index,union-attr]
    assert not torch.equal(weights(pack.results(None)[0])["0.weight"], last)  # type: ignore[arg-type]


def test_the_bar_is_for_each_member() -> None:
    pack = packed(usual)
    values = [one.payload["value"] for one in pack.results(None)]
    middle = sorted(values)[1]  # type: ignore[type-var]
    assert [one.model is not None for one in pack.results(middle)] == [value <= middle for value in values]  # type: ignore[operator,arg-type]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_another_precision_is_refused(precision: str) -> None:
    with pytest.raises(Unpackable, match=f"asks for precision '{precision}'"):
        pack_of().build(build, precision=precision)


# Each for itself


def bits(of: PackedTrial, member: int) -> tuple[bytes | None, Any]:
    return of.results(None)[member].model, lines(of)[member]


def convolved(*, lr: float = 0.05) -> orc.State:
    net = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 6)), torch.nn.Conv1d(1, 4, 3), torch.nn.BatchNorm1d(4), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1),
    )  # fmt: skip
    return orc.State(net=net, opt=torch.optim.AdamW(net.parameters(), lr=lr))


def single(trial: Any, build: Build) -> None:
    """In float32."""
    trial.build(build)
    for _ in trial.epochs(2):
        for batch in trial.batches((X.float(), Y.float()), 8):
            trial.step(losses, batch)
        trial.validate(losses, (X.float(), Y.float()))


def linear(*, lr: float = 0.05) -> orc.State:
    state = build(lr=lr)
    net = state.net.float()
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9))


@pytest.mark.parametrize("build", [linear, convolved])
def test_a_pack_gives_the_same_bits_each_time(build: Build) -> None:
    params: list[JsonObject] = [{"lr": 0.05}, {"lr": 0.1}, {"lr": 0.2}]
    one, two = (packed(lambda trial: single(trial, build), params) for _ in range(2))
    assert [bits(one, number) for number in range(3)] == [bits(two, number) for number in range(3)]


@cache
def among_others(build: Build) -> Any:
    pack = packed(lambda trial: single(trial, build), [{"lr": 0.05}, {"lr": 0.06}, {"lr": 0.07}], seeds=[1, 2, 3])
    return bits(pack, 1)


@pytest.mark.parametrize("build", [linear, convolved])
@pytest.mark.parametrize("others", [[0.3, 0.01], [1e30, 1e-30], [math.inf, 0.0]])
def test_the_bits_of_a_member_don_t_depend_on_who_the_others_are(build: Build, others: list[float]) -> None:
    def job(trial: Any) -> None:
        single(trial, build)

    other = packed(job, [{"lr": others[0]}, {"lr": 0.06}, {"lr": others[1]}], seeds=[8, 2, 9])
    assert bits(other, 1) == among_others(build)
    assert among_others(build)[0] is not None


def test_a_member_that_diverges_says_so_at_its_step_and_touches_nobody() -> None:
    params: list[JsonObject] = [{"lr": 0.05}, {"lr": 1e200}, {"lr": 0.01}]
    pack, calm = packed(usual, params), packed(usual, [{"lr": 0.05}, {"lr": 0.05}, {"lr": 0.01}])
    expected = alone(usual, params[1], 1).result(None)
    found = pack.results(None)
    assert [one.status for one in found] == [Status.COMPLETE, Status.DIVERGED, Status.COMPLETE]
    assert (found[1].payload, found[1].model) == (expected.payload, None)
    assert [len(one) for one in lines(pack)] == [3, 1, 3]  # a member that is over reports no more
    assert [bits(pack, number) for number in (0, 2)] == [bits(calm, number) for number in (0, 2)]


def test_when_no_member_is_left_the_pack_ends() -> None:
    pack = pack_of([{"lr": 1e200}, {"lr": 1e201}])
    with pytest.raises(Diverged, match="every trial of the pack has ended"):
        usual(pack)
    assert pack.num_steps == 6
    assert [one.status for one in pack.results(None)] == [Status.DIVERGED] * 2


def test_a_member_that_is_stopped_keeps_what_it_has_come_to() -> None:
    def stopped(trial: Any) -> None:
        trial.build(build)
        for epoch in trial.epochs(3):
            for batch in trial.batches((X, Y), 8):
                trial.step(losses, batch)
            trial.validate(losses, (X, Y))
            if epoch == 1 and isinstance(trial, PackedTrial):
                trial.stop(1)

    def short(trial: Any) -> None:
        trial.build(build)
        for _ in trial.epochs(2):
            for batch in trial.batches((X, Y), 8):
                trial.step(losses, batch)
            trial.validate(losses, (X, Y))

    early, whole, calm = packed(stopped), packed(short), packed(usual)
    assert bits(early, 1) == bits(whole, 1)
    assert bits(early, 0) == bits(calm, 0)
    early.stop(0)
    with pytest.raises(Diverged):
        early.stop(2)


def dropping(*, lr: float = 0.05) -> orc.State:
    net = net_of(50, torch.nn.Dropout(0.5))
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=lr))


def test_members_drop_out_each_on_their_own_and_the_same_each_time() -> None:
    pack = pack_of([{}, {}], seeds=[4, 4])
    pack.build(dropping)
    means = pack.step(losses, (X, Y))
    assert means.tolist()[0] != means.tolist()[1]  # twins in all else
    again = pack_of([{}, {}], seeds=[4, 4])
    again.build(dropping)
    assert again.step(losses, (X, Y)).tolist() == means.tolist()
    assert pack.validate(losses, (X, Y))["val_loss"].tolist() == again.validate(losses, (X, Y))["val_loss"].tolist()


def test_networks_are_those_that_the_trials_build_alone() -> None:
    import random

    import numpy as np

    def drawn() -> orc.State:
        net = net_of()
        with torch.no_grad():
            net[0].bias.fill_(random.random() + float(np.random.rand()))
        return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))

    def as_a_worker(seed: int) -> torch.Tensor:
        from orchestrator.training.trial import stream

        random.seed(stream(seed, "python"))
        np.random.seed(stream(seed, "numpy") % 2**32)
        found = alone(lambda trial: trial.build(drawn), {}, seed)
        return torch.cat([one.flatten() for one in found.net.parameters()])

    pack = pack_of([{}, {}], seeds=[5, 6])
    pack.build(drawn)
    for seed, member in zip((5, 6), pack.members, strict=True):
        assert torch.equal(torch.cat([one.flatten() for one in member.net.parameters()]), as_a_worker(seed))


# Optimizers


SGD: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.02},
    {"lr": 0.05, "momentum": 0.5, "dampening": 0.3},
]
NESTEROV: list[dict[str, Any]] = [
    {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"lr": 0.03, "momentum": 0.4, "nesterov": True, "weight_decay": 0.1},
]
ADAMW: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.03, "betas": (0.5, 0.9), "weight_decay": 0.3},
    {"lr": 0.01, "eps": 1e-2, "weight_decay": 0.0},
]
CASES: list[tuple[type[torch.optim.Optimizer], list[dict[str, Any]]]] = [
    (torch.optim.SGD, SGD),
    (torch.optim.SGD, [{"lr": 0.1}, {"lr": 0.2}]),
    (torch.optim.SGD, [{**one, "maximize": True} for one in SGD]),
    (torch.optim.SGD, NESTEROV),
    (torch.optim.AdamW, ADAMW),
    (torch.optim.AdamW, [{**one, "amsgrad": True} for one in ADAMW]),
    (torch.optim.AdamW, [{**one, "maximize": True} for one in ADAMW]),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("begin", ["new", "restored"])
def test_an_optimizer_is_torch_s_state_for_state(
    kind: type[torch.optim.Optimizer], options: list[dict[str, Any]], begin: str
) -> None:
    def build(*, number: int) -> orc.State:
        net = net_of()
        return orc.State(net=net, opt=kind(net.parameters(), **options[number]))

    def job(trial: Any) -> None:
        trial.build(build)
        for number in range(6):
            trial.step(losses, (X + number, Y))
            if begin == "restored" and isinstance(trial, PackedTrial):
                trial.opt.load_state_dict(trial.opt.state_dict())
        trial.report(val_loss=1.0)

    params: list[JsonObject] = [{"number": number} for number in range(len(options))]
    pack = packed(job, params)
    for number, member in enumerate(pack.members):
        single = alone(job, params[number], number)
        ours, theirs = member.opt.state_dict(), single.opt.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys()
        for key, entry in theirs["state"].items():
            assert ours["state"][key].keys() == entry.keys()
            for name, value in entry.items():
                torch.testing.assert_close(ours["state"][key][name], value, rtol=1e-9, atol=1e-12)
        for one, other in zip(member.net.parameters(), single.net.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def with_opt(make: Callable[..., Any]) -> Build:
    def build(**params: Any) -> orc.State:
        net = net_of()
        return orc.State(net=net, opt=make(net, **params))

    return build


@pytest.mark.parametrize(
    ("make", "params", "text"),
    [
        (lambda n: torch.optim.Adam(n.parameters()), [{}], "SGD or AdamW, and build gave torch.optim.adam.Adam"),
        (lambda n: None, [{}], "build gave none"),
        (lambda n: torch.optim.SGD(n.parameters(), lr=torch.tensor(0.1)), [{}], "nor its lr a tensor: give a number"),
        (lambda n: torch.optim.SGD(n.parameters(), differentiable=True), [{}], "can't be capturable or differ"),
        (lambda n: torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), [{}], "parameters of its network only"),
        (
            lambda n, m: torch.optim.SGD(n.parameters(), maximize=m),
            [{"m": False}, {"m": True}],
            "maximize is False in member 0 and True in member 1",
        ),
        (
            lambda n, a: (torch.optim.AdamW if a else torch.optim.SGD)(n.parameters()),
            [{"a": False}, {"a": True}],
            "one class of optimizer",
        ),
        (
            lambda n, k: torch.optim.SGD(list(n.parameters())[:k]),
            [{"k": 1}, {"k": 2}],
            "members 0 and 1 of a pack have other groups",
        ),
    ],
)
def test_an_optimizer_that_can_t_be_packed_is_refused_with_the_reason(make: Any, params: Any, text: str) -> None:
    with pytest.raises(Unpackable, match=text) as refused:
        pack_of(params).build(with_opt(make))
    assert str(refused.value).endswith("to train its trials one by one, set launch.pack: 1")


def test_momentum_can_t_begin_or_end_in_a_pack() -> None:
    pack = pack_of()
    pack.build(build)
    pack.step(losses, (X, Y))
    pack.members[0].opt.param_groups[0]["momentum"] = 0.0
    with pytest.raises(Unpackable, match="momentum can't become 0"):
        pack.step(losses, (X, Y))


# What is not possible


class Single(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X[index], Y[index]


def first(trial: Any) -> Any:
    return next(iter(trial.batches((X, Y), 8)))


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda t: t.batches(Single(), 8), "data in memory.* was given a Single"),
        (lambda t: t.batches(DataLoader(Single())), "was given a DataLoader"),
        (lambda t: t.batches((X, Y), 8, keyed=True), "augment, keyed or num_workers"),
        (lambda t: t.batches((X, Y), 8, augment=lambda s, g: s), "augment, keyed or num_workers"),
        (lambda t: list(first(t)), "looks into a batch"),
        (lambda t: first(t)[0], "looks into a batch"),
        (lambda t: len(first(t)), "looks into a batch"),
        (lambda t: float(t.step(losses, (X, Y))), "uses a value as one number"),
        (lambda t: t.step(losses, (X, Y)).item(), "uses a value as one number"),
        (lambda t: t.validate(losses, (X, Y))["val_loss"] < 1 and 1, "decides by it"),
        (lambda t: t.report(val_loss=t.step(losses, (X, Y)).mean()), "put the values of several trials together"),
        (lambda t: t.seed, "uses trial.seed"),
        (lambda t: t.index, "uses trial.index"),
        (lambda t: t.prepare(net=net_of()), "needs trial.build"),
        (lambda t: t.result(None), "a result for each member"),
        (lambda t: t.net.float(), "stays as it was built"),
        (lambda t: [*t.opt.param_groups], "uses a list in a way that is not possible"),
    ],
)
def test_what_trials_can_t_do_together_is_refused(act: Callable[[Any], object], text: str) -> None:
    pack = pack_of()
    pack.build(build)
    with pytest.raises(Unpackable, match=text):
        act(pack)


class Odd(torch.nn.Module):
    def __init__(self, kind: str, value: Any) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, 1).double()
        if kind == "attribute":
            self.scale = value
        elif kind == "frozen":
            self.inner.requires_grad_(value)
        elif kind == "tied":
            self.other = torch.nn.Linear(6, 1).double()
            if value:
                self.other.weight = self.inner.weight
        elif kind == "hook":
            self.inner.register_forward_hook(lambda m, i, o: o * value)
        elif kind == "mode":
            self.inner.train(value)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


@pytest.mark.parametrize(
    ("kind", "values", "text"),
    [
        ("attribute", [1.0, 2.0], "the network has scale = 1.0 in member 0 and 2.0 in member 1"),
        ("attribute", [torch.ones(2), torch.zeros(2)], "has scale = tensor"),
        ("attribute", [[1, {"a": 2}], [1, {"a": 3}]], "has scale"),
        ("attribute", [object(), object()], "has scale"),
        ("frozen", [True, False], "float64 of shape .* and as float64 of shape .*, without a gradient"),
        ("tied", [True, False], "share other parameters"),
        ("hook", [1.0, 2.0], "_forward_hooks"),
        ("mode", [True, False], "the network's 'inner' has training = True in member 0 and False in member 1"),
    ],
)
def test_networks_that_differ_by_more_than_values_are_refused(kind: str, values: list[Any], text: str) -> None:
    def build(*, at: int) -> orc.State:
        net = Odd(kind, values[at])
        return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))

    with pytest.raises(Unpackable, match=text):
        pack_of([{"at": 0}, {"at": 1}]).build(build)
    pack_of([{"at": 1}, {"at": 1}]).build(build) if values[1].__class__ is not object else None


def test_members_that_have_built_alike_are_told_in_groups() -> None:
    def either(*, width: int = 7, adam: bool = False, named: bool = False) -> orc.State:
        net = net_of(width)
        opt = torch.optim.AdamW(net.parameters()) if adam else torch.optim.SGD(net.parameters(), lr=0.1)
        return orc.State(net=net, opt=opt, **{"noise": torch.Generator()} if named else {})

    params: list[JsonObject] = [{}, {"width": 8}, {"adam": True}, {}, {"named": True}, {"width": 8}]
    with pytest.raises(Unlike, match="the same names") as told:
        pack_of(params).build(either)
    assert told.value.groups == [[0, 3], [1, 5], [2], [4]]
    for group in told.value.groups:
        pack_of([params[place] for place in group]).build(either)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(
        Unpackable, match=r"the network's '0' has weight as float64 of shape \(7, 6\) on cpu in member 0"
    ):
        pack_of([{"width": 7}, {"width": 8}]).build(build)
    with pytest.raises(Unpackable, match="'1' is a Tanh in member 0 and a ReLU in member 1"):
        pack_of([{"deep": False}, {"deep": True}]).build(
            lambda deep: orc.State(net=net_of(7, *[torch.nn.ReLU()] * deep), opt=None)
        )


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda t: t.step(lambda n, b: {"far": n(b[0])}, (X, Y)), KeyError, 'must give "loss"'),
        (lambda t: t.step(losses, (X, Y), micro_batches=0), ValueError, "micro_batches is"),
        (
            lambda t: t.step(lambda n, b: {"loss": n(b[0])[:, 0], "weight": b[1]}, (X, Y)),
            ValueError,
            "as many weights as losses, found 44 for 44",
        ),
        (lambda t: t.step(losses, (X, Y), clip_norm=-1.0), ValueError, "clip_norm is"),
        (
            lambda t: t.validate(lambda n, b: n(b[0]).mean(), (X, Y)),
            ValueError,
            "one value a sample: expected 44, found 1",
        ),
        (lambda t: t.validate(losses, (X[:0], Y[:0])), ValueError, "nothing to validate"),
        (lambda t: t.results(None), NoResult, "without a report"),
    ],
)
def test_a_mistake_is_told_as_in_a_single_trial(
    act: Callable[[Any], object], error: type[Exception], text: str
) -> None:
    pack = pack_of()
    pack.build(build)
    with pytest.raises(error, match=text):
        act(pack)


def test_what_torch_can_t_compute_for_all_at_once_is_told_with_the_remedy() -> None:
    pack = pack_of()
    pack.build(build)
    with pytest.raises(RuntimeError) as raised:
        pack.step(lambda net, batch: net(batch[0]).flatten() * net(batch[0]).sum().item(), (X, Y))
    assert "launch.pack: 1" in "".join(raised.value.__notes__)


def test_a_pack_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 member"):
        pack_of([])


def test_what_is_equal_is_everybody_s() -> None:
    pack = pack_of([{"lr": 0.1, "width": 7}, {"lr": 0.2, "width": 7}])
    assert pack.params == {"width": 7}
    assert Each(["a", "a"])[0] == "a"
    assert repr(PerMember.of([1.0, 2.0])) == "PerMember([1.0, 2.0])"


# Resuming


class Process:
    """A worker process that runs a pack, and hears a notice at its n-th safe point."""

    def __init__(self, folder: Path, job: Job, params: list[JsonObject]) -> None:
        self.folder, self.job, self.params = folder, job, params

    def run(self, attempt: int, leave_after: int) -> tuple[list[Result], Any] | JsonObject:
        left = [leave_after]

        def hears() -> list[str]:
            left[0] -= 1
            return [LEAVE] if left[0] < 0 else []

        torch.manual_seed(99 + attempt)
        checkpoints = Checkpoints(self.folder, Identity(sweep="s", trial=0), WRITER)
        keeper = CheckpointManager(checkpoints, CheckpointOptions(every="1 steps"), hears=hears)
        try:
            pack = packed(self.job, self.params, keeper=keeper, found=keeper.newest() if attempt else None)
            return pack.results(None), lines(pack)
        except Interrupted as interrupted:
            return interrupted.answer
        finally:
            keeper.close()


def all_at_once(*, lr: float = 0.05) -> orc.State:
    net = net_of(7, torch.nn.BatchNorm1d(7), torch.nn.Dropout(0.3))
    opt = torch.optim.AdamW(net.parameters(), lr=lr)
    noise = torch.Generator().manual_seed(int(1e6 * lr))
    return orc.State(net=net, opt=opt, noise=noise, each_step=torch.optim.lr_scheduler.ExponentialLR(opt, 0.9))


def whole(trial: Any) -> None:
    trial.build(all_at_once)
    for epoch in trial.epochs(2):
        for batch in trial.batches((X, Y), 15):
            trial.step(losses, batch)
        trial.net.eval() if epoch else None
        trial.validate(losses, (X, Y))
        if epoch == 0:
            trial.report(val_loss=PerMember.of([1.0, math.nan, 3.0]))


def simple(trial: Any) -> None:
    trial.build(build)
    for _ in trial.epochs(2):
        for batch in trial.batches((X, Y), 15):
            trial.step(losses, batch)
        trial.validate(losses, (X, Y))


@pytest.mark.parametrize(("job", "params"), [(whole, [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}]), (simple, PARAMS)])
def test_a_pack_that_is_interrupted_anywhere_ends_with_the_same_bits(
    tmp_path: Path, job: Job, params: list[JsonObject]
) -> None:
    calm = Process(tmp_path / "calm", job, params).run(0, sys.maxsize)
    assert isinstance(calm, tuple)
    places = 0
    while True:
        process = Process(tmp_path / str(places), job, params)
        answer = process.run(0, places)
        if isinstance(answer, tuple):
            break
        assert isinstance(answer, AttemptEnded)
        assert answer.cause == "preempted"
        found = process.run(1, sys.maxsize)
        assert isinstance(found, tuple), found
        assert found[0] == calm[0], places
        for own, all_ in zip(found[1], calm[1], strict=True):
            assert own == all_[len(all_) - len(own) :]
        places += 1
    assert places == 5  # between the batches of both epochs, and between the epochs


def test_a_checkpoint_of_other_trials_is_told(tmp_path: Path) -> None:
    process = Process(tmp_path, simple, PARAMS)
    assert isinstance(process.run(0, 2), AttemptEnded)
    process.params = PARAMS[:2]
    found = process.run(1, sys.maxsize)
    assert isinstance(found, AttemptEnded | Unable)
    assert "it holds torch.float64 of shape (3, 7, 6), and the job builds torch.float64 of shape (2, 7, 6)" in str(
        found
    )
