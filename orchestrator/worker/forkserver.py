"""The preloaded parent of warm workers: imports once what every trial needs, then forks.

    python -P -m orchestrator.worker.forkserver --dir SWEEP --fd N --supervisor PID

Importing torch, its optimizers and the job costs seconds; a fork costs milliseconds and shares the memory. Forking is
safe only while this process has a single thread and no CUDA context, so both are checked after the imports; otherwise
the parent says so and the supervisor starts every worker as a process of its own (`--fresh`). What it is told and what
it answers: `orchestrator.core.messages`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from orchestrator.config.plan import PlanFile
from orchestrator.core import guardian
from orchestrator.core.channel import Channel
from orchestrator.core.messages import Forked, ForkWorker, ImportDone, ImportFailed, WorkerExited, WorkerId
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process_tree import adopt_orphans, children, end_descendants, has_children, start_time
from orchestrator.core.signals import wait_readable

__all__ = ["main"]

_CLEAN_UP_S = 2.0
"""How long it has to end its workers and remove its files once the supervisor is gone, in seconds."""
_END_S = 3.0
"""How long guardians have to end workers and what those leave, in seconds; then all is killed."""
_NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

Serve = Callable[[Channel], None]


def lead_group(pid: int) -> None:
    """Put a new process, 0 for this one, into a group of its own; called on both sides of a fork, whoever is first."""
    with contextlib.suppress(OSError):
        os.setpgid(pid, 0)


def print_to(log: str | None) -> None:
    """Send all that this process prints to the end of a file; None leaves it as it is."""
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)


def load(paths: SweepPaths, at_end: contextlib.ExitStack, folder: Path | None = None) -> Serve:
    """Import all that trials of this sweep need; returns the function that serves them in a worker.

    What must be tidied up once the last worker has ended is left to `at_end`. Ranks meet in `folder`.
    """
    spec = PlanFile.open(paths.plan).spec
    if spec.command is not None and folder is not None:
        from orchestrator.worker import command_ranks

        return command_ranks.server(paths, spec, at_end, folder)
    if spec.command is not None:
        from orchestrator.worker import command

        return command.server(paths, spec, at_end)
    if folder is not None:
        from orchestrator.worker import rank

        return rank.server(paths, spec, folder)
    if spec.launch.pack > 1:
        from orchestrator.worker import pack as packer

        return packer.server(paths, spec)
    from orchestrator.worker import single

    return single.server(paths, spec)


def forkable() -> bool:
    """Whether a fork of this process is safe: one thread, no CUDA context."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return False
    return len(list(Path("/proc/self/task").iterdir())) == 1


class ForkServer:
    """Forks a worker for each request, below a guardian, and reports how it ended.

    Args:
        channel: to the supervisor.
        serve: what a worker runs, given its own channel.
        supervisor: its process id; None for nobody whose end would matter.
    """

    def __init__(self, channel: Channel, serve: Serve, supervisor: int | None = None) -> None:
        self._channel = channel
        self._serve = serve
        self._parents = [os.getpid(), *([] if supervisor is None else [supervisor])]
        self._workers: dict[int, WorkerId] = {}
        self._before = set(children())  # the program started them when it was imported
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Serve until the supervisor closes its end, or is killed; then end the workers and all that they started."""
        try:
            while not self._channel.closed:
                self._wait(None)
                if self._is_asked():
                    messages, fds = self._channel.receive_with_fds()
                    for message, fd in zip(messages, fds, strict=True):
                        assert isinstance(message, ForkWorker)
                        self._fork(message, fd)
        finally:
            self._end_workers()
            end_descendants()

    def _wait(self, timeout_s: float | None) -> None:
        """Until the supervisor asks, or a child ends, which is reaped."""
        channel = [] if self._channel.closed else [self._channel.fileno()]
        if self._wake_read in wait_readable([*channel, self._wake_read], timeout_s):
            self._reap()

    def _is_asked(self) -> bool:
        return bool(wait_readable([self._channel.fileno()], 0))

    def _end_workers(self) -> None:
        """Have every guardian end its worker, and what that has left in order."""
        for pid in self._workers:
            os.kill(pid, guardian.END)
        until = time.monotonic() + _END_S
        while self._workers and (left_s := until - time.monotonic()) > 0:
            self._wait(left_s)

    def _fork(self, request: ForkWorker, fd: int) -> None:
        pid = os.fork()
        if pid == 0:
            if request.devices is not None:  # CUDA reads it when it is first used, which this process has not done
                os.environ["CUDA_VISIBLE_DEVICES"] = request.devices
            self._become_worker(fd, request.log)
        lead_group(pid)
        os.close(fd)
        self._workers[pid] = request.worker
        self._channel.send(Forked(slot=request.slot, rank=request.rank, pid=pid))

    def _become_worker(self, fd: int, log: str | None) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            lead_group(0)
            print_to(log)
            guardian.stand_guard(self._parents)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._channel.close()
            self._serve(Channel.from_fd(fd))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass
        while has_children() and (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            pid = ended.si_pid
            since = start_time(pid)
            _, status = os.waitpid(pid, 0)
            self._before.discard(pid)
            worker = self._workers.pop(pid, None)
            if worker is None:  # the program started it when it was imported
                continue
            if os.WIFSIGNALED(status):
                # A guardian that was killed has ended nothing: what it left is ours now, and no older than it was.
                end_descendants(keep={*self._workers, *self._before}, since=since)
            self._channel.send(WorkerExited(slot=worker.slot, rank=worker.rank, status=status))


def _leave() -> NoReturn:
    """Taking torch apart in good order would take half a second, for which the sweep's end would wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(arguments: list[str] | None = None) -> None:
    """Entry of the process."""
    # Before anything slow: srun and Slurm send notices to every process of a step. This one ignores them.
    for number in _NOTICES:
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="orchestrator.worker.forkserver")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--fresh", action="store_true", help="serve here instead of forking")
    parser.add_argument("--log", help="where a fresh worker prints")
    parser.add_argument("--folder", type=Path, help="where ranks meet; removed once the supervisor is gone")
    parser.add_argument("--supervisor", type=int, required=True, help="its process id")
    options = parser.parse_args(arguments)
    print_to(options.log)
    patience_s = 0.0 if options.fresh else _CLEAN_UP_S
    guardian.stand_guard([options.supervisor], patience_s=patience_s, folder=str(options.folder or ""))
    if not options.fresh:
        adopt_orphans()
    channel = Channel.from_fd(options.fd)
    at_end, me = contextlib.ExitStack(), os.getpid()
    gc.disable()  # hardly anything that is imported becomes garbage, and looking for it takes a tenth of the time
    try:
        serve = load(SweepPaths(options.dir), at_end, options.folder)
    except BaseException as error:
        traceback.print_exc()
        if os.getpid() != me:
            os._exit(1)
        channel.send(ImportFailed(error=f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None
    if os.getpid() != me:
        _leave()  # the program has forked when it was imported, and this is the child
    gc.freeze()  # workers neither look through it nor, by that, copy the pages that they share
    gc.enable()
    if options.fresh:
        with at_end:
            serve(channel)
        _leave()
    can_fork = forkable()
    if can_fork and options.folder is not None:
        at_end.callback(shutil.rmtree, options.folder, ignore_errors=True)
    channel.send(ImportDone(forks=can_fork))
    with at_end:
        if can_fork:
            ForkServer(channel, serve, options.supervisor).run()
    _leave()


if __name__ == "__main__":
    main()
