"""What an optimizer step is made of: micro_batches, precision, the gradients' norm, schedules; alone and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import together
from test_resumed_training import X, Y, check_everywhere
from torch import nn

import orchestrator as orc
from orchestrator.config.spec import Metric
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.training import precision
from orchestrator.training.data import dataset
from orchestrator.training.precision import Precision
from orchestrator.training.trial import Trial

CPU = torch.device("cpu")


def trial(party: RankContext | None = None) -> Trial:
    return Trial(index=0, params={}, seed=7, metric=Metric(), emit=lambda _: None, device=CPU, party=party)


def net_of(kind: str = "") -> nn.Module:
    middle = nn.BatchNorm1d(9) if kind == "norm" else nn.Dropout(0.5) if kind == "dropout" else nn.Identity()
    return nn.Sequential(nn.Linear(6, 9), middle, nn.Tanh(), nn.Linear(9, 1))


def build(kind: str = "", lr: float = 0.1) -> orc.State:
    net = net_of(kind)
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    return orc.State(net=net, opt=opt, each_step=torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step))


def losses(net: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    x, y = batch
    error = (net(x) - y).square().mean(dim=1)
    return {"loss": error, "far": (error > 0.5).float()}


def weights(of: Trial) -> torch.Tensor:
    return nn.utils.parameters_to_vector(of.net.parameters()).detach()


def fresh(make: Callable[[], orc.State] = build, **options: Any) -> Trial:
    found = trial()
    found.build(make, **options)
    return found


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


@pytest.fixture
def fp16_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes in fp16 too, if slowly."""
    monkeypatch.setattr(precision, "_SCALED", ["cuda", "cpu"])


# Portions


@pytest.mark.parametrize("micro_batches", [2, 3, 7, 44, 1000])
def test_the_portions_of_a_batch_add_up_to_the_whole(micro_batches: int) -> None:
    whole, cut = fresh(), fresh()
    for one in (whole, cut):
        one.net.double()
    batch = (X.double(), Y.double())
    means = [float(whole.step(losses, batch)), float(cut.step(losses, batch, micro_batches=micro_batches))]
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-12, atol=1e-14)
    assert means[0] == pytest.approx(means[1], rel=1e-12)
    assert cut.num_steps == 1


