"""A storm on a lab: faults of every kind, drawn from a seed, one after the other, upon sweeps that are at work.

    storm = Storm(slurm, [Target(bench, sweep, num_trials=6)])
    storm.blow(draw(seed, 20))          the sequence is a function of the seed alone; when things happen is not
    storm.calm()                        whatever is still stopped or down goes on, and nothing is put right beyond that
    as_told(bench, sweep)               what a user does then: what `orc status` says, and no more

What a fault hits is chosen by `pick`, a number in [0, 1), among what is there at that moment. A fault that finds
nothing to hit waits for it, as long as it takes a busy machine to start something.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from subprocess import DEVNULL, TimeoutExpired, run
from typing import ClassVar, TypeVar

from invariants import Memory, counting
from on_lab import Slurm
from on_lab_sweeps import Bench

from orchestrator.core.procfs import process_stat

__all__ = ["Fault", "Storm", "Target", "as_told", "draw"]

_FOR_A_TARGET_S = 60.0
_POLL_S = 0.2

Item = TypeVar("Item")


# What there is to hit


@dataclass(frozen=True, slots=True)
class Target:
    """A sweep at work; its trials end as soon as they are let go, which the storm does one after the other."""

    bench: Bench
    sweep: str
    num_trials: int
    memory: Memory

    @classmethod
    def of(cls, bench: Bench, sweep: str, num_trials: int) -> Target:
        return cls(bench, sweep, num_trials, Memory(bench.paths(sweep)))


@dataclass(frozen=True, slots=True)
class Found:
    """A process of a sweep's job, by what it does there."""

    pid: int
    start_time: int
    role: str
    node: str

    def hit(self, number: signal.Signals) -> bool:
        """Send it a signal; False if it has gone, whoever has its number now."""
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(self.pid)
            try:
                if (stat := process_stat(self.pid)) and stat.start == self.start_time:
                    signal.pidfd_send_signal(handle, number)
                    return True
            finally:
                os.close(handle)
        return False


ROLES = ("launcher", "supervisor", "guardian", "parent", "worker", "program", "reducer")
"""The batch script and srun; what they start; what stands above the next two; what imports the program and forks; its
forks, ranks; their programs."""


def _process(entry: Path, jobs: tuple[str, ...], conf: str) -> Found | None:
    """What a process is that belongs to a job of such a name; None for any other."""
    try:
        words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        lines = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        parent, start_time = map(int, itemgetter(1, 19)(_stat(entry)))
    except (OSError, IndexError):
        return None
    given = {name: value for name, _, value in (line.partition("=") for line in lines)}
    if given.get("SLURM_CONF") != conf or not given.get("SLURM_JOB_NAME", "").startswith(jobs):
        return None
    return Found(int(entry.name), start_time, _role(words, parent), given.get("SLURMD_NODENAME", ""))


