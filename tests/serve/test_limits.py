"""What a request may cost, and who may ask: each limit refuses what is beyond it, and lets through what is not."""

import asyncio
import pickle
import struct
import threading
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from nucleus.errors import UsageError
from nucleus.serve import guards
from nucleus.serve.computation import Found, Ticket, segment_together
from nucleus.serve.following import ServedModel
from nucleus.serve.lanes import Lanes
from nucleus.serve.problems import PROBLEM
from nucleus.serve.service import ServeSettings, Token, is_loopback, read_token
from tests.serve.conftest import Connect

TOKEN = "0123456789abcdefABCDEF"


class Held:
    """Computes a ticket when the test allows it."""

    def __init__(self, *, starts: bool = False) -> None:
        self.starts = starts
        self.tickets: list[Ticket] = []
        self.go = asyncio.Event()

    async def segment(self, ticket: Ticket) -> Found:
        self.tickets.append(ticket)
        ticket.started = self.starts
        await self.go.wait()
        return Found(None, [])  # type: ignore[arg-type]  # it has no images that need it

    def close(self) -> None:
        pass


async def pieces(data: bytes, count: int) -> AsyncIterator[bytes]:
    """A body in pieces, without a length."""
    for part in range(count):
        yield data[part * len(data) // count : (part + 1) * len(data) // count]


def test_bytes(connect: Connect, small_png: bytes) -> None:
    """By the length that is declared, and by what arrives, also as a form or where a length is not true."""
    client = connect(max_bytes=len(small_png))
    assert client.post(small_png).status_code == 200
    assert client.post(pieces(small_png, 3)).status_code == 200
    declared, counted = client.post(small_png + b"\0"), client.post(pieces(small_png + b"\0", 3))
    lying = client.post(small_png + b"\0", **{"content-length": "5"})
    form = client.runner.run(client.ask("POST", "/v1/segment", files={"file": small_png}))
    for refused in (declared, counted, lying, form):
        assert (refused.status_code, refused.headers["content-type"]) == (413, PROBLEM)
        assert "--max-bytes" in refused.json()["detail"]
        assert refused.headers["connection"] == "close"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, data: bytes) -> bytes:
    """A PNG that declares a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_pixels_are_counted_before_they_are_decoded(
    connect: Connect, small_png: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(max_pixels=96 * 96)
    assert client.post(small_png).status_code == 200
    many = tmp_path / "many.tif"
    tifffile.imwrite(many, np.zeros((9, 64, 96), np.uint8), photometric="minisblack")
    channels = tmp_path / "channels.tif"
    tifffile.imwrite(channels, np.zeros((9, 64, 96), np.uint8), photometric="minisblack", planarconfig="separate")
    zeros = zlib.compress(bytes(30_001 * 30_000), 9)
    monkeypatch.setattr("imagecodecs.png_decode", lambda *_, **__: pytest.fail("it was decoded"))
    cases = [
        (bomb(30_000, 30_000, zeros), "", 413),
        (bomb(1 << 30, 1 << 30, b"x"), "", 422),  # more than its bytes can hold
        (many.read_bytes(), "?z=0", 200),
        (many.read_bytes(), "?z=all", 413),
        (many.read_bytes(), "?z=max", 413),
        (channels.read_bytes(), "?channel=0", 413),
    ]
    for data, query, status in cases:
        answer = client.post(data, query)
        assert answer.status_code == status, (query, answer.text[:300])
        assert status != 413 or "px" in answer.json()["detail"]


def test_seconds(connect: Connect, small_png: bytes) -> None:
    """503 for a request whose turn does not come, 504 for one whose computation does not end; both free their place."""
    for starts, status in ((False, 503), (True, 504)):
        held = Held(starts=starts)
        client = connect(held, max_seconds=1.0)
        refused = client.post(small_png)
        assert refused.status_code == status
        assert ("retry-after" in refused.headers) is (status == 503)
        assert [ticket.given_up for ticket in held.tickets] == [True]
        assert client.service.requests == 0


def test_a_computation_that_nobody_waits_for_ends(served: ServedModel, small_png: bytes) -> None:
    from nucleus.serve.uploads import SegmentOptions, Upload, open_upload

    opened = open_upload(Upload("a.png", small_png), SegmentOptions(), 1 << 20)
    ticket = Ticket(opened, [opened.source(opened.chosen[0])], given_up=True)
    (found,) = segment_together(served.model, [ticket])
    assert isinstance(found, Exception)
    assert not ticket.started


def test_requests_at_once(connect: Connect, small_png: bytes) -> None:
    """One more is refused with a time to come again, before its body is read; a place that is freed is given."""
    held = Held()
    client = connect(held, max_requests=2)
    read: list[bytes] = []

    async def unread() -> AsyncIterator[bytes]:
        read.append(b"")
        yield small_png

    async def crowd() -> Any:
        first = [asyncio.create_task(client.ask("POST", "/v1/segment", content=small_png)) for _ in range(2)]
        while len(held.tickets) < 2:
            await asyncio.sleep(0.01)
        assert "nucleus_queue 2.0" in (await client.ask("GET", "/metrics")).text
        headers = {"expect": "100-continue"}
        refused = await client.ask("POST", "/v1/segment", content=unread(), headers=headers)
        held.go.set()
        done = [answer.status_code for answer in await asyncio.gather(*first)]
        return refused, done, (await client.ask("POST", "/v1/segment", content=small_png)).status_code

    refused, done, later = client.runner.run(crowd())
    assert (refused.status_code, int(refused.headers["retry-after"]) >= 1, read) == (429, True, [])
    assert (done, later) == ([200, 200], 200)


def test_slow_bodies(connect: Connect, small_png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause, and a body that takes too long as a whole, are refused; they hold no place any more."""
    never = asyncio.Event()

    async def pausing() -> AsyncIterator[bytes]:
        yield small_png[:100]
        await never.wait()

    async def trickling() -> AsyncIterator[bytes]:
        while True:
            yield b"\0"
            await asyncio.sleep(0.005)

    client = connect(max_seconds=0.3)
    monkeypatch.setattr(guards, "_DRAINED_SECONDS", 0.01)
    slow = client.post(trickling())
    monkeypatch.setattr(guards, "_IDLE_SECONDS", 0.05)
    for refused in (slow, client.post(pausing())):
        assert (refused.status_code, refused.headers["connection"]) == (408, "close")
    assert client.service.requests == 0


