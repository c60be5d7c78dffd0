"""The lab without its daemons: options, configuration, ports, processes, and what it refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.core.process import Process, poll, processes_with, processes_writing, spawn
from orchestrator.errors import FolderError, OrcError, SlurmUnreachable, UsageError
from orchestrator.slurm.lab import Lab, LabOptions, default_root, missing_programs
from orchestrator.slurm.lab.config import LabFiles, LabPlan, slurm_conf, slurmdbd_conf
from orchestrator.slurm.lab.facts import LabFacts, read_facts, write_facts
from orchestrator.slurm.lab.ports import answers, free_ports

ROOT = Path("/lab")


def plan(*, version: tuple[int, int] = (22, 5), **options: object) -> LabPlan:
    asked = LabOptions(nodes=2, cpus=3, **options)  # type: ignore[arg-type]
    return LabPlan(
        files=LabFiles(root=ROOT, run=ROOT / "run"),
        options=asked,
        host="here",
        user="ada",
        memory_mb=1000,
        ports=(1, 2, 3, 4, 5),
        password="secret",
        version=version,
    )


def settings(text: str) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in text.splitlines() if line)


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 0}, "nodes is 0, but must be at least 1"),
        ({"nodes": 65}, "nodes is 65, but one machine takes at most 64"),
        ({"cpus": 0}, "cpus is 0"),
        ({"grace_time_s": -1}, "grace_time_s is -1"),
        ({"cred_expire_s": 4}, "cred_expire_s is 4, but must be at least 5"),
        ({"preempt_mode": "STOP"}, "preempt_mode is 'STOP', but must be REQUEUE, CANCEL or SUSPEND"),
    ],
)
def test_an_option_out_of_range_is_named_with_what_is_allowed(options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LabOptions(**options)  # type: ignore[arg-type]


def test_nothing_of_the_system_is_named_in_the_configuration() -> None:
    values = [value for value in settings(slurm_conf(plan())).values() if "/" in value]
    paths = [word.partition("=")[2] or word for value in values for word in value.split(",")]
    allowed = (
        "/lab/",
        "/bin/true",
        "auth/",
        "sched/",
        "select/",
        "preempt/",
        "proctrack/",
        "task/",
        "cred_expire",
        "5",
    )
    assert [path for path in paths if not path.startswith(allowed)] == []


def test_every_node_has_a_port_and_both_partitions_have_every_node() -> None:
    text = slurm_conf(plan())
    assert [line.split()[3] for line in lines(text, "NodeName=")] == ["Port=4", "Port=5"]
    assert [line.split()[:2] for line in lines(text, "PartitionName=")] == [
        ["PartitionName=low", "Nodes=ALL"],
        ["PartitionName=high", "Nodes=ALL"],
    ]


@pytest.mark.parametrize(
    ("mode", "cluster", "low"),
    [
        ("REQUEUE", "REQUEUE", "PreemptMode=REQUEUE GraceTime=10"),
        ("CANCEL", "CANCEL", "PreemptMode=CANCEL GraceTime=10"),
        ("SUSPEND", "SUSPEND,GANG", "PreemptMode=SUSPEND OverSubscribe=FORCE:1"),
    ],
)
def test_a_preempt_mode_brings_the_settings_it_needs(mode: str, cluster: str, low: str) -> None:
    text = slurm_conf(plan(preempt_mode=mode))
    assert settings(text)["PreemptMode"] == cluster
    assert lines(text, "PartitionName=low")[0].endswith(low)


@pytest.mark.parametrize(
    ("version", "line"),
    [((22, 5), "SlurmctldParameters=preempt_send_user_signal"), ((23, 2), "PreemptParameters=send_user_signal")],
)
def test_user_signals_are_asked_for_in_the_words_of_the_release(version: tuple[int, int], line: str) -> None:
    assert line in slurm_conf(plan(version=version, send_user_signal=True)).splitlines()
    assert line not in slurm_conf(plan(version=version)).splitlines()


def test_only_accounting_brings_a_database() -> None:
    assert "slurmdbd" not in slurm_conf(plan())
    assert settings(slurm_conf(plan(accounting=True)))["AccountingStoragePort"] == "2"
    assert settings(slurmdbd_conf(plan(accounting=True)))["StoragePort"] == "3"


def test_free_ports_are_free_different_and_out_of_the_way_of_outgoing_connections() -> None:
    ports = free_ports(20)
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == 20
    assert max(ports) < lowest_outgoing
    with socket.create_server(("127.0.0.1", ports[0])):
        assert answers(ports[0])
    assert not answers(ports[1])


def sleeper(folder: Path, *, env: dict[str, str] | None = None) -> Process:
    code = "import time; print('up', flush=True); time.sleep(100)"
    return spawn([sys.executable, "-c", code], output=folder / "out", env=env or {})


def test_a_spawned_process_lives_in_a_session_of_its_own_until_it_is_ended(tmp_path: Path) -> None:
    process = sleeper(tmp_path)
    assert os.getsid(process.pid) == process.pid
    assert poll(lambda: (tmp_path / "out").read_text() == "up\n", 10)
    process.end(limit_s=10)
    assert not process.alive()


def test_a_spawned_process_inherits_no_open_file_and_no_ignored_signal(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = sleeper(tmp_path)
    signal.signal(signal.SIGINT, old)
    os.close(write)
    assert poll(lambda: (tmp_path / "out").read_text() == "up\n", 10)
    assert os.read(read, 1) == b""  # nobody else holds the other end
    os.close(read)
    process.end(signal.SIGINT, limit_s=10)
    assert not process.alive()


def test_another_process_under_the_same_pid_is_not_touched(tmp_path: Path) -> None:
    process = sleeper(tmp_path)
    for other in (replace(process, start_time=process.start_time + 1), replace(process, boot_id="another")):
        assert not other.alive()
        other.end(signal.SIGKILL)
    assert process.alive()
    process.end(signal.SIGKILL)


def test_processes_are_found_by_environment_and_by_open_file(tmp_path: Path) -> None:
    process = sleeper(tmp_path, env={"MARK": "xyz"})
    assert poll(lambda: list(processes_with({b"MARK=xyz"})) == [process], 10)
    assert process in processes_writing(tmp_path, program="python")
    assert process not in processes_writing(tmp_path, program="slurm")
    process.end()
    assert list(processes_with({b"MARK=xyz"})) == []


def test_a_process_never_finds_itself_or_its_ancestors() -> None:
    code = (
        "import subprocess, sys; from orchestrator.core.process import processes_with; "
        "print(len(list(processes_with({b'MARK=self'}))))"
    )
    shell = f'{sys.executable} -c "{code}"; true'
    env = {**os.environ, "MARK": "self", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["sh", "-c", shell], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


FACTS = LabFacts(
    host="here",
    boot="b",
    run=Path("/short"),
    options=LabOptions(nodes=2),
    ports=(1, 2, 3, 4, 5),
    password="secret",
    version=(22, 5),
    daemons={"munged": Process(pid=1, start_time=2, boot_id="b", host="h")},
)


def test_facts_come_back_as_they_were_written_and_are_private(tmp_path: Path) -> None:
    write_facts(tmp_path, FACTS)
    assert read_facts(tmp_path) == FACTS
    assert (tmp_path / "lab.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1}'])
def test_facts_that_make_no_sense_are_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "lab.json").write_text(text)
    with pytest.raises(FolderError, match=r"lab\.json"):
        read_facts(tmp_path)


def test_missing_programs_are_named_with_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("orchestrator.slurm.lab.programs._SYSTEM_FOLDERS", "/nowhere")
    with pytest.raises(UsageError, match=r"munged, slurmctld, (.*)apt-get install munge slurm-wlm$"):
        Lab(tmp_path / "lab").up()
    packages = "mariadb-client mariadb-server-core munge slurm-wlm slurmdbd"
    with pytest.raises(UsageError, match=rf"apt-get install {packages}$"):
        Lab(tmp_path / "lab").up(LabOptions(accounting=True))
    assert not (tmp_path / "lab").exists()


@pytest.mark.skipif(bool(missing_programs()), reason="Slurm is looked for before the folder is")
def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "thesis").write_text("mine")
    for act in (Lab(tmp_path).up, Lab(tmp_path).down):
        with pytest.raises(UsageError, match="not empty and not a lab's folder"):
            act()
    assert (tmp_path / "state" / "thesis").read_text() == "mine"


def test_a_folder_that_another_command_makes_a_lab_at_that_moment_is_a_lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Path.iterdir

    def late(folder: Path) -> Iterator[Path]:
        if folder == tmp_path / "lab":
            (folder / ".lab.lock").touch()
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", late)
    (tmp_path / "lab").mkdir()
    assert Lab(tmp_path / "lab").down() is False


@pytest.mark.parametrize("name", ["two words", "50%", "a,b", "#1", "a=b", 'quo"te', "new\nline", "back\\slash"])
def test_a_path_that_slurm_cannot_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="letters, digits and"):
        Lab(tmp_path / name)


def test_a_lab_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".lab.lock").touch()
    write_facts(tmp_path, FACTS)
    with pytest.raises(UsageError, match="belongs to machine here"):
        Lab(tmp_path).down()
    assert read_facts(tmp_path) == FACTS


def test_a_lab_that_is_down_says_so(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab")
    assert str(lab.status()) == f"lab {tmp_path}/lab: down"
    assert lab.down() is False
    with pytest.raises(SlurmUnreachable, match="orc lab up"):
        lab.env()
    with pytest.raises(UsageError, match="no daemon 'slurmctld'"):
        lab.stop_daemon("slurmctld")
    assert not lab.root.exists()


def test_a_root_that_cannot_be_a_folder_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OrcError, match="can't be used for a lab"):
        Lab(tmp_path / "file" / "lab").start_daemon("munged")


def test_the_default_folder_is_in_the_cache_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORC_LAB", "/elsewhere")
    assert default_root() == Path("/elsewhere")
    monkeypatch.delenv("ORC_LAB")
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_root() == Path("/home/ada/.cache/orchestrator/lab")
