"""A worker and its guardian are one process to everyone else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from invariants import until

from orchestrator.core import guardian

WARD = """
import os, signal, sys, time
from orchestrator.core import guardian
signal.signal(signal.SIGTERM, signal.SIG_IGN)
guardian.stand_guard([int(sys.argv[1])], folder=sys.argv[2])
{does}
"""

MAKES = """
from orchestrator.core import scratch
print(scratch.make(), flush=True)
time.sleep(60)
"""

WAITS = """
signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))
print("up", os.getpid(), flush=True)
time.sleep(60)
"""


def ward(does: str, folder: Path, parent: int | None = None) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", WARD.format(does=does), str(parent or os.getpid()), str(folder)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("does", "status"),
    [
        ("pass", 0),
        ("sys.exit(75)", 75),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 3)", -(signal.SIGRTMIN + 3)),
    ],
)
def test_it_ends_as_the_one_below_it(does: str, status: int, tmp_path: Path) -> None:
    with ward(does, tmp_path) as process:
        assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == status


def test_it_says_how_a_worker_was_killed_and_what_it_left(tmp_path: Path) -> None:
    does = """
guardian.begin("trial 3 attempt 0")
if os.fork() == 0:
    os.execvp("sleep", ["sleep", "60"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    with ward(does, tmp_path) as process:
        first, second = process.communicate(timeout=60)[0].splitlines()
    assert first == "=== trial 3 attempt 0: the worker was killed by SIGKILL"
    assert second.startswith("=== trial 3 attempt 0: ended what was left running: ")


@pytest.mark.parametrize("number", [signal.SIGUSR1, guardian.END])
@pytest.mark.parametrize("early", [True, False])
def test_signals_reach_the_one_below_it_also_before_the_guardian_is_ready(
    number: int, early: bool, tmp_path: Path
) -> None:
    with ward(WAITS, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("up")
        if not early:
            until(lambda: executes_a_small_python(process.pid), lambda: "it stays large")
        process.send_signal(signal.SIGTERM)  # as Slurm does, to every process of a step
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == (7 if number == signal.SIGUSR1 else -signal.SIGKILL)


def executes_a_small_python(pid: int) -> bool:
    return b"-I\0-S\0" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_the_end_of_a_parent_is_the_end_of_all_and_the_folder_goes(tmp_path: Path) -> None:
    folder = tmp_path / "meeting"
    folder.mkdir()
    program = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {WARD.format(does=WAITS)!r}, str(os.getpid()), {str(folder)!r}])
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        below = int(parent.stdout.readline().split()[1])
        parent.kill()
        until(lambda: not Path(f"/proc/{below}").exists(), lambda: "it is left")
        until(lambda: not folder.exists(), lambda: "its folder is left")


def test_the_temporary_folder_of_one_that_is_killed_goes(tmp_path: Path) -> None:
    program = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {WARD.format(does=MAKES)!r}, str(os.getpid()), ""])
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        made = Path(parent.stdout.readline().strip())
        assert made.is_dir()
        parent.kill()
        until(lambda: not made.exists(), lambda: "it is left")


def test_nobody_stays_below_a_parent_that_has_gone_before(tmp_path: Path) -> None:
    with ward("print('goes on')", tmp_path, parent=1) as process:
        assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 1
