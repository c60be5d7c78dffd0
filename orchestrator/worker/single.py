"""The warm worker: imports the job once, then trains one trial after the other.

A trial gives the same result first, tenth and alone: before each one, whatever an earlier trial may have changed in
this process is set back, and every global generator is seeded from the trial's own seed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path

import torch

from orchestrator.config.program import LoadedJob, load_job, preload
from orchestrator.config.signatures import split
from orchestrator.config.snapshot import Lineage
from orchestrator.config.spec import SweepSpec
from orchestrator.core import atomic
from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import Channel, Send, say, serve
from orchestrator.core.messages import AttemptEnded, Cause, Message, Outcome, Reported, RunTrial, Unable
from orchestrator.core.paths import SweepPaths
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.errors import OrcError
from orchestrator.results.objective import Diverged, NoResult
from orchestrator.training.checkpoint.files import Checkpoints, Identity
from orchestrator.training.checkpoint.manager import CheckpointManager, Interrupted
from orchestrator.training.torch_state import Settings
from orchestrator.training.trial import Result, Trial, stream

__all__ = ["NoDevices", "TrialWorker", "check_devices", "described", "loaded", "reported", "reset", "server"]


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class TrialWorker:
    """Trains the trials that come over a channel.

    Args:
        paths: the sweep.
        spec: its spec.
        job: the user's job.
        channel: to the supervisor.
    """

    def __init__(self, paths: SweepPaths, spec: SweepSpec, job: LoadedJob, channel: Channel) -> None:
        self._paths = paths
        self._spec = spec
        self._job = job
        self._channel = channel
        self._noticed = False
        self._words: list[str] = []
        self._keeper: CheckpointManager | None = None
        self._party = RankContext.alone()
        self._has_saved = False
        self._cwd = Path.cwd()
        self._environment = dict(os.environ)
        self._settings = Settings()
        self._listen()

    def _listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._notice)

    def _notice(self, *_: object) -> None:
        """A signal says only that there may be a word of the supervisor's, at which the next safe point looks."""
        self._noticed = True
        if self._keeper is not None:
            self._keeper.look_s = 0.0

    def _is_asked_to_stop(self) -> bool:
        return self._noticed

    def _told(self, word: str) -> None:
        self._words.append(word)
        self._noticed = True

    def _hears(self) -> list[str]:
        words = self._words + self._channel.notices()
        self._words = []
        return words

    def serve(self) -> None:
        """Train until the supervisor closes the channel."""
        serve(self._channel, self._attempt, self._told)

    def _attempt(self, assigned: RunTrial, send: Send) -> Message:
        """Train one trial; returns the message that ends it."""
        try:
            return self._done(assigned, send)
        except Interrupted as interrupted:
            return interrupted.answer
        except (MemoryError, torch.OutOfMemoryError) as error:
            say(traceback.format_exc())
            return _ended(Cause.MEMORY, error)
        except NoDevices as error:
            return Unable(reason=str(error))  # as a full disk
        except NoResult as error:
            return AttemptEnded(cause=Cause.ERROR, detail=str(error))
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            say(traceback.format_exc())
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                return Unable(reason=str(error))  # not the trial's fault, and the next one would fare no better
            return _ended(Cause.ERROR, error)

    def _done(self, assigned: RunTrial, send: Send) -> Message:
        check_devices(self._spec.launch.gpus)
        return self._kept(assigned.index, self._train(assigned, send))

    def _train(self, assigned: RunTrial, send: Send) -> Result:
        self._listen()
        self._noticed = bool(self._words)
        reset(assigned.seed, self._spec.launch.cpus, self._cwd, self._environment, self._settings)
        keeper = self._keeper = self._new_keeper(assigned, send)
        try:
            trial, for_train = self._trial(assigned, send, keeper)
            with contextlib.suppress(Diverged), warnings.catch_warnings():
                self._run(trial, for_train)
            return trial.result(assigned.bar)
        finally:
            self._keeper, self._has_saved = None, keeper.has_saved
            keeper.close()

    def _new_keeper(self, assigned: RunTrial, send: Send) -> CheckpointManager:
        return CheckpointManager(
            self._checkpoints(assigned), self._spec.checkpoint, hears=self._hears, tells=send, say=say
        )

    def _checkpoints(self, assigned: RunTrial) -> Checkpoints:
        whose = Identity(sweep=self._paths.id, trial=assigned.index, world_size=self._party.world_size)
        return Checkpoints(self._paths.checkpoint(assigned.index), whose, assigned.writer, say=say)

    def _trial(self, assigned: RunTrial, send: Send, keeper: CheckpointManager) -> tuple[Trial, JsonObject]:
        """Return the assigned trial, as far as it was done before, and the parameters that `train` takes."""
        for_build, for_train = split(assigned.params, self._job.build, self._job.train)
        trial = Trial(
            index=assigned.index,
            params=assigned.params,
            seed=assigned.seed,
            metric=self._spec.metric,
            emit=lambda report: send(reported(report)),
            build_params=for_build,
            attempt=assigned.attempt,
            asked_to_stop=self._is_asked_to_stop,
            party=self._party,
            keeper=keeper,
            found=keeper.newest() if assigned.attempt else None,
        )
        return trial, for_train

    def _run(self, trial: Trial, for_train: JsonObject) -> None:
        with _one_process():
            returned = self._job.train(trial, **for_train)
        if isinstance(returned, dict):
            trial.report_all(returned)
        elif isinstance(returned, (Real, torch.Tensor)):
            trial.report_all(
                {self._spec.metric.name: returned if isinstance(returned, torch.Tensor) else float(returned)}
            )

    def _kept(self, index: int, result: Result) -> Message:
        """Write the model before the outcome that names it."""
        if result.model is not None:
            try:
                atomic.write(self._paths.model(index, str(result.payload["model"])), result.model)
            except OrcError as error:
                return Unable(reason=str(error))  # a full disk is not the trial's fault
        return Outcome(status=result.status, payload=result.payload, saved=self._has_saved)


