"""What Ray Serve's proxies do about requests that a lost replica was computing: they ask another one, once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pydantic_core import to_json

from nucleus.lazy import fastapi

__all__ = ["PROXY_CALLBACK", "AskAgain", "proxy_middlewares"]

PROXY_CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "job.replica_loss.proxy_middlewares"}
"""Variable of the environment by which Ray Serve's proxies find `proxy_middlewares`."""
_KEPT_BYTES = 256 << 20
"""Bytes of bodies that a proxy keeps to send them again, of all requests together."""
_OURS = b"x-content-type-options"
"""Header of every answer of the application (`nucleus.serve.guards`), which none of Ray's own has."""
_LOST = (
    "Expected a replica that computes the answer; it was lost, and another one could not be asked, or was lost too. "
    "Ask again. If that happens each time, the image may need more memory than a replica has: cut it into tiles."
)
_NONE_THERE = "Expected a replica of the service; none is there yet, or none could start. Ask again later."

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


def proxy_middlewares() -> list[Any]:
    """Return what Ray Serve's proxies put around the applications."""
    return [fastapi.middleware.Middleware(AskAgain)]  # type: ignore[attr-defined]  # FastAPI imports the module itself


class AskAgain:
    """An ASGI application around that of a proxy, which ends without an answer if it loses the replica.

    A request changes nothing, so it is sent a second time, unless an answer has begun. If the second replica is lost
    too, or the proxy had no room for the body, the answer is a problem of status 503 with Retry-After, as it is where
    there is no replica.

    Args:
        app: The application of the proxy.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self.kept = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, answer = _Request(self, receive), _Answer(send)
        try:
            await self._app(_copy(scope), request.receive, answer.send)
            if not answer.begun and request.can_be_repeated:
                request.rewind()
                await self._app(_copy(scope), request.receive, answer.send)
        finally:
            request.forget()
        if not answer.begun and not request.disconnected:
            await answer.refuse(_LOST)


def _copy(scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Return a scope of which Ray may change the headers."""
    return {**scope, "headers": list(scope["headers"])}


class _Request:
    """The messages of a request, kept as long as they may be needed again and there is room."""

    def __init__(self, proxy: AskAgain, receive: Receive) -> None:
        self._proxy, self._receive = proxy, receive
        self._kept: list[Message] = []
        self._next = 0
        self._size = 0
        self._whole = True
        self.disconnected = False

    @property
    def can_be_repeated(self) -> bool:
        """Whether all that was received is kept, and someone waits for the answer."""
        return self._whole and not self.disconnected

    async def receive(self) -> Message:
        """Return the next message."""
        if self._next < len(self._kept):
            self._next += 1
            return self._kept[self._next - 1]
        message = await self._receive()
        self.disconnected = message["type"] == "http.disconnect"
        if self._whole and not self.disconnected:
            self._keep(message)
        return message

    def _keep(self, message: Message) -> None:
        size = len(message.get("body", b""))
        if self._proxy.kept + size > _KEPT_BYTES:
            self.forget()
            return
        self._proxy.kept += size
        self._size += size
        self._kept.append(message)
        self._next += 1

    def rewind(self) -> None:
        """Begin again with the first message."""
        self._next = 0

    def forget(self) -> None:
        """Free what is kept."""
        self._proxy.kept -= self._size
        self._kept, self._next, self._size, self._whole = [], 0, 0, False


class _Answer:
    """An answer on its way."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._replaced = False
        self.begun = False

    async def send(self, message: Message) -> None:
        """Send a message; what Ray says where there is no replica is said in other words."""
        if message["type"] == "http.response.start":
            ours = any(name == _OURS for name, _ in message["headers"])
            if message["status"] == 503 and not ours:
                self._replaced = True
                await self.refuse(_NONE_THERE)
        self.begun = True
        if not self._replaced:
            await self._send(message)

    async def refuse(self, detail: str) -> None:
        """Send a problem of status 503."""
        self.begun = True
        problem = to_json({"type": "about:blank", "title": "Service Unavailable", "status": 503, "detail": detail})
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(problem)).encode()),
            (b"retry-after", b"5"),
        ]
        await self._send({"type": "http.response.start", "status": 503, "headers": headers})
        await self._send({"type": "http.response.body", "body": problem})
