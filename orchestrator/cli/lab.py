"""The verbs of `orc lab`: a private Slurm on this machine, started, stopped and looked at."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

if TYPE_CHECKING:
    from typing import Literal, Unpack

    from orchestrator.slurm.lab import Lab

__all__ = ["lab"]


class LabSettings(TypedDict):
    """Options of `orc lab up`."""

    nodes: int
    cpus: int
    preempt_mode: Literal["REQUEUE", "CANCEL", "SUSPEND"]
    grace_time_s: int
    send_user_signal: bool
    accounting: bool


@click.group()
def lab() -> None:
    """Run a private Slurm on this machine.

    A real one, of several nodes, to try things on; the machine's own Slurm is not touched.
    """


_lab_dir = click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    help="The lab's folder (default ~/.cache/orchestrator/lab).",
)


def _lab(folder: Path | None) -> Lab:
    from orchestrator.slurm.lab import Lab, default_root

    return Lab(folder or default_root())


@lab.command()
@_lab_dir
@click.option("--nodes", default=4, show_default=True, help="Number of nodes.")
@click.option("--cpus", default=4, show_default=True, help="Processors that each node claims to have.")
@click.option(
    "--preempt-mode",
    type=click.Choice(["REQUEUE", "CANCEL", "SUSPEND"]),
    default="REQUEUE",
    show_default=True,
    help="What happens to a preempted job.",
)
@click.option("--grace-time", "grace_time_s", default=10, show_default=True, help="GraceTime in seconds.")
@click.option("--send-user-signal", is_flag=True, help="Preempted jobs get the signal of --signal at once.")
@click.option("--accounting", is_flag=True, help="With slurmdbd over MariaDB, so that sacct works.")
def up(folder: Path | None, **options: Unpack[LabSettings]) -> None:
    """Start the lab: munge, slurmctld and several slurmd, in a folder of their own."""
    from orchestrator.slurm.lab import LabOptions

    lab_ = _lab(folder)
    began = lab_.up(LabOptions(**options))
    click.echo("started" if began else "already up", err=True)
    click.echo(str(lab_.status()))
    click.echo(f'try it: eval "$(orc lab env{_lab_argument(folder)})"; sinfo', err=True)


def _lab_argument(folder: Path | None) -> str:
    return f" --dir {shlex.quote(str(folder))}" if folder else ""


@lab.command()
@_lab_dir
def down(folder: Path | None) -> None:
    """Stop the lab and everything that runs in it."""
    click.echo("stopped" if _lab(folder).down() else "was not up", err=True)


@lab.command(name="status")
@_lab_dir
def lab_status(folder: Path | None) -> None:
    """Show whether the lab is up, its nodes and its jobs."""
    click.echo(str(_lab(folder).status()))


@lab.command()
@_lab_dir
def env(folder: Path | None) -> None:
    """Print what a shell needs so that sbatch and squeue talk to the lab; for `eval`."""
    for name, value in _lab(folder).env().items():
        click.echo(f"export {name}={shlex.quote(value)}")
