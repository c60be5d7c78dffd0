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

from orchestrator import local
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
def start(tmp_path: Path) -> Iterator[Callable[..., local.Process]]:
    """Starts a program, waits for its first word, and ends it afterwards."""
    started = []

    def begin(program: str, *arguments: str) -> local.Process:
        log = tmp_path / f"{len(started)}.log"
        started.append(local.start([sys.executable, "-c", program, *arguments], log=log))
        assert eventually(lambda: b"up" in log.read_bytes())
        return started[-1]

    yield begin
    for process in started:
        local.stop(process, grace_s=0, kill_s=5)


def test_a_process_has_a_session_of_its_own_and_only_the_log_open(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before\n")
    open_files = "sorted(map(int, os.listdir('/proc/self/fd')))[:3]"
    program = f"import os; print(os.getsid(0) == os.getpid(), {open_files}, os.read(0, 1))"
    process = local.start([sys.executable, "-c", program], log=log)
    assert eventually(lambda: local.state(process) == "gone")
    assert log.read_text() == "before\nTrue [0, 1, 2] b''\n"


def test_it_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    parent = (
        "import sys, pathlib; from orchestrator import local\n"
        f"print(local.start([sys.executable, '-c', {SLEEPS!r}], log=pathlib.Path(sys.argv[1])).to_json())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", parent, str(tmp_path / "log")], capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""
    process = local.Process.from_json(eval(done.stdout))
    assert local.state(process) == "alive"
    assert local.stop(process)


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OrcError, match="no-such-program: can't be started"):
        local.start(["no-such-program"], log=tmp_path / "log")
    with pytest.raises(OrcError, match="missing/log: can't be written"):
        local.start(["true"], log=tmp_path / "missing" / "log")


def test_term_is_enough_for_most(start: Callable[..., local.Process]) -> None:
    process = start(SLEEPS)
    assert local.stop(process, grace_s=20)
    assert local.stop(process)


def test_one_that_ignores_term_is_killed_with_its_group(start: Callable[..., local.Process], tmp_path: Path) -> None:
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {IGNORES_TERM!r}, sys.argv[1]]);"
    process = start(child + IGNORES_TERM, "a-child-of-its-own")
    assert eventually(lambda: len(local.find("a-child-of-its-own")) == 2)
    assert local.stop(process, grace_s=0.05, kill_s=0.5)
    assert eventually(lambda: local.find("a-child-of-its-own") == [])


@pytest.mark.parametrize(
    "other", [{"start_time": 1}, {"boot_id": "another boot"}], ids=["a reused number", "another boot"]
)
def test_a_process_that_is_not_this_very_one_gets_no_signal(
    start: Callable[..., local.Process], other: dict[str, object]
) -> None:
    process = start(SLEEPS)
    stranger = replace(process, **other)
    assert not local.alive(stranger)
    assert local.stop(stranger, grace_s=0)
    assert local.alive(process)


def test_a_process_of_another_machine_is_elsewhere() -> None:
    process = local.Process(pid=os.getpid(), start_time=1, boot_id="another", host="another")
    assert local.state(process) == "elsewhere"
    assert not local.stop(process)


def test_a_zombie_is_not_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.DEVNULL) as child:
        # The kernel shows the arguments of a new program a moment after it has begun.
        assert eventually(lambda: child.pid in [process.pid for process in local.find(SLEEPS)])
        (process,) = [process for process in local.find(SLEEPS) if process.pid == child.pid]
        child.send_signal(signal.SIGKILL)
        assert eventually(lambda: not local.alive(process))


def test_a_process_is_found_by_a_word_of_its_command_line(start: Callable[..., local.Process]) -> None:
    process = start(SLEEPS, "token-7f3a")
    assert local.find("token-7f3a") == [process]
    assert local.find("token-7f3") == []


def test_an_identity_survives_the_ledger() -> None:
    process = local.Process(pid=1, start_time=2, boot_id="b", host="h")
    assert local.Process.from_json(process.to_json()) == process
    with pytest.raises(OrcError, match="not a process"):
        local.Process.from_json({"pid": "1"})


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
    assert local.cores(tmp_path, tmp_path / "self") == expected
