"""What is watched is what happened, whoever works on it, and nobody who watches changes a bit."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import together
from sweeps import folder, records, run, spec
from test_resumed_training import X, Y, check_everywhere
from torch import nn

import orchestrator as orc
from orchestrator.config.plan import SweepPlan
from orchestrator.config.spec import Metric
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.results import curves
from orchestrator.training import precision
from orchestrator.training.diagnostics.diagnostics import Wanted, Watch, line
from orchestrator.training.packing.members import Unpackable
from orchestrator.training.packing.pack import Member, PackedTrial
from orchestrator.training.trial import Trial

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several would wait for each other on a busy machine; so small, they gain nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def build(kind: str = "") -> orc.State:
    middle = nn.BatchNorm1d(9) if kind == "norm" else nn.Dropout(0.5) if kind == "dropout" else nn.Identity()
    net = nn.Sequential(nn.Linear(6, 9), middle, nn.Tanh(), nn.Linear(9, 1))
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return orc.State(net=net, opt=opt, each_step=torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step))


def losses(net: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    x, y = batch
    error = (net(x) - y).square().mean(dim=1)
    return {"loss": error, "far": (error > 0.5).float()}


def trained(
    watched: dict[str, Any] | None,
    kind: str = "",
    party: RankContext | None = None,
    *,
    epochs: int = 2,
    given: Callable[..., Any] = losses,
    **options: Any,
) -> tuple[Trial, list[Any]]:
    """A trial of batches of 16, 16 and 12 samples an epoch, and its reports; `watched` says how, None not at all."""
    reports: list[Any] = []
    metric = Metric()
    trial = Trial(index=0, params={}, seed=7, metric=metric, emit=reports.append, device=CPU, party=party)
    trial.build(lambda: build(kind), **({"precision": options.pop("precision")} if "precision" in options else {}))
    if watched is not None:
        trial.watch(**watched)
    for _ in trial.epochs(epochs):
        for batch in trial.batches((X, Y), 16):
            trial.step(given, batch, **options)
        trial.validate(losses, (X, Y))
    return trial, reports


def image(trial: Trial) -> Any:
    """Every bit of what a trial came to."""
    result = trial.result(None)
    state = trial.state
    assert state is not None
    assert state.opt is not None
    momenta = [one["momentum_buffer"].tolist() for one in state.opt.state_dict()["state"].values()]
    return result.payload, result.model, momenta, torch.get_rng_state().tolist()


ALL = {"curvature": 6}


# Nothing is changed


@pytest.mark.parametrize("kind", ["norm", "dropout"])
@pytest.mark.parametrize("options", [{}, {"micro_batches": 3, "clip_norm": 0.1}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("every", [None, 1, 4])
def test_a_trial_that_is_watched_has_the_bits_of_one_that_is_not(
    kind: str, options: dict[str, Any], every: int | None
) -> None:
    plain, reports = trained(None, kind, **options)
    wanted = image(plain)
    watched, more = trained({**ALL, "every": every}, kind, **options)
    assert image(watched) == wanted
    own = [one for one in more if "val_loss" in one["metrics"]]
    assert own == reports
    assert [one["step"] for one in more if one not in own] == {None: [3, 6], 1: [1, 2, 3, 4, 5, 6], 4: [4]}[every]


def test_a_batch_that_losses_change_in_place_is_looked_at_as_it_was() -> None:
    def changes_it(net: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return losses(net, (x.mul_(2), y))["loss"]

    seen: list[float] = []
    for given in (changes_it, lambda net, batch: losses(net, (2 * batch[0], batch[1]))):
        _, reports = trained({**ALL, "throughput": False}, given=given, epochs=1)
        seen.append(reports[-1]["metrics"]["activation_norm/0"])
    assert seen[0] == seen[1]


def watched_job(trial: Trial) -> None:
    trial.build(lambda: build("norm"))
    trial.watch(throughput=False, curvature=3, every=1)
    for _ in trial.epochs(2):
        for batch in trial.batches((X, Y), 16):
            trial.step(losses, batch)
        trial.validate(losses, (X, Y))


def test_a_trial_that_is_watched_goes_on_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    check_everywhere(tmp_path, watched_job, steps={1, 2, 3, 4, 5})


def test_modules_that_the_job_has_set_to_eval_stay_so_and_are_looked_at_so() -> None:
    trial = Trial(index=0, params={}, seed=7, metric=Metric(), emit=lambda _: None, device=CPU)
    net = trial.build(lambda: build("norm")).net
    net.train()
    net[1].eval()
    trial.watch(**ALL, every=1)
    modes: list[bool] = []
    net[1].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trial.step(losses, (X, Y))
    assert modes == [False] * 3  # the step, the activations, the curvature
    net.eval()
    trial._report_watched(trial._watch)
    assert not any(module.training for module in net.modules())


# Norms


def test_gradient_norms_are_those_of_the_layers_parameters() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    assert set(orc.gradient_norms(net).values()) == {0.0}
    net[0].weight.grad = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    net[0].bias.grad = torch.tensor([4.0, 0.0])
    net[2].bias.grad = torch.tensor([12.0])
    assert orc.gradient_norms(net) == {"": 13.0, "0": 5.0, "2": 12.0}
    assert orc.gradient_norms(net[0]) == {"": 5.0, "(net)": 5.0}


def test_gradient_norms_take_sparse_gradients_too() -> None:
    net = nn.Embedding(4, 2, sparse=True)
    net(torch.tensor([1, 1, 2])).sum().backward()
    assert orc.gradient_norms(net)["(net)"] == pytest.approx(math.sqrt(2 * 2**2 + 2))


class Twice(nn.Module):
    """Calls one layer twice and another not at all; one gives a pair, and one numbers that have no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused, self.pair = nn.Identity(), nn.Identity(), nn.LSTM(2, 3)
        self.counts = nn.Sequential(nn.Flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counts(torch.ones(len(x), 1, dtype=torch.int64))
        return self.pair(self.inner(2 * self.inner(x)))[0].sum(dim=1)


def test_activation_norms_are_means_over_samples_and_calls() -> None:
    net = Twice()
    x = torch.tensor([[3.0, 4.0], [0.0, 5.0], [6.0, 8.0]])
    found = orc.activation_norms(lambda net, batch: net(batch), net, x)
    assert list(found) == ["inner", "pair"]
    assert found["inner"] == pytest.approx((20 / 3 + 40 / 3) / 2)
    assert found["pair"] == pytest.approx(net.pair(2 * x)[0].norm(dim=1).mean().item())
    assert not any(module._forward_hooks for module in net.modules())


def test_reports_have_the_mean_over_the_steps_before_gradients_are_clipped() -> None:
    _, each = trained({"throughput": False, "every": 1}, epochs=1, clip_norm=1e-3)
    _, reports = trained({"throughput": False}, epochs=1, clip_norm=1e-3)
    assert len(each) == 4
    assert reports[-1]["step"] == 3
    found = reports[-1]["metrics"]
    for name in ("gradient_norm", "gradient_norm/0", "gradient_norm/3"):
        wanted = [one["metrics"][name] for one in each if name in one["metrics"]]
        assert min(wanted) > 0.01
        assert found[name] == pytest.approx(sum(wanted) / 3)
    assert {name for name in found if name.startswith("act")} == {f"activation_norm/{layer}" for layer in range(4)}


def test_a_step_whose_gradients_overflow_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_SCALED", ["cuda", "cpu"])
    trial = Trial(index=0, params={}, seed=7, metric=Metric(), emit=lambda _: None, device=CPU)
    trial.build(build, precision="fp16")
    trial.watch(throughput=False, every=100)
    for factor in (1.0, 1e30, 1.0):
        trial.step(lambda net, batch, by=factor: losses(net, batch)["loss"] * by, (X, Y))
    watch = trial._watch
    assert watch is not None
    assert math.isfinite(watch._gradients()["gradient_norm"])
    assert watch._num_normed == 2


def test_what_is_not_finite_is_reported_as_null() -> None:
    def bad(net: nn.Module, batch: Any) -> torch.Tensor:
        return losses(net, batch)["loss"] * math.nan

    reports: list[Any] = []
    trial = Trial(index=0, params={}, seed=7, metric=Metric(), emit=reports.append, device=CPU)
    trial.build(build)
    trial.watch(**ALL, every=1)
    trial.step(bad, (X, Y))
    assert reports[0]["metrics"]["gradient_norm"] is None
    assert reports[0]["metrics"]["curvature"] is None


# Time


class Clock:
    """Goes on by a second at each look."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def test_shares_of_the_time_are_one_together() -> None:
    watch = Watch(build().net, Wanted(norms=False), seed=0, clock=Clock())  # begins at second 1
    for batch in watch.batches(iter([(X, Y), (X[:6], Y[:6])])):  # looks twice for each, and for the end
        with watch.step(losses, batch, 1):
            pass
    with watch.spent("validation"), watch.spent("checkpoint"):
        pass
    found = watch.report()  # at second 16
    shares = {name: value for name, value in found.items() if name.startswith("share/")}
    assert sum(shares.values()) == pytest.approx(1)
    assert {name: round(15 * value) for name, value in shares.items()} == {
        "share/data": 3,
        "share/compute": 2,
        "share/communication": 0,
        "share/checkpoint": 1,
        "share/validation": 3,
        "share/other": 6,
    }
    assert found["samples_per_s"] == pytest.approx(50 / 15)
    assert found["steps_per_s"] == pytest.approx(2 / 15)


def test_a_report_begins_anew_after_itself() -> None:
    watch = Watch(build().net, Wanted(), seed=0)
    with watch.step(losses, (X, Y), 1):
        watch.look()
    watch.stepped()
    assert "activation_norm/0" in watch.report()
    again = watch.report()
    assert again["samples_per_s"] == 0
    assert not any("norm" in name for name in again)


def test_a_loop_of_one_s_own_has_what_is_not_of_steps() -> None:
    reports: list[Any] = []
    trial = Trial(index=0, params={}, seed=7, metric=Metric(), emit=reports.append, device=CPU)
    state = build()
    trial.prepare(net=state.net, opt=state.opt)
    trial.watch()
    for _ in trial.epochs(2):
        for _ in trial.batches((X, Y), 16):
            pass
    assert [one["step"] for one in reports] == [0, 1]
    assert reports[1]["metrics"]["share/data"] > 0


# Ranks


def of_ranks(party: RankContext, watched: dict[str, Any] | None, kind: str, options: dict[str, Any]) -> Any:
    trial, reports = trained(watched, kind, party, **options)
    momenta = image(trial)[2:]
    weights = nn.utils.parameters_to_vector(trial.net.parameters()).tolist()
    return reports, (weights, *momenta)


@pytest.mark.parametrize(("world_size", "kind"), [(2, "norm"), (3, "dropout")])
def test_ranks_that_are_watched_have_the_bits_of_ranks_that_are_not(place: Path, world_size: int, kind: str) -> None:
    plain = together(place, world_size, of_ranks, None, kind, {})
    watched = together(place, world_size, of_ranks, {**ALL, "every": 2}, kind, {})
    assert [one[1] for one in watched] == [one[1] for one in plain]
    reports = [one[0] for one in watched]
    assert all(one == reports[0] for one in reports)
    assert [one for one in reports[0] if "val_loss" in one["metrics"]] == plain[0][0]


@pytest.mark.parametrize(("world_size", "micro_batches"), [(2, 1), (3, 2), (5, 1)])
def test_ranks_report_what_one_process_does(place: Path, world_size: int, micro_batches: int) -> None:
    watched = {**ALL, "throughput": False}
    # The last batch has 12 samples: of 5 ranks, some have more than others.
    found = together(place, world_size, of_ranks, watched, "", {"micro_batches": micro_batches})
    _, wanted = trained(watched)
    assert len(wanted) == len(found[0][0]) == 4
    for one, other in zip(found[0][0], wanted, strict=True):
        assert set(one["metrics"]) == set(other["metrics"])
        for name, value in other["metrics"].items():
            assert one["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def late(party: RankContext, told: Path, steps: int, wait_s: float) -> tuple[float, float]:
    """How long a rank has waited, and the share that it reports; rank 1 is late.

    It begins its forward only once rank 0's backward has done its part.
    """
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    reports: list[Any] = []
    trial = Trial(index=0, params={}, seed=7, metric=Metric(), emit=reports.append, device=CPU, party=party)
    trial.build(lambda: orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1)))
    trial.watch(norms=False, every=steps)
    if party.rank == 0:
        net[0].weight.register_post_accumulate_grad_hook(lambda _: (told / str(trial.num_steps)).touch())

    def loss(net: nn.Module, batch: Any) -> torch.Tensor:
        while party.rank == 1 and not (told / str(trial.num_steps)).exists():
            time.sleep(0.001)
        if party.rank == 1:
            time.sleep(wait_s)  # what rank 0 waits for
        return losses(net, batch)["loss"]

    for _ in trial.epochs(1):
        for batch in trial.batches((X, Y), 44 // steps):
            if trial.num_steps < steps:
                trial.step(loss, batch)
    assert trial._team is not None
    return trial._team.waited_s, reports[0]["metrics"]["share/communication"]


def test_waiting_for_another_rank_is_communication(place: Path) -> None:
    told = place / "told"
    told.mkdir()
    (waited_s, share), (_, other_s_share) = together(place, 2, late, told, 4, 0.1)
    assert waited_s > 0.1  # about 0.1 s three times: the fourth is told in a step that is not made any more
    assert share > 0
    assert other_s_share == share  # the first rank's


# Where it can be read


JOB = """
import torch
import orchestrator as orc

def build(*, lr: float):
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=lr))