def test_each_portion_passes_through_the_network_by_itself() -> None:
    seen = []

    def noted(net: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(len(batch["x"]))
        return losses(net, (batch["x"], batch["rest"][0]))["loss"]

    fresh().step(noted, {"x": X, "rest": [Y]}, micro_batches=3)
    assert seen == [15, 15, 14]


@pytest.mark.parametrize(
    ("batch", "options", "error", "text"),
    [
        ((X, ["a"] * 44), {"micro_batches": 2}, TypeError, "a batch of 44 samples .* found 'a'"),
        ((X, torch.tensor(3)), {"micro_batches": 2}, TypeError, r"found a tensor of shape \(\)"),
        ((X, Y[:9]), {"micro_batches": 2}, TypeError, r"found a tensor of shape \(9, 1\)"),
        ((X, Y), {"micro_batches": 0}, ValueError, "at least 1, not 0"),
        ((X, Y), {"clip_norm": 0.0}, ValueError, "a positive number, not 0.0"),
        ((X, Y), {"clip_norm": float("nan")}, ValueError, "a positive number, not nan"),
    ],
)
def test_what_cannot_be_stepped_on_is_told(batch: Any, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fresh().step(losses, batch, **options)


def test_a_named_tuple_stays_one_in_its_parts() -> None:
    both = torch.max(X, dim=1)
    found = dataset.part(both, 3, 5)
    assert type(found) is type(both)
    assert torch.equal(found.values, both.values[3:5])  # type: ignore[attr-defined]


# The norm of the gradients


@pytest.mark.parametrize(("limit", "is_cut"), [(1e-3, True), (1e6, False)])
def test_no_step_is_longer_than_the_norm_allows_and_shorter_ones_stay_as_they_are(limit: float, is_cut: bool) -> None:
    free, held = fresh(), fresh()
    before = weights(free)
    free.step(losses, (X, Y))
    held.step(losses, (X, Y), clip_norm=limit)
    steps = [weights(one) - before for one in (free, held)]
    assert torch.equal(weights(free), weights(held)) != is_cut
    if is_cut:  # the rate is 0.1
        assert float(steps[1].norm()) == pytest.approx(0.1 * limit, rel=1e-3)
        torch.testing.assert_close(steps[1] / steps[1].norm(), steps[0] / steps[0].norm(), rtol=0, atol=1e-3)


# Precision


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_what_a_network_computes_is_of_its_precision_and_all_that_stays_of_float32(
    name: str, dtype: torch.dtype
) -> None:
    seen = []

    def plain(net: nn.Module, batch: Any) -> torch.Tensor:
        z: torch.Tensor = net(batch[0])[:, 0]
        seen.append(z.dtype)
        return z

    found = fresh(precision=name)
    mean = found.step(plain, (X, Y))
    found.validate(plain, (X, Y))
    assert seen == [dtype, dtype]
    assert mean.dtype == torch.float32  # type: ignore[union-attr]
    assert {value.dtype for value in found.net.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fp16", "precision 'fp16' needs a CUDA device, and this trial runs on cpu: use 'bf16'"),
        ("half", "precision 'half' is not known: expected one of float32, bf16, fp16"),
    ],
)
def test_a_precision_that_cannot_be_had_is_told(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fresh(precision=name)


@pytest.mark.usefixtures("fp16_here")
def test_a_step_that_overflows_in_fp16_changes_nothing_and_the_next_one_is_scaled_less() -> None:
    found = fresh(precision="fp16")
    scaler, before = found.state.others["scaler"], weights(found)  # type: ignore[union-attr]
    found.step(lambda net, batch: losses(net, batch)["loss"] * 1e6, (X, Y))
    assert torch.equal(weights(found), before)
    assert (found.num_steps, found.opt.param_groups[0]["lr"]) == (1, 0.1)
    assert scaler.get_scale() == 2.0**15  # type: ignore[attr-defined]
    found.step(losses, (X, Y))
    assert found.opt.param_groups[0]["lr"] == pytest.approx(0.09)
    twin = fresh()
    twin.step(losses, (X, Y))
    torch.testing.assert_close(weights(found), weights(twin), rtol=0.02, atol=2e-3)


@pytest.mark.usefixtures("fp16_here")
def test_the_norm_is_that_of_the_gradients_themselves_not_of_the_scaled_ones() -> None:
    found = fresh(precision="fp16")
    before = weights(found)
    found.step(losses, (X, Y), clip_norm=1e-3, micro_batches=2)
    assert float((weights(found) - before).norm()) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.usefixtures("fp16_here")
def test_a_scaler_of_the_job_s_own_is_refused() -> None:
    def with_scaler() -> orc.State:
        net = net_of()
        return orc.State(net=net, opt=torch.optim.SGD(net.parameters()), scaler=torch.amp.GradScaler("cpu"))

    with pytest.raises(TypeError, match="brings its own scaler"):
        fresh(with_scaler, precision="fp16")


def test_float32_values_are_passed_on_as_they_are() -> None:
    assert Precision(device=CPU).applied(losses) is losses


# Schedules


def test_schedules_step_with_the_optimizer_and_with_the_epochs() -> None:
    net = net_of()
    opt = torch.optim.SGD(net.parameters(), lr=1.0)
    each_step = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    each_epoch = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    found = trial()
    found.prepare(net=net, opt=opt, each_step=each_step, each_epoch=each_epoch)
    for epoch in found.epochs(3):
        for batch in found.batches((X, Y), 22):
            found.step(losses, batch)
        assert each_step.last_epoch == found.num_steps == 2 * (epoch + 1)
        assert each_epoch.last_epoch == epoch
    assert each_epoch.last_epoch == 3


@pytest.mark.parametrize("name", ["each_step", "each_epoch"])
def test_a_schedule_that_wants_a_metric_is_refused(name: str) -> None:
    net = net_of()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(net.parameters()))
    with pytest.raises(TypeError, match=f"{name} wants no metric to step: give a ReduceLROnPlateau another name"):
        orc.State(net=net, **{name: plateau})  # type: ignore[arg-type]


# Resumed


def all_at_once(name: str) -> Callable[[Trial], None]:
    def build() -> orc.State:
        net = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 1))
        opt = torch.optim.AdamW(net.parameters(), lr=0.05)
        each_step = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step)
        return orc.State(net=net, opt=opt, each_step=each_step, each_epoch=torch.optim.lr_scheduler.StepLR(opt, 1))

    def train(trial: Trial) -> None:
        state = trial.build(build, precision=name)
        for _ in trial.epochs(2):
            for batch in trial.batches((X, Y), 22):
                trial.step(losses, batch, micro_batches=3, clip_norm=0.5)
            trial.validate(losses, (X, Y))
        if name == "fp16":  # the first one overflowed
            assert 1.0 < state.others["scaler"].get_scale() < 2.0**16  # type: ignore[attr-defined]

    return train


