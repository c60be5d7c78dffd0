"""The lab itself: up, down, status, and single daemons killed and started again."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.errors import OrcError, SlurmUnreachable, UsageError
from orchestrator.slurm.lab.ask import environment, job_ids, node_states
from orchestrator.slurm.lab.clear import clear
from orchestrator.slurm.lab.config import LabFiles
from orchestrator.slurm.lab.daemons import daemon_names
from orchestrator.slurm.lab.facts import LabFacts, read_facts
from orchestrator.slurm.lab.options import LabOptions
from orchestrator.slurm.lab.programs import need_programs
from orchestrator.slurm.lab.start import start, start_daemon

__all__ = ["Lab", "LabStatus", "default_root"]

_LOCK_LIMIT_S = 120.0
# slurm.conf has no quoting, splits at spaces and commas, expands % and ends a line at #.
_SAFE_PATH = re.compile(r"[\w./+@~-]+")


def default_root() -> Path:
    """$ORC_LAB, or ~/.cache/orchestrator/lab."""
    given = os.environ.get("ORC_LAB")
    return Path(given) if given else Path.home() / ".cache" / "orchestrator" / "lab"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabStatus:
    """How a lab is; `str` of it is for people.

    Args:
        root: its folder.
        up: whether all its daemons run.
        options: what it was started with; None when it is down.
        daemons: name and pid of each daemon, None for one that does not run.
        nodes: name and state of each node, in Slurm's word; empty when Slurm does not answer.
        num_jobs: jobs that wait or run, an array counting once; None when Slurm does not answer.
    """

    root: Path
    up: bool
    options: LabOptions | None = None
    daemons: tuple[tuple[str, int | None], ...] = ()
    nodes: tuple[tuple[str, str], ...] = ()
    num_jobs: int | None = None

    def __str__(self) -> str:
        if self.options is None:
            return f"lab {self.root}: down"
        dead = ", ".join(name for name, pid in self.daemons if pid is None)
        lines = [
            f"lab {self.root}: {'up' if self.up else 'broken'}",
            f"  nodes: {', '.join(f'{name} {state}' for name, state in self.nodes) or 'no answer from Slurm'}",
            f"  {self.options.cpus} cpus a node; partition high preempts partition low: {self.options.preempt_mode}",
            f"  jobs: {'unknown' if self.num_jobs is None else self.num_jobs}",
        ]
        return "\n".join(lines + ([f"  not running: {dead}"] if dead else []))


class Lab:
    """The lab in the folder `root`. It holds nothing: any process may make a `Lab` of the same folder and act on it.

    Raises:
        UsageError: the path has characters that mean something else in Slurm's configuration.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        if not _SAFE_PATH.fullmatch(str(self.root)):
            raise UsageError(f"{str(self.root)!r}: the path of a lab may have letters, digits and . _ / + @ ~ - only")

    def up(self, options: LabOptions | None = None) -> bool:
        """Start it and return once every node is idle. False when it was up already.

        What a crash or a reboot has left is cleared first. When starting fails, nothing is left running.

        Raises:
            UsageError: programs are missing (the text says what to install), the folder is not a lab's, or the lab
                is up with other options or on another machine.
            OrcError: a daemon did not start; the text has the end of what it printed.
        """
        options = options or LabOptions()
        need_programs(accounting=options.accounting)
        with self._lock():
            facts = read_facts(self.root)
            if facts is not None and self._runs(facts):
                if facts.options != options:
                    raise UsageError(
                        f"{self.root}: the lab is up with other options; take it down first: {facts.options}"
                    )
                return False
            clear(self.root, facts)
            try:
                start(self.root, options)
            except BaseException:
                clear(self.root, read_facts(self.root))
                raise
        return True

    def down(self) -> bool:
        """Cancel its jobs, end its daemons and what its jobs have left running, remove its files but for the logs.

        False when it was down already.

        Raises:
            UsageError: the lab belongs to another machine, or the folder is not a lab's.
            OrcError: a process of its own would not end; the text names its pid.
        """
        if not self.root.is_dir():
            clear(self.root, None)
            return False
        with self._lock():
            facts = read_facts(self.root)
            clear(self.root, facts)
        return facts is not None

    def status(self) -> LabStatus:
        """How it is now."""
        facts = read_facts(self.root)
        if facts is None:
            return LabStatus(root=self.root, up=False)
        alive = {name: process.pid for name, process in facts.daemons.items() if process.alive()}
        # Without one of these two every question takes Slurm's whole patience.
        answers = {"munged", "slurmctld"} <= alive.keys()
        return LabStatus(
            root=self.root,
            up=self._runs(facts),
            options=facts.options,
            daemons=tuple((name, alive.get(name)) for name in daemon_names(facts.options)),
            nodes=tuple(node_states(self._files).items()) if answers else (),
            num_jobs=len(job_ids(self._files)) if answers else None,
        )

    def env(self) -> dict[str, str]:
        """What a process needs in its environment so that Slurm's commands talk to this lab.

        Raises:
            SlurmUnreachable: the lab is down.
        """
        if read_facts(self.root) is None:
            raise SlurmUnreachable(f"{self.root}: the lab is down; start it with: orc lab up")
        return environment(self._files)

    def stop_daemon(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to one daemon (`munged`, `slurmctld`, `slurmd-n0`, …); if it ends a process, wait until it has.

        Raises:
            UsageError: the lab has no such daemon.
        """
        self._facts_with(name).daemons[name].end(number)

    def start_daemon(self, name: str) -> None:
        """Start a stopped daemon again, with the state that it left; a running one is left alone.

        Raises:
            UsageError: the lab has no such daemon.
            OrcError: it did not start; the text has the end of what it printed.
        """
        with self._lock():
            facts = self._facts_with(name)
            if not facts.daemons[name].alive():
                start_daemon(self.root, facts, name)

    @property
    def _files(self) -> LabFiles:
        return LabFiles(root=self.root, run=self.root / "run")

    def _runs(self, facts: LabFacts) -> bool:
        names = daemon_names(facts.options)
        return all(name in facts.daemons and facts.daemons[name].alive() for name in names)

    def _facts_with(self, name: str) -> LabFacts:
        facts = read_facts(self.root)
        if facts is None or name not in facts.daemons:
            known = ", ".join(facts.daemons) if facts else "none, it is down"
            raise UsageError(f"{self.root}: the lab has no daemon {name!r}; its daemons: {known}")
        return facts

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = self._files.lock
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            # In this order: another command may be making the lab just now, and it makes the lock first.
            if any(self.root.iterdir()) and not lock.exists():
                raise UsageError(f"{self.root}: not empty and not a lab's folder; name another one, or set ORC_LAB")
            with FileLock(lock, timeout=_LOCK_LIMIT_S):
                yield
        except Timeout:
            raise OrcError(
                f"{self.root}: another command has been changing this lab for {_LOCK_LIMIT_S:.0f} s"
            ) from None
        except OSError as error:
            raise OrcError(f"{self.root}: can't be used for a lab: {error.strerror}: {error.filename}") from error
