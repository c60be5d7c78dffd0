"""The command line: parse, call, print.

Data goes to stdout, progress and remarks to stderr. Exit codes: 0 fine, 1 our fault, 2 bad usage or configuration, 3
nothing matched, 4 some trials failed or are missing, 5 Slurm unreachable, 75 preempted or interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator import __version__
from orchestrator.cli.lab import lab
from orchestrator.errors import OrcError, Preempted, SweepFileError, TrialsFailed

if TYPE_CHECKING:
    from typing import Literal

    from orchestrator.cli.prepare import PreparedSweep
    from orchestrator.core.atomic import Json
    from orchestrator.slurm.ledger import SubmissionPart
    from orchestrator.slurm.submit import Receipt
    from orchestrator.sweep import Sweep

__all__ = ["cli", "main"]


def _print_json(value: Json) -> None:
    import orjson

    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _say(text: str) -> None:
    click.echo(text, err=True)


def _runs(folder: Path | None) -> Path:
    from orchestrator.sweep import default_runs

    return folder.absolute() if folder else default_runs()


def _open(name: str | None, folder: Path | None) -> Sweep:
    from orchestrator.slurm import leftovers
    from orchestrator.sweep import Sweep

    sweep = Sweep.open(name, runs=_runs(folder))
    leftovers.end(sweep.paths, _say)
    return sweep


_dir = click.option(
    "--dir",
    "folder",
    is_eager=True,
    type=click.Path(path_type=Path),
    help="Where sweeps live (default ./runs, or $ORC_DIR).",
)


def _complete(context: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """Ids of sweeps that begin so, for the shell."""
    from orchestrator.sweep import ids

    return [name for name in ids(_runs(context.params.get("folder"))) if name.startswith(begun)]


_sweep = click.argument("sweep", required=False, shell_complete=_complete)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, with stable keys.")
_file = click.argument("sweep_file", type=click.Path(path_type=Path))
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_watch = click.option(
    "--watch", is_flag=True, help="Stay, with progress, submit what is lost again, and end with the best trials."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="orc")
def cli() -> None:
    """Sweeps on Slurm, or on this machine, that cannot lose or double-count a trial.

    SWEEP is a name, an id or a folder; the newest sweep by default.
    """


# Starting


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path())
@click.option("--job", default="digits_mlp", show_default=True, help="Which of the example jobs.")
def init(folder: Path, job: str) -> None:
    """Copy an example job and its sweep file.

    FOLDER (default: this one) gets two files, to try and to change; none that is there already is touched.
    """
    from orchestrator.cli import init as examples

    for path in examples.copy(job, folder):
        click.echo(path)
    _say(f"try it: orc run {shlex.quote(str(folder / job))}.yaml run_cap=20")


@cli.command()
@_file
@_overrides
@_dir
@click.option(
    "--workers", type=click.IntRange(min=1), help="Trials at the same time (default: as many as the cores allow)."
)
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="How many trials to show.")
def run(sweep_file: Path, overrides: tuple[str, ...], folder: Path | None, workers: int | None, top: int) -> None:
    """Run a sweep on this machine, to the best trials.

    KEY=VALUE goes over what the sweep file says: run_cap=20, parameters.lr.max=0.1, launch.cpus=2. Interrupted by
    Ctrl-C or killed, the same command goes on where it stopped.
    """
    from orchestrator.cli import prepare
    from orchestrator.cli import run as running

    runs = _runs(folder)
    taken = prepare.read(sweep_file, list(overrides), runs=runs)
    sweep = running.run(taken, runs, workers=workers)
    _show_results(sweep, top)
    _fail_if_missing(sweep, "the same command goes on")
    _fail_if_failed(sweep)


def _show_results(sweep: Sweep, top: int) -> None:
    from orchestrator.cli import tables

    click.echo(tables.summary(sweep))
    click.echo(tables.times(sweep))
    ranked = sweep.best(top)
    if ranked:
        click.echo(f"best of {sweep.id}:")
        click.echo(tables.best(ranked, sweep.plan.spec.metric.name))


def _fail_if_missing(sweep: Sweep, remedy: str) -> None:
    from orchestrator.cli.tables import plural

    if sweep.fold.num_missing:
        raise TrialsFailed(f"{sweep.id}: {plural(sweep.fold.num_missing, 'trial')} without an outcome; {remedy}")


def _fail_if_failed(sweep: Sweep) -> None:
    from orchestrator.cli.tables import plural

    failures = sweep.failures()
    if failures:
        lines = [f"{plural(number, 'trial')} failed: {text} (first: trial {index})" for text, index, number in failures]
        remedies = [
            f"`orc logs {failures[0][1]} {sweep.id}` shows what one printed,",
            f"`orc resume --failed {sweep.id}` runs them again",
        ]
        raise TrialsFailed("\n".join([*lines, *remedies]))


@cli.command()
@_file
@_overrides
@_dir
@_json
@click.option("--scripts", is_flag=True, help="Print the sbatch scripts.")
def plan(sweep_file: Path, overrides: tuple[str, ...], folder: Path | None, as_json: bool, scripts: bool) -> None:
    """Show what a sweep would do; write and submit nothing."""
    from orchestrator.cli import plan as preview
    from orchestrator.cli import prepare

    taken = prepare.read(sweep_file, list(overrides), runs=_runs(folder))
    if scripts:
        click.echo(preview.scripts(taken, _runs(folder)), nl=False)
    elif as_json:
        _print_json(preview.as_json(taken))
    else:
        click.echo(preview.text(taken))


@cli.command()
@_file
@_overrides
@_dir
@click.option("--on", type=click.Choice(["slurm", "local"]), default="slurm", show_default=True, help="Where.")
@click.option("--workers", type=click.IntRange(min=1), help="Workers at most.")
@click.option("--test-only", is_flag=True, help="Ask sbatch whether it would take the scripts; submit nothing.")
@_watch
def submit(
    sweep_file: Path,
    overrides: tuple[str, ...],
    folder: Path | None,
    on: Literal["slurm", "local"],
    workers: int | None,
    test_only: bool,
    watch: bool,
) -> None:
    """Hand a sweep to Slurm and return at once.

    Submitting twice submits once; a submission that was cut off is completed. With --on local the workers are
    processes of this machine, which stay when you log out.
    """
    from orchestrator.cli import prepare
    from orchestrator.cli import run as running

    runs = _runs(folder)
    taken = prepare.read(sweep_file, list(overrides), runs=runs)
    if test_only:
        return _test_only(taken, runs, workers)
    sweep, receipt = running.hand_over(taken, runs, on=on, workers=workers)
    _show_receipt(sweep.id, receipt)
    if watch:
        running.follow(sweep, workers=workers)
        _show_end(sweep)
    return None


def _show_end(sweep: Sweep) -> None:
    _show_results(sweep, top=3)
    _fail_if_missing(sweep, f"`orc resume {sweep.id}` goes on")
    _fail_if_failed(sweep)


def _test_only(taken: PreparedSweep, runs: Path, workers: int | None) -> None:
    from orchestrator.core.paths import SweepPaths
    from orchestrator.slurm import submit as handing

    taken.check_program()
    for line in handing.check(SweepPaths(runs / taken.plan.id), taken.plan, workers=workers):
        click.echo(line)


def _part(part: SubmissionPart) -> str:
    if part.process is not None:
        return f"process {part.process.pid} on {part.process.host}"
    return f"{part.what} {part.job or ''}".rstrip()


def _show_receipt(sweep_id: str, receipt: Receipt) -> None:
    for note in receipt.notes:
        _say(note)
    for job in receipt.alive:
        _say(f"still there: {job.what} {job.job} {job.state} {job.reason}".rstrip())
    if receipt.submission is not None:
        how = "already submitted" if receipt.already else "submitted"
        parts = [_part(part) for part in receipt.submission.parts]
        _say(f"{how}: {', '.join(parts)}")
    click.echo(sweep_id)


# Reading


@cli.command()
@_sweep
@_dir
@_json
def status(sweep: str | None, folder: Path | None, as_json: bool) -> None:
    """Show where a sweep stands.

    Trials, retries and failures with their causes, jobs, and the command that helps.
    """
    from orchestrator.cli import tables

    found = _open(sweep, folder)
    standing = found.standing()
    if as_json:
        _print_json(tables.standing_json(found, standing))
    else:
        click.echo(tables.standing(found, standing))


@cli.command()
@_sweep
@_dir
@_json
@click.option("--by", multiple=True, metavar="PARAM", help="For each value of a parameter; may be repeated.")
@click.option("--curve", metavar="METRIC", help="A metric by step, over the trials that reported it.")
def summary(sweep: str | None, folder: Path | None, as_json: bool, by: tuple[str, ...], curve: str | None) -> None:
    """Show count, mean, spread and quantiles.

    They are of the objective, over all complete trials; with --by, over those of each value of a parameter (a nested
    one by dotted path), or of each of ten ranges where it is drawn from one. With --curve, they are of any metric, step
    by step.
    """
    from orchestrator.cli import tables

    found = _open(sweep, folder)
    if curve is not None:
        _show_curves(found, curve, by, as_json)
    elif as_json:
        _print_json(found.summary(by=by or None))
    else:
        click.echo(tables.effects(found, found.effects(by)) if by else tables.summary(found))


def _show_curves(sweep: Sweep, metric: str, by: tuple[str, ...], as_json: bool) -> None:
    from orchestrator.cli import tables

    found = sweep.curve(metric, by)
    if as_json:
        names: list[Json] = [*found[0].values]
        curves: list[Json] = [one.to_json() for one in found]
        _print_json({"schema": 1, "sweep": sweep.id, "metric": metric, "by": names, "curves": curves})
    else:
        click.echo(tables.curves(metric, found))


@cli.command()
@_sweep
@_dir
@_json
@click.option("--top", type=click.IntRange(min=1), default=1, show_default=True, help="How many trials.")
def best(sweep: str | None, folder: Path | None, as_json: bool, top: int) -> None:
    """Show the best trials, with parameters and model."""
    from orchestrator.cli import tables
    from orchestrator.errors import NothingMatched

    found = _open(sweep, folder)
    ranked = found.best(top)
    if as_json:
        _print_json([one.to_json() for one in ranked])
    if not ranked:
        raise NothingMatched(f"{found.id}: no trial is complete yet; `orc status {found.id}` shows where it stands")
    if not as_json:
        click.echo(tables.best(ranked, found.plan.spec.metric.name))


@cli.command()
@click.argument("trial")
@_sweep
@_dir
@click.option("-f", "--follow", is_flag=True, help="Go on printing until the trial has an outcome.")
def logs(trial: str, sweep: str | None, folder: Path | None, follow: bool) -> None:
    """Show what a trial printed.

    TRIAL is an index or an id. All attempts are shown, each between marks, with the name of its log file.
    """
    from orchestrator.cli import logs as reading

    found = _open(sweep, folder)
    reading.show(found, found.trial(trial), follow=follow, write=lambda text: click.echo(text, nl=False))


# Going on and ending


@cli.command()
@_sweep
@_dir
@click.option("--failed", is_flag=True, help="Run failed trials again, too.")
@click.option("--set", "settings", multiple=True, metavar="slurm.KEY=VALUE", help="Other sbatch options from now on.")
@click.option("--on", type=click.Choice(["slurm", "local"]), help="Where (default: as before).")
@click.option("--workers", type=click.IntRange(min=1), help="Workers at most.")
@click.option("--force", is_flag=True, help="Even beside something that is alive, or may be on another machine.")
@_watch
def resume(
    sweep: str | None,
    folder: Path | None,
    failed: bool,
    settings: tuple[str, ...],
    on: Literal["slurm", "local"] | None,
    workers: int | None,
    force: bool,
    watch: bool,
) -> None:
    """Submit exactly what is missing.

    Harmless while jobs still run, and any number of times. Jobs that wait because they were requeued are started. Of a
    process on another machine it waits for a word, as long as launch.lease_s says, before it takes over; --force takes
    over at once.
    """
    from orchestrator.cli import run as running

    found = _open(sweep, folder)
    receipt = running.resume(found, failed=failed, settings=list(settings), on=on, workers=workers, force=force)
    if receipt is None:
        _say(f"{found.id}: nothing is missing")
        click.echo(found.id)
        return
    _show_receipt(found.id, receipt)
    if watch:
        # Beside what is still there, failed trials were not handed over again.
        retries = failed and not receipt.already
        running.follow(found, workers=workers, settings=list(settings), failed=retries)
        _show_end(found)
    elif receipt.alive and receipt.already:
        raise TrialsFailed(f"{found.id}: nothing new was handed over, beside what is still there; --force does it")


@cli.command()
@_sweep
@_dir
def cancel(sweep: str | None, folder: Path | None) -> None:
    """End a sweep's jobs and processes.

    What is done stays; `orc resume` starts the rest again.
    """
    from orchestrator.slurm import jobs, leftovers

    found = _open(sweep, folder)
    alive = jobs.cancel(found.paths)
    is_clean = leftovers.end(found.paths, _say)
    told = [one.job for one in alive if not one.is_elsewhere]
    _say(f"{found.id}: cancelled; told to end: {', '.join(told) or 'nothing, for nothing here was alive'}")
    for one in alive:
        if one.is_elsewhere:
            _say(f"not reached: process {one.job} on {one.reason}; `orc cancel` there ends it at once")
    click.echo(found.id)
    if not is_clean:
        raise OrcError(f"{found.id}: cancelled, but the processes named above could not be ended")


# Around


@cli.command()
def schema() -> None:
    """Print the JSON Schema of sweep files."""
    from orchestrator.config import load

    _print_json(load.json_schema())


cli.add_command(lab)


def main() -> None:
    """Entry of `orc`: errors become a text and an exit code."""
    try:
        code = cli.main(prog_name="orc", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except SweepFileError as error:
        # Bare, so that editors find file, line and column where they expect them.
        _say(str(error))
        code = error.exit_code
    except OrcError as error:
        _say(f"orc: {error}")
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("orc: interrupted")
        code = Preempted.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"orc: {error.filename}: {error.strerror}")
        code = OrcError.exit_code
    sys.exit(code if isinstance(code, int) else 0)
