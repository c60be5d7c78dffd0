"""Monoids as 64-bit words and back, exactly: what ranks send to each other instead of pickles.

    words = encode(summary)                 # bytes, a multiple of 8
    decode(words) == summary

    first, rest = framed(KIND, words)       # `first` always has FRAME_BYTES, `rest` is what doesn't fit
    kind, num_bytes = head(first)           # what it is, and how long `rest` will be
    body(first, rest) == words

A word is a two's complement int64 or the bits of a float64, little-endian. Every value begins with a word that says of
which kind it is, and with the lengths of its parts. Equal values have equal words.

A message carries checksums of its head and of its words, so what is cut off, damaged or of another version is refused
and never taken for a number. What its sender got wrong is refused where its parts contradict each other.

The first message has one size for every type: who receives it need not know yet what the sender holds, and two ranks
that hold different types find out, instead of waiting for bytes that never come.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final
from zlib import crc32

import orjson

from orchestrator.stats.containers import Key, Monoid, SummaryMap, SummaryPair, TopN
from orchestrator.stats.summary import Summary, check
from orchestrator.stats.topk import Ranked

if TYPE_CHECKING:
    from orchestrator.stats.topk import Pair

__all__ = ["FRAME_BYTES", "body", "decode", "encode", "framed", "head"]

FRAME_BYTES: Final = 8192
"""Size of a first message: room for a Summary that keeps 100 values at each end and counts in 240 buckets."""

_WORD: Final = 8
_MAGIC: Final = int.from_bytes(b"orcwire2", "little")
_HEAD: Final = struct.Struct("<3qI")  # magic and version, kind, bytes of the body, their CRC-32
_CHECK: Final = struct.Struct("<I")  # the CRC-32 of the head
_BEGIN: Final = _HEAD.size + _CHECK.size
_MOST_DEPTH: Final = 64  # As deep as algebra reads monoids in one another.
_SUMMARY, _MAP, _PAIR, _TOP = 1, 2, 3, 4


# Frames


def framed(kind: int, words: bytes) -> tuple[bytes, bytes]:
    """Any bytes as a message of two parts: one of FRAME_BYTES that says how long the whole is, and the rest.

    The rest is empty where all fits into the first part, and whole words otherwise.
    """
    begin = _HEAD.pack(_MAGIC, kind, len(words), crc32(words))
    whole = b"".join((begin, _CHECK.pack(crc32(begin)), words, bytes(-len(words) % _WORD)))
    return whole[:FRAME_BYTES].ljust(FRAME_BYTES, b"\0"), whole[FRAME_BYTES:]


def head(first: bytes) -> tuple[int, int]:
    """The kind of a message, and how many bytes its second part has.

    Raises:
        ValueError: it is no first part of a message, one of another version, or its head is damaged.
    """
    if len(first) != FRAME_BYTES:
        raise ValueError(f"expected {FRAME_BYTES} bytes of a message, found {len(first)}")
    magic, kind, num_bytes, _ = _HEAD.unpack_from(first)
    if magic != _MAGIC or num_bytes < 0:
        raise ValueError(f"expected a message that begins with {_MAGIC:#x} and its length, found {magic:#x}")
    if crc32(first[: _HEAD.size]) != _CHECK.unpack_from(first, _HEAD.size)[0]:
        raise ValueError("expected the head of a message, found one that is damaged")
    return kind, max(0, _BEGIN + num_bytes + -num_bytes % _WORD - FRAME_BYTES)


def body(first: bytes, rest: bytes) -> bytes:
    """What was framed.

    Raises:
        ValueError: the parts don't belong together, or are damaged.
    """
    _, num_rest = head(first)
    if num_rest != len(rest):
        raise ValueError(f"expected {num_rest} bytes after the first message, found {len(rest)}")
    _, _, num_bytes, crc = _HEAD.unpack_from(first)
    words = (first + rest)[_BEGIN : _BEGIN + num_bytes]
    if crc32(words) != crc:
        raise ValueError(f"expected {num_bytes} bytes as they were sent, found them damaged")
    return words


# Values


def encode(value: Monoid) -> bytes:
    """A monoid as words.

    Raises:
        TypeError: it is none of `orchestrator.stats.containers`, and no Summary.
        ValueError: a count is beyond 64 bits, or monoids are nested more than 64 deep.
    """
    try:
        return b"".join(_put(value, 1))
    except struct.error as error:
        raise ValueError(f"a number to be sent is beyond 64 bits: {error}") from error


def decode(words: bytes) -> Monoid:
    """The monoid of which `words` is the `encode`.

    Raises:
        ValueError: the words are cut off, followed by others, or no value that merging could make.
    """
    reader = _Reader(words)
    try:
        value = _take(reader, 1)
    except TypeError as error:
        raise ValueError(f"damaged words: {error}") from error
    if not reader.at_end:
        raise ValueError(f"expected the end of a value at byte {reader.position} of {len(words)}, found more")
    return value


def _put(value: object, depth: int) -> Iterator[bytes]:
    _check_depth(depth)
    if isinstance(value, Summary):
        yield from _put_summary(value)
    elif isinstance(value, SummaryMap):
        yield _whole(_MAP, len(value.entries))
        for key, one in value.entries:
            yield from _put_key(key)
            yield from _put(one, depth + 1)
    elif isinstance(value, SummaryPair):
        yield _whole(_PAIR)
        yield from _put(value.first, depth + 1)
        yield from _put(value.second, depth + 1)
    elif isinstance(value, TopN):
        yield _whole(_TOP, value.n, len(value.entries))
        yield _ranked(value.entries)
    else:
        raise TypeError(f"expected a Summary, SummaryMap, SummaryPair or TopN, found a {type(value).__name__}")


def _put_summary(summary: Summary) -> Iterator[bytes]:
    sums = [_limbs(getattr(summary, name)) for name in _SUMS]
    codes = sorted(summary.buckets)
    lengths = [len(summary.low), len(summary.high), len(codes), *(len(one) // _WORD for one in sums)]
    yield _whole(_SUMMARY, *(getattr(summary, name) for name in _PLAIN), *lengths)
    yield from sums
    yield _ranked(summary.low)
    yield _ranked(summary.high)
    yield _whole(*codes)
    yield _whole(*map(summary.buckets.__getitem__, codes))


_PLAIN: Final = ("top", "sketch_bits", "count", "num_diverged", "num_failed", "num_pruned")
_SUMS: Final = ("total", "squares", "weight_excess", "product_excess")


def _put_key(key: Key) -> Iterator[bytes]:
    text = orjson.dumps(key)
    yield _whole(len(text))
    yield text + bytes(-len(text) % _WORD)


def _whole(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _limbs(number: int) -> bytes:
    """Two's complement, of no more words than it needs."""
    return number.to_bytes(_WORD * (number.bit_length() // 64 + 1), "little", signed=True)


def _ranked(pairs: Iterable[Pair]) -> bytes:
    values, keys = zip(*pairs, strict=True) if pairs else ((), ())
    return struct.pack(f"<{len(values)}d{len(keys)}q", *values, *keys)


class _Reader:
    """Words, taken one after the other."""

    __slots__ = ("_words", "position")

    def __init__(self, words: bytes) -> None:
        self._words = words
        self.position = 0

    @property
    def at_end(self) -> bool:
        return self.position == len(self._words)

    def raw(self, num_bytes: int) -> bytes:
        begin, end = self.position, self.position + num_bytes
        if num_bytes < 0 or end > len(self._words):
            raise ValueError(f"expected {num_bytes} bytes at byte {begin}, found {len(self._words) - begin}")
        self.position = end
        return self._words[begin:end]

    def whole(self, num: int) -> tuple[int, ...]:
        return struct.unpack(f"<{num}q", self.raw(num * _WORD))

    def limbs(self, num: int) -> int:
        return int.from_bytes(self.raw(num * _WORD), "little", signed=True)

    def ranked(self, num: int) -> tuple[Pair, ...]:
        values = struct.unpack(f"<{num}d", self.raw(num * _WORD))
        return tuple(zip(values, self.whole(num), strict=True))

    def text(self) -> bytes:
        (length,) = self.whole(1)
        return self.raw(length + -length % _WORD)[:length]


def _take(reader: _Reader, depth: int) -> Monoid:
    _check_depth(depth)
    (kind,) = reader.whole(1)
    if kind not in _TAKERS:
        raise ValueError(f"expected the kind of a value, one of {[*_TAKERS]}, found {kind}")
    return _TAKERS[kind](reader, depth)


def _take_summary(reader: _Reader, _: int) -> Summary:
    plain = dict(zip(_PLAIN, reader.whole(len(_PLAIN)), strict=True))
    num_low, num_high, num_buckets, *lengths = reader.whole(3 + len(_SUMS))
    sums = {name: reader.limbs(length) for name, length in zip(_SUMS, lengths, strict=True)}
    low, high = reader.ranked(num_low), reader.ranked(num_high)
    buckets = dict(zip(reader.whole(num_buckets), reader.whole(num_buckets), strict=True))
    found = Summary(**plain, **sums, low=low, high=high, buckets=buckets)
    check(found)
    return found


def _take_map(reader: _Reader, depth: int) -> SummaryMap[Monoid]:
    (num,) = reader.whole(1)
    return SummaryMap(entries=tuple((orjson.loads(reader.text()), _take(reader, depth + 1)) for _ in range(num)))


def _take_pair(reader: _Reader, depth: int) -> SummaryPair[Monoid, Monoid]:
    return SummaryPair(first=_take(reader, depth + 1), second=_take(reader, depth + 1))


def _take_top(reader: _Reader, _: int) -> TopN:
    n, num = reader.whole(2)
    return TopN(n=n, entries=tuple(Ranked(*pair) for pair in reader.ranked(num)))


_TAKERS: Final[dict[int, Callable[[_Reader, int], Monoid]]] = {
    _SUMMARY: _take_summary,
    _MAP: _take_map,
    _PAIR: _take_pair,
    _TOP: _take_top,
}


def _check_depth(depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise ValueError(f"expected monoids nested at most {_MOST_DEPTH} deep, found more")
