"""The ranks that work on one thing together; one process alone is a group too.

    group = Group.of()                   the ranks of torch.distributed, or this process alone if it was never set up
    whole = group.reduce(part)           the merge of every rank's part, the same on every rank
    group.agree("the data", num)         raises on every rank where one holds something else
    group.broadcast(buffers)             rank 0's, into everyone's

All calls are collective: every rank makes the same ones in the same order. They send words (`orchestrator.stats.wire`)
between pairs of ranks over gloo, so they work whatever device the ranks compute on, and nothing is pickled. A rank that
is gone or silent ends them with `PeerLost` on the others, which says which one, as far as that can be known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, takewhile
from operator import itemgetter
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar, cast

import orjson
import torch
import torch.distributed as dist

from orchestrator.errors import OrcError
from orchestrator.stats import wire
from orchestrator.stats.containers import Key, Monoid, SummaryMap, TopN

if TYPE_CHECKING:
    from orchestrator.core.atomic import Json

__all__ = ["TIMEOUT_S", "ControlGroup", "PeerLost"]

TIMEOUT_S: Final = 600.0
"""How long ranks wait for each other: one that has more to do than the others keeps them waiting."""

# Each round of a reduction waits a little longer than the one before it. Who finds a rank silent can then still tell
# those that wait for it, before they take it for silent itself.
_GRACE_S: Final = 0.5

_VALUE, _BYTES, _TROUBLE = 1, 2, 3
_WORD: Final = 8


class PeerLost(OrcError):
    """A rank of the group is gone, or did not answer in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trouble:
    """What keeps a collective from its result; it takes the result's place, so that every rank hears of it.

    Args:
        lost: the ranks that don't answer; none if it is the values that don't fit.
        text: what happened.
    """

    lost: tuple[int, ...] = ()
    text: str

    def merge(self, other: _Trouble) -> _Trouble:
        """Of all that is known. Of values that don't fit only one text is kept, and none beside a loss."""
        lost = tuple(sorted({*self.lost, *other.lost}))
        return _Trouble(lost=lost, text=min((not one.lost, one.text) for one in (self, other))[1])

    def error(self, world_size: int) -> OrcError | ValueError:
        if not self.lost:
            return ValueError(self.text)
        ranks = f"rank {self.lost[0]}" if len(self.lost) == 1 else f"ranks {', '.join(map(str, self.lost))}"
        return PeerLost(f"lost {ranks} of {world_size}: {self.text}")


