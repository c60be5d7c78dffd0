"""Nothing that a trial has started is left, whatever it does to hide, however the trial ends, and whoever dies first.

`ORC_TRIES=50 pytest tests/test_nothing_left.py` does each so often.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Orc
from invariants import until

TRIES = int(os.environ.get("ORC_TRIES", "1"))

LITTER = '''
import os, signal, subprocess, sys, time

STAYS = ["sleep", os.environ["STAYS"]]


def child(what):
    """What `what` does in a new process, before it becomes one that stays."""
    if os.fork() == 0:
        what()
        os.execvp(STAYS[0], STAYS)


def deaf():
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def apart():
    os.setsid()


def daemon():
    os.setsid()
    if os.fork():
        os._exit(0)
    deaf()
    os.closerange(0, 1000)


def stopped():
    os.execvp("sh", ["sh", "-c", f"kill -STOP $$; exec sleep {STAYS[1]}"])


def without_our_variables():
    os.setsid()
    if os.fork():
        os._exit(0)
    os.execve("/bin/sleep", STAYS, {})


def litter():
    for what in (deaf, apart, daemon, stopped, without_our_variables):
        child(what)
    subprocess.Popen(["sh", "-c", f"for i in $(seq {BOMB}); do sleep {STAYS[1]} & done"], start_new_session=True).wait()
    open(f"up-{os.environ.get('RANK', os.getpid())}", "w").close()
    if os.environ["ENDS"] == "no":
        time.sleep(600)


BOMB = 200
'''

COMMAND = """
import os
from litter import litter
litter()
if os.environ.get("RANK", "0") == "0":
    with open(os.environ["ORC_REPORT"], "a") as file:
        file.write('{"val_loss": 1.0}\\n')
"""

JOB = """
from litter import litter

def train(trial, *, x):
    litter()
    trial.report(val_loss=1.0)
