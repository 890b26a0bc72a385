"""`Guard`: what every request must pass before a route sees it, and the limits on its body.

It checks the host and the origin, against pages of other sites that a browser on this machine shows; the token; and
while a body arrives, its size and its pace. It counts and logs each request.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from nucleus.errors import RequestError
from nucleus.serve.problems import problem_of
from nucleus.serve.service import is_loopback

if TYPE_CHECKING:
    from nucleus.serve.monitoring import Monitor
    from nucleus.serve.service import ServeSettings, Token

__all__ = ["OPEN_PATHS", "Guard"]

OPEN_PATHS = ("/healthz", "/readyz", "/static/")
"""Paths, and beginnings of paths, that need no token, and `/`: they hold nothing that is worth one."""
_IDLE_SECONDS = 10.0
"""How long a client may leave off while it sends a body."""
_DRAINED_BYTES, _DRAINED_SECONDS = 16 << 20, 2.0
"""What is read of a refused body, so that its client comes to read the answer."""
_MOST_OPTIONS = 100
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_ALWAYS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application around another one.

    Args:
        app: The application.
        settings: Its settings.
        monitor: Counts and logs the requests.
    """

    def __init__(self, app: Application, settings: ServeSettings, monitor: Monitor) -> None:
        self._app = app
        self._settings = settings
        self._monitor = monitor

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        exchange = _Exchange(receive, send, self._settings, asked=b"expect" in headers)
        started = time.monotonic()
        routed = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope  # the server leaves the body out
        try:
            self._check(headers, scope["path"])
            _check_query(scope["query_string"])
        except RequestError as error:
            await problem_of(error)(scope, receive, exchange.send)
        else:
            await self._app(routed, exchange.receive, exchange.send)
        finally:
            self._monitor.answered({**routed, "method": scope["method"]}, exchange.status, time.monotonic() - started)

    def _check(self, headers: dict[bytes, bytes], path: str) -> None:
        """Raise `RequestError` for a request that must not reach a route."""
        host = headers.get(b"host", b"").decode("latin-1")
        own = self._settings.host
        name = _name_in(host)
        if is_loopback(own) and name not in {*_LOCAL, own}:  # --host 127.0.0.2 answers to it
            raise RequestError(
                f"Expected the name of this machine for itself, such as {own}, in the header Host; found another one. "
                "Ask for that name, or start the service with --host and --token-file.",
                421,
            )
        _check_origin(headers, host)
        if self._settings.token is not None and not _is_open(path):
            _check_token(headers.get(b"authorization", b""), self._settings.token)
        _check_encoding(headers)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._settings.max_bytes:
            raise _too_large(self._settings.max_bytes)


def _name_in(host: str) -> str:
    """Return the name in a header Host, without a port; "" if there is none.

    Raises `RequestError` if it is no name with or without a port: the framework takes addresses apart by it.
    """
    try:
        found = urlsplit(f"//{host}")
        if found.netloc == host and "@" not in host and found.port != 0:
            return found.hostname or ""
    except ValueError:  # of brackets, or of a port
        pass
    raise RequestError(
        f"Expected a name in the header Host, such as 127.0.0.1:8000; found {host[:80]!r}. Correct it.", 400
    )


