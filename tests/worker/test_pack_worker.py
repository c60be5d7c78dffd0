"""Packs at work, with real supervisors and real kills: a pack is claimed, saved and tried again as one, and each trial
has its own records, its own model, and the bits that it has where the pack was left in peace."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sweeps
import torch
from sweeps import OTHER, TOKEN, counts, records, started, superseded, until
from test_single_worker import message, process_as_before  # noqa: F401  # a fixture of its own process

from orchestrator.cli import logs
from orchestrator.cli.prepare import read
from orchestrator.config.plan import PlanFile
from orchestrator.config.program import LoadedJob, load_job
from orchestrator.config.spec import CheckpointOptions, Metric, Retries
from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import Channel, decode, encode
from orchestrator.core.messages import AttemptMessage, Idle, Outcome, PackDone, Reported
from orchestrator.core.paths import SweepPaths
from orchestrator.results import resumption
from orchestrator.results.records import Cause, RecordWriter, Status, outcome
from orchestrator.sweep import Sweep
from orchestrator.training.trial import Trial
from orchestrator.worker.pack import PackWorker

JOBS = Path(__file__).parents[2] / "jobs"
JOB = """
import os, time
from pathlib import Path
import torch
import orchestrator as orc


def build(*, lr, width):
    net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    return orc.State(net=net, opt=opt, each_epoch=torch.optim.lr_scheduler.ExponentialLR(opt, 0.9))


def losses(net, batch):
    x, y = batch
    return (net(x) - y).square().mean(dim=1)


def train(trial, *, epochs=4):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    y = x.sum(dim=1, keepdim=True)
    trial.build(build)
    for _ in trial.epochs(epochs):
        for batch in trial.batches((x, y), 8):
            trial.step(losses, batch)
            if "CALM" not in os.environ:
                tell(trial)
        trial.validate(losses, (x, y))


def tell(trial):
    here = Path(__file__).parent
    with (here / "steps").open("a") as steps:
        steps.write(f"{trial.attempt}:{trial.num_steps} ")
    (here / "worker").write_text(str(os.getpid()))
    while trial.attempt == 0 and trial.num_steps == 13 and not trial.should_stop and not (here / "go").exists():
        (here / "at").touch()
        time.sleep(0.01)
    time.sleep(0.03 if (here / "slow").exists() else 0.0)
