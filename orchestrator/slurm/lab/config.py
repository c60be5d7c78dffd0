"""A lab's files, and the text of its configuration. Pure: nothing here touches the disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from orchestrator.slurm.lab.options import LabOptions

__all__ = ["DATABASE", "MARK", "LabFiles", "LabPlan", "database_sql", "slurm_conf", "slurmdbd_conf"]

DATABASE = "slurm_acct_db"
# Environment variable by which the daemons of a lab are known; its value is the ClusterName.
MARK = "ORC_LAB_CLUSTER"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabFiles:
    """Every file of a lab.

    Args:
        root: the lab's folder.
        run: folder of sockets and spools; `root / "run"`, or a short one elsewhere when that path is too long for
            a socket.
    """

    root: Path
    run: Path

    @property
    def cluster(self) -> str:
        """ClusterName: every process of its jobs has it in its environment, so it must follow from the folder alone."""
        return f"orclab{hashlib.sha256(bytes(self.root)).hexdigest()[:12]}"

    @property
    def slurm_conf(self) -> Path:
        """What SLURM_CONF names."""
        return self.root / "slurm.conf"

    @property
    def cgroup_conf(self) -> Path:
        """Slurm looks for it beside slurm.conf; empty, so that the system's settings don't count."""
        return self.root / "cgroup.conf"

    @property
    def plugstack_conf(self) -> Path:
        """SPANK plugins; empty, so that the system's don't count."""
        return self.root / "plugstack.conf"

    @property
    def slurmdbd_conf(self) -> Path:
        """Slurm looks for it beside slurm.conf; holds the database's password, so mode 0600."""
        return self.root / "slurmdbd.conf"

    @property
    def munge_key(self) -> Path:
        """The lab's own munge key, mode 0600."""
        return self.root / "munge.key"

    @property
    def state(self) -> Path:
        """State of the controller."""
        return self.root / "state"

    @property
    def database(self) -> Path:
        """MariaDB's data."""
        return self.root / "database"

    @property
    def database_sql(self) -> Path:
        """What MariaDB executes when it starts: the database and its one user; mode 0600."""
        return self.root / "database.sql"

    @property
    def logs(self) -> Path:
        """Logs of the daemons; the only thing that `down` leaves."""
        return self.root / "log"

    def log(self, daemon: str) -> Path:
        """What a daemon logs."""
        return self.logs / f"{daemon}.log"

    def output(self, daemon: str) -> Path:
        """What a daemon prints, also before it has opened its log."""
        return self.logs / f"{daemon}.out"

    @property
    def lock(self) -> Path:
        """Keeps two commands from changing the lab at once, and marks the folder as a lab's."""
        return self.root / ".lab.lock"

    @property
    def facts(self) -> Path:
        """What runs, as JSON; there while the lab is up."""
        return self.root / "lab.json"

    @property
    def munge_socket(self) -> Path:
        """The lab's own munge socket."""
        return self.run / "munge.sock"

    @property
    def spool(self) -> Path:
        """Folder of the slurmds' spools, where every job step has a socket."""
        return self.run / "spool"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabPlan:
    """Everything that the configuration depends on.

    Args:
        files: where things are.
        options: as asked for.
        host: this machine's short name.
        user: who runs the daemons.
        memory_mb: RealMemory of each node, in MiB.
        ports: free TCP ports: slurmctld, slurmdbd, MariaDB, then one a node.
        password: of the accounting database.
        version: Slurm's, such as (22, 5).
    """

    files: LabFiles
    options: LabOptions
    host: str
    user: str
    memory_mb: int
    ports: tuple[int, ...]
    password: str
    version: tuple[int, int]