def _place_of(origin: str) -> str | None:
    """Return the host and port of an origin; None if it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _is_open(path: str) -> bool:
    return path == "/" or any(path == each or (each[-1] == "/" and path.startswith(each)) for each in OPEN_PATHS)


def _check_origin(headers: dict[bytes, bytes], host: str) -> None:
    """Raise `RequestError` if a page of another site sent the request."""
    origin = headers.get(b"origin")
    site = headers.get(b"sec-fetch-site", b"none")
    same = origin is None or _place_of(origin.decode("latin-1")) == host
    navigates = headers.get(b"sec-fetch-mode") == b"navigate" and origin is None  # a link to the page
    if not same or (site in {b"cross-site", b"same-site"} and not navigates):
        raise RequestError(
            "Expected a request of this service's own page or of a program; found one of a page of another site. "
            "Ask from a program.",
            403,
        )


def _check_query(query: bytes) -> None:
    """Raise `RequestError` if an option is given twice: one of the two would be passed over without a word."""
    try:
        given = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=_MOST_OPTIONS)
    except ValueError as error:
        raise RequestError(f"Expected at most {_MOST_OPTIONS} options; found more. Leave some out.") from error
    twice = [name for name, count in Counter(name for name, _ in given).items() if count > 1]
    if twice:
        raise RequestError(f"Expected each option once; found {twice[0][:80]!r} more than once. Leave one out.")


def _check_encoding(headers: dict[bytes, bytes]) -> None:
    """Raise `RequestError` for a compressed body, which would be taken for a damaged image."""
    coding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if coding.strip().lower() != "identity":
        raise RequestError(
            f"Expected a body as it is; found Content-Encoding: {coding[:80]!r}. Send the file itself, which may be "
            "compressed inside (PNG, TIFF).",
            415,
        )


def _check_token(given: bytes, token: Token) -> None:
    kind, _, presented = given.partition(b" ")
    if kind.lower() != b"bearer" or not token.matches(presented.strip()):
        raise RequestError(
            "Expected the token of this service in the header Authorization, as Bearer TOKEN; found none, or another "
            "one. It is in the file that the service was started with (--token-file).",
            401,
        )


def _too_large(most: int) -> RequestError:
    return RequestError(
        f"Expected a body of at most {most:,} bytes; found a larger one. Compress the image or cut it into tiles, or "
        "start the service with a larger --max-bytes.",
        413,
    )


class _Exchange:
    """The messages of one request and its answer."""

    def __init__(self, receive: Receive, send: Send, settings: ServeSettings, *, asked: bool) -> None:
        self._receive = receive
        self._send = send
        self._settings = settings
        self._ends = asyncio.get_running_loop().time() + settings.max_seconds
        self._bytes = 0
        self._whole = False
        self._asked = asked
        self.status = 0

    async def receive(self) -> Message:
        """Return the next message. Raises `RequestError` if the body is too large or too slow."""
        if self._whole:
            return await self._receive()
        message = await self._in_time()
        self._bytes += len(message.get("body", b""))
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        if self._bytes > self._settings.max_bytes:
            raise _too_large(self._settings.max_bytes)
        return message

    async def _in_time(self) -> Message:
        left = self._ends - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(self._receive(), max(0.0, min(_IDLE_SECONDS, left)))
        except TimeoutError as error:
            self._whole = True  # what may follow is not waited for
            raise RequestError(
                f"Expected the body within {self._settings.max_seconds:g} s, and no pause in it of "
                f"{_IDLE_SECONDS:g} s; it takes longer. Send it again, by a faster network.",
                408,
            ) from error

    async def send(self, message: Message) -> None:
        """Send a message; an answer that comes before the whole body ends the connection."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            await self._drain()
            given = {name.lower() for name, _ in message["headers"]}
            more = [(name, value) for name, value in _ALWAYS.items() if name not in given]
            more += [(b"connection", b"close")] if self.status in {408, 413} else []
            more += [(b"www-authenticate", b"Bearer")] if self.status == 401 else []
            message = {**message, "headers": [*message["headers"], *more]}
        await self._send(message)

    async def _drain(self) -> None:
        """Read what the client of a refused request still sends, for a while: it reads the answer only after that."""
        ends = asyncio.get_running_loop().time() + _DRAINED_SECONDS
        most = self._bytes + _DRAINED_BYTES
        if self._asked and not self._bytes:  # it waits for leave to send (Expect: 100-continue)
            return
        while self.status >= 400 and not self._whole and self._bytes < most:
            try:
                left = ends - asyncio.get_running_loop().time()
                message = await asyncio.wait_for(self._receive(), max(0.0, left))
            except TimeoutError:
                return
            self._bytes += len(message.get("body", b""))
            self._whole = message["type"] != "http.request" or not message.get("more_body", False)
