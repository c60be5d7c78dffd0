"""Starting a lab, and single daemons of it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from orchestrator.core.atomic import write
from orchestrator.core.process import Process, poll, spawn
from orchestrator.core.procfs import boot_id
from orchestrator.errors import OrcError
from orchestrator.slurm.lab.ask import environment
from orchestrator.slurm.lab.config import MARK, LabFiles, LabPlan, database_sql, slurm_conf, slurmdbd_conf
from orchestrator.slurm.lab.daemons import daemon_argv, daemon_names, is_ready
from orchestrator.slurm.lab.facts import LabFacts, write_facts
from orchestrator.slurm.lab.options import LabOptions
from orchestrator.slurm.lab.ports import free_ports
from orchestrator.slurm.lab.programs import find_program, slurm_version

__all__ = ["short_host", "start", "start_daemon"]

_MAX_SOCKET_BYTES = 107
# The longest name that Slurm gives a socket: SPOOL/NODE_JOB.STEP, with a job id and a step id of ten digits.
_LONGEST_SOCKET = "spool/n63/n63_4294967295.4294967295"
_READY_LIMIT_S = 60.0
_TAIL_LINES = 15


def short_host() -> str:
    """Name of this machine as Slurm knows it."""
    return socket.gethostname().partition(".")[0]


def start(root: Path, options: LabOptions) -> None:
    """Start every daemon in the cleared folder `root` and return once all nodes are idle.

    Raises:
        OrcError: a daemon did not start; what started before it still runs, and the facts on disk tell of it.
    """
    facts = LabFacts(
        host=short_host(),
        boot=boot_id(),
        run=_run_folder(root),
        options=options,
        ports=free_ports(3 + options.nodes),
        password=secrets.token_hex(16),
        version=slurm_version(),
        daemons={},
    )
    # Written before anything starts, so that a start that is killed half-way can be cleared by the next command.
    write_facts(root, facts)
    plan = facts.plan(root)
    _write_files(plan)
    for name in daemon_names(options):
        facts = _spawn(facts, plan, name)
        if not name.startswith("slurmd-"):
            _wait_until_ready(plan, name, facts.daemons[name])
    for name, process in facts.daemons.items():
        _wait_until_ready(plan, name, process)


def start_daemon(root: Path, facts: LabFacts, name: str) -> None:
    """Start one daemon again, with the state that it left, and return once it is ready.

    Raises:
        OrcError: it did not start; the text has the end of what it printed.
    """
    plan = facts.plan(root)
    _wait_until_ready(plan, name, _spawn(facts, plan, name).daemons[name])


def _run_folder(root: Path) -> Path:
    run = root / "run"
    if len(os.fsencode(run / _LONGEST_SOCKET)) <= _MAX_SOCKET_BYTES:
        run.mkdir(mode=0o700)
        return run
    return Path(tempfile.mkdtemp(prefix="orc-lab-", dir="/tmp"))


def _write_files(plan: LabPlan) -> None:
    files = plan.files
    shutil.rmtree(files.logs, ignore_errors=True)
    for folder in (files.state, files.logs, files.spool, *(files.spool / name for name in plan.options.node_names)):
        folder.mkdir(mode=0o700)
    write(files.munge_key, secrets.token_bytes(128))
    write(files.slurm_conf, slurm_conf(plan).encode(), mode=0o644)
    for empty in (files.cgroup_conf, files.plugstack_conf):
        write(empty, b"# Empty, so that the system's own file does not count.\n", mode=0o644)
    if plan.options.accounting:
        write(files.slurmdbd_conf, slurmdbd_conf(plan).encode())
        write(files.database_sql, database_sql(plan).encode())
        _make_database(plan)


def _make_database(plan: LabPlan) -> None:
    name = "mariadb-install-db"
    program = find_program(name)
    assert program is not None, "need_programs looks before anything starts"
    plan.files.database.mkdir(mode=0o700)
    argv = [program, "--no-defaults", f"--datadir={plan.files.database}", f"--user={plan.user}", "--skip-test-db"]
    with plan.files.output(name).open("wb") as output:
        done = subprocess.run(argv, stdout=output, stderr=output, check=False, timeout=_READY_LIMIT_S)
    if done.returncode:
        raise _failure(plan.files, name, f"ended with code {done.returncode}")


def _spawn(facts: LabFacts, plan: LabPlan, name: str) -> LabFacts:
    # A clean environment: neither the caller's Slurm variables nor its secrets reach the daemons, and so the jobs.
    env = {"PATH": os.environ.get("PATH", os.defpath), MARK: plan.files.cluster, **environment(plan.files)}
    facts = facts.with_daemon(name, spawn(daemon_argv(plan, name), output=plan.files.output(name), env=env))
    write_facts(plan.files.root, facts)
    return facts


def _wait_until_ready(plan: LabPlan, name: str, process: Process) -> None:
    def settled() -> bool:
        return not process.alive() or is_ready(plan, name)

    if not poll(settled, _READY_LIMIT_S):
        raise _failure(plan.files, name, f"was not ready within {_READY_LIMIT_S:.0f} s")
    if not process.alive():
        raise _failure(plan.files, name, "ended as soon as it was started")


def _failure(files: LabFiles, name: str, what: str) -> OrcError:
    output = files.output(name)
    tail = output.read_text(errors="replace").splitlines()[-_TAIL_LINES:] if output.exists() else []
    return OrcError("\n".join([f"lab: {name} {what}; the end of {output}:", *(f"  {line}" for line in tail)]))
