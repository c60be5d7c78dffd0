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
import time
import traceback
import warnings
from collections.abc import Callable
from numbers import Real
from pathlib import Path

import torch

from orchestrator import store
from orchestrator.channel import Channel
from orchestrator.command import say
from orchestrator.errors import OrcError
from orchestrator.job import Job, load_job, preload
from orchestrator.objective import Diverged, NoResult
from orchestrator.paths import SweepPaths
from orchestrator.records import Cause
from orchestrator.signatures import split
from orchestrator.spec import SweepSpec
from orchestrator.store import JsonObject
from orchestrator.trial import Result, Trial, stream

__all__ = ["Worker", "reset", "server"]


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Worker:
    """Trains the trials that come over a channel.

    Args:
        paths: the sweep.
        spec: its spec.
        job: the user's job.
        channel: to the supervisor.
    """

    def __init__(self, paths: SweepPaths, spec: SweepSpec, job: Job, channel: Channel) -> None:
        self._paths = paths
        self._spec = spec
        self._job = job
        self._channel = channel
        self._noticed = False
        self._cwd = Path.cwd()
        self._environment = dict(os.environ)
        self._listen()

    def _listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._notice)

    def _notice(self, *_: object) -> None:
        self._noticed = True

    def serve(self) -> None:
        """Train until the supervisor closes the channel."""
        while not self._channel.closed:
            for message in self._channel.receive():
                self._channel.send(self._attempt(message))

    def _attempt(self, message: JsonObject) -> JsonObject:
        """Train one trial; returns the message that ends it."""
        name = f"trial {message['trial']} attempt {message['attempt']}"
        say(f"=== {name}: start {message['params']}")
        began = time.monotonic()
        answer = self._guarded(message)
        end = answer.get("outcome", answer.get("detail", answer.get("broken")))
        say(f"=== {name}: {end} after {time.monotonic() - began:.2f} s")
        return answer

    def _guarded(self, message: JsonObject) -> JsonObject:
        try:
            return self._kept(int(str(message["index"])), self._train(message))
        except (MemoryError, torch.OutOfMemoryError) as error:
            say(traceback.format_exc())
            return _ended(Cause.MEMORY, error)
        except NoResult as error:
            return {"end": Cause.ERROR.value, "detail": str(error)}
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            say(traceback.format_exc())
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                return {"broken": str(error)}  # not the trial's fault, and the next one would fare no better
            return _ended(Cause.ERROR, error)

    def _train(self, message: JsonObject) -> Result:
        seed = int(str(message["seed"]))
        params = message["params"]
        bar = message["bar"]
        assert isinstance(params, dict)
        self._listen()
        reset(seed, self._spec.launch.cpus, self._cwd, self._environment)
        for_build, for_train = split(params, self._job.build, self._job.train)
        trial = Trial(
            index=int(str(message["index"])),
            params=params,
            seed=seed,
            metric=self._spec.metric,
            emit=lambda report: self._channel.send({"report": report}),
            build_params=for_build,
            attempt=int(str(message["attempt"])),
            asked_to_stop=lambda: self._noticed,
        )
        with contextlib.suppress(Diverged), warnings.catch_warnings():
            self._run(trial, for_train)
        return trial.result(bar if isinstance(bar, float) else None)

    def _run(self, trial: Trial, for_train: JsonObject) -> None:
        returned = self._job.train(trial, **for_train)
        if isinstance(returned, dict):
            trial.report_all(returned)
        elif isinstance(returned, (Real, torch.Tensor)):
            trial.report_all(
                {self._spec.metric.name: returned if isinstance(returned, torch.Tensor) else float(returned)}
            )

    def _kept(self, index: int, result: Result) -> JsonObject:
        """Write the model before the outcome that names it."""
        if result.model is not None:
            try:
                store.write(self._paths.model(index, str(result.payload["model"])), result.model)
            except OrcError as error:
                return {"broken": str(error)}  # a full disk is not the trial's fault
        return {"outcome": result.status.value, "payload": result.payload}


def _ended(cause: Cause, error: BaseException) -> JsonObject:
    # Addresses differ from run to run; what counts must not.
    text = re.sub(r"0x[0-9a-f]+", "0x…", f"{type(error).__name__}: {error}")
    return {"end": cause.value, "detail": text}


def reset(seed: int, threads: int, cwd: Path, environment: dict[str, str]) -> None:
    """Set this process back to what a fresh one would be, and seed its global generators.

    Layers' initialisers, dropout and much user code read the global generators, so this is the one place that seeds
    them.
    """
    os.chdir(cwd)
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(False)
    torch.autograd.set_detect_anomaly(False)
    torch.manual_seed(stream(seed, "global"))
    random.seed(stream(seed, "python"))
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(stream(seed, "numpy") % 2**32)
        numpy.seterr(divide="warn", over="warn", under="ignore", invalid="warn")


def server(paths: SweepPaths, spec: SweepSpec) -> Callable[[Channel], None]:
    """Import the job; returns what serves its trials in a worker process."""
    assert spec.program is not None
    job = load_job(paths.code, spec.program)
    preload(job)
    return lambda channel: Worker(paths, spec, job, channel).serve()
