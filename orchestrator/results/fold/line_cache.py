"""The line cache: lines that were read, once more, without opening a file for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from orchestrator.results.fold.columns import at
from orchestrator.results.fold.segment import RecordFile, opened

__all__ = ["LineCache", "payload_text"]

_BLOCK: Final = 1 << 16
_MOST_BLOCKS: Final = 64
_LONGEST: Final = 32 << 20
_PAYLOAD: Final = b',"payload":'
_SECONDS: Final = b',"seconds":'
_NOTHING: Final = (0, b"")


def payload_text(line: bytes) -> bytes:
    """The payload in an outcome line as workers write it; empty where the line is not laid out like that.

    No brace before it and none but the last one after it: so both keys are the line's own, whatever the payload holds.
    """
    start, stop = line.find(_PAYLOAD), line.rfind(_SECONDS)
    text = line[start + len(_PAYLOAD) : stop]
    is_whole = 0 < start < stop and text[:1] == b"{" and line.find(b"{", 1, start) < 0
    return text if is_whole and line.find(b"}", stop) == len(line) - 1 else b""


class LineCache:
    """Lines of record files, read back: the neighbours of one that was asked for are at hand.

    Args:
        files: the record files by number; grows.
    """

    def __init__(self, files: Sequence[RecordFile]) -> None:
        self._files = files
        self._blocks: dict[int, tuple[int, bytes]] = {}

    def forget(self) -> None:
        """Let go of all that is at hand."""
        self._blocks.clear()

    def line(self, where: int) -> bytes:
        """The line at a place, without its newline.

        It may be what was there a moment ago, before the line was visible; empty if it can't be read.
        """
        number, offset = at(where)
        first, block = self._blocks.get(number, _NOTHING)
        start = offset - first
        end = block.find(b"\n", start) if start >= 0 else -1
        if end < 0:
            start, block = 0, self._read(number, offset)
            end = block.find(b"\n")
        return block[start:end] if end >= 0 else b""

    def _read(self, number: int, offset: int) -> bytes:
        if len(self._blocks) >= _MOST_BLOCKS:
            self._blocks.clear()
        try:
            with opened(self._files[number].path) as file:
                file.seek(offset)
                block = file.read(_BLOCK)
                while b"\n" not in block and len(block) < _LONGEST and (more := file.read(_BLOCK)):
                    block += more
        except OSError:
            return b""
        self._blocks[number] = offset, block
        return block
