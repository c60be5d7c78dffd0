"""Trials that harm what is around them: it costs themselves, and neither the next trial nor the sweep."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sweeps
from command_line import Orc

from orchestrator.config.spec import Retries
from orchestrator.core.process_tree import MARK, end_left, mark, start_time

REPORT = """echo '{"val_loss": 1}' >> $ORC_REPORT"""
ONCE = {"retries": dict.fromkeys(("error", "signal", "memory", "timeout", "unknown"), 0)}


def run(paths: sweeps.SweepPaths) -> dict[str, int]:
    sweeps.run(paths)
    return sweeps.counts(paths)


@pytest.mark.parametrize("number", ["USR1", "HUP", "QUIT", "ALRM", "KILL"])
def test_a_signal_to_its_whole_group_hits_the_program_alone(tmp_path: Path, number: str) -> None:
    script = f'trap "" USR1 HUP QUIT ALRM; [ $ORC_TRIAL = 1 ] && kill -{number} 0; {REPORT}'
    none = Retries(error=0, signal=0, memory=0, timeout=0, unknown=0)
    counts = run(sweeps.make(tmp_path, argv=("sh", "-c", script), trials=5, retries=none))
    assert counts == ({"complete": 4, "failed": 1} if number == "KILL" else {"complete": 5})


LEFT = """
if [ $ORC_TRIAL = 0 ]; then sh -c 'trap "kill -{number} 0" TERM; touch up; while :; do sleep 0.05; done' & fi
while [ ! -e up ]; do sleep 0.01; done
echo ran > ran$ORC_TRIAL
echo '{{"val_loss": 1}}' >> $ORC_REPORT
"""


@pytest.mark.parametrize("number", ["KILL", "USR1", "INT"])
def test_what_a_trial_leaves_harms_no_later_trial_while_it_is_ended(tmp_path: Path, number: str) -> None:
    orc = Orc(tmp_path)
    file = orc.write(
        command=["sh", "-c", LEFT.format(number=number)], parameters={"x": {"values": [0, 1, 2]}}, launch=ONCE
    )
    orc("run", file, "--workers", "1")
    assert sorted(path.name for path in tmp_path.glob("ran*")) == ["ran0", "ran1", "ran2"]


TIMEOUT = """
import socket, subprocess
socket.setdefaulttimeout(0.001)

def train(trial, *, x):
    subprocess.Popen(["sh", "-c", "setsid sh -c 'trap \\"\\" TERM; sleep 600; sleep 600' & true"]).wait()
    return float(x)
"""


def test_a_default_timeout_of_sockets_is_the_job_s_own(tmp_path: Path) -> None:
    orc = Orc(tmp_path)
    (tmp_path / "job.py").write_text(TIMEOUT)
    file = orc.write(program="job.py", parameters={"x": {"values": [0, 1, 2]}}, launch=ONCE)
    orc("run", file, "--workers", "1")
    for trial in range(3):
        said = orc("logs", str(trial), orc.sweeps[0]).out
        assert said.count("ended what was left running") >= 1, said


FORKS = """
import os, time
if os.fork() == 0:
    time.sleep(0.2)
else:
    os.wait()  # it comes through the rest of this import first

def train(trial, *, x):
    trial.report(val_loss=1.0)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_child_that_falls_through_the_import_ends_as_that_of_a_script(tmp_path: Path, ranks: int) -> None:
    orc = Orc(tmp_path)
    (tmp_path / "job.py").write_text(FORKS)
    file = orc.write(program="job.py", parameters={"x": {"values": [0]}}, launch={"ranks_per_node": ranks})
    orc("run", file)
    assert "Traceback" not in orc("logs", "0", orc.sweeps[0]).out


MANY = """
import os
files = [open(os.devnull) for _ in range(1100)]

def train(trial, *, x):
    return 1.0
"""


def test_a_job_that_has_more_than_a_thousand_files_open_is_served(tmp_path: Path) -> None:
    orc = Orc(tmp_path)
    (tmp_path / "job.py").write_text(MANY)
    orc("run", orc.write(program="job.py", parameters={"x": {"values": [0, 1]}}))


GARBAGE = """
import os, socket

def train(trial, *, x):
    if x == 0:
        for number in map(int, os.listdir("/proc/self/fd")):
            try:
                sock = socket.socket(fileno=os.dup(number))
                if sock.family == socket.AF_UNIX:
                    os.write(number, b'{"kind":"Nothing"}\\n')
            except OSError:
                pass
        import time
        time.sleep(600)
    return float(x)
"""


def test_what_is_no_message_costs_its_sender_s_attempt_alone(tmp_path: Path) -> None:
    paths = sweeps.folder(tmp_path, sweeps.spec(program="train.py", parameters={"x": {"values": [0, 1, 2]}}), GARBAGE)
    assert run(paths) == {"complete": 2, "failed": 1}
    details = {line["detail"] for line in sweeps.records(paths, "end")}
    assert all("the worker sent what is no message" in detail for detail in details), details


def test_ranks_of_a_command_that_are_done_are_not_said_to_be_killed(tmp_path: Path) -> None:
    orc = Orc(tmp_path)
    orc("run", orc.write(command=["sh", "-c", REPORT], parameters={"x": {"values": [0]}}, launch={"ranks_per_node": 2}))
    logs = "".join(path.read_text() for path in tmp_path.glob("**/logs/*.log"))
    assert "complete after" in logs
    assert "killed" not in logs


