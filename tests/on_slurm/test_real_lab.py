"""The lab as a whole: real daemons, real jobs, real kills."""

from __future__ import annotations

import encodings.idna  # noqa: F401  # for sockets; who has become nobody can't read it any more
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from on_lab import Slurm

from orchestrator.core.process import Process, poll
from orchestrator.errors import OrcError, UsageError
from orchestrator.slurm.lab import Lab, LabOptions, missing_programs
from orchestrator.slurm.lab.facts import read_facts

SMALL = LabOptions(nodes=2, cpus=2)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab that is down, and is down again after the test."""
    lab = Lab(tmp_path / "lab")
    yield lab
    lab.down()


@pytest.fixture
def own(lab: Lab) -> Slurm:
    """A lab of this test alone, which it may break."""
    lab.up(SMALL)
    return Slurm(lab)


def job(folder: Path, body: str) -> Path:
    file = folder / "job.sh"
    file.write_text(f"#!/bin/bash\n#SBATCH --open-mode=append --output=out.txt\n{body}\n")
    return file


def processes_naming(path: Path) -> list[str]:
    """Command lines of all processes that name `path`."""
    done = subprocess.run(["pgrep", "-af", str(path)], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def test_a_job_runs_and_its_environment_names_the_lab(slurm: Slurm, tmp_path: Path) -> None:
    it = slurm.submit(job(tmp_path, "srun printenv SLURM_CONF"), "--export=PATH")
    slurm.wait_for_state(it, "COMPLETED")
    assert (tmp_path / "out.txt").read_text().strip() == slurm.env["SLURM_CONF"]


def test_a_step_spans_nodes(slurm: Slurm) -> None:
    assert set(slurm.run("srun", "-N2", "printenv", "SLURMD_NODENAME").split()) <= {"n0", "n1", "n2", "n3"}
    assert len(set(slurm.run("srun", "-N2", "printenv", "SLURMD_NODENAME").split())) == 2


def test_every_socket_listens_on_loopback_only(own: Slurm) -> None:
    pids = {f"pid={pid}," for _, pid in own.lab.status().daemons}
    done = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True)
    listening = [line.split()[3] for line in done.stdout.splitlines() if any(pid in line for pid in pids)]
    assert len(listening) == 3
    assert all(address.startswith("127.0.0.1:") for address in listening)


def test_up_again_says_that_it_is_up_and_refuses_other_options(own: Slurm) -> None:
    assert own.lab.up(SMALL) is False
    with pytest.raises(UsageError, match="up with other options"):
        own.lab.up(LabOptions(nodes=1))


def test_status_is_plain_text_for_people(own: Slurm) -> None:
    text = str(own.lab.status())
    assert "n0 idle, n1 idle" in text
    assert "jobs: 0" in text


def test_down_ends_jobs_and_all_that_they_started_and_keeps_logs_only(own: Slurm, tmp_path: Path) -> None:
    detached = "setsid nohup sh -c 'trap : TERM; echo $$ > detached; while :; do sleep 0.1; done' >/dev/null 2>&1 &"
    it = own.submit(job(tmp_path, f"{detached}\nsrun sleep 1000"))
    own.wait_for(lambda: own.job_state(it) == "RUNNING" and (tmp_path / "detached").exists())
    own.wait_for(lambda: bool((tmp_path / "detached").read_text()))
    process = Process.of(int((tmp_path / "detached").read_text()))
    assert process is not None
    assert own.lab.down() is True
    assert not process.alive()
    assert processes_naming(own.lab.root) == []
    assert {path.name for path in own.lab.root.iterdir()} == {"log", ".lab.lock"}
    assert own.lab.down() is False


def test_down_spares_a_shell_that_uses_the_lab(own: Slurm) -> None:
    with subprocess.Popen(["sleep", "100"], env=own.env) as shell:
        own.lab.down()
        assert shell.poll() is None
        shell.kill()


def test_down_after_all_daemons_were_killed_ends_their_jobs(own: Slurm, tmp_path: Path) -> None:
    it = own.submit(job(tmp_path, "echo $$ > pid\nsleep 1000"))
    own.wait_for(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
    assert own.job_state(it) == "RUNNING"
    batch = Process.of(int((tmp_path / "pid").read_text()))
    for name, _ in own.lab.status().daemons:
        own.lab.stop_daemon(name, signal.SIGKILL)
    assert "not running: munged, slurmctld, slurmd-n0, slurmd-n1" in str(own.lab.status())
    own.lab.down()
    assert batch is not None
    assert not batch.alive()


def test_down_ends_a_lab_whose_folder_was_deleted(own: Slurm, tmp_path: Path) -> None:
    it = own.submit(job(tmp_path, "echo $$ > pid\nsleep 1000"))
    own.wait_for(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
    batch = Process.of(int((tmp_path / "pid").read_text()))
    assert own.job_state(it) == "RUNNING"
    shutil.rmtree(own.lab.root)
    own.lab.down()
    assert processes_naming(own.lab.root) == []
    assert batch is not None
    assert not batch.alive()


def test_up_after_a_crash_starts_anew(own: Slurm) -> None:
    for name, _ in own.lab.status().daemons:
        own.lab.stop_daemon(name, signal.SIGKILL)
    assert own.lab.up(SMALL) is True
    assert own.run("squeue", "-h") == ""


def test_a_controller_that_was_killed_comes_back_with_its_jobs(own: Slurm, tmp_path: Path) -> None:
    it = own.submit(job(tmp_path, "while [ ! -e done ]; do sleep 0.1; done; echo finished"))
    own.wait_for_state(it, "RUNNING")
    wait_until_saved(own, it)
    own.lab.stop_daemon("slurmctld", signal.SIGKILL)
    own.lab.start_daemon("slurmctld")
    (tmp_path / "done").touch()
    own.wait_for_state(it, "COMPLETED")
    assert (tmp_path / "out.txt").read_text() == "finished\n"


def wait_until_saved(slurm: Slurm, it: str) -> None:
    """The controller writes its state some seconds after a change; killed before that, it has forgotten."""
    changed = time.time()
    slurm.run("scontrol", "update", f"JobId={it}", "Comment=changed")
    state = slurm.lab.root / "state" / "job_state"
    slurm.wait_for(lambda: state.exists() and state.stat().st_mtime > changed)


def test_a_node_that_was_stopped_comes_back(own: Slurm) -> None:
    own.lab.stop_daemon("slurmd-n1")
    assert own.lab.status().up is False
    own.lab.start_daemon("slurmd-n1")
    assert own.lab.status().up is True
    assert own.run("srun", "-w", "n1", "printenv", "SLURMD_NODENAME") == "n1"


def test_a_requeued_job_runs_again_within_seconds(own: Slurm, tmp_path: Path) -> None:
    it = own.submit(job(tmp_path, "echo run ${SLURM_RESTART_COUNT:-0}; sleep 1000"))
    own.wait_for(lambda: "run 0" in out(tmp_path))
    own.run("scontrol", "requeue", it)
    own.wait_for(lambda: "run 1" in out(tmp_path), 40)


def out(folder: Path) -> str:
    file = folder / "out.txt"
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("mode", ["CANCEL", "SUSPEND"])
def test_a_preempted_job_is_dealt_with_as_the_lab_was_told(
    mode: str, slurm_of: Callable[[LabOptions], Slurm], tmp_path: Path
) -> None:
    slurm = slurm_of(LabOptions(nodes=1, cpus=1, grace_time_s=0, preempt_mode=mode))
    low = slurm.submit(job(tmp_path, "sleep 1000"))
    slurm.wait_for_state(low, "RUNNING")
    high = slurm.submit(job(tmp_path, "sleep 1000"), "-p", "high")
    slurm.wait_for_state(low, "SUSPENDED" if mode == "SUSPEND" else "PREEMPTED")
    slurm.run("scancel", low, high)


def test_a_path_too_long_for_sockets_is_no_hindrance(tmp_path: Path) -> None:
    lab = Lab(tmp_path / ("long" * 30) / "lab")
    lab.up(LabOptions(nodes=1, cpus=1))
    try:
        facts = read_facts(lab.root)
        assert facts is not None
        assert facts.run.stat().st_mode & 0o777 == 0o700
        assert Slurm(lab).run("srun", "printenv", "SLURMD_NODENAME") == "n0"
    finally:
        lab.down()
    assert not facts.run.exists()


def test_a_start_that_fails_shows_the_log_and_leaves_nothing(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "slurmd").write_text("#!/bin/sh\necho no luck today\nexit 1\n")
    (programs / "slurmd").chmod(0o700)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with pytest.raises(OrcError, match=r"slurmd-n0 ended as soon as it was started(.|\n)*no luck today"):
        lab.up(SMALL)
    assert processes_naming(lab.root) == []
    assert lab.status().up is False


def test_a_start_that_is_killed_is_cleared_by_the_next(lab: Lab) -> None:
    code = f"from orchestrator.slurm.lab import *; from pathlib import Path; Lab(Path({str(lab.root)!r})).up()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2]) as starting:
        assert poll(lambda: bool((facts := read_facts(lab.root)) and facts.daemons), 30, every_s=0.001)
        starting.kill()
    assert lab.up(SMALL) is True
    lab.down()
    assert processes_naming(lab.root) == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # xdist's threads do nothing in the child
@pytest.mark.skipif(os.getuid() != 0, reason="the other tests have shown it already")
def test_an_ordinary_user_can_have_a_lab() -> None:
    home = Path(tempfile.mkdtemp(prefix="orc-user-", dir="/tmp"))  # the tests' own folder is closed to others
    os.chown(home, 65534, 65534)
    try:
        pid = os.fork()
        if pid == 0:
            exit_as_nobody(home)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        shutil.rmtree(home)


def exit_as_nobody(home: Path) -> NoReturn:
    try:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.environ["TMPDIR"] = str(home)
        lab = Lab(home / "lab")
        lab.up(SMALL)
        Slurm(lab).wait_for_state(Slurm(lab).submit(job(home, "id -u")), "COMPLETED")
        lab.down()
        assert out(home) == "65534\n"
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.skipif(bool(missing_programs(accounting=True)), reason="no slurmdbd or no MariaDB on this machine")
def test_accounting_remembers_jobs(lab: Lab, tmp_path: Path) -> None:
    lab.up(LabOptions(nodes=1, cpus=1, accounting=True))
    slurm = Slurm(lab)
    it = slurm.submit(job(tmp_path, "true"))
    slurm.wait_for(lambda: "COMPLETED" in slurm.run("sacct", "-n", "-X", "-o", "State", "-j", it))
