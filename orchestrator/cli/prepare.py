"""From a sweep file to what can be handed over: spec, snapshot of the code, plan; checked, and nothing written yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.config import load, signatures
from orchestrator.config import program as job
from orchestrator.config import snapshot as code
from orchestrator.config.plan import SweepPlan
from orchestrator.config.spec import SweepSpec
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import ProgramError
from orchestrator.slurm import sweep_folder

__all__ = ["PreparedSweep", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSweep:
    """A sweep that is read and checked.

    Args:
        plan: its trials; `plan.spec.program` is relative to the snapshot.
        snapshot: the code.
        sweep_file: the sweep file's bytes as given.
        root: the folder that the snapshot was taken of.
    """

    plan: SweepPlan
    snapshot: code.Snapshot
    sweep_file: bytes
    root: Path

    def check_program(self) -> None:
        """Import the program in a process of its own, with the sweep's time limit.

        Raises:
            ProgramError: it can't be imported; carries its own error.
        """
        spec = self.plan.spec
        if spec.program is not None and spec.command is None:
            job.check(self.root, spec.program, timeout_s=spec.launch.import_timeout_s)

    def store(self, runs: Path) -> SweepPaths:
        """The sweep's folder, made whole or found whole.

        Raises:
            FolderError: `runs` is not writable, or the folder is somebody else's.
        """
        return sweep_folder.prepare(self.plan, self.snapshot, self.sweep_file, runs)


def read(path: Path, overrides: list[str], *, runs: Path) -> PreparedSweep:
    """Read a sweep file and the code that it names.

    Args:
        path: the sweep file.
        overrides: `key=value` arguments.
        runs: the folder of sweeps, which is left out of the snapshot.

    Raises:
        SweepFileError: every problem of file and arguments.
        ProgramError: no such program, or its signatures don't take the parameters.
        UsageError: the snapshot is too large.
    """
    spec = load.read(path, overrides)
    base = path.absolute().parent
    file = _program_file(spec, base)
    snapshot = code.survey(file, base, exclude=[runs.absolute(), path.absolute()], command=spec.command or ())
    packed_by: tuple[str, ...] = ()
    if spec.command is None and spec.program is not None:
        found = signatures.check(spec.program, spec.parameters.keys(), base)
        packed_by = _packed_by(spec, found)
    if file is not None and spec.program is not None:
        _, colon, function = spec.program.partition(":")
        spec = replace(spec, program=f"{snapshot.program}{colon}{function}")
    return PreparedSweep(
        plan=SweepPlan(spec=spec, code=snapshot.digest, packed_by=packed_by),
        snapshot=snapshot,
        sweep_file=path.read_bytes(),
        root=snapshot.root,
    )


def _packed_by(spec: SweepSpec, found: signatures.Signatures | None) -> tuple[str, ...]:
    """The parameters of which trials in a pack must have equal values: `train` is called once for all of them."""
    if spec.launch.pack == 1:
        return ()
    if found is None:
        raise ProgramError(
            f"launch.pack: {spec.launch.pack} needs to know what train takes, which can't be read from the source of "
            f"{spec.program}: define it there by a plain def, or set launch.pack: 1"
        )
    return tuple(name for name in spec.parameters if found.train.takes(name))


def _program_file(spec: SweepSpec, base: Path) -> Path | None:
    """The program's file; None for a function of a package, or a command without one."""
    target = (spec.program or "").partition(":")[0]
    if not target.endswith(".py"):
        return None
    path = base / target
    if not path.is_file():
        raise ProgramError(f"program: {path}: no such file; a program is named relative to its sweep file")
    return path