"""
"""Twenty steps, five an epoch. The first attempt stays at the 13th until it is told of a notice, or may go on."""

LRS = (0.01, 1e9, 0.03)
"""Trials 2 and 3 diverge."""


def sweep(runs: Path, every: str = "5 steps", **launch: Any) -> SweepPaths:
    """Six trials in packs of 4 and 2, each of two architectures."""
    spec = sweeps.spec(
        program="train.py",
        parameters={"lr": {"values": list(LRS)}, "width": {"values": [5, 7]}},
        retries=Retries(signal=60, unknown=20),
        **{"trials_per_task": 6, "pack": 4, "notice_s": 5, **launch},
    )
    return sweeps.folder(runs, replace(spec, checkpoint=CheckpointOptions(every=every)), JOB, packed_by=("epochs",))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> SweepPaths:
    """The sweep, run by one worker in peace."""
    paths = sweep(tmp_path_factory.mktemp("calm"))
    paths.submissions.touch()
    assert sweeps.run(paths, env={"CALM": "1"})[0] == 0
    sweeps.summary(paths)
    return paths


def finished(paths: SweepPaths, calm: SweepPaths) -> None:
    """Nothing was lost, nothing counts twice, and every bit is that of the sweep that was left in peace."""
    assert counts(paths) == {"complete": 4, "diverged": 2}
    assert sweeps.summary(paths) == calm.summary.read_bytes()
    assert {path.name: path.read_bytes() for path in paths.models.iterdir()} == {
        path.name: path.read_bytes() for path in calm.models.iterdir()
    }
    assert sweeps.fold(paths).disagreements == []
    assert sweeps.names(paths.checkpoints) == []
    assert sorted(line["trial"] for line in records(paths, "outcome")) == list(range(6))
    assert sweeps.left_running(paths) == []


def steps_of(paths: SweepPaths) -> list[str]:
    return (paths.code / "steps").read_text().split()


# What comes out


def test_every_trial_of_a_pack_has_its_own_records_and_its_own_model(calm: SweepPaths) -> None:
    assert [(line["trial"], line["attempt"]) for line in records(calm, "start")] == [(n, 0) for n in range(6)]
    reports = [line["trial"] for line in records(calm, "report")]
    assert [reports.count(trial) for trial in range(6)] == [4, 4, 1, 1, 4, 4]
    assert {line["step"] for line in records(calm, "report")} == {5, 10, 15, 20}
    finished(calm, calm)
    for one in Sweep(calm).best(4):
        assert one.model is not None


def alone(paths: SweepPaths, index: int) -> Trial:
    """A trial as it is without a pack, in this process."""
    planned = PlanFile.open(paths.plan).trial(index)
    job = load_job(paths.code, "train.py")
    trial = Trial(
        index=index,
        params=planned.params,
        seed=planned.seed,
        metric=Metric(),
        emit=lambda _: None,
        device=torch.device("cpu"),
    )
    job.train(trial)
    return trial


def test_trials_of_a_pack_come_to_what_they_come_to_alone_but_for_rounding(
    calm: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALM", "1")
    sweep = Sweep(calm)
    for index in (0, 1, 4, 5):
        trial = alone(calm, index)
        assert sweep.fold.value(index) == pytest.approx(trial.result(None).payload["value"], rel=1e-5)
        packed = sweep.load_model(str(index)).net.state_dict()
        for name, value in trial.net.state_dict().items():
            torch.testing.assert_close(packed[name], value, rtol=1e-4, atol=1e-5)


def test_a_kept_model_gives_the_value_that_was_recorded(calm: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(calm)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    for one in sweep.best(4):
        with torch.no_grad():
            found = (sweep.load_model(one.trial).net(x) - x.sum(dim=1, keepdim=True)).square().mean()
        assert float(found) == pytest.approx(one.value, rel=1e-5)


def test_the_logs_of_a_trial_are_its_pack_s_and_say_which_parts_it_trains_in(calm: SweepPaths) -> None:
    shown: list[str] = []
    sweep = Sweep(calm)
    (calm.logs / "workers.log").write_text(f"=== trial {sweep.plan.trial(0).trial} attempt 0: start\nwords\n")
    logs.show(sweep, sweep.plan.trial(3), follow=False, write=shown.append)
    assert "".join(shown) == (
        "--- trial 3 is of the pack of 0 to 3, whose lines these are\n--- workers.log\n"
        f"=== trial {sweep.plan.trial(0).trial} attempt 0: start\nwords\n"
    )


# Kills and notices


def test_a_pack_that_is_killed_at_random_steps_gives_the_same_bytes_on_two_slots(
    tmp_path: Path, calm: SweepPaths
) -> None:
    rng, paths = random.Random(1), sweep(tmp_path, "1 steps")
    (paths.code / "slow").touch()
    (paths.code / "go").touch()
    killed: set[int] = set()
    with started(paths, "--slots", "2") as process:
        while process.poll() is None and len(killed) < 8:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.1, 0.4))
                break
            with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
                os.kill(worker := int((paths.code / "worker").read_text()), signal.SIGKILL)
                killed.add(worker)
        (paths.code / "slow").unlink()
        assert process.wait(60) == 0
    assert len(killed) > 2
    ended = [(line["trial"], line["attempt"]) for line in records(paths, "end")]
    assert len(set(ended)) == len(ended)
    finished(paths, calm)


def test_a_pack_that_is_cancelled_is_saved_and_goes_on_there_and_so_are_its_other_trials(
    tmp_path: Path, calm: SweepPaths
) -> None:
    paths = sweep(tmp_path, "1h")
    with started(paths) as process:
        until((paths.code / "at").exists)
        paths.cancelled.write_text("0")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert sweeps.names(paths.checkpoints) == ["0"]
    assert [(line["trial"], line["cause"]) for line in records(paths, "end")] == [(n, "cancelled") for n in range(4)]
    superseded(paths, OTHER, TOKEN)
    (paths.code / "go").touch()
    assert sweeps.run(paths, submission=OTHER)[0] == 0
    assert steps_of(paths)[12:14] == ["0:13", "1:14"]
    assert [(each.trial, each.step, each.lost) for each in resumption.read(paths).resumptions if each.step] == [
        (0, 13, 0),
        (2, 13, 0),
    ]
    finished(paths, calm)


def test_a_pack_whose_supervisor_is_killed_was_running_whole_and_is_charged_so(tmp_path: Path) -> None:
    paths = sweep(tmp_path)
    with started(paths) as process:
        until((paths.code / "at").exists)
        process.kill()
        process.wait(60)
    found = sweeps.fold(paths)
    assert sorted(found.running()) == [0, 1, 2, 3]
    assert [dict(found.charges(trial)) for trial in range(6)] == [{Cause.UNKNOWN: 1}] * 4 + [{}] * 2
    until(lambda: not sweeps.left_running(paths))


def test_a_pack_of_which_some_trials_have_an_outcome_runs_again_whole_and_writes_of_the_others_alone(
    tmp_path: Path, calm: SweepPaths
) -> None:
    paths = sweep(tmp_path)
    writer = RecordWriter(paths, {"submission": TOKEN, "slots": 4})
    paths.claim(0, 5, 0).write_text(writer.writer)
    kept = [{key: value for key, value in line.items() if key != "crc"} for line in records(calm, "outcome")]
    writer.append(*(line for line in kept if line["trial"] in (0, 3, 5)))
    writer.close()
    for path in calm.models.glob("[05]-*"):
        (paths.models / path.name).write_bytes(path.read_bytes())
    superseded(paths, OTHER, TOKEN)
    assert sweeps.run(paths, submission=OTHER, env={"CALM": "1"})[0] == 0
    assert [line["trial"] for line in records(paths, "start")] == [1, 2, 4]
    finished(paths, calm)


def test_the_job_of_the_examples_runs_packed_as_it_is(tmp_path: Path) -> None:
    taken = read(JOBS / "digits_mlp.yaml", ["run_cap=5", "launch.trials_per_task=5", "launch.pack=3"], runs=tmp_path)
    assert list(taken.plan.packs()) == [(0, 1, 2), (3, 4)]
    paths = taken.store(tmp_path)
    assert sweeps.run(paths)[0] == 0
    assert counts(paths) == {"complete": 5}
    assert all(value < 1.0 for value in sweeps.fold(paths).values)


# The worker


def worked(
    paths: SweepPaths, train: Any, build: Any, of: list[JsonObject], *, open_: list[int] | None = None, attempt: int = 0
) -> list[Any]:
    """What a worker says to a supervisor that sends one pack and hangs up."""
    import socket
    from types import ModuleType

    module = ModuleType("job")
    module.build = build  # type: ignore[attr-defined]
    pack: list[Any] = [{"index": n, "trial": f"{n}-abc", "params": one, "seed": n} for n, one in enumerate(of)]
    sent = replace(message(attempt=attempt), pack=pack, open=open_ or list(range(len(of))))
    spec = PlanFile.open(paths.plan).spec
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode(sent))
        ours.shutdown(socket.SHUT_WR)
        PackWorker(paths, spec, LoadedJob(module, train), Channel(theirs)).serve()
        theirs.shutdown(socket.SHUT_WR)
        with ours.makefile("rb") as file:
            return [said for line in file if not isinstance(said := decode(line), Idle)]


def build_net(*, lr: float = 0.1, width: int = 3) -> Any:
    import orchestrator as orc

    net = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Linear(width, 1))
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=lr))


def losses(net: torch.nn.Module, batch: Any) -> torch.Tensor:
    return net(batch[0]).square().mean(dim=1)  # type: ignore[no-any-return]


def trains(trial: Any) -> None:
    x = torch.linspace(-1, 1, 16).reshape(8, 2)
    trial.build(build_net)
    for batch in trial.batches((x,), 4):
        trial.step(losses, batch)
    trial.validate(losses, (x,))


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return sweeps.folder(tmp_path, sweeps.spec(program="train.py", pack=8, top=2), "")


def outcomes(found: list[Any]) -> list[tuple[int, str]]:
    return [(each.body.trial, each.body.status) for each in found if isinstance(each.body, Outcome)]


@pytest.mark.usefixtures("process_as_before")
def test_outcomes_are_told_trial_by_trial_and_the_models_of_the_best_are_kept(paths: SweepPaths) -> None:
    found = worked(paths, trains, build_net, [{"lr": lr} for lr in (0.0, 0.3, 0.1, 0.2)])
    assert sorted(outcomes(found)) == [(n, "complete") for n in range(4)]
    assert found[-1] == AttemptMessage(index=0, attempt=0, body=PackDone())
    values = {each.body.trial: each.body.payload["value"] for each in found if isinstance(each.body, Outcome)}
    best = sorted(values, key=lambda trial: values[trial])[:2]
    assert sorted(int(path.name.partition("-")[0]) for path in paths.models.iterdir()) == sorted(best)


@pytest.mark.usefixtures("process_as_before")
def test_a_part_whose_trials_have_outcomes_is_not_trained_again(paths: SweepPaths) -> None:
    params: list[JsonObject] = [{"width": 3}, {"width": 4}, {"width": 3}, {"width": 4}]
    whole = worked(paths, trains, build_net, params)
    assert outcomes(whole) == [(n, "complete") for n in (0, 2, 1, 3)]
    again = worked(paths, trains, build_net, params, open_=[3])
    assert [each.body.trial for each in again if isinstance(each.body, Reported)] == [1, 3]
    assert [each for each in again if isinstance(each.body, Outcome)] == [
        each for each in whole if isinstance(each.body, Outcome) and each.body.trial == 3
    ]


@pytest.mark.usefixtures("process_as_before")
def test_a_trial_that_was_never_reported_is_told_beside_the_others(paths: SweepPaths) -> None:
    def train(trial: Any) -> None:
        trial.build(build_net)
        trial.stop(1)
        trial.validate(losses, (torch.ones(4, 2),))

    found = worked(paths, train, build_net, [{}, {}, {}])
    assert outcomes(found) == [(0, "complete"), (2, "complete")]
    assert (found[-1].body.cause, found[-1].body.detail[:10]) == ("error", "no result:")


def uses_the_seed(trial: Any) -> None:
    torch.manual_seed(trial.seed)


def raises(trial: Any) -> None:
    trial.build(build_net)
    raise MemoryError("too much")


@pytest.mark.usefixtures("process_as_before")
@pytest.mark.parametrize(
    ("train", "cause", "text"),
    [
        (uses_the_seed, "error", "to train its trials one by one, set launch.pack: 1"),
        (raises, "out of memory", "too much"),
    ],
)
def test_what_ends_a_pack_ends_it_whole_and_says_what_helps(
    paths: SweepPaths, train: Any, cause: str, text: str
) -> None:
    (end,) = worked(paths, train, build_net, [{}, {}])
    assert end.body.cause == cause
    assert text in end.body.detail


@pytest.mark.usefixtures("process_as_before")
def test_train_is_never_called_with_what_is_one_trial_s_alone(paths: SweepPaths) -> None:
    def train(trial: Any, *, width: int) -> None:
        raise AssertionError

    (end,) = worked(paths, train, build_net, [{"width": 3}, {"width": 4}])
    assert "not equal for all trials of a pack" in end.body.detail


RAISES = """
import orchestrator as orc