"""

KINDS = {
    "command": ({"command": [sys.executable, "trial.py"]}, 1),
    "job": ({"program": "job.py"}, 1),
    "command of ranks": ({"command": [sys.executable, "trial.py"]}, 2),
    "job of ranks": ({"program": "job.py"}, 2),
}
ENDS = ("ordinary", "cancel", "ctrl-c", "worker", "forkserver", "supervisor", "supervisor and forkserver")


def of(word: str) -> list[int]:
    """Processes with `word` among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes().replace(b" ", b"\0").split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def children_of(pid: int) -> list[int]:
    """Processes whose parent `pid` is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


class Litterer:
    """A sweep of one trial that starts what should not stay.

    Args:
        orc: where.
        kind: of trial.
        ends: whether the trial ends by itself.
    """

    def __init__(self, orc: Orc, kind: str, *, ends: bool) -> None:
        keys, self.num_ranks = KINDS[kind]
        self.stays = f"{600 + os.getpid() % 1000}.{id(orc)}"
        self.orc = Orc(orc.folder, {"STAYS": self.stays, "ENDS": "yes" if ends else "no"})
        for name, text in (("litter.py", LITTER), ("trial.py", COMMAND), ("job.py", JOB)):
            (orc.folder / name).write_text(text)
        none = dict.fromkeys(("error", "signal", "memory", "timeout", "unknown"), 0)
        self.file = orc.write(
            **keys,
            parameters={"x": {"values": [0]}},
            launch={"ranks_per_node": self.num_ranks, "retries": none},
        )

    def wait(self) -> None:
        """Until every rank has started everything."""
        until(lambda: len(list(self.orc.folder.glob("up-*"))) == self.num_ranks, lambda: "the trial has not begun")

    @property
    def supervisor(self) -> int:
        (found,) = (pid for pid in of("orchestrator.supervisor") if str(self.orc.runs) in command_line(pid))
        return found

    @property
    def forkserver(self) -> int:
        (found,) = (pid for pid in children_of(self.supervisor) if "orchestrator.forkserver" in command_line(pid))
        return found

    @property
    def worker(self) -> int:
        return min(pid for pid in children_of(self.forkserver) if "orchestrator.forkserver" in command_line(pid))

    def check(self) -> None:
        """Nothing is there any more, of the trial or of us."""
        until(lambda: not self.there(), lambda: f"left running: {[command_line(pid) for pid in self.there()][:5]}")

    def there(self) -> list[int]:
        ours = (pid for word in ("orchestrator.supervisor", "orchestrator.forkserver") for pid in of(word))
        return of(self.stays) + [pid for pid in ours if str(self.orc.runs) in command_line(pid)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.fixture
def litterer(tmp_path: Path) -> Iterator[Callable[..., Litterer]]:
    """Makes a sweep that litters; what a failed test has left is ended."""
    made: list[Litterer] = []

    def make(kind: str, *, ends: bool) -> Litterer:
        made.append(Litterer(Orc(tmp_path), kind, ends=ends))
        return made[-1]

    yield make
    for one in made:
        for pid in one.there():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("_", range(TRIES))
def test_nothing_is_left(kind: str, end: str, _: int, litterer: Callable[..., Litterer]) -> None:
    sweep = litterer(kind, ends=end == "ordinary")
    if end == "ordinary":
        sweep.orc("run", sweep.file)
    elif end == "ctrl-c":
        process = sweep.orc.start("run", sweep.file)
        sweep.wait()
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=120)[1]
        assert process.returncode == 75
    else:
        sweep.orc("submit", sweep.file, "--on", "local")
        sweep.wait()
        end_by(end, sweep)
    sweep.check()


def end_by(end: str, sweep: Litterer) -> None:
    if end == "cancel":
        sweep.orc("cancel")
        assert sweep.there() == []  # at once: the command has waited for it
    elif end == "supervisor and forkserver":
        pids = sweep.supervisor, sweep.forkserver
        for pid in pids:  # neither may notice the other's end
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        end_what_has_no_variables(sweep)
        assert "had left running" in sweep.orc("status").err
        assert sweep.there() == []
    else:
        os.kill(getattr(sweep, end), signal.SIGKILL)


def end_what_has_no_variables(sweep: Litterer) -> None:
    """With supervisor and forkserver gone at once, nothing tells that it is the trial's."""
    for pid in of(sweep.stays):
        with contextlib.suppress(OSError):
            if not Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(pid, signal.SIGKILL)


def test_what_a_command_has_left_ends_with_its_trial(litterer: Callable[..., Litterer]) -> None:
    """And not only with the sweep: the log names it."""
    sweep = litterer("command", ends=True)
    sweep.orc("run", sweep.file, "parameters.x.values=[0,1]", "--workers", "1")
    logs = "".join(path.read_text() for path in sweep.orc.runs.glob("*/logs/*"))
    assert logs.count("ended what the program left running") == 2
    sweep.check()


def test_a_stopped_forkserver_and_a_killed_supervisor_leave_nothing_to_the_next_command(
    litterer: Callable[..., Litterer],
) -> None:
    sweep = litterer("command", ends=False)
    sweep.orc("submit", sweep.file, "--on", "local")
    sweep.wait()
    supervisor, forkserver = sweep.supervisor, sweep.forkserver
    os.kill(forkserver, signal.SIGSTOP)
    os.kill(supervisor, signal.SIGKILL)
    end_what_has_no_variables(sweep)
    said = sweep.orc("best", expect=None).err
    assert "ended what a killed supervisor had left running" in said
    assert sweep.there() == []


def test_a_sweep_that_is_at_work_loses_nothing_to_a_command(litterer: Callable[..., Litterer]) -> None:
    sweep = litterer("command", ends=False)
    sweep.orc("submit", sweep.file, "--on", "local")
    sweep.wait()
    before = sorted(of(sweep.stays))
    assert "left running" not in sweep.orc("status").err
    assert sorted(of(sweep.stays)) == before
    sweep.orc("cancel")
    sweep.check()