def _stat(entry: Path) -> list[str]:
    """Fields of /proc/PID/stat from the third on: the state, the parent, ... (proc(5))."""
    return (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()


def _role(words: list[str], parent: int) -> str:
    program = Path(words[0]).name
    if program in ("srun", "bash", "sh"):
        return "launcher"
    if "orchestrator.supervisor" in words:
        return "supervisor"
    if any("orchestrator.core.guardian" in word for word in words):
        return "guardian"
    if "orchestrator.worker.forkserver" in words:
        stat = process_stat(parent)
        above = _command_line(stat.parent) if stat else b""
        return "worker" if "--fresh" in words or b"orchestrator.worker.forkserver" in above else "parent"
    if {"orchestrator.results.reducer", "orchestrator.worker.reducer_ranks"} & {*words}:
        return "reducer"
    return "program"


def _command_line(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def chosen(items: Sequence[Item], pick: float) -> Item | None:
    return items[int(pick * len(items))] if items else None


# The faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens once, `after_s` seconds after the one before it, to what `pick` chooses."""

    after_s: float
    pick: float
    weight: ClassVar[int] = 1

    @classmethod
    def draw(cls, rng: random.Random, *, after_s: float, pick: float) -> Fault:
        """One of this kind; what it needs besides is drawn, too."""
        return cls(after_s=after_s, pick=pick)

    def strike(self, storm: Storm) -> str:
        """Do it; says to what, or nothing if there was nothing."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill(Fault):
    """SIGKILL for a process of that role, or for any where there is none."""

    role: str
    weight: ClassVar[int] = 12

    @classmethod
    def draw(cls, rng: random.Random, *, after_s: float, pick: float) -> Fault:
        return cls(after_s=after_s, pick=pick, role=rng.choice((*ROLES, "worker", "supervisor")))

    def strike(self, storm: Storm) -> str:
        found = storm.chosen_process(self.role, self.pick)
        return f"{found.role} {found.pid} on {found.node}" if found and found.hit(signal.SIGKILL) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Fault):
    """SIGSTOP for a process of that role or any, SIGCONT after `for_s` seconds: at times more than a lease."""

    role: str
    for_s: float
    weight: ClassVar[int] = 5

    @classmethod
    def draw(cls, rng: random.Random, *, after_s: float, pick: float) -> Fault:
        return cls(after_s=after_s, pick=pick, role=rng.choice(ROLES), for_s=rng.uniform(0.5, 12.0))

    def strike(self, storm: Storm) -> str:
        found = storm.chosen_process(self.role, self.pick)
        if found is None or not found.hit(signal.SIGSTOP):
            return ""
        storm.later(self.for_s, lambda: found.hit(signal.SIGCONT))
        return f"{found.role} {found.pid} on {found.node} for {self.for_s:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseDaemon(Fault):
    """A slurmd is killed and comes back, at times after its node was given up; its jobs' processes run on."""

    for_s: float
    weight: ClassVar[int] = 2

    @classmethod
    def draw(cls, rng: random.Random, *, after_s: float, pick: float) -> Fault:
        return cls(after_s=after_s, pick=pick, for_s=rng.choice((0.5, 3.0, 20.0)))

    def strike(self, storm: Storm) -> str:
        node = storm.chosen_node(self.pick)
        if node is None:
            return ""
        storm.lose(node, self.for_s)
        return f"slurmd-{node} for {self.for_s:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseNode(LoseDaemon):
    """A machine fails: its slurmd and every process of the sweeps on it are killed."""

    weight: ClassVar[int] = 2

    def strike(self, storm: Storm) -> str:
        node = storm.chosen_node(self.pick)
        if node is None:
            return ""
        storm.lose(node, self.for_s)
        hit = [found for found in storm.processes() if found.node == node and found.hit(signal.SIGKILL)]
        return f"{node} for {self.for_s:.1f} s, with {len(hit)} processes"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseController(Fault):
    """The slurmctld is killed, and so forgets its last seconds; it comes back after `for_s` seconds."""

    for_s: float
    weight: ClassVar[int] = 2

    @classmethod
    def draw(cls, rng: random.Random, *, after_s: float, pick: float) -> Fault:
        return cls(after_s=after_s, pick=pick, for_s=rng.uniform(0.0, 4.0))

    def strike(self, storm: Storm) -> str:
        storm.slurm.lab.stop_daemon("slurmctld", signal.SIGKILL)
        time.sleep(self.for_s)
        storm.slurm.lab.start_daemon("slurmctld")
        return f"slurmctld for {self.for_s:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue(Fault):
    """`scontrol requeue`, of an element or of its whole array; or with a hold, as an administrator does."""

    how: str
    weight: ClassVar[int] = 4

    @classmethod
    def draw(cls, rng: random.Random, *, after_s: float, pick: float) -> Fault:
        return cls(after_s=after_s, pick=pick, how=rng.choice(("element", "element", "array", "hold")))

    def strike(self, storm: Storm) -> str:
        job = chosen(storm.jobs("RUNNING"), self.pick)
        if job is None:
            return ""
        name = job.partition("_")[0] if self.how == "array" else job
        verb = "requeuehold" if self.how == "hold" else "requeue"
        return f"{verb} {name}" if storm.ask("scontrol", verb, name) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Fault):
    """`scancel` of an element that runs or waits, or `orc cancel` of a sweep."""

    how: str
    weight: ClassVar[int] = 3

    @classmethod
    def draw(cls, rng: random.Random, *, after_s: float, pick: float) -> Fault:
        return cls(after_s=after_s, pick=pick, how=rng.choice(("scancel", "orc cancel")))

    def strike(self, storm: Storm) -> str:
        if self.how == "scancel":
            job = chosen(storm.jobs(), self.pick)
            return f"scancel {job}" if job and storm.ask("scancel", job) else ""
        target = chosen(storm.targets, self.pick)
        assert target is not None
        done = target.bench.run("cancel", target.sweep)
        assert "Traceback" not in done.stderr
        return f"orc cancel {target.sweep}" if done.returncode == 0 else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempt(Fault):
    """A job of the high partition takes a node for a second."""

    weight: ClassVar[int] = 3

    def strike(self, storm: Storm) -> str:
        node = storm.chosen_node(self.pick)
        script = storm.targets[0].bench.folder / ".urgent.sh"
        script.write_text("#!/bin/sh\nsleep 1\n")
        options = ("-p", "high", "-w", str(node), "--exclusive", "-o", "/dev/null")
        return f"all on {node}" if node and storm.ask("sbatch", *options, str(script)) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Fault):
    """A signal by hand, to the batch script or to the steps: TERM to those is what a careless user sends."""

    how: tuple[str, ...]
    weight: ClassVar[int] = 3

    @classmethod
    def draw(cls, rng: random.Random, *, after_s: float, pick: float) -> Fault:
        ways = (("--batch", "--signal", "TERM"), ("--batch", "--signal", "USR1"), ("--signal", "USR1"))
        return cls(after_s=after_s, pick=pick, how=rng.choice(ways))

    def strike(self, storm: Storm) -> str:
        job = chosen(storm.jobs("RUNNING"), self.pick)
        return f"scancel {' '.join(self.how)} {job}" if job and storm.ask("scancel", *self.how, job) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Impatience(Fault):
    """A user submits or resumes again, whatever runs; by force a second time beside what runs."""

    how: tuple[str, ...]
    weight: ClassVar[int] = 3

    @classmethod
    def draw(cls, rng: random.Random, *, after_s: float, pick: float) -> Fault:
        return cls(after_s=after_s, pick=pick, how=rng.choice((("resume",), ("resume", "--force"), ("submit",))))

    def strike(self, storm: Storm) -> str:
        target = chosen(storm.targets, self.pick)
        assert target is not None
        done = target.bench.run(*self.how, "sweep.yaml" if "submit" in self.how else target.sweep)
        assert "Traceback" not in done.stderr, done.stderr
        return f"orc {' '.join(self.how)} {target.sweep}: {done.returncode}"


