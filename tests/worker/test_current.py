"""orc.current(): what a script is told in a trial, and by hand; reports whole; notices when it asks for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sweeps
import torch
from crew import together
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.distributed.rendezvous import RankContext
from orchestrator.errors import OrcError, UsageError
from orchestrator.worker import current as attempt
from orchestrator.worker.current import Attempt

PARAMS = {"lr": 0.1, "opt": {"beta": 0.9}}


def in_a_trial(folder: Path, **more: str) -> dict[str, str]:
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return {
        "ORC_TRIAL": "3", "ORC_ATTEMPT": "1", "ORC_SEED": str(2**63 - 1), "ORC_PARAMS": str(folder / "params.json"),
        "ORC_REPORT": str(folder / "report.jsonl"), "ORC_CHECKPOINT": str(folder / "saved"), **more,
    }  # fmt: skip


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


@pytest.fixture
def _handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_trial_says_what_to_do(tmp_path: Path) -> None:
    run = Attempt(in_a_trial(tmp_path, RANK="1", WORLD_SIZE="4"), {"lr": 7.0, "epochs": 3})
    assert run.params == {**PARAMS, "epochs": 3}
    assert (run.trial, run.attempt, run.seed, run.rank, run.world_size) == (3, 1, 2**63 - 1, 1, 4)
    assert run.checkpoint_dir == tmp_path / "saved"
    assert run.checkpoint_dir.is_dir()


def test_by_hand_everything_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    run = Attempt({}, {"lr": 7.0})
    run.report(step=2, val_loss=0.5)
    assert json.loads(capsys.readouterr().out) == {"step": 2, "val_loss": 0.5}
    assert (run.params, run.trial, run.attempt, run.seed, run.rank, run.world_size) == ({"lr": 7.0}, 0, 0, 0, 0, 1)
    assert (run.checkpoint_dir, run.checkpoint_dir.is_dir()) == (Path("checkpoints"), True)
    assert not run.should_stop
    assert signal.getsignal(signal.SIGTERM) is before


@given(st.lists(st.tuples(st.none() | st.integers(-(2**53), 2**53), st.floats(allow_nan=False)), max_size=5))
def test_reports_are_lines_of_their_own(tmp_path_factory: pytest.TempPathFactory, found: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("reports")
    run = Attempt(in_a_trial(folder), {})
    (folder / "report.jsonl").touch()
    for step, value in found:
        run.report(step, val_loss=value)
    assert reports(folder) == [
        {"val_loss": value} if step is None else {"step": step, "val_loss": value} for step, value in found
    ]


def test_a_number_of_any_kind_is_a_metric(tmp_path: Path) -> None:
    run = Attempt(in_a_trial(tmp_path), {})
    run.report(step=torch.tensor(4), a=torch.tensor(0.5), b=torch.tensor([2]), c=True, d=10**400, e=float("nan"))
    (found,) = reports(tmp_path)
    assert found.pop("e") != found.get("e")
    assert found == {"step": 4, "a": 0.5, "b": 2.0, "c": True, "d": 10**400}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"a": "0.5"}, "report: a is '0.5', expected one number"),
        ({"a": None}, "report: a is None, expected one number"),
        ({"a": torch.zeros(2)}, "report: a is tensor"),
        ({"step": 1}, "report: no metric is given"),
        ({"step": 1.5, "a": 1}, "report: step is 1.5, expected a whole number"),
        ({"step": float("nan"), "a": 1}, "report: step is nan"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path: Path, given: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Attempt(in_a_trial(tmp_path), {}).report(**given)
    assert not (tmp_path / "report.jsonl").exists()


@pytest.mark.parametrize("num_bytes", [0, 10])
def test_a_full_disk_is_said(tmp_path: Path, num_bytes: int) -> None:
    run = Attempt(in_a_trial(tmp_path), {})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with (
        sweeps.no_room_after(num_bytes),
        pytest.raises(OrcError, match=r"report.jsonl: (can't be written|there is no)"),
    ):
        run.report(step=1, val_loss=0.25)


def test_the_first_rank_alone_reports(tmp_path: Path) -> None:
    Attempt(in_a_trial(tmp_path, RANK="1", WORLD_SIZE="2"), {}).report(val_loss=1)
    assert not (tmp_path / "report.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("ORC_PARAMS", "/nowhere", "ORC_PARAMS: '/nowhere' can't be read"), ("ORC_SEED", "x", "ORC_SEED: found 'x'")],
)
def test_an_environment_that_no_worker_gives_is_refused(tmp_path: Path, name: str, value: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Attempt(in_a_trial(tmp_path) | {name: value}, {})


# Notices


@pytest.mark.usefixtures("_handler")
def test_a_notice_is_seen_and_who_listened_before_hears_it_too(tmp_path: Path) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    run = Attempt(in_a_trial(tmp_path), {})
    assert not run.should_stop
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.should_stop
    assert heard == [signal.SIGTERM]
    with pytest.raises(SystemExit) as left:
        run.leave()
    assert left.value.code == 75


@pytest.mark.usefixtures("_handler")
def test_another_thread_may_ask_only_once_the_main_one_has(tmp_path: Path) -> None:
    run, found = Attempt(in_a_trial(tmp_path), {}), []

    def ask() -> None:
        try:
            found.append(run.should_stop)
        except UsageError as error:
            found.append(str(error).partition(",")[0])

    def in_a_thread() -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    in_a_thread()
    assert not run.should_stop
    in_a_thread()
    assert found == ["should_stop: ask in the main thread first", False]


def stopped(party: RankContext, environment: dict[str, str]) -> list[bool]:
    """What a rank is told at five places, where the second rank has a notice before the third."""
    run = Attempt({**environment, "RANK": str(party.rank), "WORLD_SIZE": "3"}, {})
    found = []
    for place in range(5):
        if (party.rank, place) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        found.append(run.should_stop)
    return found


def test_ranks_stop_at_one_place(tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    meeting.mkdir(mode=0o700)
    assert together(meeting, 3, stopped, in_a_trial(tmp_path)) == 3 * [[False, False, True, True, True]]


# As a script


def script(text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = sweeps.clean_environment()
    return subprocess.run(
        [sys.executable, "-c", "import orchestrator as orc\n" + text],
        capture_output=True, text=True, check=False, cwd=folder, env=clean | environment,
    )  # fmt: skip


def test_it_loads_nothing_but_the_standard_library(tmp_path: Path) -> None:
    done = script(
        "run = orc.current(); run.should_stop; import sys; print(*sys.modules)", tmp_path, **in_a_trial(tmp_path)
    )
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    extra = {name for name in tops - sys.stdlib_module_names if not name.startswith("_")}
    assert extra <= {"orchestrator"} | modules_of_a_bare_start(), done.stderr


def modules_of_a_bare_start() -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_every_call_gives_the_same_object_and_adds_defaults(tmp_path: Path) -> None:
    done = script(
        "a = orc.current(lr=7, n=1); b = orc.current(m=2); print(a is b, a.params)", tmp_path, **in_a_trial(tmp_path)
    )
    assert done.stdout == f"True { ({'lr': 0.1, 'n': 1, 'opt': {'beta': 0.9}, 'm': 2}) }\n", done.stderr


def test_a_job_of_its_own_is_told_where_its_trial_is() -> None:
    import orchestrator.worker  # noqa: F401  # which this process now is, as far as it can be told

    with pytest.raises(UsageError, match=r"whose train\(trial, \.\.\.\) has trial\.params"):
        attempt.current()
