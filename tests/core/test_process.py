from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.core.process import Process, cores, find_processes, spawn
from orchestrator.errors import OrcError

IGNORES_TERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
)
SLEEPS = "import time; print('up', flush=True); time.sleep(60)"


def eventually(holds: Callable[[], bool], limit_s: float = 20.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts a program, waits for its first word, and ends it afterwards."""
    started = []

    def begin(program: str, *arguments: str) -> Process:
        log = tmp_path / f"{len(started)}.log"
        started.append(spawn([sys.executable, "-c", program, *arguments], output=log, env=os.environ))
        assert eventually(lambda: b"up" in log.read_bytes())
        return started[-1]

    yield begin
    for process in started:
        process.stop(grace_s=0, kill_s=5)


def test_a_process_has_a_session_of_its_own_and_only_the_log_open(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before\n")
    open_files = "sorted(map(int, os.listdir('/proc/self/fd')))[:3]"
    program = f"import os; print(os.getsid(0) == os.getpid(), {open_files}, os.read(0, 1))"
    process = spawn([sys.executable, "-c", program], output=log, env=os.environ)
    assert eventually(lambda: process.state() == "gone")
    assert log.read_text() == "before\nTrue [0, 1, 2] b''\n"


def test_it_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    parent = (
        "import os, sys, pathlib; from orchestrator.core.process import spawn\n"
        f"print(spawn([sys.executable, '-c', {SLEEPS!r}], output=pathlib.Path(sys.argv[1]), env=os.environ).to_json())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", parent, str(tmp_path / "log")], capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""
    process = Process.from_json(eval(done.stdout))
    assert process.state() == "alive"
    assert process.stop()


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OrcError, match="no-such-program: can't be started"):
        spawn(["no-such-program"], output=tmp_path / "log", env=os.environ)
    with pytest.raises(OrcError, match="missing/log: can't be written"):
        spawn(["true"], output=tmp_path / "missing" / "log", env=os.environ)


def test_term_is_enough_for_most(start: Callable[..., Process]) -> None:
    process = start(SLEEPS)
    assert process.stop(grace_s=20)
    assert process.stop()


def test_one_that_ignores_term_is_killed_with_its_group(start: Callable[..., Process], tmp_path: Path) -> None:
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {IGNORES_TERM!r}, sys.argv[1]]);"
    process = start(child + IGNORES_TERM, "a-child-of-its-own")
    assert eventually(lambda: len(find_processes("a-child-of-its-own")) == 2)
    assert process.stop(grace_s=0.05, kill_s=0.5)
    assert eventually(lambda: find_processes("a-child-of-its-own") == [])


@pytest.mark.parametrize(
    "other", [{"start_time": 1}, {"boot_id": "another boot"}], ids=["a reused number", "another boot"]
)
def test_a_process_that_is_not_this_very_one_gets_no_signal(
    start: Callable[..., Process], other: dict[str, object]
) -> None:
    process = start(SLEEPS)
    stranger = replace(process, **other)
    assert not stranger.alive()
    assert stranger.stop(grace_s=0)
    assert process.alive()


def test_a_process_of_another_machine_is_elsewhere() -> None:
    process = Process(pid=os.getpid(), start_time=1, boot_id="another", host="another")
    assert process.state() == "elsewhere"
    assert not process.stop()


def test_a_zombie_is_not_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.DEVNULL) as child:
        # The kernel shows the arguments of a new program a moment after it has begun.
        assert eventually(lambda: child.pid in [process.pid for process in find_processes(SLEEPS)])
        (process,) = [process for process in find_processes(SLEEPS) if process.pid == child.pid]
        child.send_signal(signal.SIGKILL)
        assert eventually(lambda: not process.alive())


def test_a_process_is_found_by_a_word_of_its_command_line(start: Callable[..., Process]) -> None:
    process = start(SLEEPS, "token-7f3a")
    assert find_processes("token-7f3a") == [process]
    assert find_processes("token-7f3") == []


def test_an_identity_survives_the_ledger() -> None:
    process = Process(pid=1, start_time=2, boot_id="b", host="h")
    assert Process.from_json(process.to_json()) == process
    with pytest.raises(OrcError, match="not a process"):
        Process.from_json({"pid": "1"})


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/job/step\n", {"job/cpu.max": "100000 100000"}, 1),
        ("0::/job/step\n", {"job/cpu.max": "max 100000"}, len(os.sched_getaffinity(0))),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        (
            "3:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "100000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("3:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1"}, len(os.sched_getaffinity(0))),
        ("", {}, len(os.sched_getaffinity(0))),
    ],
)
def test_cores_are_what_affinity_and_control_groups_leave(
    tmp_path: Path, membership: str, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "self").write_text(membership)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path, tmp_path / "self") == expected


def test_what_was_spawned_leaves_no_zombie(tmp_path: Path) -> None:
    process = spawn(["true"], output=tmp_path / "log", env=os.environ)
    assert eventually(lambda: not process.alive())
    assert not Path(f"/proc/{process.pid}").exists()
