"""The warm worker: a trial gives the same result first, tenth and alone."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import orjson
import pytest
import sweeps
import torch
from sweeps import no_room_after

import orchestrator as orc
from orchestrator.config.program import LoadedJob
from orchestrator.core.channel import Channel, decode, encode
from orchestrator.core.messages import Idle, Message, Notice, Progress, Reported, RunTrial, Unable
from orchestrator.core.paths import SweepPaths
from orchestrator.training.torch_state import Settings
from orchestrator.worker import single as workers
from orchestrator.worker.single import TrialWorker

WRITER = "e" * 32


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """A worker owns its process; here it is pytest's."""
    cwd, environment, threads = Path.cwd(), dict(os.environ), torch.get_num_threads()
    settings, numbers = Settings(), (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    workers.reset(0, threads, cwd, environment, settings)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return sweeps.folder(tmp_path, sweeps.spec(program="train.py"), "")


def answers(paths: SweepPaths, train: Callable[..., object], *messages: Message, build: Any = None) -> list[Any]:
    """What a worker says to a supervisor that sends `messages` and then hangs up."""
    module = ModuleType("job")
    if build is not None:
        module.build = build  # type: ignore[attr-defined]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in messages:
            ours.sendall(encode(message))
        ours.shutdown(socket.SHUT_WR)
        TrialWorker(paths, sweeps.spec(program="train.py"), LoadedJob(module, train), Channel(theirs)).serve()
        theirs.shutdown(socket.SHUT_WR)
        with ours.makefile("rb") as file:
            return [said for line in file if not isinstance(said := decode(line), Idle)]


def message(index: int = 0, seed: int = 5, bar: float | None = None, attempt: int = 0, **params: Any) -> RunTrial:
    return RunTrial(
        index=index, trial=f"{index}-abc", params=params, seed=seed, attempt=attempt, bar=bar, writer=WRITER
    )


def outcomes(found: list[Any]) -> list[Any]:
    return [
        answer for answer in found if not isinstance(answer.body, Reported | Progress)
    ]  # a slow one tells where it is


def result(answer: Any) -> list[Any]:
    """All that a worker says of an outcome, but whether it has saved: on a slow machine it may have."""
    return [answer.index, answer.attempt, answer.body.status, answer.body.payload]


def build(*, width: int = 4) -> orc.State:
    net = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Dropout(0.5), torch.nn.Linear(width, 1))
    return orc.State(net=net, opt=torch.optim.Adam(net.parameters()))


def everything_random(trial: orc.Trial, *, width: int = 4) -> None:
    """A job whose result depends on every generator and setting that a job can reach."""
    trial.build(build)
    x = torch.randn(30, 3) + random.random() + np.random.rand()
    for _ in trial.epochs(2):
        for (batch,) in trial.batches((x,), 8):  # type: ignore[misc]
            trial.step(lambda net, b: net(b[0])[:, 0] ** 2, (batch,))
    assert Path.cwd() == Path(os.environ["EXPECTED"])
    assert "LEFT" not in os.environ
    assert torch.get_num_threads() == 1
    assert torch.backends.mkldnn.enabled
    assert warnings.filters != []
    trial.report(val_loss=trial.net[2].weight.detach().double().sum().item() + torch.rand(1).item())  # type: ignore[index,operator]


def leave_a_mess(trial: orc.Trial) -> None:
    os.environ["LEFT"] = "1"
    os.environ.pop("PATH", None)
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.set_flush_denormal(True)
    torch.autograd.set_detect_anomaly(True)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property of the module
    np.seterr(all="raise")
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    warnings.simplefilter("error")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    trial.report(val_loss=1.0)


