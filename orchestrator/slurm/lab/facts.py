"""What a lab remembers while it is up: one JSON file, from which any process can act on it."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson

from orchestrator.core.atomic import write
from orchestrator.core.process import Process
from orchestrator.errors import FolderError
from orchestrator.slurm.lab.config import LabFiles, LabPlan
from orchestrator.slurm.lab.options import LabOptions

__all__ = ["LabFacts", "read_facts", "write_facts"]

_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LabFacts:
    """A started lab.

    Args:
        host: short name of the machine.
        boot: boot id at the start.
        run: folder of sockets and spools.
        options: as asked for.
        ports: as in `LabPlan`.
        password: of the accounting database.
        version: Slurm's.
        daemons: the processes, by name, in starting order.
    """

    host: str
    boot: str
    run: Path
    options: LabOptions
    ports: tuple[int, ...]
    password: str
    version: tuple[int, int]
    daemons: Mapping[str, Process]

    def with_daemon(self, name: str, process: Process) -> LabFacts:
        """The same, with a daemon started or started anew."""
        return replace(self, daemons={**self.daemons, name: process})

    def plan(self, root: Path) -> LabPlan:
        """What the configuration is made from."""
        return LabPlan(
            files=LabFiles(root=root, run=self.run),
            options=self.options,
            host=self.host,
            user=pwd.getpwuid(os.getuid()).pw_name,
            memory_mb=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
            ports=self.ports,
            password=self.password,
            version=self.version,
        )


def write_facts(root: Path, facts: LabFacts) -> None:
    """Replace the file, atomically."""
    value = {"schema": _SCHEMA, **asdict(facts), "run": str(facts.run)}
    write(LabFiles(root=root, run=facts.run).facts, orjson.dumps(value, option=orjson.OPT_INDENT_2))


def read_facts(root: Path) -> LabFacts | None:
    """The facts of the lab in `root`; None when it is down.

    Raises:
        FolderError: the file is there but can't be understood.
    """
    file = LabFiles(root=root, run=root).facts
    try:
        value = orjson.loads(file.read_bytes())
        if value.pop("schema") != _SCHEMA:
            raise ValueError("another schema")
        value["run"] = Path(value["run"])
        value["options"] = LabOptions(**value["options"])
        value["ports"] = tuple(value["ports"])
        value["version"] = tuple(value["version"])
        value["daemons"] = {name: Process.from_json(process) for name, process in value["daemons"].items()}
        return LabFacts(**value)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FolderError(
            f"{file}: not what a lab of this version writes ({error}); was it edited, or is it of another version?"
        ) from error
