"""What a job sees, and what a trial comes to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import orchestrator as orc
from orchestrator.config.spec import Metric
from orchestrator.core.atomic import JsonObject
from orchestrator.results.objective import Diverged, NoResult
from orchestrator.results.records import Status
from orchestrator.training.data import dataset
from orchestrator.training.trial import Trial, stream

X = torch.arange(40, dtype=torch.float32).reshape(20, 2)
Y = torch.arange(20)


class Pairs(Dataset[Any]):
    """The same samples, one by one."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X[index], Y[index]


FORMS = [(X, Y), [X, Y], TensorDataset(X, Y), Pairs()]


def trial(metric: Metric | None = None, params: JsonObject | None = None, seed: int = 7, **more: Any) -> Trial:
    reports: list[JsonObject] = []
    found = Trial(
        index=0,
        params=params or {},
        seed=seed,
        metric=metric or Metric(),
        emit=reports.append,
        device=torch.device("cpu"),
        **more,
    )
    found.reports = reports  # type: ignore[attr-defined]
    return found


def reports(of: Trial) -> list[JsonObject]:
    return of.reports  # type: ignore[attr-defined,no-any-return]


def build(*, width: int = 3) -> orc.State:
    net = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Dropout(0.5), torch.nn.Linear(width, 1))
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=1e-3))