def slurm_conf(plan: LabPlan) -> str:
    """The text of slurm.conf."""
    sections = (_daemons(plan), _scheduling(plan), _accounting(plan), _nodes(plan), _partitions(plan.options))
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _daemons(plan: LabPlan) -> list[str]:
    files, options = plan.files, plan.options
    return [
        f"ClusterName={files.cluster}",
        f"SlurmctldHost={plan.host}(127.0.0.1)",
        f"SlurmctldPort={plan.ports[0]}",
        f"SlurmUser={plan.user}",
        f"SlurmdUser={plan.user}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={files.munge_socket},cred_expire={options.cred_expire_s}",
        "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
        f"StateSaveLocation={files.state}",
        f"SlurmdSpoolDir={files.spool}/%n",
        f"SlurmctldPidFile={files.run}/slurmctld.pid",
        f"SlurmdPidFile={files.run}/slurmd-%n.pid",
        f"SlurmctldLogFile={files.log('slurmctld')}",
        f"SlurmdLogFile={files.logs}/slurmd-%n.log",
        f"PlugStackConfig={files.plugstack_conf}",
        # Several nodes on one machine claim more processors than it has, and no cgroup may hold them to that.
        "SlurmdParameters=config_overrides",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "MailProg=/bin/true",
        "ReturnToService=2",
        f"SlurmdTimeout={options.slurmd_timeout_s}",
        f"KillWait={options.kill_wait_s}",
        f"MinJobAge={options.min_job_age_s}",
        f"MaxArraySize={options.max_array_size}",
    ]


def _scheduling(plan: LabPlan) -> list[str]:
    options = plan.options
    return [
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "PreemptType=preempt/partition_prio",
        f"PreemptMode={'SUSPEND,GANG' if options.preempt_mode == 'SUSPEND' else options.preempt_mode}",
        "JobRequeue=1",
        *([_user_signal(plan.version)] if options.send_user_signal else []),
    ]


def _user_signal(version: tuple[int, int]) -> str:
    # The switch moved after 22.05, and Slurm refuses to start on a key that it doesn't know.
    old = version <= (22, 5)
    return "SlurmctldParameters=preempt_send_user_signal" if old else "PreemptParameters=send_user_signal"


def _accounting(plan: LabPlan) -> list[str]:
    if not plan.options.accounting:
        return []
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={plan.ports[1]}",
        f"AccountingStoragePass={plan.files.munge_socket}",
        "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherFrequency=5",
    ]


def _nodes(plan: LabPlan) -> list[str]:
    size = f"CPUs={plan.options.cpus} RealMemory={plan.memory_mb} State=UNKNOWN"
    return [
        f"NodeName={name} NodeHostname={plan.host} NodeAddr=127.0.0.1 Port={port} {size}"
        for name, port in zip(plan.options.node_names, plan.ports[3:], strict=True)
    ]


def _partitions(options: LabOptions) -> list[str]:
    suspend = options.preempt_mode == "SUSPEND"
    habits = "OverSubscribe=FORCE:1" if suspend else f"GraceTime={options.grace_time_s}"
    return [
        f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode={options.preempt_mode} {habits}",
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF" + (" OverSubscribe=FORCE:1" if suspend else ""),
    ]


def slurmdbd_conf(plan: LabPlan) -> str:
    """The text of slurmdbd.conf."""
    lines = [
        "DbdHost=localhost",
        "DbdAddr=127.0.0.1",
        f"DbdPort={plan.ports[1]}",
        f"SlurmUser={plan.user}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={plan.files.munge_socket}",
        f"LogFile={plan.files.log('slurmdbd')}",
        f"PidFile={plan.files.run}/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=127.0.0.1",
        f"StoragePort={plan.ports[2]}",
        f"StorageLoc={DATABASE}",
        "StorageUser=slurm",
        f"StoragePass={plan.password}",
    ]
    return "\n".join(lines) + "\n"


def database_sql(plan: LabPlan) -> str:
    """What MariaDB executes when it starts. Statements of an init file stand on one line each."""
    return (
        f"CREATE DATABASE IF NOT EXISTS {DATABASE};\n"
        f"CREATE OR REPLACE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{plan.password}';\n"
        f"GRANT ALL ON {DATABASE}.* TO 'slurm'@'127.0.0.1';\n"
    )