@pytest.mark.usefixtures("fp16_here")
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_trial_of_such_steps_goes_on_with_the_bits_of_an_undisturbed_one(tmp_path: Path, name: str) -> None:
    check_everywhere(tmp_path, all_at_once(name), steps={1, 2, 3})


# Ranks


def trained(party: RankContext, kind: str = "", micro_batches: int = 1, name: str = "float32") -> list[float]:
    """The weights after two epochs, of which the last batch is uneven."""
    found = trial(party)
    found.build(lambda: build(kind), precision=name)
    for _ in found.epochs(2):
        for batch in found.batches((X, Y), 13):
            found.step(losses, batch, micro_batches=micro_batches, clip_norm=0.3)
    return weights(found).tolist()  # type: ignore[no-any-return]


# Eight steps. In float32 what is left is the rounding of sums in another order; a rank's part in bf16 is rounded as it
# would be in the whole batch, but the gradients of its weights are sums over fewer samples, rounded to 8 bits.
@pytest.mark.parametrize(
    ("world_size", "micro_batches", "name"), [(2, 1, "float32"), (3, 2, "float32"), (2, 1, "bf16")]
)
def test_ranks_follow_one_process_in_portions_and_with_a_norm(
    place: Path, world_size: int, micro_batches: int, name: str
) -> None:
    found = torch.tensor(together(place, world_size, trained, "", micro_batches, name))
    alone = torch.tensor(trained(RankContext.alone(), name=name))
    assert (found == found[0]).all()
    tolerance = {"float32": 2e-6, "bf16": 5e-3}[name]
    torch.testing.assert_close(found[0], alone, rtol=0, atol=tolerance)


def test_ranks_with_batch_norm_follow_one_process_that_takes_as_many_portions(place: Path) -> None:
    found = torch.tensor(together(place, 2, trained, "norm"))
    assert (found == found[0]).all()
    torch.testing.assert_close(found[0], torch.tensor(trained(RankContext.alone(), "norm", 2)), rtol=0, atol=5e-6)
    assert not torch.allclose(found[0], torch.tensor(trained(RankContext.alone(), "norm")), rtol=0, atol=1e-3)


# Compiled


def compiled(backend: str | None) -> Callable[[Trial], None]:
    def build() -> orc.State:
        net = net_of("norm")
        if backend is not None:
            net.compile(backend=backend)
        return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))

    def train(trial: Trial) -> None:
        trial.build(build)
        for batch in trial.batches((X, Y), 22):
            trial.step(losses, batch)
        trial.validate(losses, (X, Y))

    return train


def test_a_compiled_network_is_saved_under_the_names_of_a_plain_one(tmp_path: Path) -> None:
    found = trial()
    compiled("eager")(found)
    plain = trial()
    compiled(None)(plain)
    assert found.result(None).payload == plain.result(None).payload  # the model's digest is in it


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its parts
def test_a_compiled_network_goes_on_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    check_everywhere(tmp_path, compiled("inductor"), steps={1})