M = TypeVar("M", bound=Monoid)
_Held: TypeAlias = "Monoid | bytes | _Trouble"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlGroup:
    """Some ranks, as one of them sees them.

    Args:
        rank: the place of this process among them, from 0.
        world_size: how many they are.
        process_group: of torch.distributed, with gloo for CPU tensors; None for one process.
        timeout_s: how long to wait for another rank, in seconds.
    """

    rank: int
    world_size: int
    process_group: dist.ProcessGroup | None
    timeout_s: float = TIMEOUT_S

    @classmethod
    def alone(cls) -> ControlGroup:
        """A group of this process, and of no other."""
        return cls(rank=0, world_size=1, process_group=None)

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None = None, *, timeout_s: float = TIMEOUT_S) -> ControlGroup:
        """The ranks of a process group, or of the default one; this process alone where there is none.

        A group without gloo for CPU tensors, such as one of nccl, gets a gloo group beside it. All of its ranks make it
        then, so all must call this.

        Raises:
            ValueError: this process is not in the group.
        """
        if not dist.is_available() or not dist.is_initialized():
            return cls.alone()
        rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if rank < 0:
            raise ValueError("this process is no rank of the group that it was given")
        return cls(
            rank=rank, world_size=world_size, process_group=_on_gloo(process_group, timeout_s), timeout_s=timeout_s
        )

    # What ranks do together

    def reduce(self, value: M) -> M:
        """The merge of every rank's value, which must be disjoint; the same on every rank.

        By recursive doubling: in round k every rank merges what it has with what the rank whose number differs in bit k
        has, so log2 of the world size rounds do. Ranks beyond a power of two hand theirs in before, and get the result
        after (Thakur, Rabenseifner and Gropp 2005, Optimization of Collective Communication Operations in MPICH, 4.5).

        Args:
            value: a Summary, or any monoid of `orchestrator.stats.containers`.

        Raises:
            ValueError: the ranks hold what can't be merged or sent. Every rank raises.
            PeerLost: a rank is gone or silent.
        """
        return cast(M, _settled(self._doubled(value), self.world_size))

    def agree(self, what: str, value: Json) -> None:
        """Return if all ranks hold the same value; it is plain JSON, and short.

        Raises:
            ValueError: they don't; says which values there are, and the first rank that holds each. Every rank raises.
            PeerLost: a rank is gone or silent.
        """
        if self.world_size == 1:
            return
        text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
        mine: tuple[Key, TopN] = (text, TopN.of(self.rank, self.rank, n=1))
        held = self.reduce(SummaryMap.of([mine]))
        if len(held) > 1:
            views = sorted((one.entries[0].key, str(text)) for text, one in held.entries)
            raise ValueError(f"ranks differ in {what}: " + ", ".join(f"rank {rank} has {text}" for rank, text in views))

    def barrier(self) -> None:
        """Return once every rank has come here.

        Raises:
            PeerLost: a rank is gone or silent.
        """
        self.reduce(SummaryMap.empty())

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy rank 0's tensors, bit for bit, into those of every rank, which are as many, of its shapes and dtypes.

        Raises:
            ValueError: rank 0's tensors have another size in all. `agree` beforehand if they might.
            PeerLost: a rank is gone or silent.
        """
        # A rank gets it from the one whose number lacks its highest bit, and passes it on to those that add a higher.
        top = self.rank.bit_length()
        state: _Held = b""
        if self.rank:
            state = self._moved(state, origin=self.rank - (1 << (top - 1)), round_=top)
        elif self.world_size > 1:  # to spare one process the copy
            state = b"".join(map(_bytes_of, tensors))
        for bit in takewhile(lambda bit: self.rank + bit < self.world_size, _powers(top)):
            state = self._moved(state, to=self.rank + bit, round_=bit.bit_length())
        found = _settled(state, self.world_size)
        if self.rank:
            _fill(tensors, found)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What each rank gave, by rank; all of one shape and dtype, on the CPU.

        Raises:
            ValueError: a rank gave another number of bytes.
            PeerLost: a rank is gone or silent.
        """
        mine = tensor.detach().cpu()
        found = [mine.clone() for _ in range(self.world_size)]
        state: _Held = _bytes_of(mine)
        for shift in range(1, self.world_size):
            to, origin = (self.rank + shift) % self.world_size, (self.rank - shift) % self.world_size
            given = _settled(self._moved(state, to=to, origin=origin, round_=0), self.world_size)
            _fill([found[origin]], given)
        return found

    # Rounds

    def _doubled(self, state: _Held) -> _Held:
        core = 1 << (self.world_size.bit_length() - 1)
        twin, last = self.rank ^ core, core.bit_length()
        if self.rank >= core:
            state = self._moved(state, to=twin, round_=0)
            return state if _is_lost(state) else self._moved(state, origin=twin, round_=last)
        if twin < self.world_size:
            state = self._merged(state, twin, self._moved(state, origin=twin, round_=0))
        for bit in takewhile(lambda bit: bit < core, _powers(0)):
            state = self._swapped(state, self.rank ^ bit, bit.bit_length())
        return self._moved(state, to=twin, round_=last) if twin < self.world_size else state

    def _swapped(self, state: _Held, peer: int, round_: int) -> _Held:
        return self._merged(state, peer, self._moved(state, to=peer, origin=peer, round_=round_))

    def _merged(self, mine: _Held, peer: int, found: _Held) -> _Held:
        """The lower rank's value comes first, so that both ranks of a round do, and say, exactly the same."""
        if isinstance(mine, _Trouble) or isinstance(found, _Trouble):
            return _worse(mine, found)
        (first, low), (second, high) = sorted(((self.rank, mine), (peer, found)), key=itemgetter(0))
        ranks = f"what ranks {first} and {second} hold, or were given, can't be merged"
        if isinstance(low, bytes) or isinstance(high, bytes) or type(low) is not type(high):
            return _Trouble(text=f"{ranks}: a {type(low).__name__} and a {type(high).__name__}")
        try:
            return low.merge(high)
        except (TypeError, ValueError) as error:
            return _Trouble(text=f"{ranks}: {error}")

    def _moved(self, state: _Held, *, to: int | None = None, origin: int | None = None, round_: int) -> _Held:
        """Send `state` to one rank; returns what another one has sent, or `state` itself where that is None.

        If either of the two is trouble, or this is, then that is returned.
        """
        try:
            parts = () if to is None else _framed(state)
        except (TypeError, ValueError) as error:
            state = _Trouble(text=f"what rank {self.rank} holds can't be sent: {error}")
            parts = _framed(state)
        try:
            given = self._transferred(parts, to, origin, self.timeout_s + round_ * _GRACE_S)
        except _Silence as error:
            # Of a group that has lost one rank others may be out of reach too, which says nothing about them.
            return state if _is_lost(state) else _Trouble(lost=(error.peer,), text=f"rank {self.rank} {error}")
        return _worse(state, state if given is None else _unframed(*given))

    def _transferred(
        self, parts: Sequence[bytes], to: int | None, origin: int | None, limit_s: float
    ) -> tuple[bytes, bytes] | None:
        """Both parts of what `origin` has sent, while `parts` go out."""
        sent: list[dist.Work | None] = []
        if to is not None:
            with _listening(to, limit_s):
                group = self.process_group
                sent = [dist.isend(_tensor(part), group=group, group_dst=to) for part in parts if part]
        given = None
        if origin is not None:
            first = self._given(origin, wire.FRAME_BYTES, limit_s)
            given = first, self._given(origin, _num_rest(first), limit_s)
        for work in sent:
            assert to is not None
            _await(work, to, limit_s)
        return given

    def _given(self, origin: int, num_bytes: int, limit_s: float) -> bytes:
        if not num_bytes:
            return b""
        found = torch.empty(num_bytes // _WORD, dtype=torch.int64, device="cpu")
        with _listening(origin, limit_s):
            work = dist.irecv(found, group=self.process_group, group_src=origin)
        _await(work, origin, limit_s)
        return found.numpy().tobytes()


# Messages


def _framed(state: _Held) -> tuple[bytes, bytes]:
    if isinstance(state, bytes):
        return wire.framed(_BYTES, state)
    if isinstance(state, _Trouble):
        return wire.framed(_TROUBLE, json.dumps([state.lost, state.text]).encode())
    return wire.framed(_VALUE, wire.encode(state))


def _unframed(first: bytes, rest: bytes) -> _Held:
    try:
        kind, words = wire.head(first)[0], wire.body(first, rest)
        if kind == _VALUE:
            return wire.decode(words)
    except ValueError as error:
        return _Trouble(text=f"a rank has sent what is no message of this version: {error}")
    if kind == _BYTES:
        return words
    lost, text = json.loads(words)
    return _Trouble(lost=tuple(lost), text=text)


def _num_rest(first: bytes) -> int:
    try:
        return wire.head(first)[1]
    except ValueError:
        return 0  # `_unframed` says what is wrong with it


def _is_lost(state: _Held) -> bool:
    return isinstance(state, _Trouble) and bool(state.lost)


def _worse(mine: _Held, found: _Held) -> _Held:
    """What is trouble of the two, both as one if both are; else `found`."""
    if not isinstance(mine, _Trouble):
        return found
    return mine.merge(found) if isinstance(found, _Trouble) else mine


def _settled(state: _Held, world_size: int) -> Monoid | bytes:
    if isinstance(state, _Trouble):
        raise state.error(world_size)
    return state


def _powers(first: int) -> Iterator[int]:
    return (1 << exponent for exponent in count(first))


# Tensors


def _tensor(part: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(part), dtype=torch.int64)  # of its own memory, which torch may write to


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def _fill(tensors: Sequence[torch.Tensor], words: Monoid | bytes) -> None:
    if not isinstance(words, bytes):
        raise ValueError(f"expected tensors, found a {type(words).__name__}: ranks don't make the same calls")
    sizes = [one.numel() * one.element_size() for one in tensors]
    if sum(sizes) != len(words):
        raise ValueError(f"expected {sum(sizes)} bytes for the tensors of this rank, found {len(words)}")
    if not words:
        return
    parts = torch.split(torch.frombuffer(bytearray(words), dtype=torch.uint8), sizes)
    for one, part in zip(tensors, parts, strict=True):
        # A copy of the part begins where any dtype may.
        one.copy_(part.clone().view(one.dtype).reshape(one.shape))


# Other ranks


class _Silence(Exception):
    """A rank did not answer."""

    def __init__(self, peer: int, text: str) -> None:
        super().__init__(text)
        self.peer = peer


@contextmanager
def _listening(peer: int, limit_s: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        found = str(error)
        text = f"waited {limit_s:g} s for it" if "imed out" in found else f"could not reach it: {_reason(found)}"
        raise _Silence(peer, text) from error


def _reason(found: str) -> str:
    """The words of an error of gloo, which begins with a place in its source: `[../pair.cc:547] Connection closed`."""
    return found.partition("\n")[0].rpartition("] ")[2] if found.startswith("[") else found.partition("\n")[0]


def _await(work: dist.Work | None, peer: int, limit_s: float) -> None:
    assert work is not None  # this process is in the group
    with _listening(peer, limit_s):
        work.wait(timedelta(seconds=limit_s))


def _on_gloo(process_group: dist.ProcessGroup | None, timeout_s: float) -> dist.ProcessGroup | None:
    """A group of the same ranks with gloo for CPU tensors: the same one if it has."""
    if "cpu:gloo" in dist.get_backend_config(process_group):
        return process_group
    ranks = dist.get_process_group_ranks(process_group)
    timeout = timedelta(seconds=timeout_s)
    found: dist.ProcessGroup = dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)
    return found
