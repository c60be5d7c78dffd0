"""Nothing that a trial has started is left, whatever it does to hide, however the trial ends, and whoever dies first.

`ORC_TRIES=5 ORC_TRIALS=10 pytest tests/test_nothing_left.py` does each five times, with ten trials side by side.
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
TRIALS = int(os.environ.get("ORC_TRIALS", "1"))

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
    open(f"up-{os.getpid()}", "w").close()
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
KILLED = ("workers", "guardians", "forkserver", "head", "supervisor")
ENDS = ("ordinary", "cancel", "ctrl-c", *KILLED, "supervisor, forkserver and guardians")


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
    """A sweep whose trials start what should not stay.

    Args:
        orc: where.
        kind: of trial.
        ends: whether they end by themselves.
        num: how many trials there are, all at once.
    """

    def __init__(self, orc: Orc, kind: str, *, ends: bool, num: int = 1) -> None:
        self.num = num
        keys, self.num_ranks = KINDS[kind]
        self.stays = f"{600 + os.getpid() % 1000}.{id(orc)}"
        self.orc = Orc(orc.folder, {"STAYS": self.stays, "ENDS": "yes" if ends else "no"})
        for name, text in (("litter.py", LITTER), ("trial.py", COMMAND), ("job.py", JOB)):
            (orc.folder / name).write_text(text)
        none = dict.fromkeys(("error", "signal", "memory", "timeout", "unknown"), 0)
        self.file = orc.write(
            **keys,
            parameters={"x": {"values": list(range(num))}},
            launch={"ranks_per_node": self.num_ranks, "retries": none},
        )

    def wait(self) -> None:
        """Until every rank has started everything."""
        until(
            lambda: len(list(self.orc.folder.glob("up-*"))) == self.num * self.num_ranks,
            lambda: "the trial has not begun",
        )

    @property
    def supervisor(self) -> int:
        (found,) = (pid for pid in of("orchestrator.supervisor") if str(self.orc.runs) in command_line(pid))
        return found

    def of_each_trial(self, pids: list[int]) -> list[int]:
        """One of the workers, or guardians, of each trial: the first rank's, as numbers rise."""
        return pids[:: self.num_ranks]

    @property
    def head(self) -> int:
        """The guardian of the forkserver."""
        (found,) = (pid for pid in children_of(self.supervisor) if "orchestrator.core.guardian" in command_line(pid))
        return found

    @property
    def forkserver(self) -> int:
        return below(self.head)

    @property
    def guardians(self) -> list[int]:
        """Those of the workers."""
        return sorted(pid for pid in children_of(self.forkserver) if "orchestrator.core.guardian" in command_line(pid))

    @property
    def workers(self) -> list[int]:
        return [below(pid) for pid in self.guardians]

    def check(self) -> None:
        """Nothing is there any more, of the trial or of us."""
        until(lambda: not self.there(), lambda: f"left running: {[command_line(pid) for pid in self.there()][:5]}")

    def there(self) -> list[int]:
        ours = (pid for word in ("supervisor", "forkserver", "guardian") for pid in of(f"orchestrator.{word}"))
        return of(self.stays) + [pid for pid in ours if self.stays in environment(pid)]


def below(guardian: int) -> int:
    """The process that a guardian watches."""
    (found,) = (pid for pid in children_of(guardian) if "orchestrator.worker.forkserver" in command_line(pid))
    return found


def environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.fixture
def litterer(tmp_path: Path) -> Iterator[Callable[..., Litterer]]:
    """Makes a sweep that litters; what a failed test has left is ended."""
    made: list[Litterer] = []

    def make(kind: str, *, ends: bool, num: int = 1) -> Litterer:
        made.append(Litterer(Orc(tmp_path), kind, ends=ends, num=num))
        return made[-1]

    yield make
    for one in made:
        for pid in one.there():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("_", range(TRIES))
def test_nothing_is_left(kind: str, end: str, _: int, litterer: Callable[..., Litterer]) -> None:
    sweep = litterer(kind, ends=end == "ordinary", num=TRIALS)
    workers = ("--workers", str(TRIALS))
    if end == "ordinary":
        sweep.orc("run", sweep.file, *workers)
    elif end == "ctrl-c":
        process = sweep.orc.start("run", sweep.file, *workers)
        sweep.wait()
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=120)[1]
        assert process.returncode == 75
    else:
        sweep.orc("submit", sweep.file, "--on", "local", *workers)
        sweep.wait()
        end_by(end, sweep)
    sweep.check()


def end_by(end: str, sweep: Litterer) -> None:
    if end == "cancel":
        sweep.orc("cancel")
        assert sweep.there() == []  # at once: the command has waited for it
    elif end == "supervisor, forkserver and guardians":
        pids = sweep.supervisor, sweep.head, sweep.forkserver, *sweep.guardians
        for pid in pids:  # neither may notice the other's end
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        end_what_has_no_variables(sweep)
        assert "had left running" in sweep.orc("status").err
        assert sweep.there() == []
    else:
        found = getattr(sweep, end)
        for pid in sweep.of_each_trial(found) if isinstance(found, list) else [found]:
            os.kill(pid, signal.SIGKILL)


def end_what_has_no_variables(sweep: Litterer) -> None:
    """With all of them gone at once, nothing tells that it is the trial's."""
    for pid in of(sweep.stays):
        with contextlib.suppress(OSError):
            if not environment(pid):
                os.kill(pid, signal.SIGKILL)


