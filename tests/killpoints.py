"""Kills a process before, in the middle of, and after each of its system calls that change a file.

    for kill in kill_everywhere(act): ...       a kill a time: make the scene in the body, `kill()` runs `act` in it

The n-th kill ends a fork of this process by SIGKILL at its n-th call, so nothing is cleaned up and no buffer is
flushed, as when the kernel or Slurm ends it. The calls are wrapped where Python makes them, in `os`: hundreds of kills
take as long as one under strace, which `test_store.py` uses to see that no call is made that is not wrapped here.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Kill", "kill_everywhere"]

CALLS = ("open", "write", "fsync", "rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir", "truncate")
LIMIT_S = 30
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
    """Ends the process at the n-th call, counted from 1."""

    def __init__(self, left: int) -> None:
        self._left = left

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left:
                return call(*arguments, **options)
            if name == "write":  # torn: half of it reaches the file
                call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("unreachable")

        return counted

    def install(self) -> None:
        os.fdopen = _fdopen
        for name in CALLS:
            setattr(os, name, self.wrap(name, getattr(os, name)))


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
        _Countdown(number).install()
        act()
        os._exit(0)
    except BaseException as error:  # it must not reach the test runner in the fork
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(_FAILED)


def kill_everywhere(act: Callable[[], object]) -> Iterator[Kill]:
    """A kill at the first call of `act`, at the second, ..., until one comes to its end.

    Each is to be called once in the body of the loop, after the scene was made.
    """
    for number in range(1, _MOST):
        kill = Kill(act, number)
        yield kill
        if not kill.happened:
            assert number > 2, "it makes no calls that are seen"
            return
    raise AssertionError(f"more than {_MOST} calls")
