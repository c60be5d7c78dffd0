"""What a sweep is: the resolved sweep file as frozen values.

These types are plain and cheap to import: every part of the running side reads them back from the header of the plan.
Reading a file, with every check and every position, is `orchestrator.config.load`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Literal, TypeVar, cast

from orchestrator.core.atomic import Json, JsonObject, canonical

__all__ = ["CheckpointOptions", "Interval", "Launch", "Metric", "Reduce", "Retries", "SweepSpec"]


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
        trials_per_task: trials in a block, the unit of claim; None takes ceil(trials / 100), but at least `pack`.
        max_workers: array elements at most; None leaves it to the number of blocks and the user's limits.
        throttle: array elements that run at the same time (`%` of sbatch's array); None for no limit.
        nodes: machines on which one trial trains; part of the plan, as the number of ranks is.
        ranks_per_node: processes that train one trial together on each machine, each with a part of every batch; part
            of the plan, since it changes the last bits.
        cpus: threads of one rank; part of the plan, since it changes the last bits.
        gpus: GPUs of one rank, asked of Slurm; with 0 a rank takes one where it finds some.
        trials_per_node: trials side by side in one job, each with its own processors, devices and log.
        trials_per_gpu: how many of these share their GPUs.
        pack: trials that train together in one process, at most; part of the plan, since it changes the last bits.
        notice_s: how long before the time limit Slurm sends the notice, in seconds.
        modules: environment modules to load.
        conda: conda environment, by name or path.
        venv: virtual environment to activate, a folder.
        uv: project folder whose `uv run` environment is used.
        apptainer: image in which the worker runs.
        setup: shell lines that run before the worker, after the trap is set.
        lease_s: how long a claim is honoured after its holder's last sign of life, in seconds.
        import_timeout_s: how long importing the program may take when it is checked, in seconds.
        answer_s: how long ranks wait for each other in whatever they do together, in seconds.
        silent_s: how long a rank may be stopped before its trial is ended, in seconds.
        retries: retry budgets by cause.
    """

    form: Literal["auto", "exec", "trap", "srun"] = "auto"
    trials_per_task: int | None = None
    max_workers: int | None = None
    throttle: int | None = None
    nodes: int = 1
    ranks_per_node: int = 1
    cpus: int = 1
    gpus: int = 0
    trials_per_node: int = 1
    trials_per_gpu: int = 1
    pack: int = 1
    notice_s: int = 120
    modules: tuple[str, ...] = ()
    conda: str | None = None
    venv: str | None = None
    uv: str | None = None
    apptainer: str | None = None
    setup: str = ""
    lease_s: float = 120.0
    import_timeout_s: float = 60.0
    answer_s: float = 600.0
    silent_s: float = 30.0
    retries: Retries = field(default_factory=Retries)

    @property
    def num_ranks(self) -> int:
        """Processes that train one trial."""
        return self.nodes * self.ranks_per_node

    @property
    def cpus_per_trial(self) -> int:
        """Processors that one trial keeps busy, on all its machines."""
        return self.num_ranks * self.cpus

    @property
    def cpus_per_task(self) -> int:
        """Processors that a job keeps busy on each of its machines."""
        return self.trials_per_node * self.ranks_per_node * self.cpus

    @property
    def gpus_per_node(self) -> int:
        """GPUs that a job keeps busy on each of its machines."""
        return -(-self.trials_per_node // self.trials_per_gpu) * self.ranks_per_node * self.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """How results are merged.

    Only `top` has a say in what comes out; the others decide who does the work, and how long it may take.

    Args:
        top: how many of the best trials, and of their models, are kept.
        visibility_s: how long the reducer waits for records that are not visible yet, in seconds.
        trials_per_range: how many trials a range has that one reducer folds.
        fan_in: how many ranges one reducer merges; with more ranges there is a tree of reducers. At least 2.
        ranks: processes of the reducer job, each with a part of the trials; with more than one there is no tree.
        slurm: sbatch options of the reducer jobs, over those of `slurm:`.
    """

    top: int = 10
    visibility_s: float = 90.0
    trials_per_range: int = 100_000
    fan_in: int = 16
    ranks: int = 1
    slurm: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Between two checkpoints of a trial. One of these is given, or none: then it follows from what saving costs.

    Args:
        seconds: so many of them.
        steps: so many optimizer steps.
        epochs: so many epochs; never inside of one.
        is_off: no checkpoints at all.
    """

    seconds: float | None = None
    steps: int | None = None
    epochs: int | None = None
    is_off: bool = False

    @classmethod
    def of(cls, text: str) -> Interval:
        """The interval that is written as `auto`, `30s`, `5m`, `2h`, `500 steps`, `epoch`, `2 epochs` or `off`.

        Raises:
            ValueError: it is none of these.
        """
        if text in ("auto", "off"):
            return cls(is_off=text == "off")
        if text == "epoch":
            return cls(epochs=1)
        digits = text[: len(text) - len(text.lstrip("0123456789."))]
        unit = text[len(digits) :].strip(" ")
        if unit in _SECONDS:
            return cls(seconds=_positive(float(digits)) * _SECONDS[unit])
        if unit not in ("step", "steps", "epoch", "epochs"):
            raise ValueError(f"{text!r} names no interval")
        count = _positive(int(digits))
        return cls(steps=count) if unit.startswith("step") else cls(epochs=count)


_SECONDS = {"s": 1, "m": 60, "h": 3600}
N = TypeVar("N", int, float)


def _positive(number: N) -> N:
    if not 0 < number < 1e9:
        raise ValueError(f"{number} is out of range")
    return number


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """How the state of a trial is kept while it runs. None of it has a say in what comes out.

    Args:
        every: how often: `auto`, `30s`, `5m`, `2h`, `500 steps`, `epoch`, `2 epochs` or `off`. `auto` weighs what
            saving costs against what a failure would.
        mtbf_s: mean time between failures that `auto` reckons with, in seconds.
    """

    every: str = "auto"
    mtbf_s: float = 3600.0

    @property
    def interval(self) -> Interval:
        """What `every` says."""
        return Interval.of(self.every)


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
        checkpoint: how the state of a trial is kept while it runs.
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
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

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
            "checkpoint": CheckpointOptions(**cast("dict[str, str]", value.get("checkpoint", {}))),  # type: ignore[arg-type]
        }
        return cls(**typed)  # type: ignore[arg-type]  # as to_json wrote it

    def identity(self) -> bytes:
        """What makes this sweep another one than others: canonical JSON of all but what can't change its results.

        That is the options handed to sbatch, how often trials are saved, how long ranks are waited for, and how results
        are merged, but for how many rank.
        """
        value = self.to_json()
        del value["slurm"], value["checkpoint"]
        value["reduce"] = {"top": self.reduce.top}
        launch = cast("JsonObject", value["launch"])
        del launch["answer_s"], launch["silent_s"], launch["trials_per_node"], launch["trials_per_gpu"]
        for name in ("nodes", "ranks_per_node", "gpus", "pack"):
            if launch[name] == _DEFAULTS[name]:
                del launch[name]  # so that sweeps from before there were such keys are the same ones
        return canonical(value)


_DEFAULTS = {f.name: f.default for f in fields(Launch)}


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
