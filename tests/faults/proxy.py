"""An HTTP proxy before the S3 server that fails requests as bad networks and busy servers do."""

import http.client
import random
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from typing import Any

__all__ = ["PASSING", "Answer", "Fault", "Framing", "Proxy", "Request", "proxied", "refusal", "seldom"]

_POLL_SECONDS = 0.02
"""How often it looks whether it is to shut down."""
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}
_OWN = {"date", "server"}
"""Headers of every answer of this proxy."""


class Fault(Enum):
    """What happens to one request."""

    ERROR_500 = "500 without the request having been done"
    SLOW_DOWN = "503 SlowDown without the request having been done"
    RESET_BEFORE = "connection reset, the request not done"
    RESET_AFTER = "connection reset, the request done and its answer lost"
    STALL = "no answer"
    TRUNCATE = "the answer breaks off in its middle"
    SHORT = "the connection ends in the middle of the answer"
    DENIED = "403 AccessDenied without the request having been done"
    UNKNOWN_KEY = "403 InvalidAccessKeyId without the request having been done"
    WRONG_KEY = "403 SignatureDoesNotMatch without the request having been done"
    WRONG_CLOCK = "403 RequestTimeTooSkewed without the request having been done"


_REFUSALS = {
    Fault.ERROR_500: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.DENIED: (403, "AccessDenied"),
    Fault.UNKNOWN_KEY: (403, "InvalidAccessKeyId"),
    Fault.WRONG_KEY: (403, "SignatureDoesNotMatch"),
    Fault.WRONG_CLOCK: (403, "RequestTimeTooSkewed"),
}
_LASTING = {fault for fault, (status, _) in _REFUSALS.items() if status == 403}
PASSING = tuple(fault for fault in Fault if fault not in _LASTING)
"""Faults after which a repeated request succeeds."""


@dataclass(frozen=True)
class Request:
    """A received request: its number, from 0, and its parts; names of headers in lower case."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """An answer that the proxy gives in place of the server."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


Decision = Callable[[Request], Fault | None]
"""Maps a request to its fault, or to None."""