def test_what_a_command_has_left_ends_with_its_trial(litterer: Callable[..., Litterer]) -> None:
    """And not only with the sweep: the log names it."""
    sweep = litterer("command", ends=True)
    sweep.orc("run", sweep.file, "parameters.x.values=[0,1]", "--workers", "1")
    logs = "".join(path.read_text() for path in sweep.orc.runs.glob("*/logs/*"))
    assert logs.count("attempt 0: ended what was left running") == 2 * 20  # and tells how many more there were
    assert "(killed: it did not end within 1 s of SIGTERM)" in logs
    assert logs.index(": complete after") < logs.index("ended what was left")  # what it came to is safe by then
    shown = sweep.orc("logs", "1").out
    assert "ended what was left running" in shown
    sweep.check()


def test_stopped_guardians_and_a_killed_supervisor_leave_nothing_to_the_next_command(
    litterer: Callable[..., Litterer],
) -> None:
    sweep = litterer("command", ends=False)
    sweep.orc("submit", sweep.file, "--on", "local")
    sweep.wait()
    supervisor = sweep.supervisor
    for pid in (sweep.head, sweep.forkserver, *sweep.guardians):
        os.kill(pid, signal.SIGSTOP)
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


def test_a_chain_that_forks_faster_than_anyone_can_look_is_ended(tmp_path: Path) -> None:
    """Each link forks the next and leaves, within a millisecond."""
    orc = Orc(tmp_path)
    chain = 'setsid sh -c "echo \\$\\$ > group; f() { f & }; f" & while [ ! -s group ]; do :; done'
    report = """echo '{"val_loss": 1}' >> $ORC_REPORT"""
    file = orc.write(command=["sh", "-c", f"{chain}; sleep 0.3; {report}"], parameters={"x": {"values": [0]}})
    try:
        orc("run", file)
        group = int((tmp_path / "group").read_text())
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)
    finally:
        with contextlib.suppress(OSError):
            os.killpg(int((tmp_path / "group").read_text()), signal.SIGKILL)


INNER = """
orc="{python} -P -m orchestrator"
$orc submit inner.yaml --on local 2>> said; echo $? >> codes
$orc run inner.yaml > /dev/null 2>> said; echo $? >> codes
$orc resume --on local 2>> said; echo $? >> codes
echo '{{"val_loss": 1}}' >> $ORC_REPORT
"""


def test_a_trial_that_would_leave_a_sweep_on_its_machine_is_told_to_wait_for_it(tmp_path: Path) -> None:
    """It would end with the trial, and its own trials count as cancelled."""
    orc = Orc(tmp_path)
    orc.write("inner.yaml")
    script = INNER.format(python=sys.executable)
    orc("run", orc.write(command=["sh", "-c", script], parameters={"x": {"values": [0]}}))
    said = (tmp_path / "said").read_text()
    assert (tmp_path / "codes").read_text().split() == ["2", "0", "0"], said  # with nothing missing there is no harm
    assert "this is a trial" in said
    assert "`orc run` waits for the other sweep" in said


WARM = """
import glob, os, signal, subprocess, sys, time

def train(trial, *, x):
    subprocess.Popen(["sh", "-c", f"setsid sleep {os.environ['STAYS']} & true"]).wait()
    try:
        others = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        others = "none"
    assert others == "none", others
    while not (num := sleepers()):
        time.sleep(0.01)
    with open("seen", "a") as file:
        print(num, file=file)
    return 1.0


def sleepers():
    num = 0
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            num += open(path).read() == f"sleep\\0{os.environ['STAYS']}\\0"
        except OSError:
            pass
    return num
"""


def test_what_a_job_detaches_ends_with_its_trial_and_is_no_child_of_the_worker(tmp_path: Path) -> None:
    """The worker lives on, and user code that waits for all its children waits for its own alone."""
    stays = f"777.{os.getpid()}"
    orc = Orc(tmp_path, {"STAYS": stays})
    (tmp_path / "job.py").write_text(WARM)
    file = orc.write(program="job.py", parameters={"x": {"values": [0, 1, 2, 3]}})
    orc("run", file, "--workers", "1")
    assert (tmp_path / "seen").read_text().split() == ["1"] * 4
    assert of(stays) == []


IMPORTS = """
import os, subprocess, threading, time
subprocess.Popen(["sleep", os.environ["STAYS"]], start_new_session=True)
open("up", "w").close()
if os.environ["HOW"] == "slow":
    time.sleep(600)
if os.environ["HOW"] == "unforkable":
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

def train(trial, *, x):
    open("trains", "w").close()
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["slow", "unforkable"])
def test_what_an_import_has_started_ends_with_a_killed_supervisor(how: str, tmp_path: Path) -> None:
    stays = f"{778 + (how == 'slow')}.{os.getpid()}"
    orc = Orc(tmp_path, {"STAYS": stays, "HOW": how})
    (tmp_path / "job.py").write_text(IMPORTS)
    watching = orc.start("run", orc.write(program="job.py", parameters={"x": {"values": [0]}}))
    until((tmp_path / "trains" if how == "unforkable" else tmp_path / "up").exists, lambda: "nothing was imported")
    assert of(stays)
    watching.kill()  # which would look for what is left
    watching.communicate()
    (supervisor,) = (pid for pid in of("orchestrator.supervisor") if str(orc.runs) in command_line(pid))
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: of(stays) == [], lambda: "it is left")


def test_a_check_of_the_program_that_takes_too_long_leaves_nothing(tmp_path: Path) -> None:
    stays = f"780.{os.getpid()}"
    orc = Orc(tmp_path, {"STAYS": stays, "HOW": "slow"})
    (tmp_path / "job.py").write_text(IMPORTS)
    file = orc.write(program="job.py", parameters={"x": {"values": [0]}}, launch={"import_timeout_s": 2})
    assert "importing it took longer than 2 s" in orc("submit", file, "--on", "local", expect=2).err
    assert (tmp_path / "up").exists()
    assert of(stays) == []
