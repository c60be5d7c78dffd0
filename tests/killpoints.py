"""Kills a process before, in the middle of, and after each of its system calls that change a file.

    for kill in kill_everywhere(act): ...       a kill at a time: make the scene in the body, `kill()` runs `act` in it
    run_apart(act)                              to its end, in a fork as well: nothing of it is left in this process

The n-th kill ends a fork of this process by SIGKILL at its n-th moment, so nothing is cleaned up and no buffer is
flushed, as when the kernel or Slurm ends it. A moment is just before a call, which is just after the one before it, or
the middle of a write, when half of it has reached the file; the last one of all is just after the last call. The calls
are wrapped where Python makes them, in `os`: hundreds of kills take as long as one under strace. A file that is opened
for writing in another way would escape them, and ends the fork with an error.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Kill", "kill_everywhere", "run_apart"]

CALLS = (
    *("open", "write", "fsync", "rename", "replace", "link", "symlink", "unlink", "remove"),
    *("mkdir", "rmdir", "chmod", "truncate", "ftruncate"),
)
LIMIT_S = 120
_MOST = 2000
_FAILED = 99


class _Raw(io.RawIOBase):
    """A file whose writes are calls of `os.write`, so that they are seen."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._handle, data)

    def fileno(self) -> int:
        return self._handle

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._handle)


def _fdopen(handle: int, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
    if mode == "wb":
        return io.BufferedWriter(_Raw(handle), buffering if buffering > 0 else io.DEFAULT_BUFFER_SIZE)
    return open(handle, mode, buffering, *rest, **more)


class _Countdown:
    """Ends the process at the n-th moment, counted from 1."""

    def __init__(self, left: int) -> None:
        self._left = left

    def moment(self) -> None:
        self._left -= 1
        if not self._left:
            end()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.moment()
            if name == "write" and self._left == 1:
                call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            if name == "write":
                self.moment()
            return call(*arguments, **options)

        return counted

    def install(self) -> None:
        os.fdopen = _fdopen
        for name in CALLS:
            setattr(os, name, self.wrap(name, getattr(os, name)))
        sys.addaudithook(_look)


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _look(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what `open` opens for writing by its name: those writes are not seen."""
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        if isinstance(arguments[0], int) or os.fspath(arguments[0]) == os.devnull:
            return
        raise AssertionError(f"{arguments[0]} is opened for writing past the calls of os")


@dataclass(slots=True)
class Kill:
    """The `number`-th kill of `act`; calling it runs `act` until then."""

    act: Callable[[], object]
    number: int
    happened: bool = True

    def __call__(self) -> None:
        """Run `act` in a fork; `happened` is False if it came to its end before."""
        pid = os.fork()
        if pid == 0:
            _run(self.act, self.number)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), f"kill {self.number}: wait status {status}"
        self.happened = status != 0


def _run(act: Callable[[], object], number: int) -> None:
    """In the fork: never returns, and never runs what the test runner would do at its end."""
    signal.alarm(LIMIT_S)
    try:
        countdown = _Countdown(number)
        countdown.install()
        act()
        countdown.moment()  # just after the last call
        os._exit(0)
    except BaseException as error:  # it must not reach the test runner in the fork
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(_FAILED)


def kill_everywhere(act: Callable[[], object]) -> Iterator[Kill]:
    """A kill at the first moment of `act`, at the second, ..., until one comes to its end.

    Each is to be called once in the body of the loop, after the scene was made.
    """
    for number in range(1, _MOST):
        kill = Kill(act, number)
        yield kill
        if not kill.happened:
            assert number > 2, "it makes no calls that are seen"
            return
    raise AssertionError(f"more than {_MOST} moments")


def run_apart(act: Callable[[], object]) -> None:
    """Run `act` to its end in a fork."""
    kill = Kill(act, _MOST)
    kill()
    assert not kill.happened, f"more than {_MOST} moments"