def test_a_trial_is_the_same_first_tenth_and_alone(paths: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPECTED", str(Path.cwd()))
    (alone,) = outcomes(answers(paths, everything_random, message(index=9, seed=99, width=5), build=build))
    assert alone.body.status == "complete", alone

    def job(trial: orc.Trial, **params: Any) -> None:
        if trial.index % 2:
            everything_random(trial, **params)
        else:
            leave_a_mess(trial)

    many = [message(index=i, seed=i, width=5) for i in range(9)] + [message(index=9, seed=99, width=5)]
    found = outcomes(answers(paths, job, *many, build=build))
    assert len(found) == 10
    assert [answer.body.status for answer in found] == ["complete"] * 10
    assert result(found[9]) == result(alone)
    assert result(found[7])[2:] != result(found[9])[2:]
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def some_mess(trial: orc.Trial, **params: Any) -> None:
    """Of ten trials every other one leaves a mess behind, and the rest depend on all that can be left."""
    if trial.index % 2:
        everything_random(trial, **params)
    else:
        leave_a_mess(trial)


def apart(paths: SweepPaths, indices: list[int]) -> dict[int, Any]:
    """What a process of its own comes to that trains these trials one after the other, by index."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        found = answers(paths, some_mess, *(message(index, seed=index, width=5) for index in indices), build=build)
        os.write(writing, orjson.dumps([result(answer) for answer in outcomes(found)]))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = orjson.loads(pipe.read() or b"[]")
    assert os.waitpid(pid, 0)[1] == 0
    return dict(zip(indices, found, strict=True))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_trial_gives_the_same_bytes_alone_tenth_and_in_any_order(
    paths: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPECTED", str(Path.cwd()))
    torch.set_num_threads(1)  # a fork has none of the threads that the pool of this process counts on
    import_module("torch._dynamo")  # else each fork imports it anew, with its first optimizer
    in_order = apart(paths, list(range(10)))
    assert [status for _, _, status, _ in in_order.values()] == ["complete"] * 10, in_order
    assert len({payload["model"] for *_, payload in in_order.values()}) > 5
    for seed in range(3):
        assert apart(paths, random.Random(seed).sample(range(10), 10)) == in_order
    assert apart(paths, [9]) | apart(paths, [1]) | apart(paths, [0]) == {index: in_order[index] for index in (9, 1, 0)}


def test_reset_gives_the_settings_of_a_fresh_process(tmp_path: Path) -> None:
    fresh = Settings()
    leave_a_mess(orc.Trial(index=0, params={}, seed=0, metric=sweeps.Metric(), emit=lambda _: None))
    workers.reset(3, 1, tmp_path, {"ONLY": "this"}, fresh)
    assert (Path.cwd(), dict(os.environ)) == (tmp_path, {"ONLY": "this"})
    assert (torch.get_default_dtype(), torch.empty(1).device.type) == (torch.float32, "cpu")
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_anomaly_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.tensor(1e-40) * 1).item() != 0.0
    assert np.geterr()["invalid"] == "warn"
    warnings.resetwarnings()
    warnings.simplefilter("error")


@pytest.mark.parametrize(
    ("train", "cause", "detail"),
    [
        (lambda trial: None, "error", "no result: the job ended without a report of 'val_loss'"),
        (lambda trial: {"acc": 1.0}, "error", "no result: the job never reported 'val_loss'; it reported acc"),
        (lambda trial: 1 / 0, "error", "ZeroDivisionError: division by zero"),
        (lambda trial: sys.exit(3), "error", "SystemExit: 3"),
        (lambda trial: trial.nothing, "error", "AttributeError: 'Trial' object has no attribute 'nothing'"),
        (lambda trial: {"val_loss": object()}, "error", "TypeError"),
        (lambda trial: bytearray(10**18), "out of memory", "MemoryError: "),
    ],
)
def test_a_job_that_fails_says_why_and_the_next_trial_runs(
    paths: SweepPaths, train: Callable[..., object], cause: str, detail: str
) -> None:
    def job(trial: orc.Trial) -> object:
        return train(trial) if trial.index == 0 else 2.5

    bad, good = outcomes(answers(paths, job, message(0), message(1)))
    assert bad.body.cause == cause
    assert bad.body.detail.startswith(detail)
    assert (good.body.status, good.body.payload["value"]) == ("complete", 2.5)


def test_an_error_reads_the_same_in_every_process(paths: SweepPaths) -> None:
    def job(_: orc.Trial) -> None:
        raise ValueError(object())

    (found,) = outcomes(answers(paths, job, message()))
    assert found.body.detail == "ValueError: <object object at 0x…>"


@pytest.mark.parametrize("value", [2.5, torch.tensor(2.5), np.float32(2.5), np.float64(2.5), {"val_loss": 2.5}])
def test_what_a_job_returns_is_its_last_report(paths: SweepPaths, value: object) -> None:
    (found,) = outcomes(answers(paths, lambda _: value, message()))
    assert found.body.payload["value"] == 2.5


def test_a_parameter_that_the_job_does_not_take_is_named(paths: SweepPaths) -> None:
    (found,) = outcomes(answers(paths, lambda trial: 1.0, message(lr=0.1)))
    assert "'lr'" in found.body.detail


def test_a_job_that_diverges_ends_there(paths: SweepPaths) -> None:
    def job(trial: orc.Trial) -> None:
        for step in range(10):
            trial.report(step=step, val_loss=1.0 if step < 3 else float("nan"))

    found = answers(paths, job, message())
    assert [line.body.step for line in found[:-1]] == [0, 1, 2, 3]
    assert (found[-1].body.status, found[-1].body.payload["step"]) == ("diverged", 3)


def test_a_model_is_on_the_disk_before_the_outcome_that_names_it(paths: SweepPaths) -> None:
    def job(trial: orc.Trial) -> float:
        trial.build(build)
        return 1.0

    first, again, beaten = outcomes(answers(paths, job, message(), message(), message(1, bar=0.5), build=build))
    assert first == again
    name = paths.model(0, first.body.payload["model"])
    assert sweeps.names(paths.models) == [name.name]
    assert beaten.body.payload["model"] is None


def test_a_full_disk_is_not_the_trials_fault(paths: SweepPaths) -> None:
    def job(trial: orc.Trial) -> float:
        trial.build(build)
        return 1.0

    with no_room_after(100):
        (found,) = outcomes(answers(paths, job, message(), build=build))
    assert isinstance(found.body, Unable)
    assert str(paths.models) in found.body.reason
    assert sweeps.names(paths.models) == []


def test_a_job_that_finds_no_room_is_not_charged_for_it(paths: SweepPaths) -> None:
    def job(_: orc.Trial) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/cache")

    (found,) = outcomes(answers(paths, job, message()))
    assert found.body.reason == "[Errno 28] No space left on device: '/data/cache'"


def test_a_notice_that_came_first_is_known_to_the_trial(paths: SweepPaths) -> None:
    def job(trial: orc.Trial) -> float:
        return float(trial.should_stop)

    (found,) = outcomes(answers(paths, job, message(), Notice(action="save")))
    assert found.body.payload["value"] == 1.0


def test_what_a_thread_of_an_earlier_trial_reports_carries_that_trials_name(paths: SweepPaths) -> None:
    first: list[orc.Trial] = []

    def job(trial: orc.Trial) -> float:
        first.append(trial)
        first[0].report(acc=1.0)
        return 2.0

    found = answers(paths, job, message(0), message(1))
    assert [line.index for line in found if isinstance(line.body, Reported) and "acc" in line.body.metrics] == [0, 0]


# With real processes

JOB = """
import ctypes, os
import torch
import orchestrator as orc

def build(*, x):
    net = torch.nn.Linear(2, 1)
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))

