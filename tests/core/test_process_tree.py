"""Which processes are taken for a trial's, and which are not."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sweeps
from invariants import until

from orchestrator.core import process_tree

HIDES = """
import os, subprocess, sys, time
from orchestrator.core.process_tree import adopt_orphans, children, end_descendants, start_time
adopt_orphans()
kept = subprocess.Popen(["sleep", "60"])
old = subprocess.Popen(["sleep", "60"])
time.sleep(0.05)
hidden = subprocess.Popen(["sh", "-c", "setsid sh -c 'trap \\"\\" TERM; sleep 60 & sleep 60' & sleep 0.2"])
since = start_time(hidden.pid)
hidden.wait()
named = end_descendants(keep={kept.pid}, since=since, grace_s=0.1)
print(len(named.gone), named.remaining, sorted(children()) == sorted([kept.pid, old.pid]), [kept.poll(), old.poll()])
kept.kill(), old.kill()
"""


def test_everything_below_is_ended_but_what_is_kept_or_older() -> None:
    done = subprocess.run([sys.executable, "-c", HIDES], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("3 [] True [None, None]", "")  # a shell and its two sleeps


def test_without_children_there_is_nothing_to_end() -> None:
    program = (
        "from orchestrator.core.process_tree import end_descendants, has_children;"
        "print(has_children(), *end_descendants()[:2])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False [] []"


@pytest.fixture
def dead() -> tuple[str, str]:
    """The token of a submission, and what names its supervisor, which has ended."""
    token = secrets.token_hex(16)
    program = f"import os; from orchestrator.core.process_tree import mark; print(mark({token!r}, {{}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return token, done.stdout.strip()


def sleeper(value: str, **more: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], process_tree.MARK: value, **more})
    until(lambda: b"sleep" in Path(f"/proc/{child.pid}/cmdline").read_bytes(), lambda: "it has not begun")
    return child


@pytest.fixture
def orphan(request: pytest.FixtureRequest, dead: tuple[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that names a supervisor: the dead one, unless the parameter says how to change that."""
    change, more = getattr(request, "param", (lambda value: value, {}))
    child = sleeper(change(dead[1]), **more)
    yield child
    child.kill()
    child.wait()


def test_what_names_a_dead_supervisor_is_found_and_ended(
    orphan: subprocess.Popen[bytes], dead: tuple[str, str]
) -> None:
    assert [entry.pid for entry in process_tree.left({dead[0]})] == [orphan.pid]
    assert process_tree.left({"another"}) == process_tree.left(()) == []
    ended, remaining, _ = process_tree.end_left({dead[0]}, grace_s=0.0)
    assert (ended, remaining) == ([f"{orphan.pid} sleep 60"], [])


def _alive(value: str) -> str:
    return process_tree.mark(value.split(":")[0], {})


def _of_a_job(value: str) -> str:
    return value + "17"


def _elsewhere(value: str) -> str:
    token, pid, start, _, job = value.split(":")
    return ":".join((token, pid, start, "another-boot/1", job))


@pytest.mark.parametrize(
    "orphan",
    [
        (_alive, {}),
        (str, {"SLURM_JOB_ID": "17"}),
        (_of_a_job, {}),
        (_of_a_job, {"SLURM_JOB_ID": "18"}),
        (_elsewhere, {}),
        (lambda value: value.replace(":", ";"), {}),
        (lambda value: "", {}),
    ],
    ids=["alive", "in a job", "of a job", "of another job", "of another boot", "nonsense", "empty"],
    indirect=True,
)
def test_what_is_not_a_dead_supervisors_is_left_alone(orphan: subprocess.Popen[bytes], dead: tuple[str, str]) -> None:
    assert process_tree.left({dead[0]}) == []
    assert orphan.poll() is None


SERVES = """
import os, subprocess
server = subprocess.Popen(["sleep", "60"])
def train(trial, *, x):
    if x == 0:
        os.abort()
    return float(os.path.exists(f"/proc/{server.pid}"))
"""


def test_what_the_program_starts_when_it_is_imported_outlives_a_worker_but_not_the_sweep(tmp_path: Path) -> None:
    paths = sweeps.folder(
        tmp_path,
        sweeps.spec(program="train.py", retries=sweeps.Retries(signal=0), trials_per_task=3),
        SERVES,
    )
    assert sweeps.run(paths)[0] == 0
    values = [line["payload"].get("value") for line in sweeps.records(paths, "outcome")]
    assert sorted(value for value in values if value is not None) == [1.0, 1.0]


HEADLESS = """
import ctypes, os, threading, time
from orchestrator.core import process_tree
from orchestrator.core.procfs import process_stat
process_tree.adopt_orphans()
pid = os.fork()
if pid == 0:
    os.setsid()
    threading.Thread(target=time.sleep, args=(60,)).start()
    ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)  # exit(2) of this thread alone
while process_stat(pid).state != "Z":
    time.sleep(0.01)
print(process_stat(pid).has_ended, len(process_tree.end_descendants().gone), process_stat(pid))
"""


def test_a_process_whose_main_thread_has_ended_is_ended_like_any_other() -> None:
    done = subprocess.run([sys.executable, "-c", HEADLESS], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("False 1 None", "")