def build(*, x): ...

def train(trial):
    trial.net
"""


def test_an_error_is_charged_to_every_trial_of_the_pack_which_is_tried_again_as_one(tmp_path: Path) -> None:
    spec = sweeps.spec(program="train.py", trials=3, pack=3, trials_per_task=3, retries=Retries(error=1))
    paths = sweeps.folder(tmp_path, spec, RAISES)
    assert sweeps.run(paths)[0] == 0
    assert counts(paths) == {"failed": 3}
    ends = [(line["trial"], line["attempt"], line["cause"]) for line in records(paths, "end")]
    assert ends == [(trial, attempt, "error") for attempt in (0, 1) for trial in range(3)]
    assert "call trial.build(build)" in sweeps.fold(paths).payload(1)["error"]


# Parts


def changed(paths: SweepPaths, before: str, after: str) -> None:
    """The job of a sweep that has not begun, with other words in it."""
    text = (paths.code / "train.py").read_text()
    assert before in text
    (paths.code / "train.py").write_text(text.replace(before, after))


def test_an_error_in_one_part_costs_the_other_parts_nothing(tmp_path: Path, calm: SweepPaths) -> None:
    paths = sweep(tmp_path)
    changed(paths, "    x, y = batch\n", "    x, y = batch\n    assert net[0].out_features != 5, 'five is too few'\n")
    assert sweeps.run(paths, env={"CALM": "1"})[0] == 0
    assert counts(paths) == {"complete": 2, "diverged": 1, "failed": 3}
    found, expected = sweeps.fold(paths), sweeps.fold(calm)
    for trial in (0, 2, 4):
        assert found.payload(trial)["error"] == "AssertionError: five is too few"
    assert [found.payload(trial) for trial in (1, 3, 5)] == [expected.payload(trial) for trial in (1, 3, 5)]


def test_a_reducer_leaves_the_checkpoint_of_a_pack_that_still_has_something_to_do(tmp_path: Path) -> None:
    paths = sweep(tmp_path)
    writer = RecordWriter(paths, {"submission": TOKEN})
    writer.append(
        outcome(trial=0, attempt=0, status=Status.COMPLETE, payload={"value": 1.0}, seconds=0.0), durable=True
    )
    writer.close()
    for trial in (0, 4):
        paths.checkpoint(trial).mkdir()
    sweeps.summary(paths)
    assert sweeps.names(paths.checkpoints) == ["0", "4"]