def refusal(status: int, code: str, message: str = "by the proxy", more: str = "") -> Answer:
    """An error of S3."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"
    return Answer(status, {"Content-Type": "application/xml"}, body.encode())


class Framing(Enum):
    """How an answer says where its body ends."""

    LENGTH = "Content-Length"
    CHUNKED = "chunks"
    CLOSED = "the end of the connection"


def seldom(rate: float, seed: int, faults: tuple[Fault, ...] = PASSING) -> Decision:
    """Fail each request with probability `rate`, by the `faults` in turn."""
    chance = random.Random(seed)
    turn = cycle(faults)

    def decide(_request: Request) -> Fault | None:
        return next(turn) if chance.random() < rate else None

    return decide


class Proxy(ThreadingHTTPServer):
    """Passes requests on to 127.0.0.1:`port`, except those that `decide` gives a fault.

    Args:
        port: The server's port.
        decide: Chooses the fault of each request.
        stall_seconds: How long a stalled request is held.
        done: Called with a request's number after the server has done it and before its answer is passed on.
        dropped: Headers, in lower case, that are removed from requests.
        secret: Bytes that no request may contain.

    Attributes:
        met: Number of requests by fault.
        requests: Number of requests.
        shown: Requests that contained the secret.
        ahead: Seconds that the clock of its answers is ahead.
        changed: Changes the bodies of answers.
        scripted: Gives the answer to a request in place of the server, or None.
        framing: How answers say where their bodies end.
        log: The requests, in order.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        port: int,
        decide: Decision,
        stall_seconds: float,
        done: Callable[[int], None] | None,
        dropped: frozenset[str],
        secret: bytes | None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.done = done
        self.dropped = _HOP_BY_HOP | dropped
        self.target = port
        self.decide = decide
        self.stall_seconds = stall_seconds
        self.met: Counter[Fault] = Counter()
        self.requests = 0
        self.shown: list[str] = []
        self.ahead = 0.0
        self.changed: Callable[[bytes], bytes] = bytes
        self.scripted: Callable[[Request], Answer | None] = lambda _: None
        self.framing = Framing.LENGTH
        self.log: list[Request] = []
        self.scheme = "http"
        self._secret = secret
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """For AWS_ENDPOINT_URL_S3."""
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def secure(self, context: ssl.SSLContext) -> None:
        """Answer by TLS from now on."""
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.scheme = "https"

    def next_request(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[Request, Fault | None]:
        """The request that just came, and what happens to it."""
        sent = (path.encode(), repr(headers).encode(), body)
        if self._secret is not None and any(self._secret in part for part in sent):
            self.shown.append(f"{method} {path}")
        with self._lock:
            number, self.requests = self.requests, self.requests + 1
            request = Request(number, method, path, headers, body)
            self.log.append(request)
            fault = self.decide(request)
            if fault is not None:
                self.met[fault] += 1
        return request, fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it holds the body of an answer back until its head is acknowledged: 40 ms
    server: Proxy

    def handle_any(self) -> None:
        body = self._read_body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        request, fault = self.server.next_request(self.command, self.path, headers, body)
        scripted = self.server.scripted(request)
        if scripted is not None:
            self._give(scripted)
        elif fault in _REFUSALS:
            self._give(refusal(*_REFUSALS[fault]))
        elif fault is Fault.RESET_BEFORE:
            self._reset()
        elif fault is Fault.STALL:
            time.sleep(self.server.stall_seconds)
            self._reset()
        else:
            self._pass_on(request, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _pass_on(self, request: Request, fault: Fault | None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=600)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in self.server.dropped}
            connection.request(self.command, self.path, request.body or None, headers)
            answer = connection.getresponse()
            content = self.server.changed(answer.read())
        except OSError:  # the server is down
            self._reset()
            return
        finally:
            connection.close()
        if self.server.done is not None:
            self.server.done(request.number)
        if fault is Fault.RESET_AFTER:
            self._reset()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP | _OWN:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        if answer.status in {204, 304} or self.command == "HEAD" or self.server.framing is Framing.LENGTH:
            if answer.status not in {204, 304} and length is not None:
                self.send_header("Content-Length", length)
            self.end_headers()
            self._write(content, fault)
        else:
            self._write_unmeasured(content, fault)

    def _write(self, content: bytes, fault: Fault | None) -> None:
        whole = fault not in {Fault.TRUNCATE, Fault.SHORT}
        self.wfile.write(content if whole else content[: len(content) // 2])
        self.wfile.flush()
        if fault is Fault.TRUNCATE:
            self._reset()
        elif not whole:
            self.close_connection = True

    def _write_unmeasured(self, content: bytes, fault: Fault | None) -> None:
        chunked = self.server.framing is Framing.CHUNKED
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
        self.end_headers()
        short = fault in {Fault.TRUNCATE, Fault.SHORT}
        kept = content[: len(content) // 2] if short else content
        if chunked and kept:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(kept), kept))
        if chunked and not short:
            self.wfile.write(b"0\r\n\r\n")
        if not chunked:
            self.wfile.write(kept)  # cut off without any sign of it
        self.close_connection = not chunked or short

    def _give(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _reset(self) -> None:
        """Close without a farewell, as a machine that lost its power."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date of an answer, by the proxy's own clock."""
        return super().date_time_string((timestamp or time.time()) + self.server.ahead)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def proxied(
    port: int,
    decide: Decision = lambda _: None,
    *,
    stall_seconds: float = 30.0,
    done: Callable[[int], None] | None = None,
    dropped: Iterable[str] = (),
    secret: bytes | None = None,
) -> Iterator[Proxy]:
    """A running proxy before the server on `port`."""
    proxy = Proxy(port, decide, stall_seconds, done, frozenset(dropped), secret)
    threading.Thread(target=proxy.serve_forever, args=(_POLL_SECONDS,), daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
