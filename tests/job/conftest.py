"""A proxy before a cluster's dashboard that breaks off streams of logs."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

import pytest


class BreakingLine(socketserver.ThreadingTCPServer):
    """Passes connections on to a dashboard; those that stream a log break off.

    Attributes:
        pieces: Pieces of such a stream that are passed on: its head, then the log.
        broken: Number of streams that have broken off.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = port
        self.broken = 0
        self.pieces = 2

    @property
    def address(self) -> str:
        """Its URL, for `--address`."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(socketserver.BaseRequestHandler):
    server: BreakingLine

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.target)) as there:
            first = self.request.recv(1 << 16)
            there.sendall(first)
            streamed = b"/logs/tail" in first.split(b"\r\n")[0]
            threading.Thread(target=_pass_on, args=(self.request, there), daemon=True).start()
            _pass_on(there, self.request, pieces=self.server.pieces if streamed else None)
            self.server.broken += streamed


def _pass_on(source: socket.socket, target: socket.socket, pieces: int | None = None) -> None:
    with suppress(OSError):
        for _ in count() if pieces is None else range(pieces):
            data = source.recv(1 << 16)
            if not data:
                break
            target.sendall(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def breaking_line(ray_cluster: str) -> Iterator[BreakingLine]:
    """A proxy before the session's cluster."""
    line = BreakingLine(int(ray_cluster.rpartition(":")[2]))
    threading.Thread(target=line.serve_forever, args=(0.05,), daemon=True).start()
    yield line
    line.shutdown()
    line.server_close()
