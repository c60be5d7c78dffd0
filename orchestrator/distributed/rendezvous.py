"""How the ranks of one piece of work meet, and how they part.

    call = RendezvousRequest(folder=folder, whose="trial 3, attempt 0, of digits-1a2b", rank=rank, world_size=4)
    with met(call) as party:
        party.group                     a `dist.Group` over gloo, for words between ranks
        party.main                      the process group for gradients: nccl for CUDA tensors, gloo for others

Rank 0 binds a free port, on loopback when all are on one machine, and publishes it with a fresh nonce in a file that is
its owner's alone. A TCPStore asks nobody who they are: a rank that was given another job's port would join that job
without an error. So the store greets with a digest of the nonce, which only the file tells, and a rank that finds
another greeting leaves; and when all are a group, they compare the nonce and whose it is, and end on a difference.

    RendezvousFailed          some ranks did not come in time, or the file or its folder is not to be trusted
      Foreign       a process that belongs to something else was found
    PeerLost        (`control_group`) a rank is gone or silent; names it, its process and its cause where known
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import socket
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # not in its stubs

from orchestrator.core import atomic
from orchestrator.core.slurm_env import LOOPBACK
from orchestrator.distributed.control_group import TIMEOUT_S, ControlGroup, PeerLost
from orchestrator.distributed.failure import Membership, RendezvousFailed, is_of_others, sockets, within

__all__ = [
    "LOOPBACK",
    "Foreign",
    "RankContext",
    "RendezvousFailed",
    "RendezvousRequest",
    "hosted",
    "interface_towards",
    "met",
]

_CONNECT_S = 5.0
"""After how long without an answer, in seconds, the address is read again."""
_CONNECT_LEAST_S = 0.5
_SHORTEST_LOOK_S, _LONGEST_LOOK_S = 0.002, 0.1
_BACKLOG = 4096
_DISCARD = 9
_SIOCGIFADDR = 0x8915
_CARD_BYTES = 512
"""Of what a rank shows the others: the nonce's digest, and whose it is."""