def losses(net: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    x, y = batch
    error = (net(x)[:, 0] - y) ** 2
    return {"loss": error, "far": (error > 1).float()}


def trained(seed: int = 7, samples: Any = (X, Y)) -> Trial:
    found = trial(seed=seed)
    found.build(build)
    for _ in found.epochs(2):
        for batch in found.batches(samples, 8):
            found.step(losses, batch)
        found.validate(losses, (X, Y))
    return found


# Batches


@pytest.mark.parametrize("samples", FORMS)
@pytest.mark.parametrize(("shuffle", "drop_last", "sizes"), [(True, False, [8, 8, 4]), (False, True, [8, 8])])
def test_each_sample_comes_once_an_epoch(samples: Any, shuffle: bool, drop_last: bool, sizes: list[int]) -> None:
    found = list(trial().batches(samples, 8, shuffle=shuffle, drop_last=drop_last))
    assert [len(y) for _, y in found] == sizes  # type: ignore[misc]
    order = torch.cat([y for _, y in found]).tolist()  # type: ignore[misc]
    assert len(set(order)) == len(order)
    assert (order == sorted(order)) == (not shuffle)
    assert torch.equal(torch.cat([x for x, _ in found]), X[order])  # type: ignore[misc]


def order_of(found: Trial, samples: Any) -> list[int]:
    return [int(i) for _, y in found.batches(samples, 8) for i in y]  # type: ignore[misc]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    one, other = trial(), trial()
    torch.rand(5)  # what happened before does not matter
    assert [order_of(one, form) for form in FORMS] == [order_of(other, (X, Y))] * len(FORMS)
    other.epoch = 1
    assert order_of(one, (X, Y)) != order_of(other, (X, Y))
    assert order_of(one, (X, Y)) != order_of(trial(seed=8), (X, Y))


def test_a_loader_brings_its_own_batches() -> None:
    found = list(trial().batches(DataLoader(Pairs(), batch_size=5)))
    assert [len(y) for _, y in found] == [5] * 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ((X, Y[:-1]), r"differ in length: \[20, 19\]"),
        (iter([1]), "a data set is a tuple of tensors or a map-style Dataset, not list_iterator"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_data_set_is_a_clear_error(samples: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        list(trial().batches(samples))


def test_containers_are_kept_when_a_batch_moves() -> None:
    batch = {"x": X, "rest": [Y, "name"], "pair": (1, Y)}
    assert dataset.to_device(batch, torch.device("cpu")) == batch


# Building and training


def test_build_takes_its_parameters_and_no_others() -> None:
    found = trial(params={"width": 5, "epochs": 3}, build_params={"width": 5})
    found.build(build)
    assert found.net[0].out_features == 5  # type: ignore[index,union-attr]


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = trial()
    one.build(build)
    torch.manual_seed(2)
    two = trial()
    two.build(build)
    other = trial(seed=8)
    other.build(build)
    assert torch.equal(one.net[0].weight, two.net[0].weight)  # type: ignore[index,arg-type]
    assert not torch.equal(one.net[0].weight, other.net[0].weight)  # type: ignore[index,arg-type]


def test_training_is_the_same_every_time_whatever_the_form_of_the_data() -> None:
    found = [trained(samples=form) for form in FORMS]
    assert len({str(reports(one)) for one in found}) == 1
    assert len({str(one.result(None).payload["model"]) for one in found}) == 1
    assert reports(found[0]) != reports(trained(seed=8))


def test_purposes_share_no_random_numbers() -> None:
    seeds = {stream(seed, purpose) for seed in (0, 1, 2**62) for purpose in ("build", "train", "order/0", "order/1")}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda t: t.step(losses, (X, Y)), RuntimeError, "call trial.build"),
        (lambda t: t.build(dict), TypeError, "must return orc.State"),
        (lambda t: (t.prepare(net=torch.nn.Linear(2, 1)), t.step(losses, (X, Y))), RuntimeError, "no optimizer"),
        (lambda t: (t.build(build), t.step(lambda n, b: {"error": n(b[0])}, (X, Y))), KeyError, 'must give "loss"'),
    ],
)
def test_a_mistake_of_the_job_is_told_in_its_words(act: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        act(trial())


def test_a_loop_of_ones_own_works_with_keep() -> None:
    found, net = trial(), torch.nn.Linear(2, 1)
    kept, opt = found.prepare(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    assert kept is net
    assert found.opt is opt
    found.report(val_loss=1.5)
    assert found.result(None).model is not None


# Validation and reports


def test_validation_is_the_exact_mean_of_every_sample_whatever_the_batches() -> None:
    found = trial()
    found.build(build)
    results = [found.validate(losses, (X, Y), batch_size=20), found.validate(losses, Pairs(), batch_size=20)]
    assert results[0] == results[1]
    assert results[0].keys() == {"val_loss", "val_far"}
    with torch.no_grad():
        exact = math.fsum(losses(found.net.eval(), (X, Y))["loss"].tolist()) / 20
    assert results[0]["val_loss"] == exact


def test_validation_leaves_training_as_it_was() -> None:
    found = trial()
    found.build(build)
    found.net.train()
    found.validate(losses, (X, Y))
    assert found.net.training
    assert torch.is_grad_enabled()


def test_the_whole_summary_of_the_last_validation_can_be_had() -> None:
    found = trial()
    found.build(build)
    assert found.summaries == {}
    found.validate(losses, (X[:5], Y[:5]), prefix="few_")
    found.report(val_loss=0.0)  # the objective, which is not validated here
    found.validate(losses, (X, Y), batch_size=8)
    means = found.validate(losses, (X, Y), batch_size=8)
    with torch.no_grad():
        values = torch.cat([losses(found.net.eval(), (X[i : i + 8], Y[i : i + 8]))["loss"] for i in (0, 8, 16)])
    assert found.summaries["val_loss"] == orc.Summary.of_samples(values)
    assert found.summaries["val_loss"].compute().mean == means["val_loss"]
    assert {name: one.count for name, one in found.summaries.items()} == {
        "few_loss": 5,
        "few_far": 5,
        "val_loss": 20,
        "val_far": 20,
    }


@pytest.mark.parametrize(
    ("values", "num", "text"),
    [
        (lambda v: v.mean(), 20, "val_loss: losses must give one value a sample: expected 20, found 3"),
        (lambda v: v[1:], 20, "expected 20, found 17"),
        (lambda v: v.repeat(2, 1), 20, "expected 20, found 40"),
        (lambda v: v, 0, "there is nothing to validate: expected at least 1 sample, found a data set of 0"),
    ],
)
def test_a_validation_that_misses_samples_is_an_error(values: Any, num: int, text: str) -> None:
    found = trial()
    found.build(build)
    with pytest.raises(ValueError, match=text):
        found.validate(lambda net, batch: values(losses(net, batch)["loss"]), (X[:num], Y[:num]), batch_size=8)
    assert reports(found) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_validation_that_changes_its_batches_leaves_the_samples_alone(form: Any) -> None:
    def changing(net: torch.nn.Module, batch: Any) -> torch.Tensor:
        return batch[0].zero_().sum(1)  # type: ignore[no-any-return]

    found, before = trial(), X.clone()
    found.build(build)
    found.validate(changing, form, batch_size=8)
    assert torch.equal(X, before)


def test_one_sample_that_is_nan_makes_the_trial_diverge() -> None:
    found, x = trial(), X.clone()
    x[3] = math.nan
    found.build(build)
    with pytest.raises(Diverged):
        found.validate(losses, (x, Y))
    result = found.result(None)
    assert (result.status, result.model) == (Status.DIVERGED, None)
    assert result.payload["metric"] == "val_loss"


@pytest.mark.parametrize(
    "value",
    [
        0.25,
        torch.tensor(0.25),
        torch.tensor(0.25, requires_grad=True),
        torch.tensor([0.0, 0.5]),
        torch.tensor([[0.0], [0.5]]),
        orc.Summary.of_samples(torch.tensor([0.0, 0.5])),
    ],
)
def test_a_report_takes_a_number_a_tensor_or_a_summary(value: Any) -> None:
    found = trial()
    assert found.report(val_loss=value) == {"val_loss": 0.25}
    assert found.result(None).payload["value"] == 0.25


def test_steps_are_those_of_the_optimizer_else_counted_else_given() -> None:
    import numpy as np

    found = trained()
    assert [line["step"] for line in reports(found)] == [3, 6]
    bare = trial()
    bare.report(val_loss=1.0)
    bare.report(val_loss=1.0)
    bare.report(step=np.int64(40), val_loss=1.0)  # type: ignore[arg-type]
    steps = [line["step"] for line in reports(bare)]
    assert steps == [0, 1, 40]
    assert all(type(step) is int for step in steps)


@pytest.mark.parametrize(("named", "text"), [({}, "without a report of 'val_loss'"), ({"acc": 1.0}, "it reported acc")])
def test_a_metric_that_is_never_reported_is_no_result(named: dict[str, float], text: str) -> None:
    found = trial()
    if named:
        found.report(**named)
    with pytest.raises(NoResult, match=text):
        found.result(None)


# Models


def weights(result: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(result.model)


def steps(found: Trial) -> Iterator[int]:
    """Sets the only weight to 0, 1, 2, ..."""
    net = torch.nn.Linear(1, 1, bias=False)
    found.prepare(net=net)
    for step in range(4):
        with torch.no_grad():
            net.weight.fill_(float(step))
        yield step


@pytest.mark.parametrize(("at", "kept"), [("last", 3.0), ("best", 1.0)])
def test_the_model_is_that_of_the_report_that_counts(at: str, kept: float) -> None:
    found = trial(Metric(at=at))  # type: ignore[arg-type]
    for step in steps(found):
        found.report(val_loss=abs(step - 1) + 0.5)
    result = found.result(None)
    assert weights(result)["weight"].item() == kept
    assert result.payload["value"] == {"last": 2.5, "best": 0.5}[at]


@pytest.mark.parametrize(
    ("goal", "bar", "kept"), [("minimize", 1.0, True), ("minimize", 0.9, False), ("maximize", 1.1, False)]
)
def test_a_model_below_the_bar_is_not_even_made(goal: str, bar: float, kept: bool) -> None:
    found = trial(Metric(goal=goal))  # type: ignore[arg-type]
    for _ in steps(found):
        found.report(val_loss=1.0)
    result = found.result(bar)
    assert (result.model is not None, result.payload["model"] is not None) == (kept, kept)


def test_the_same_weights_are_the_same_bytes() -> None:
    one, two = trained().result(None), trained().result(None)
    assert one.model == two.model
    assert one.payload == two.payload


def test_tied_weights_and_views_are_stored() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    net.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
    found = trial()
    found.prepare(net=net)
    found.report(val_loss=1.0)
    stored = weights(found.result(None))
    assert torch.equal(stored["0.weight"], stored["1.weight"])
    assert stored["turned"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 20])
def test_a_step_is_bit_for_bit_that_of_the_mean(size: int) -> None:
    def losses(net: torch.nn.Module, batch: Any) -> torch.Tensor:
        return net(batch[0]).flatten().square()

    ours = trial(params={"width": 4})
    twin = trial(params={"width": 4})
    batch = (X[:size], Y[:size])
    found = [ours.build(build), ours.step(losses, batch), ours.step(losses, batch)][1:]
    net, opt, wanted = twin.build(build).net, twin.opt, []
    for _ in range(2):
        loss = losses(net, batch).mean()
        opt.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        wanted.append(loss.detach())
    assert [float(one) for one in found] == [float(one) for one in wanted]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(ours.net.parameters(), net.parameters(), strict=True))


def test_an_optimizer_s_own_zero_grad_is_called() -> None:
    calls = []

    class Counting(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            calls.append(set_to_none)
            super().zero_grad(set_to_none)

    one = trial()
    net = torch.nn.Linear(2, 1)
    one.prepare(net=net, opt=Counting(net.parameters(), lr=0.1))
    one.step(lambda net, batch: net(batch).flatten(), X)
    assert calls == [True]


def test_what_a_job_has_frozen_stays_frozen_through_a_validation() -> None:
    frozen, live = torch.nn.Dropout(), torch.nn.Linear(2, 1)
    net = torch.nn.Sequential(frozen, live)
    frozen.eval()
    it = trial()
    it.prepare(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    it.validate(lambda net, batch: net(batch[0]).squeeze(-1), (torch.ones(4, 2),))
    assert (frozen.training, live.training, net.training) == (False, True, True)