def reported(report: JsonObject, trial: int | None = None) -> Reported:
    """Return the message of a report, {"step": n, "metrics": {...}}, of `trial` if that is one of a pack."""
    match report:
        case {"step": int(step), "metrics": dict(metrics)}:
            return Reported(step=step, metrics=metrics, trial=trial)
    raise ValueError(f"not a report: {report!r}")


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """A process that the job forked and lets come back ends here, as a script would: only one of them is the worker."""
    process, code = os.getpid(), 1
    try:
        yield
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except BaseException:
        if os.getpid() != process:
            say(traceback.format_exc())
        raise
    finally:
        if os.getpid() != process:
            _end_process(code)


def _end_process(code: int) -> None:
    for stream_ in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream_.flush()
    os._exit(code & 0xFF)


def _ended(cause: Cause, error: BaseException) -> AttemptEnded:
    return AttemptEnded(cause=cause, detail=described(error))


def described(error: BaseException) -> str:
    """An error in a line. Addresses differ from run to run; what counts must not."""
    return re.sub(r"0x[0-9a-f]+", "0x…", f"{type(error).__name__}: {error}")


def reset(seed: int, threads: int, cwd: Path, environment: dict[str, str], settings: Settings) -> None:
    """Set this process back to what it was when the job had been imported, and seed its global generators.

    Layers' initialisers, dropout and much user code read the global generators, so this is the one place that seeds
    them.
    """
    os.chdir(cwd)
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
    torch.set_num_threads(threads)
    settings.restore()
    torch.manual_seed(stream(seed, "global"))
    random.seed(stream(seed, "python"))
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(stream(seed, "numpy") % 2**32)
        numpy.seterr(divide="warn", over="warn", under="ignore", invalid="warn")


class NoDevices(OrcError):
    """The GPUs that a rank was to have are not to be seen from it."""


def check_devices(num: int) -> None:
    """Return if this process sees at least `num` GPUs.

    Raises:
        NoDevices: it doesn't; a trial that asks for them would train on the processor, for days.
    """
    if num and (found := torch.cuda.device_count()) < num:
        raise NoDevices(f"launch.gpus asks for {num} on each rank, and this one sees {found}")


def loaded(paths: SweepPaths, spec: SweepSpec) -> LoadedJob:
    """The job, with all that its trials need imported."""
    assert spec.program is not None
    job = load_job(paths.code, spec.program, Lineage.of(paths))
    preload(job, ranks=spec.launch.num_ranks)
    return job


def server(paths: SweepPaths, spec: SweepSpec) -> Callable[[Channel], None]:
    """Import the job; returns what serves its trials in a worker process."""
    job = loaded(paths, spec)
    return lambda channel: TrialWorker(paths, spec, job, channel).serve()
