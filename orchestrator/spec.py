"""What a sweep is: the resolved sweep file as frozen values.

These types are plain and cheap to import: every part of the running side reads them back from the header of the plan.
Reading a file, with every check and every position, is `orchestrator.sweepfile`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Literal, cast

from orchestrator.store import Json, JsonObject, canonical

__all__ = ["Launch", "Metric", "Reduce", "Retries", "SweepSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """The objective.

    Args:
        name: the name under which the job reports it.
        goal: direction.
        at: which report counts, the last one or the best one.
    """

    name: str = "val_loss"
    goal: Literal["minimize", "maximize"] = "minimize"
    at: Literal["last", "best"] = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often a trial is started again after an attempt without an outcome, by cause.

    Args:
        error: the job raised, or its program ended with a non-zero code.
        signal: the job was killed by a signal of its own doing, such as SIGSEGV.
        memory: the job was killed for want of memory.
        timeout: the time limit of the job came first.
        unknown: the attempt ended without a trace, because its machine or its supervisor did.
    """

    error: int = 0
    signal: int = 1
    memory: int = 0
    timeout: int = 3
    unknown: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How workers start.

    Args:
        form: launch form of a Slurm job; `auto` is `srun`.
        trials_per_task: trials in a block, the unit of claim; None takes ceil(trials / 100).
        max_workers: array elements at most; None leaves it to the number of blocks and the user's limits.
        throttle: array elements that run at the same time (`%` of sbatch's array); None for no limit.
        cpus: threads of one trial; part of the plan, since it changes the last bits.
        notice_s: how long before the time limit Slurm sends the notice, in seconds.
        modules: environment modules to load.
        conda: conda environment, by name or path.
        venv: virtual environment to activate, a folder.
        uv: project folder whose `uv run` environment is used.
        apptainer: image in which the worker runs.
        setup: shell lines that run before the worker, after the trap is set.
        lease_s: how long a claim is honoured after its holder's last sign of life, in seconds.
        import_timeout_s: how long importing the program may take when it is checked, in seconds.
        retries: retry budgets by cause.
    """

    form: Literal["auto", "exec", "trap", "srun"] = "auto"
    trials_per_task: int | None = None
    max_workers: int | None = None
    throttle: int | None = None
    cpus: int = 1
    notice_s: int = 120
    modules: tuple[str, ...] = ()
    conda: str | None = None
    venv: str | None = None
    uv: str | None = None
    apptainer: str | None = None
    setup: str = ""
    lease_s: float = 120.0
    import_timeout_s: float = 60.0
    retries: Retries = field(default_factory=Retries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """How results are merged.

    Args:
        top: how many of the best trials, and of their models, are kept.
        visibility_s: how long the reducer waits for records that are not visible yet, in seconds.
        slurm: sbatch options of the reducer job, over those of `slurm:`.
    """

    top: int = 10
    visibility_s: float = 90.0
    slurm: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSpec:
    """One sweep, every default filled in.

    Args:
        name: `[A-Za-z0-9._-]{1,64}`, not starting with a dash or a dot.
        method: how trials are chosen.
        metric: the objective.
        program: `train.py`, `train.py:function` or `package.module:function`; None with a `command`.
        command: argument list of a program that knows nothing of us, with W&B's macros (`${args}`, `${env}`, ...);
            `${program}` is already replaced.
        parameters: name to W&B parameter as in the file; nested `parameters` stay nested.
        description: a sentence for the reader.
        zip: groups of parameter names whose `values` advance together instead of crossing (grid), by dotted path.
        run_cap: number of trials, repeats counted: at most (grid), or exactly (random; then required).
        repeats: how often each configuration is run, with another seed each time; trial i is repeat i % repeats of
            configuration i // repeats.
        seed: seed of the sweep; parameters and seed of trial i depend on it and on i alone.
        env: environment variables of the workers.
        slurm: sbatch's own long option names, without dashes, passed on as they are.
        launch: how workers start.
        reduce: how results are merged.
    """

    name: str
    method: Literal["grid", "random"]
    parameters: dict[str, Json]
    metric: Metric = field(default_factory=Metric)
    program: str | None = None
    command: tuple[str, ...] | None = None
    description: str = ""
    zip: tuple[tuple[str, ...], ...] = ()
    run_cap: int | None = None
    repeats: int = 1
    seed: int = 0
    env: dict[str, str] = field(default_factory=dict)
    slurm: dict[str, Json] = field(default_factory=dict)
    launch: Launch = field(default_factory=Launch)
    reduce: Reduce = field(default_factory=Reduce)

    def to_json(self) -> JsonObject:
        """The spec as JSON; `from_json` gives it back."""
        return cast("JsonObject", _plain(self))

    @classmethod
    def from_json(cls, value: JsonObject) -> SweepSpec:
        """The spec that `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: `value` is not what `to_json` gives.
        """
        command = cast("list[str] | None", value["command"])
        launch, reduce = cast("JsonObject", value["launch"]), cast("JsonObject", value["reduce"])
        typed: dict[str, object] = {
            **value,
            "metric": Metric(**cast("dict[str, str]", value["metric"])),  # type: ignore[arg-type]  # as to_json wrote it
            "command": None if command is None else tuple(command),
            "zip": tuple(tuple(group) for group in cast("list[list[str]]", value["zip"])),
            "launch": _launch(launch),
            "reduce": Reduce(**reduce),  # type: ignore[arg-type]  # as to_json wrote it
        }
        return cls(**typed)  # type: ignore[arg-type]  # as to_json wrote it

    def identity(self) -> bytes:
        """What makes this sweep another one than others: canonical JSON of all but the options handed to sbatch."""
        value = self.to_json()
        del value["slurm"]
        cast("JsonObject", value["reduce"]).pop("slurm")
        return canonical(value)


def _plain(value: object) -> object:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _launch(value: JsonObject) -> Launch:
    typed: dict[str, object] = {
        **value,
        "modules": tuple(cast("list[str]", value["modules"])),
        "retries": Retries(**cast("dict[str, int]", value["retries"])),
    }
    return Launch(**typed)  # type: ignore[arg-type]  # as to_json wrote it
