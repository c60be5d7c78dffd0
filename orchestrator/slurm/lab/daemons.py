"""The daemons of a lab: what each is started with, in the order in which they need each other, and when it is ready."""

from __future__ import annotations

from orchestrator.slurm.lab.ask import node_states
from orchestrator.slurm.lab.config import LabPlan
from orchestrator.slurm.lab.options import LabOptions
from orchestrator.slurm.lab.ports import answers
from orchestrator.slurm.lab.programs import find_program

__all__ = ["daemon_argv", "daemon_names", "is_ready"]

_SLURMD = "slurmd-"


def daemon_names(options: LabOptions) -> tuple[str, ...]:
    """Every daemon, in starting order: each needs only those before it."""
    accounting = ("mariadbd", "slurmdbd") if options.accounting else ()
    return ("munged", *accounting, "slurmctld", *(f"{_SLURMD}{node}" for node in options.node_names))


def daemon_argv(plan: LabPlan, name: str) -> list[str]:
    """Command line of a daemon. All stay in the foreground, so that their pids are known."""
    conf = str(plan.files.slurm_conf)
    if name == "munged":
        return _munged(plan)
    if name == "mariadbd":
        return _mariadbd(plan)
    if name == "slurmdbd":
        return [_program("slurmdbd"), "-D"]
    if name == "slurmctld":
        return [_program("slurmctld"), "-D", "-f", conf]
    return [_program("slurmd"), "-D", "-f", conf, "-N", name.removeprefix(_SLURMD)]


def _program(name: str) -> str:
    path = find_program(name)
    assert path is not None, "need_programs looks before anything starts"
    return path


def _munged(plan: LabPlan) -> list[str]:
    files = plan.files
    return [
        _program("munged"),
        "--foreground",
        # The folders are private; munged would rather that everyone could reach its socket.
        "--force",
        f"--key-file={files.munge_key}",
        f"--socket={files.munge_socket}",
        f"--pid-file={files.run / 'munged.pid'}",
        f"--seed-file={files.run / 'munged.seed'}",
        f"--log-file={files.log('munged')}",
    ]


def _mariadbd(plan: LabPlan) -> list[str]:
    files = plan.files
    return [
        _program("mariadbd"),
        "--no-defaults",
        f"--user={plan.user}",
        f"--datadir={files.database}",
        f"--socket={files.run / 'mariadb.sock'}",
        f"--pid-file={files.run / 'mariadbd.pid'}",
        "--bind-address=127.0.0.1",
        f"--port={plan.ports[2]}",
        f"--init-file={files.database_sql}",
        "--innodb-buffer-pool-size=64M",
        "--innodb-lock-wait-timeout=900",
        "--skip-log-bin",
    ]


def is_ready(plan: LabPlan, name: str) -> bool:
    """Whether a started daemon does its work."""
    if name == "munged":
        return plan.files.munge_socket.exists()
    if not name.startswith(_SLURMD):
        ports = {"slurmctld": plan.ports[0], "slurmdbd": plan.ports[1], "mariadbd": plan.ports[2]}
        return answers(ports[name])
    state = node_states(plan.files).get(name.removeprefix(_SLURMD))
    return state in ("idle", "mixed", "allocated", "completing")