def losses(net, batch):
    return net(batch[0])[:, 0] ** 2

def train(trial):
    trial.build(build)
    if trial.index == 2:
        ctypes.string_at(0)
    if trial.index == 4:
        os._exit(0)
    data = (torch.randn(16, 2),)
    for batch in trial.batches(data, 4):
        trial.step(losses, batch)
    trial.validate(losses, data)
"""


def test_a_sweep_of_a_job_gives_the_same_bytes_on_one_slot_and_two(tmp_path: Path) -> None:
    summaries = []
    for slots in ("1", "2"):
        paths = sweeps.folder(tmp_path / slots, sweeps.spec(program="train.py", trials=8, top=3), JOB)
        code, said = sweeps.run(paths, "--slots", slots)
        assert code == 0, said
        assert sweeps.counts(paths) == {"complete": 6, "failed": 2}
        found = sweeps.fold(paths)
        assert "SIGSEGV" in str(found.payload(2)["error"])
        assert "exit code 0 in the middle" in str(found.payload(4)["error"])
        summaries.append(sweeps.summary(paths))
        assert len(sweeps.names(paths.models)) == 3
        assert sweeps.left_running(paths) == []
    assert summaries[0] == summaries[1]


def test_a_program_that_cannot_be_imported_ends_the_supervisor_by_name(tmp_path: Path) -> None:
    paths = sweeps.folder(tmp_path, sweeps.spec(program="train.py"), "import nothing_of_this_name")
    code, said = sweeps.run(paths)
    assert code == 2
    assert "the program can't be imported on this machine: ModuleNotFoundError: No module named" in said
    assert sweeps.counts(paths) == {"missing": 3}


def sweep_of(tmp_path: Path, job: str, trials: int = 3, **options: Any) -> SweepPaths:
    return sweeps.folder(tmp_path, sweeps.spec(program="train.py", trials=trials, **options), job)


SCRIPT_IN_A_FORK = """
import os
def train(trial, *, x):
    child = os.fork()
    if child == 0:
        raise SystemExit(x)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == x
    return x
"""
FORK_THAT_COMES_BACK = """
import os, threading, time
def train(trial, *, x):
    gone, told = os.pipe()
    def late():
        os.read(gone, 1)
        trial.report(val_loss=1000.0)
    threading.Thread(target=late, daemon=True).start()
    if os.fork() == 0:
        os.close(told)
        trial.report(val_loss=2000.0)
        return 2000.0
    threading.Timer(0.1, os.close, [told]).start()
    return x
