"""Messages between a supervisor and its children: JSON objects, one a line, over a socket pair.

Nothing is pickled, and a child that dies in the middle of a message loses that message alone.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import orjson

from orchestrator.store import JsonObject

__all__ = ["Channel"]


class Channel:
    """One end of a socket pair.

    Args:
        sock: a connected stream socket; the channel owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self.closed = False

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """The end that a parent left open as file descriptor `fd`."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """The file descriptor, so that a selector takes a channel."""
        return self._sock.fileno()

    def send(self, message: JsonObject, fds: tuple[int, ...] = ()) -> None:
        """Send a message, and file descriptors along with it. A peer that is gone is noticed when reading."""
        data = orjson.dumps(message) + b"\n"
        try:
            if fds:
                sent = socket.send_fds(self._sock, [data], list(fds))
                data = data[sent:]
            self._sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> Iterator[JsonObject]:
        """The complete messages after one read, which waits when there is nothing to read; sets `closed` at the end."""
        self._fill(self._read())
        yield from self._drain()

    def receive_with_fds(self) -> tuple[list[JsonObject], list[int]]:
        """As `receive`, with the file descriptors that came along."""
        data, fds, _, _ = socket.recv_fds(self._sock, 65536, 16)
        self._fill(data)
        return list(self._drain()), fds

    def _read(self) -> bytes:
        try:
            return self._sock.recv(1 << 20)
        except ConnectionResetError:
            return b""

    def _fill(self, data: bytes) -> None:
        self.closed = self.closed or not data
        self._buffer += data

    def _drain(self) -> Iterator[JsonObject]:
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            yield orjson.loads(line)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