KINDS: tuple[type[Fault], ...] = (
    *(Kill, Stop, LoseDaemon, LoseNode, LoseController),
    *(Requeue, Cancel, Preempt, Notice, Impatience),
)


def draw(seed: int, num: int, *, pause_s: float = 3.0) -> list[Fault]:
    """So many faults: a function of the arguments. Pauses between them are of `pause_s` seconds on average."""
    rng = random.Random(seed)
    kinds = rng.choices(KINDS, [kind.weight for kind in KINDS], k=num)
    return [kind.draw(rng, after_s=rng.uniform(0, 2 * pause_s), pick=rng.random()) for kind in kinds]


# The storm


class Storm:
    """Strikes, remembers what is to be undone, and looks between two faults at what must hold at any time.

    Args:
        slurm: the lab; no one else may be on it.
        targets: the sweeps.
        say: hears of each fault.
    """

    def __init__(self, slurm: Slurm, targets: Sequence[Target], say: Callable[[str], object] = print) -> None:
        self.slurm = slurm
        self.targets = targets
        self.counts: Counter[str] = Counter()
        self._say = say
        self._began = time.monotonic()
        self._due: list[tuple[float, Callable[[], object]]] = []
        self._lost: set[str] = set()

    def blow(self, faults: Sequence[Fault]) -> None:
        """All the faults, one after the other; meanwhile, as many of the trials are let go as there is time for."""
        for number, fault in enumerate(faults, 1):
            self._pass(fault.after_s)
            said = self._strike(fault)
            kind = type(fault).__name__
            self.counts[kind if said else "nothing to hit"] += 1
            self._say(f"{time.monotonic() - self._began:6.1f} s  {number:3} {kind:14} {said or 'nothing to hit'}")
            for target in self.targets:
                look(target)
                let_go(target, number * target.num_trials // len(faults))

    def _strike(self, fault: Fault) -> str:
        """Strike as soon as there is something to hit, even if a user must bring it back first."""
        until = time.monotonic() + _FOR_A_TARGET_S
        while not (said := fault.strike(self)) and time.monotonic() < until:
            self._pass(_POLL_S)
            for target in self.targets:
                do_as_told(target.bench, target.sweep)
        return said

    def _pass(self, seconds: float) -> None:
        """Let time pass, and undo what is due."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_S))
            for due, undo in [*takewhile(lambda one: one[0] <= time.monotonic(), sorted(self._due, key=_when))]:
                self._due.remove((due, undo))
                undo()

    def later(self, seconds: float, undo: Callable[[], object]) -> None:
        """Undo something then, or at the end."""
        self._due.append((time.monotonic() + seconds, undo))

    def calm(self) -> None:
        """Undo all, whatever time it was for, and give back the nodes that Slurm has drained."""
        for _, undo in sorted(self._due, key=_when):
            undo()
        self._due.clear()
        for node in self.nodes:
            if "drain" in self.slurm.run("sinfo", "-h", "-n", node, "-o", "%T"):
                self.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")

    # What faults are made of

    @property
    def nodes(self) -> list[str]:
        """All nodes."""
        options = self.slurm.lab.status().options
        return [*options.node_names] if options else []

    def chosen_node(self, pick: float) -> str | None:
        """A node whose slurmd runs and that has processes of the sweeps, or any that runs."""
        up = [node for node in self.nodes if node not in self._lost]
        busy = {found.node for found in self.processes()}
        return chosen([node for node in up if node in busy] or up, pick)

    def processes(self) -> list[Found]:
        """Those of the sweeps' jobs."""
        entries = sorted(
            (entry for entry in Path("/proc").iterdir() if entry.name.isdigit()), key=lambda e: int(e.name)
        )
        jobs, conf = tuple(target.sweep for target in self.targets), self.slurm.env["SLURM_CONF"]
        return [found for entry in entries if (found := _process(entry, jobs, conf))]

    def chosen_process(self, role: str, pick: float) -> Found | None:
        """One of that role, or of any while there is none of it."""
        found = self.processes()
        return chosen([one for one in found if one.role == role] or found, pick)

    def jobs(self, *states: str) -> list[str]:
        """Jobs and array elements of the sweeps that have not ended, as Slurm's commands name them."""
        ids = tuple(target.sweep for target in self.targets)
        rows = (row.split() for row in self._answer("squeue", "-h", "-r", "-o", "%i %j %T").splitlines())
        return [job for job, name, state in rows if name.startswith(ids) and (not states or state in states)]

    def lose(self, node: str, for_s: float) -> None:
        """Kill the slurmd of a node, and start it again later."""
        self._lost.add(node)
        self.slurm.lab.stop_daemon(f"slurmd-{node}", signal.SIGKILL)
        self.later(for_s, lambda: self._restore(node))

    def _restore(self, node: str) -> None:
        self.slurm.lab.start_daemon(f"slurmd-{node}")
        self._lost.discard(node)

    def ask(self, *argv: str) -> bool:
        """Whether one of Slurm's commands did what it was asked for: what it is about may have just ended."""
        with suppress(TimeoutExpired):
            return (
                run(argv, env=self.slurm.env, stdout=DEVNULL, stderr=DEVNULL, check=False, timeout=60).returncode == 0
            )
        return False

    def _answer(self, *argv: str) -> str:
        return run(argv, env=self.slurm.env, capture_output=True, text=True, check=False, timeout=60).stdout


def _when(one: tuple[float, Callable[[], object]]) -> float:
    return one[0]


def look(target: Target) -> None:
    """What must hold at any time: no record is lost, and no summary calls a sweep done that isn't."""
    target.memory.look()
    paths = target.bench.paths(target.sweep)
    # In this order, since there are ever more records: what is missing at last was missing at first.
    said = json.loads(paths.summary.read_bytes())["missing"] if paths.summary.exists() else None
    assert said is None or said >= target.num_trials - len(counting(paths))


def let_go(target: Target, num_trials: int) -> None:
    """The first trials need not stay any more."""
    for trial in range(num_trials):
        (target.bench.folder / f"go{trial}").touch()


# The user


def do_as_told(bench: Bench, sweep: str) -> list[str]:
    """Run the commands that `orc status` names for what stands still; those for failed trials are not for these."""
    said = bench.run("status", sweep)
    assert "Traceback" not in said.stderr, said.stderr
    found = [command for command in re.findall(r"`([^`]+)`", said.stdout) if _goes_on(command)]
    for command in found:
        program, *arguments = command.split()
        if program == "orc":
            done = bench.run(*arguments)
            assert "Traceback" not in done.stderr, done.stderr
        else:
            run([program, *arguments], env=bench.slurm.env, stdout=DEVNULL, stderr=DEVNULL, check=False, timeout=60)
    return found


def _goes_on(command: str) -> bool:
    return command.startswith(("orc resume", "scontrol")) and "--failed" not in command


def as_told(bench: Bench, sweep: str, *, limit_s: float = 300.0) -> Iterator[str]:
    """What a user does until the sweep is done: what `orc status` says, again and again; yields the commands.

    Where that doesn't help within `limit_s`, status has not said what would.
    """
    until = time.monotonic() + limit_s
    while not (bench.is_reduced(sweep) and not bench.jobs(sweep)):
        assert time.monotonic() < until, (
            f"not done after {limit_s:.0f} s of doing as told:\n{bench.orc('status', sweep)}"
        )
        yield from do_as_told(bench, sweep)
        time.sleep(_POLL_S)