def test_large_images_do_not_hold_up_small_ones(connect: Connect, served: ServedModel, small_png: bytes) -> None:
    """A small image is answered while a large one is computed."""
    lanes = Lanes(lambda: served.model)
    begun, go = threading.Event(), threading.Event()

    def large() -> None:
        begun.set()
        go.wait(600)

    busy = lanes._large.submit(large)
    begun.wait(600)
    client = connect(lanes)
    assert client.post(small_png).status_code == 200
    go.set()
    busy.result()


def test_images_that_the_options_make_large_are_computed_alone(connect: Connect, small_png: bytes) -> None:
    """By their size for the network; the result is the same."""
    client = connect()
    before = client.post(small_png, "?diameter=8").json()["table"]
    from nucleus.serve import computation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(computation, "SMALL_PIXELS", 96 * 96)
        called = []
        patch.setattr("nucleus.serve.lanes.segment_alone", lambda *a: called.append(1) or computation.segment_alone(*a))
        assert client.post(small_png, "?diameter=8").json()["table"] == before
    assert called == [1]


def test_token(connect: Connect, small_png: bytes) -> None:
    client = connect(token=Token.of(TOKEN), host="0.0.0.0")
    for wrong in ({}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": f"Basic {TOKEN}"}):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", "/static"):
            refused = client.get(path, **wrong)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert client.post(small_png, **wrong).status_code == 401
    assert client.get("/v1/models", authorization=f"Bearer {TOKEN}").status_code == 200
    assert client.post(small_png, authorization=f"bearer {TOKEN}").status_code == 200
    assert [client.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]


