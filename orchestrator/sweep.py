"""A sweep, from Python.

    sweep = Sweep.open("runs/digits-0f3a5b7c9d")        or open("digits"), the newest of that name in ./runs
    sweep.best(3)                                       [Best(index=412, value=0.0771, params={...}, ...), ...]
    sweep.summary()                                     count, mean, quantiles, ... as `orc summary --json`
    sweep.summary(by="lr")                              the same for each value of a parameter
    sweep.curve("val_loss")                             step -> statistics over the trials that reported it
    net = sweep.load_model().net                        the best model, back in the network of its job
    sweep.to_pandas()                                   a row a trial

Every answer is folded from the records at the moment of asking. What the last fold knew is kept beside them, and only
what is new is read, as long as it fits the records as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from orchestrator.config.plan import PlanFile, PlannedTrial
from orchestrator.core import permissions
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import FolderError, NothingMatched
from orchestrator.results import top_models
from orchestrator.results.fold import Fold
from orchestrator.results.records import Status

if TYPE_CHECKING:
    import pandas

    from orchestrator.results.curves import Curve
    from orchestrator.results.effects import Effect
    from orchestrator.results.resumption import Account
    from orchestrator.slurm.jobs import Live
    from orchestrator.stats.statistics import Statistics
    from orchestrator.training.trial import State

__all__ = ["Best", "JobStatus", "Standing", "Sweep", "default_runs", "find", "ids"]


def default_runs() -> Path:
    """Where sweeps live: $ORC_DIR, or ./runs."""
    return Path(os.environ.get("ORC_DIR") or "runs").absolute()


def find(name: str | None, runs: Path) -> SweepPaths:
    """The sweep of a name, an id or a folder; the newest one without a name.

    Raises:
        NothingMatched: there is none.
    """
    if name and (Path(name) / "plan.jsonl").is_file():
        return SweepPaths(Path(name).absolute())
    found = [path for path in runs.glob("*/plan.jsonl") if _is_called(path.parent.name, name)]
    if not found:
        what = f"no sweep called {name!r}" if name else "no sweep"
        raise NothingMatched(f"{runs}: {what} here; --dir or $ORC_DIR says where sweeps live")
    newest = max(found, key=lambda path: (path.stat().st_mtime_ns, path))
    return SweepPaths(newest.parent.absolute())


def ids(runs: Path) -> list[str]:
    """Ids of all sweeps in a folder, in the order of the alphabet."""
    return sorted(path.parent.name for path in runs.glob("*/plan.jsonl") if not path.parent.name.startswith("."))


def _is_called(folder: str, name: str | None) -> bool:
    """Whether a sweep's folder is meant by a name or an id; a hidden one, which is half made, never is."""
    return not folder.startswith(".") and (name is None or name in (folder, folder.rpartition("-")[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """A trial that ranks.

    Args:
        trial: its id.
        index: its index in the plan.
        value: its objective.
        params: its parameters.
        seed: its seed.
        attempts: how often it was started.
        metrics: all metrics of the report that counts.
        model: its weights; None if they are not there, as with a program that reports only.
    """

    trial: str
    index: int
    value: float
    params: JsonObject
    seed: int
    attempts: int
    model: Path | None
    metrics: JsonObject

    def to_json(self) -> JsonObject:
        """As `orc best --json` shows it."""
        return {**asdict(self), "model": None if self.model is None else str(self.model)}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """Something of a sweep that has not ended: a job, an element of an array, or a process of this machine."""

    job: str
    task: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a sweep stands.

    Args:
        trials: number of trials by waiting, running, complete, diverged, pruned, failed, cancelled; adds up to the
            plan.
        retries: attempts that ended without an outcome, by cause.
        interruptions: where attempts went on, and what was saved.
        failures: what failed trials say of their cause, the first that says so, and how many do.
        disagreements: trials with outcomes that differ, and the hosts that wrote them.
        bad_lines: lines of records that are torn, or not visible yet.
        unreadable: record files that can't be read, with the reason: their trials count as missing.
        mixed: versions or processor levels that differ among the workers, so that equal bytes are not promised.
        jobs: what has not ended; None when Slurm did not answer.
    """

    trials: dict[str, int]
    retries: dict[str, int]
    interruptions: Account
    failures: list[tuple[str, int, int]]
    disagreements: list[tuple[int, tuple[str, str]]]
    bad_lines: int
    unreadable: list[str]
    mixed: list[str]
    jobs: list[JobStatus] | None
    note: str = ""


class Sweep:
    """A sweep on disk.

    Args:
        paths: its folder.

    Raises:
        FolderError: the folder holds no plan, or one of another schema.
    """

    def __init__(self, paths: SweepPaths) -> None:
        self.paths = paths
        self.plan = PlanFile.open(paths.plan)
        self.fold = Fold(paths, self.plan.num_trials, eager=True)
        self._update()

    @classmethod
    def open(cls, name: str | Path | None = None, *, runs: Path | None = None) -> Sweep:
        """The sweep of a name, an id or a folder; the newest one by default.

        Raises:
            NothingMatched: there is none.
            FolderError: the folder is of another schema.
        """
        return cls(find(None if name is None else str(name), runs or default_runs()))

    def _update(self) -> None:
        try:
            self.fold.update()
        except FileNotFoundError as error:
            raise FolderError(f"{self.paths.root}: not a whole sweep: {error.filename} is missing") from error

    @property
    def id(self) -> str:
        """The sweep's id."""
        return self.plan.id

    def refresh(self) -> Sweep:
        """Read what has become visible since; returns this sweep."""
        self._update()
        return self

    # Answers

    def best(self, top: int = 1) -> list[Best]:
        """The `top` best complete trials, best first; fewer if there are fewer."""
        return [self._best(index) for index in top_models.best(self.fold, self.plan.spec.metric, top)]

    def _best(self, index: int) -> Best:
        trial = self.plan.trial(index)
        return Best(
            trial=trial.trial,
            index=index,
            value=self.fold.values[index],
            params=trial.params,
            seed=trial.seed,
            attempts=self.fold.attempts(index),
            model=self.model(index),
            metrics=self._metrics(index),
        )

    def _metrics(self, index: int) -> JsonObject:
        metrics = self.fold.payload(index).get("metrics")
        return metrics if isinstance(metrics, dict) else {}

    def model(self, index: int) -> Path | None:
        """The file with the weights of a trial, if they were kept."""
        sha256 = self.fold.payload(index).get("model")
        if not isinstance(sha256, str):
            return None
        path = self.paths.model(index, sha256)
        return path if path.exists() else None

    def summary(self, by: str | Sequence[str] | None = None) -> JsonObject:
        """What `summary.json` holds, folded now: planned, missing, count, min, max, mean, std, sum, quantiles, ...

        With `by`, one parameter or several, nested ones by dotted path, `groups`: the same for the trials of each of
        their values, as `orc summary --by NAME --json`. A parameter that is drawn from a range, and has more than 20
        values, is cut into 10 ranges, each an object of `from` and `to`, both included.

        Raises:
            UsageError: no such parameter.
        """
        from orchestrator.results import reducer

        if by is None:
            return reducer.summary_json(self.plan, self.fold)
        metric, names = self.plan.spec.metric, _names(by)
        return {
            "schema": reducer.SCHEMA,
            "sweep": self.id,
            "metric": metric.name,
            "goal": metric.goal,
            "by": [*names],
            "groups": [self._with_params(effect) for effect in self.effects(names)],
        }

    def effects(self, by: str | Sequence[str]) -> list[Effect]:
        """What `summary(by=...)` says, a group at a time.

        Raises:
            UsageError: no such parameter.
        """
        from orchestrator.results import effects

        spec, groups = self.plan.spec, effects.group(self.plan, _names(by))
        return effects.effects(self.fold, groups, goal=spec.metric.goal, top=spec.reduce.top)

    def _with_params(self, effect: Effect) -> JsonObject:
        top: list[Json] = [
            {"index": one.key, "value": one.value, "params": self.plan.trial(one.key).params}
            for one in effect.statistics.top
        ]
        return {**effect.to_json(), "top": top}

    @overload
    def curve(self, metric: str | None = None, by: None = None) -> dict[int, Statistics]: ...

    @overload
    def curve(self, metric: str | None, by: str | Sequence[str]) -> list[Curve]: ...

    def curve(
        self, metric: str | None = None, by: str | Sequence[str] | None = None
    ) -> dict[int, Statistics] | list[Curve]:
        """A metric by step: the statistics over the trials that have reported it there, whatever became of them.

        Args:
            metric: its name; the objective by default.
            by: parameters, as for `summary`; gives a curve for each group, as (values, steps).

        Raises:
            NothingMatched: no report has the metric.
            UsageError: no such parameter.
        """
        from orchestrator.results import curves, effects

        objective = self.plan.spec.metric
        groups = effects.group(self.plan, _names(by))
        points = curves.read(self.paths, self.plan.num_trials, metric or objective.name)
        goal = objective.goal if metric in (None, objective.name) else "minimize"
        found = curves.curves(points, groups, goal=goal)
        return found[0].steps if by is None else found

    def trial(self, name: str) -> PlannedTrial:
        """A trial by its index or its id.

        Raises:
            NothingMatched: there is none.
        """
        index = name.partition("-")[0]
        if index.isdigit() and int(index) < self.plan.num_trials:
            trial = self.plan.trial(int(index))
            if name in (index, trial.trial):
                return trial
        last = self.plan.num_trials - 1
        raise NothingMatched(f"{self.id}: no trial {name!r}; trials are named by index, 0 to {last}, or by id")

    # Where it stands

    def standing(self) -> Standing:
        """Where the sweep stands; asks Slurm once, if it was ever handed over to Slurm."""
        alive, note = self._alive()
        return Standing(
            trials=self._counts(alive),
            retries={cause.value: number for cause, number in sorted(self.fold.retries().items())},
            interruptions=self._interruptions(),
            failures=self.failures(),
            disagreements=[(found.trial, found.hosts) for found in self.fold.disagreements],
            bad_lines=self.fold.num_bad_lines,
            unreadable=[f"{path}: {why[:1].lower()}{why[1:]}" for path, why in self.fold.unreadable],
            mixed=self._mixed(),
            jobs=None if alive is None else [_job(one) for one in alive],
            note=note,
        )

    def _interruptions(self) -> Account:
        from orchestrator.results import resumption

        return resumption.read(self.paths) if self.fold.has_retried or self.fold.retries() else resumption.Account()

    def _alive(self) -> tuple[list[Live] | None, str]:
        from orchestrator.errors import SlurmUnreachable
        from orchestrator.slurm import jobs

        try:
            return jobs.live(self.paths), ""
        except SlurmUnreachable as error:
            return None, str(error)

    def _counts(self, alive: Sequence[Live] | None) -> dict[str, int]:
        # Without an answer from Slurm, whoever began a trial and has not ended it is taken at its word.
        from orchestrator.slurm import ledger

        running = sum(
            alive is None or any(_is_alive(writer, alive) for writer in writers)
            for writers in self.fold.running().values()
        )
        rest = self.fold.num_missing - running
        now = ledger.current(self.paths)
        is_cancelled = now is not None and ledger.is_cancelled(self.paths, now.token)
        counts = {status.value: self.fold.count(status) for status in Status}
        return {
            "waiting": 0 if is_cancelled else rest,
            "running": running,
            **counts,
            "cancelled": rest if is_cancelled else 0,
        }

    def failures(self) -> list[tuple[str, int, int]]:
        """What failed trials say of their cause: (text, first trial, how many say so)."""
        found: dict[str, tuple[int, int]] = {}
        for index in self.fold.trials(Status.FAILED):
            error = str(self.fold.payload(index).get("error", "")).splitlines()
            first, number = found.get(error[0] if error else "", (index, 0))
            found[error[0] if error else ""] = (first, number + 1)
        return [(text, *where) for text, where in found.items()]

    def _mixed(self) -> list[str]:
        seen: dict[str, set[str]] = {}
        for writer in self.fold.writers().values():
            if "cpu" not in writer:
                continue  # whoever only wrote down what became of others
            versions = writer.get("versions")
            for name, value in {"cpu": writer.get("cpu"), **(versions if isinstance(versions, dict) else {})}.items():
                seen.setdefault(name, set()).add(str(value))
        return [f"{name}: {', '.join(sorted(values))}" for name, values in sorted(seen.items()) if len(values) > 1]

    # Results

    def rows(self) -> Iterator[JsonObject]:
        """A flat row a trial: index, trial, status, value, attempts, then parameters by dotted path."""
        from orchestrator.worker.command import flat

        for trial in self.plan.trials():
            status = self.fold.status(trial.index)
            row: dict[str, Json] = {
                "index": trial.index,
                "trial": trial.trial,
                "status": None if status is None else status.value,
                "value": self.fold.values[trial.index] if status is Status.COMPLETE else None,
                "attempts": self.fold.attempts(trial.index),
            }
            yield row | dict(flat(trial.params))

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a table, indexed by trial index. Needs pandas (`pip install 'slurm-orchestrator[pandas]'`)."""
        import pandas

        return pandas.DataFrame(list(self.rows())).set_index("index")

    def load_model(self, name: str | None = None) -> State:
        """A trial's network with its weights: built by the job's own `build`, from the sweep's snapshot of its code.

        Args:
            name: a trial's index or id; the best trial by default.

        Raises:
            NothingMatched: no such trial, or its weights were not kept.
            FolderError: somebody else could have written the code that would run.
        """
        best = self.best(1)
        if name is None and not best:
            raise NothingMatched(f"{self.id}: no trial is complete yet")
        trial = self.plan.trial(best[0].index) if name is None else self.trial(name)
        path = self.model(trial.index)
        if path is None:
            raise NothingMatched(
                f"{self.id}: the weights of trial {trial.index} were not kept; "
                f"the best {self.plan.spec.reduce.top} have theirs (reduce.top)"
            )
        permissions.check(self.paths)
        return _load(self.paths, self.plan, trial, path)


def _names(by: str | Sequence[str] | None) -> list[str]:
    """Names of parameters, each once."""
    return list(dict.fromkeys([by] if isinstance(by, str) else by or ()))


def _load(paths: SweepPaths, plan: PlanFile, trial: PlannedTrial, weights: Path) -> State:
    from safetensors.torch import load_file

    from orchestrator.config.program import load_job
    from orchestrator.config.signatures import split
    from orchestrator.config.snapshot import Lineage

    assert plan.spec.program is not None
    job = load_job(paths.code, plan.spec.program, Lineage.of(paths))
    if job.build is None:
        raise NothingMatched(f"{plan.spec.program}: has no build(...), so load {weights} with safetensors by hand")
    for_build, _ = split(trial.params, job.build, job.train)
    state: State = job.build(**for_build)  # type: ignore[assignment]  # a job's build returns State, or training failed
    state.net.load_state_dict(load_file(weights))
    state.net.eval()
    return state


def _is_alive(writer: JsonObject, alive: Sequence[Live]) -> bool:
    """Whether the process that wrote a record file's first line is among what is alive."""
    return any(
        writer.get("submission") == one.token
        and (str(writer.get("pid")) == one.job if one.process else writer.get("job") == one.job)
        and one.state in ("RUNNING", "COMPLETING", "SUSPENDED", "alive", "elsewhere")
        for one in alive
    )


def _job(one: Live) -> JobStatus:
    job, _, task = one.job.partition("_")
    return JobStatus(job=job, task=task or one.what, state=one.state, reason=one.reason)