class Foreign(RendezvousFailed):
    """A process that belongs to something else was found where the ranks meet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RendezvousRequest:
    """What a rank needs to know to meet the others.

    Args:
        folder: where the file is; node-local if all ranks are on one machine, else on a file system that all see. It is
            this user's, and nobody else may enter it.
        whose: what they meet for, in words that no other meeting has: the sweep, the trial, the attempt.
        rank: of this process, from 0.
        world_size: how many ranks there are.
        host: a name or address of rank 0's machine that the others reach; loopback if all are on one machine.
        device: the GPU that this rank computes on; None for the CPU.
        join_s: how long to wait for the others here, in seconds.
        answer_s: how long to wait for a rank in every operation later.
    """

    folder: Path
    whose: str
    rank: int
    world_size: int
    host: str = LOOPBACK
    device: torch.device | None = None
    join_s: float = 60.0
    answer_s: float = TIMEOUT_S

    @property
    def file(self) -> Path:
        """Where rank 0 says how to reach it. What else meets in this folder has other files."""
        return self.folder / f"meet-{hashlib.sha256(self.whose.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """The ranks that met.

    Args:
        group: for words between them, and for all that must not wait for the gradients' turn.
        main: for gradients; None for one process alone.
        roll: who they are; None for one process alone.
    """

    group: ControlGroup
    main: dist.ProcessGroup | None = None
    roll: Membership | None = None

    @classmethod
    def alone(cls) -> RankContext:
        """One process, and no other."""
        return cls(group=ControlGroup.alone())

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.group.rank

    @property
    def world_size(self) -> int:
        """How many there are."""
        return self.group.world_size


@contextlib.contextmanager
def met(call: RendezvousRequest) -> Iterator[RankContext]:
    """The ranks, from when all are there until they part; every rank must call it, once in a process.

    A rank that leaves the block by an error tells the others, and doesn't wait for them; its process must end then.

    Raises:
        RendezvousFailed: the ranks did not meet.
        PeerLost: what ended the block came from another rank, which it names.
    """
    party = _meet(call)
    if party.roll is None:
        yield party
        return
    try:
        yield party
        party.group.barrier()  # the store is rank 0's, and goes with it
    except BaseException as error:
        if is_of_others(error):
            raise party.roll.blame(error) from error
        party.roll.confess(f"{type(error).__name__}: {error}")
        raise
    dist.destroy_process_group()


def hosted(call: RendezvousRequest) -> TCPStore:
    """The store of ranks that are programs and meet in it by themselves. Its `host` and `port` are what they are told.

    Rank 0 listens, for as long as it keeps what this returns; the others look where, and make sure that it is theirs.

    Raises:
        RendezvousFailed: it can't be had.
    """
    _check_folder(call.folder)
    try:
        return (_publish(call) if call.rank == 0 else _find(call))[0]
    except (OSError, dist.DistError, RuntimeError) as error:
        raise RendezvousFailed(f"{_name(call)}: no store for its ranks: {str(error).partition(chr(10))[0]}") from error


def _meet(call: RendezvousRequest) -> RankContext:
    if call.world_size == 1:
        return RankContext.alone()
    _check_folder(call.folder)
    try:
        with _listening_on(call.host):
            return _join(call)
    except (dist.DistError, RuntimeError, PeerLost) as error:
        reason = str(error).partition("\n")[0]
        raise RendezvousFailed(f"{_name(call)}: the ranks did not meet: {reason}") from error
    finally:
        _unpublish(call)


def _name(call: RendezvousRequest) -> str:
    return f"rank {call.rank} of {call.world_size}: {call.whose}"


def _join(call: RendezvousRequest) -> RankContext:
    found, nonce = _publish(call) if call.rank == 0 else _find(call)
    roll = Membership.call(
        PrefixStore("roll", _client(found.host, found.port, call.answer_s)),
        call.rank,
        call.world_size,
        timeout_s=call.join_s,
    )
    limit, before = timedelta(seconds=call.answer_s), sockets()
    dist.init_process_group(
        "gloo" if call.device is None else "cpu:gloo,cuda:nccl",
        store=PrefixStore("group", found),
        rank=call.rank,
        world_size=call.world_size,
        timeout=limit,
        device_id=call.device,
    )
    side = dist.new_group(timeout=limit, backend="gloo")
    roll.holds({number: name for number, name in sockets().items() if before.get(number) != name})
    group = ControlGroup.of(side, timeout_s=call.answer_s)
    _compare(group, nonce, call.whose)
    return RankContext(group=group, main=dist.group.WORLD, roll=roll)


@contextlib.contextmanager
def _listening_on(host: str) -> Iterator[None]:
    """Have gloo listen on loopback alone when that is where all ranks are, else where rank 0's machine is reached.

    Left to itself it takes the address of the machine's name, and that is often loopback. What the user has set holds.
    """
    name, before = "GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME")
    if host == LOOPBACK:
        os.environ[name] = "lo"
    elif before is None and (found := interface_towards(host)):
        os.environ[name] = found
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def interface_towards(host: str) -> str | None:
    """The network interface with the address from which this machine talks to `host`, itself perhaps.

    None where that can't be told, as for IPv6.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, _DISCARD))  # of a datagram socket, this sends nothing
        own = sock.getsockname()[0]
        return next((name for _, name in socket.if_nameindex() if _address(sock, name) == own), None)
    return None


def _address(sock: socket.socket, interface: str) -> str | None:
    """An interface's IPv4 address (netdevice(7))."""
    with contextlib.suppress(OSError):
        answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None


# The file


def _check_folder(folder: Path) -> None:
    try:
        about = folder.lstat()
    except OSError as error:
        raise RendezvousFailed(f"{folder}: the folder where ranks meet can't be used: {error.strerror}") from error
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
        raise RendezvousFailed(
            f"{folder}: ranks meet in a folder of their own user with mode 0700; this one belongs to user "
            f"{about.st_uid} and has mode {stat.S_IMODE(about.st_mode):04o}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Address:
    host: str
    port: int
    nonce: str
    whose: str


def _publish(call: RendezvousRequest) -> tuple[TCPStore, str]:
    # A name may mean another address here than elsewhere.
    at = call.host if _is_address(call.host) else ""
    listener = socket.create_server((at, 0), backlog=_BACKLOG)
    port, nonce = int(listener.getsockname()[1]), secrets.token_hex(16)
    found = TCPStore(
        call.host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=call.answer_s),
        master_listen_fd=listener.detach(),
    )
    found.set("greeting", _greeting(nonce))
    content: atomic.JsonObject = {"host": call.host, "port": port, "nonce": nonce, "whose": call.whose}
    atomic.write(call.file, atomic.checked(content))
    return found, nonce