"""


@pytest.mark.parametrize("job", [SCRIPT_IN_A_FORK, FORK_THAT_COMES_BACK])
def test_nothing_that_a_trial_leaves_counts_for_another(tmp_path: Path, job: str) -> None:
    paths = sweep_of(tmp_path, job, trials=4)
    code, said = sweeps.run(paths)
    assert (code, list(sweeps.fold(paths).values)) == (0, [0.0, 1.0, 2.0, 3.0]), said
    assert all(line["metrics"] == {"val_loss": line["trial"]} for line in sweeps.records(paths, "report"))


HELPER_AT_IMPORT = """
import subprocess, time
from pathlib import Path
helper = subprocess.Popen(["sleep", "0.5"])
def train(trial, *, x):
    limit = time.monotonic() + 20
    while Path(f"/proc/{helper.pid}").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    return x
"""


def test_a_process_that_the_program_starts_when_imported_may_end(tmp_path: Path) -> None:
    paths = sweep_of(tmp_path, HELPER_AT_IMPORT)
    code, said = sweeps.run(paths)
    assert (code, sweeps.counts(paths)) == (0, {"complete": 3}), said
    assert sweeps.records(paths, "end") == []


FINDS_NO_ROOM = """
import errno, os
from pathlib import Path
def train(trial, *, x):
    if x == 1 and Path(__file__).with_name("full").exists():
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch")
    return x
"""


def test_a_full_disk_is_charged_to_no_trial(tmp_path: Path) -> None:
    paths = sweep_of(tmp_path, FINDS_NO_ROOM, trials_per_task=3)
    (paths.code / "full").touch()
    code, said = sweeps.run(paths)
    assert (code, "No space left on device" in said) == (1, True)
    assert [(line["trial"], line["begun"]) for line in sweeps.records(paths, "end")] == [(1, False), (2, False)]
    assert sum(sweeps.fold(paths).charges(1).values()) == 0


DAEMONS = """
import os, time
def train(trial, *, x):
    if x == 1 and trial.attempt == 0:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.closerange(0, 3)
            time.sleep(60)
            os._exit(0)
        os.system(f"setsid sleep 60 > /dev/null 2>&1 & echo {pid} $! > {__file__}.pids")
        os.abort()
    return x
"""


def test_a_daemon_that_a_dead_worker_left_holds_nobody_up_and_is_ended(tmp_path: Path) -> None:
    paths = sweep_of(tmp_path, DAEMONS)
    with sweeps.started(paths) as process:
        assert process.wait(40) == 0
    daemons = (paths.code / "train.py.pids").read_text().split()
    assert daemons
    assert not [pid for pid in daemons if Path(f"/proc/{pid}").exists()]
    assert sweeps.counts(paths) == {"complete": 3}


# Programs with threads, which can't be forked

WITH_A_THREAD = """
import subprocess, sys, threading, time
from pathlib import Path
threading.Thread(target=time.sleep, args=(999,), daemon=True).start()
here = Path(__file__).parent
def train(trial, *, x):
    if (here / "dies").exists():
        (here / "dies").unlink()
        __import__("os").abort()
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", __file__])
    (here / f"began-{x}").touch()
    while not (here / "go").exists():
        time.sleep(0.02)
        if trial.should_stop:
            (here / "heard").touch()
    return x
"""


def test_a_program_with_threads_is_run_in_peace(tmp_path: Path) -> None:
    """A crash costs its attempt, the supervisor has nothing to do while a trial runs, and nothing is left."""
    paths = sweep_of(tmp_path, WITH_A_THREAD, trials=1)
    (paths.code / "dies").touch()
    with sweeps.started(paths) as process:
        sweeps.until((paths.code / "began-0").exists)
        before, began = cpu_s(process.pid), time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        assert cpu_s(process.pid) - before < 0.5 * (time.monotonic() - began)
        (paths.code / "go").touch()
        assert process.wait(60) == 0
    assert [line["detail"] for line in sweeps.records(paths, "end")] == ["killed by SIGABRT"]
    assert sweeps.counts(paths) == {"complete": 1}
    sweeps.until(lambda: not sweeps.left_running(paths))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_killed_supervisor_takes_a_program_with_threads_along(tmp_path: Path) -> None:
    paths = sweep_of(tmp_path, WITH_A_THREAD, trials=1)
    with sweeps.started(paths) as process:
        sweeps.until((paths.code / "began-0").exists)
        process.kill()
    sweeps.until(lambda: not sweeps.left_running(paths))


def test_a_program_with_threads_hears_of_a_notice(tmp_path: Path) -> None:
    paths = sweep_of(tmp_path, WITH_A_THREAD, trials=2)
    env = {"SLURM_JOB_ID": "77", "PATH": "/nowhere"}  # no answer, so what runs is finished
    with sweeps.started(paths, env=env) as process:
        sweeps.until((paths.code / "began-0").exists)
        process.send_signal(signal.SIGTERM)
        sweeps.until((paths.code / "heard").exists)
        (paths.code / "go").touch()
        sweeps.until(lambda: sweeps.records(paths, "outcome"))
    assert len(sweeps.records(paths, "notice")) == 1