def test_the_token_is_nowhere(connect: Connect, small_png: bytes, caplog: pytest.LogCaptureFixture) -> None:
    client = connect(token=Token.of(TOKEN))
    with caplog.at_level("DEBUG"):
        answers = [
            client.post(small_png, authorization=f"Bearer {TOKEN}"),
            client.get("/v1/models", authorization=TOKEN),
        ]
    assert TOKEN.encode() not in pickle.dumps(client.service.settings)
    assert TOKEN not in repr(client.service.settings) + caplog.text + "".join(answer.text for answer in answers)
    assert "POST /v1/segment 200" in caplog.text


def test_other_machines_need_a_token(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(UsageError, match="--token-file"):
            ServeSettings(host=host)
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        assert ServeSettings(host=host).token is None
    for number, content in enumerate(["short", "", "with a blank in the middle", "é" * 20, "x" * 5000]):
        path = tmp_path / str(number)
        path.write_text(content)
        with pytest.raises(UsageError, match="token") as raised:
            read_token(path)
        assert not content or content not in str(raised.value)
    path.write_text(f"\n{TOKEN}\n")
    assert read_token(path) == Token.of(TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000", "LOCALHOST:1"])
def test_names_of_this_machine(connect: Connect, host: str) -> None:
    assert connect().get("/v1/models", host=host).status_code == 200


def test_another_loopback_address_answers_to_its_name(connect: Connect) -> None:
    client = connect(host="127.0.0.2")
    assert [client.get("/v1/models", host=host).status_code for host in ("127.0.0.2:8000", "127.0.0.3")] == [200, 421]


@pytest.mark.parametrize("host", ["[", "127.0.0.1:abc", "127.0.0.1:99999", "127.0.0.1/a", "a@127.0.0.1", "::1"])
def test_malformed_hosts_are_refused(connect: Connect, host: str) -> None:
    """Also where other machines ask, by whatever name: what the page does with the port must not fail."""
    for settings in ({}, {"host": "::", "token": Token.of(TOKEN)}):
        answer = connect(**settings).get("/healthz", host=host)
        assert (answer.status_code, repr(host) in answer.json()["detail"]) == (400, True)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "evil.example:8000", "a b"])
def test_other_names_are_refused_on_loopback(connect: Connect, host: str) -> None:
    """A page of another site that has its name point to 127.0.0.1 (DNS rebinding) sends that name."""
    assert connect().get("/v1/models", host=host).status_code == 421


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
    ],
)
def test_pages_of_other_sites(connect: Connect, headers: dict[str, str], status: int) -> None:
    """They neither read (no CORS) nor write; a link from one opens the page."""
    answer = connect().get("/v1/models", **headers)
    assert answer.status_code == status
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_client_that_goes_away(connect: Connect, small_png: bytes) -> None:
    """Its computation is given up, and its place is free."""
    held = Held()
    client = connect(held)

    async def leaves() -> None:
        gone = asyncio.Event()
        messages = iter([{"type": "http.request", "body": small_png, "more_body": False}])

        async def receive() -> Any:
            try:
                return next(messages)
            except StopIteration:
                await gone.wait()
                return {"type": "http.disconnect"}

        async def send(_message: Any) -> None:
            pass

        headers = [(b"host", b"127.0.0.1")]
        scope = {"type": "http", "method": "POST", "path": "/v1/segment", "headers": headers, "query_string": b""}
        asked = asyncio.create_task(client.app({**scope, "http_version": "1.1", "scheme": "http"}, receive, send))
        while not held.tickets and not asked.done():
            await asyncio.sleep(0.01)
        gone.set()
        await asked

    client.runner.run(leaves())
    assert ([ticket.given_up for ticket in held.tickets], client.service.requests) == ([True], 0)