def _is_address(host: str) -> bool:
    try:
        return bool(socket.inet_pton(socket.AF_INET, host))
    except OSError:
        return False


def _unpublish(call: RendezvousRequest) -> None:
    if call.rank == 0:
        with contextlib.suppress(OSError):
            call.file.unlink()


def _find(call: RendezvousRequest) -> tuple[TCPStore, str]:
    """Wait for the file, then for who has written it. What is there may be an earlier run's, which rank 0 replaces.

    Raises:
        RendezvousFailed: rank 0 has written nothing in time, or nobody answers where it says.
        Foreign: who answers there is another.
    """
    until, pause_s = time.monotonic() + call.join_s, _SHORTEST_LOOK_S
    tried, reason = "", _unsaid(call)
    while True:
        address = _read(call)
        if address is not None and address.nonce != tried:
            try:
                return _ask(address, call, until), address.nonce
            except RendezvousFailed as error:
                tried, reason = address.nonce, error
        if time.monotonic() >= until:
            raise reason
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_LOOK_S)


def _unsaid(call: RendezvousRequest) -> RendezvousFailed:
    return RendezvousFailed(
        f"{_name(call)}: rank 0 has not said within {call.join_s:g} s where to meet, in {call.file}: did it start?"
    )


def _ask(address: _Address, call: RendezvousRequest, until: float) -> TCPStore:
    where = f"{_name(call)}: who listens at {address.host}:{address.port}"
    left_s = max(_CONNECT_LEAST_S, min(until - time.monotonic(), 2 * _CONNECT_S))
    try:
        return within(left_s, lambda: _connect(address, call))
    except TimeoutError:
        raise RendezvousFailed(f"{where} says nothing") from None
    except (dist.DistError, RuntimeError) as error:
        raise RendezvousFailed(f"{where} can't be reached: {str(error).partition(chr(10))[0]}") from error


def _read(call: RendezvousRequest) -> _Address | None:
    """What rank 0 has written; None while there is nothing, or what something else left there."""
    try:
        handle = os.open(call.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise RendezvousFailed(f"{call.file}: can't be read: {reason}") from error
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise RendezvousFailed(
                f"{call.file}: is not a file of this user alone, with mode 0600, as rank 0 writes it"
            )
        line = file.read(1 << 16)
    match atomic.unchecked(line.removesuffix(b"\n")):
        case {"host": str(host), "port": int(port), "nonce": str(nonce), "whose": call.whose}:
            return _Address(host=host, port=port, nonce=nonce, whose=call.whose)
    return None


def _connect(address: _Address, call: RendezvousRequest) -> TCPStore:
    found = _client(address.host, address.port, min(call.join_s, _CONNECT_S))
    if not found.check(["greeting"]) or found.get("greeting").decode() != _greeting(address.nonce):
        raise Foreign(
            f"{_name(call)}: who answers at {address.host}:{address.port} is "
            "another job, not the rank 0 that this one was to meet; it is left alone"
        )
    found.set_timeout(timedelta(seconds=call.answer_s))
    return found


def _client(host: str, port: int, timeout_s: float) -> TCPStore:
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def _greeting(nonce: str) -> str:
    return hashlib.sha256(f"greeting {nonce}".encode()).hexdigest()


# The comparison


def _compare(group: ControlGroup, nonce: str, whose: str) -> None:
    """Return if all ranks read the same nonce, and meet for the same.

    Raises:
        Foreign: on every rank, if they did not; says who meets for what.
    """
    card = (hashlib.sha256(f"card {nonce}".encode()).digest() + whose.encode())[:_CARD_BYTES].ljust(_CARD_BYTES, b"\0")
    shown = [bytes(one.tolist()) for one in group.all_gather(torch.tensor(list(card), dtype=torch.uint8))]
    if len(set(shown)) > 1:
        who = "; ".join(map(_shown, range(len(shown)), shown))
        raise Foreign(f"ranks of different work have met, and part: {who}: a process of another job is among them")


def _shown(rank: int, card: bytes) -> str:
    return f"rank {rank} is of {card[32:].rstrip(bytes(1)).decode(errors='replace')} (nonce {card[:4].hex()})"
