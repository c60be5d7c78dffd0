"""Free ports of the loopback interface."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

from orchestrator.errors import OrcError

__all__ = ["answers", "free_ports"]

_LOWEST = 10_000
_TRIES = 10_000


def _first_ephemeral() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32_768


def free_ports(count: int) -> tuple[int, ...]:
    """That many different ports on which nothing listens.

    They lie below the range that the kernel hands out to outgoing connections, so that none is taken between now and
    use by a process that asked for no port in particular.

    Raises:
        OrcError: there are not that many.
    """
    highest = _first_ephemeral() - 1
    low, high = (_LOWEST, highest) if highest - _LOWEST > count else (_LOWEST, 65_535)
    found: list[int] = []
    with ExitStack() as held:
        for port in random.SystemRandom().choices(range(low, high + 1), k=_TRIES):
            if len(found) == count:
                return tuple(found)
            listener = held.enter_context(socket.socket())
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    raise OrcError(f"lab: fewer than {count} free ports between {low} and {high}")


def answers(port: int) -> bool:
    """Whether something accepts connections on this port of the loopback interface."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