LITTERS = """
setsid sh -c 'trap "printf half" TERM; while :; do
  sleep 0.05
done' & ( sleep 300; sleep 300 ) &
sleep 0.5
echo '{"val_loss": 1}' >> $ORC_REPORT
"""


def test_the_log_names_each_process_in_a_line_whatever_is_printed_meanwhile(tmp_path: Path) -> None:
    orc = Orc(tmp_path)
    orc("run", orc.write(command=["bash", "-c", LITTERS], parameters={"x": {"values": [0, 1]}}), "--workers", "1")
    for trial in range(2):
        said = orc("logs", str(trial), orc.sweeps[0]).out
        ended = re.findall(r"=== trial \S+ attempt 0: ended what was left running: \d+ (.+)", said)
        assert any("trap" in words for words in ended), said
        assert sum(words.startswith("sleep 300") for words in ended) == 1, said


BLOCKED = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.executable, [sys.executable, "-P", "-m", "orchestrator", "submit", sys.argv[1], "--on", "local"])
"""


def test_signals_that_the_caller_blocks_reach_the_supervisor_and_the_program(tmp_path: Path) -> None:
    orc = Orc(tmp_path)
    script = 'trap "touch saved; exit 75" TERM; touch up; sleep 300 & wait'
    file = orc.write(command=["sh", "-c", script], parameters={"x": {"values": [0]}})
    done = subprocess.run([sys.executable, "-c", BLOCKED, file], cwd=tmp_path, env=orc.environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    sweeps.until((tmp_path / "up").exists)
    orc("cancel", orc.sweeps[0])
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_orc_run_sees_its_sweep_through_with_a_stream_closed(tmp_path: Path, closed: str) -> None:
    orc = Orc(tmp_path)
    file = orc.write(command=["sh", "-c", f"sleep 1; {REPORT}"], parameters={"x": {"values": [0]}})
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -P -m orchestrator run {file} {closed}"], cwd=tmp_path, env=orc.environment
    )
    assert done.returncode == 0
    assert "complete" in orc("status", orc.sweeps[0]).out


HEADLESS = """
import ctypes, os, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)  # exit(2) of this thread alone
"""


def test_a_process_whose_first_thread_has_ended_is_found_by_the_next_command() -> None:
    gone = subprocess.Popen(["true"])
    mine = mark("token", {}).split(":")
    mine[1:3] = str(gone.pid), str(start_time(gone.pid))
    gone.wait()
    headless = subprocess.Popen([sys.executable, "-c", HEADLESS], env={MARK: ":".join(mine)}, start_new_session=True)
    try:
        sweeps.until(lambda: Path(f"/proc/{headless.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        assert not headless.poll()
        assert len(end_left(["token"], grace_s=0.0).gone) == 1
    finally:
        headless.kill()
        headless.wait()


IGNORES = """
import os, subprocess, sys, time
from orchestrator.core.process_tree import end_descendants, start_time
child = subprocess.Popen(["sleep", "600"])
began = time.monotonic()
kept = {(child.pid, start_time(child.pid))}
assert end_descendants(ignore=kept, grace_s=5.0).gone == []
assert time.monotonic() - began < 4.0
assert len(end_descendants(grace_s=5.0).gone) == 1
"""


def test_what_outlived_a_kill_once_is_not_waited_for_again() -> None:
    subprocess.run([sys.executable, "-c", IGNORES], check=True, timeout=60)


INNER = """
ORC_DIR=inner {python} -P -m orchestrator run inner.yaml > inner.out 2>&1 &
touch up; sleep 600
"""


def test_a_sweep_that_a_trial_runs_ends_with_the_killed_processes_of_the_outer_one(tmp_path: Path) -> None:
    stays = f"786.{os.getpid()}"
    orc = Orc(tmp_path)
    inner = orc.write("inner.yaml", command=["sh", "-c", f"setsid sleep {stays} & sleep {stays}"])
    assert inner
    file = orc.write(command=["sh", "-c", INNER.format(python=sys.executable)], parameters={"x": {"values": [0]}})
    orc("submit", file, "--on", "local")

    sweeps.until(lambda: _processes(lambda entry: stays in _read(entry / "cmdline")))
    chain = _processes(lambda entry: _is_outer(entry, tmp_path))
    assert len(chain) >= 4, "supervisor, forkserver and their guardians"
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in chain:
            os.kill(pid, number)
    assert "left running" in orc("status", orc.sweeps[0]).err
    sweeps.until(lambda: not _processes(lambda entry: stays in _read(entry / "cmdline")))


def _processes(matches: Callable[[Path], bool]) -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if matches(entry)]


def _is_outer(entry: Path, folder: Path) -> bool:
    """Whether a process belongs to the supervisor of the outer sweep, and is not a trial's own."""
    variables = _read(entry / "environ").split("\0")
    is_ours = f"HOME={folder}" in variables and "ORC_DIR=inner" not in variables
    return is_ours and "orchestrator." in _read(entry / "cmdline")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


TIDIES = """
sh -c 'trap "sleep 0.3; touch tidied; exit" TERM; while :; do sleep 0.05; done' & sleep 600 &
sleep 0.5
echo '{"val_loss": 1}' >> $ORC_REPORT
"""


def test_what_is_ended_has_its_second_to_tidy_up_though_others_of_its_group_end_at_once(tmp_path: Path) -> None:
    orc = Orc(tmp_path)
    orc("run", orc.write(command=["sh", "-c", TIDIES], parameters={"x": {"values": [0]}}))
    assert (tmp_path / "tidied").exists()
