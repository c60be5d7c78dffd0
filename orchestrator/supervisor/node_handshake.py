"""How the other nodes of a job connect to its first: a file says where, and a key in it proves who is who.

The file lies in the job's own folder, which all its nodes see and only this user reads. Either side proves that it has
read the key (HMAC-SHA256 over a salt) before anything else that it sends counts.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from orchestrator.core import atomic
from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import Channel
from orchestrator.errors import OrcError

__all__ = ["FILE", "MOST_BYTES", "addresses", "call", "configure", "parse", "proof_of", "proves"]

FILE = "nodes"
MOST_BYTES = 4096
"""Of a stranger's words, before the connection is closed."""
_CONNECT_S = 30.0
"""How long the first node may take to answer, in seconds: it may be at a fold."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
_UNANSWERED_MS = 60_000
"""After how long without an acknowledgement what was sent is given up (TCP_USER_TIMEOUT, tcp(7))."""


def addresses(environment: Mapping[str, str]) -> list[str]:
    """Return where the other nodes of a job may reach this one, its first: what srun says of it, then its names."""
    names = (environment.get(name) for name in ("SLURM_LAUNCH_NODE_IPADDR", "SLURMD_NODENAME"))
    return list(dict.fromkeys(name for name in (*names, socket.gethostname()) if name))


def call(folder: Path, node: int, *, within_s: float) -> Channel | None:
    """Connect node `node` to the first one, and wait for that; None when that one had nothing to do, and left.

    The file may be an earlier run's until the first node replaces it.

    Raises:
        OrcError: not in time.
    """
    until, pause_s = time.monotonic() + within_s, _SHORTEST_PAUSE_S
    reason = f"{folder / FILE} has not appeared"
    while True:
        try:
            return _knock(folder, node)
        except _Over:
            return None
        except (OSError, _Unknown) as error:
            reason = str(error)
        if time.monotonic() >= until:
            raise OrcError(f"node {node} of this job can't reach its first node within {within_s:.0f} s: {reason}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class _Over(Exception):
    """The first node has left."""


class _Unknown(Exception):
    """Who listens there, or what the file says, is nothing of ours."""


def _knock(folder: Path, node: int) -> Channel:
    hosts, port, key = _read(folder / FILE)
    problems = []
    for host in hosts:
        try:
            return _introduce(host, port, key, node)
        except (OSError, _Unknown) as error:
            problems.append(f"{host}:{port}: {error}")
    raise _Unknown("; ".join(problems) or "it names no address")


def _read(file: Path) -> tuple[list[str], int, str]:
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        about = os.fstat(opened.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise _Unknown(f"{file}: is not a file of this user alone, with mode 0600")
        line = opened.read(MOST_BYTES)
    match parse(line.removesuffix(b"\n")):
        case {"hosts": list(hosts), "port": int(port), "key": str(key)}:
            return [str(host) for host in hosts], port, key
        case {"over": True}:
            raise _Over
    raise _Unknown(f"{file}: says nothing that can be understood")


def _introduce(host: str, port: int, key: str, node: int) -> Channel:
    sock, salt = socket.create_connection((host, port), timeout=_CONNECT_S), secrets.token_hex(16)
    try:
        hello: JsonObject = {
            "node": node,
            "salt": salt,
            "host": socket.gethostname(),
            "proof": proof_of(key, "other", node, salt),
        }
        sock.sendall(atomic.checked(hello))
        if not proves(str(parse(_line(sock)).get("proof")), proof_of(key, "first", node, salt)):
            raise _Unknown("who listens there is not the first node of this job")
    except BaseException:
        sock.close()
        raise
    sock.settimeout(None)
    configure(sock)
    return Channel(sock)


def _line(sock: socket.socket) -> bytes:
    """Read one line, and nothing of what comes after it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MOST_BYTES and (data := sock.recv(1)):
        line += data
    return line.removesuffix(b"\n")


def parse(line: bytes) -> JsonObject:
    """Return the JSON object of a line with a checksum; an empty one for anything else."""
    try:
        return atomic.unchecked(line) or {}
    except ValueError:
        return {}


def proves(proof: str, expected: str) -> bool:
    """Compare a proof with the expected one, in a time that tells nothing about it."""
    return hmac.compare_digest(proof.encode(errors="replace"), expected.encode())


def proof_of(key: str, who: str, node: int, salt: str) -> str:
    """Return what shows that `who` has read the key."""
    return hmac.digest(key.encode(), f"{who} {node} {salt}".encode(), "sha256").hex()


def configure(sock: socket.socket) -> None:
    """Set what a long-lived connection between nodes needs."""
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
