"""Connections that bring no request, or leave an answer unread, are cut off; one too many is refused."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from nucleus.serve import connections
from nucleus.serve.connections import bounded_protocol

SECONDS = 600
ASKED = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@asynccontextmanager
async def listening(answer: Callable[[], bytes], most: int = 8) -> AsyncIterator[tuple[Callable[[], Any], ServerState]]:
    """A server of an application that answers after three looks at its connection; opens connections to it."""
    state = ServerState()

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await asyncio.sleep(3 * connections._LOOK_SECONDS)
        body = answer()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    config = uvicorn.Config(app, log_config=None, http=bounded_protocol(most), timeout_keep_alive=SECONDS)
    config.load()
    made = lambda: config.http_protocol_class(config=config, server_state=state, app_state={})  # noqa: E731
    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, asyncio.timeout(SECONDS):
        yield lambda: asyncio.open_connection("127.0.0.1", port), state


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LOOK_SECONDS", 0.4)


async def drip(writer: asyncio.StreamWriter) -> None:
    """Send a header that never ends."""
    while not writer.is_closing():
        writer.write(b"a")
        await asyncio.sleep(0.01)


async def cut_off(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""


async def slow_headers() -> None:
    """Without a byte, with a part of a header, and after an answer; a request that is being answered is not."""
    async with listening(lambda: b"ok") as (connect, state):
        for first in (b"", ASKED, ASKED + b"\r\n"):
            reader, writer = await connect()
            writer.write(first)
            if first.endswith(b"\r\n\r\n"):
                assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            dripping = asyncio.create_task(drip(writer)) if first else None
            assert await cut_off(reader) == b""
            writer.close()
            if dripping:
                await asyncio.gather(dripping, return_exceptions=True)
        while state.connections:
            await asyncio.sleep(0.01)


async def unread_answers() -> None:
    """An answer that its client does not read is thrown away with its connection."""
    async with listening(lambda: bytes(64 << 20)) as (connect, state):
        _, writer = await connect()
        writer.write(ASKED + b"\r\n")
        while not state.total_requests:
            await asyncio.sleep(0.01)
        while state.connections:
            await asyncio.sleep(0.01)
        writer.close()


async def too_many() -> None:
    async with listening(lambda: b"ok", 1) as (connect, _state):
        first, asking = await connect()
        asking.write(ASKED + b"\r\n")
        reader, writer = await connect()
        refused = await cut_off(reader)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: " in refused
        assert b"Expected at most" in refused
        assert (await first.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        asking.close()
        writer.close()


async def malformed_requests() -> None:
    """They are told so as problem+json; what comes after an answer has begun only ends the connection."""
    failed: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
    async with listening(lambda: b"ok") as (connect, _state):
        for wrong in (b"no request\r\n\r\n", b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", ASKED + b"A: " + bytes(1 << 16)):
            reader, writer = await connect()
            writer.write(wrong)
            refused = await cut_off(reader)
            assert refused.startswith(b"HTTP/1.1 400 ")
            assert b"Content-Type: application/problem+json" in refused
            assert b"Expected a request of HTTP/1.1" in refused
            writer.close()
        reader, writer = await connect()
        writer.write(ASKED.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.write(b"no chunk\r\n")
        assert await cut_off(reader) == b""
        writer.close()
    assert failed == []


@pytest.mark.parametrize("run", [slow_headers, unread_answers, too_many, malformed_requests])
def test_connections(run: Callable[[], Any]) -> None:
    asyncio.run(run())