def losses(net, batch):
    x, y = batch
    return (net(x) - y).square().mean(dim=1)

def train(trial):
    x = torch.linspace(-1, 1, 64).reshape(-1, 1)
    trial.build(build)
    {watch}
    for _ in trial.epochs(3):
        for batch in trial.batches((x, 2 * x), 16):
            trial.step(losses, batch)
        trial.validate(losses, (x, 2 * x))
"""


def test_a_sweep_that_is_watched_has_the_outcomes_of_one_that_is_not_and_tells_curves(tmp_path: Path) -> None:
    of = spec(program="train.py", parameters={"lr": {"values": [0.01, 0.1]}})
    paths = folder(tmp_path, of, JOB.format(watch="trial.watch(curvature=4)"))
    code, said = run(paths)
    assert code == 0, said
    plain: dict[str, Any] = {}
    exec(JOB.format(watch="pass"), plain)
    for one in records(paths, "outcome"):
        planned = SweepPlan(spec=of, code="0" * 64).trial(one["trial"])
        trial = Trial(
            index=planned.index, params=planned.params, seed=planned.seed, metric=of.metric, emit=print, device=CPU
        )
        plain["train"](trial)
        assert one["payload"] == trial.result(None).payload  # the model by its digest, too
    steps = sorted(curves.read(paths, 2, "curvature"))
    assert steps == [(trial, step) for trial in range(2) for step in (4, 8, 12)]
    assert len(re.findall(r"^--- step \d+: .* samples/s; .*; curvature ", said, re.MULTILINE)) == 6  # into the log


def test_a_line_says_what_there_is() -> None:
    found = {"samples_per_s": 12345.6, "steps_per_s": 9.87, "share/data": 0.25, "share/other": 0.75}
    assert line(3, found) == "--- step 3: 12,346 samples/s; 9.87 steps/s; data 25%, other 75%"
    more = {"gradient_norm": 0.5, "gradient_norm/0": 0.5, "curvature": 12.0, "curvature_error": 0.014}
    assert line(3, more) == "--- step 3: gradient norm 0.5; curvature 12 +- 0.01"


# Mistakes


def test_it_is_built_first_and_numbers_are_in_range() -> None:
    trial = Trial(index=0, params={}, seed=7, metric=Metric(), emit=lambda _: None, device=CPU)
    with pytest.raises(RuntimeError, match=r"call trial\.build"):
        trial.watch()
    trial.build(build)
    with pytest.raises(ValueError, match="curvature is a number of Hessian-vector products, at least 0, not -1"):
        trial.watch(curvature=-1)
    with pytest.raises(ValueError, match="every is how many steps lie between reports, at least 1, not 0"):
        trial.watch(every=0)


def test_a_pack_is_not_watched() -> None:
    member = Member(index=0, params={}, seed=1, emit=lambda _: None)
    with pytest.raises(Unpackable, match=r"trial\.watch.*launch\.pack: 1"):
        PackedTrial([member], metric=Metric(), device=CPU).watch(curvature=3)
