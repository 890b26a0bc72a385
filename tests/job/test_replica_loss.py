"""A request that loses its replica is asked of another one, once, if nothing of its answer was sent."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from job import replica_loss
from job.replica_loss import AskAgain

Messages = list[dict[str, Any]]
BODY: Messages = [
    {"type": "http.request", "body": b"one", "more_body": True},
    {"type": "http.request", "body": b"two", "more_body": False},
]
OURS = [(b"x-content-type-options", b"nosniff")]


def start(status: int, headers: list[tuple[bytes, bytes]] | None = None) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": OURS if headers is None else headers}


DONE = [start(200), {"type": "http.response.body", "body": b"done"}]


class Proxy:
    """Stands for Ray's proxy: reads a number of messages, and answers with others; nothing if it lost the replica."""

    def __init__(self, *tries: tuple[int, Messages]) -> None:
        self._tries: Iterator[tuple[int, Messages]] = iter(tries)
        self.read: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["headers"].append((b"x-request-id", b"1"))
        assert len(scope["headers"]) == 1
        reads, answers = next(self._tries)
        self.read.append(b"".join([(await receive()).get("body", b"") for _ in range(reads)]))
        for message in answers:
            await send(message)


def ask(proxy: Proxy, messages: Messages = BODY) -> tuple[Messages, AskAgain]:
    """What the client receives, and the middleware."""
    asking, sent, coming = AskAgain(proxy), [], iter(messages)

    async def receive() -> dict[str, Any]:
        return next(coming)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asking({"type": "http", "headers": []}, receive, send))
    return sent, asking


@pytest.mark.parametrize("before", [0, 1, 2])
def test_another_replica_is_asked(before: int) -> None:
    """With the whole body, whatever of it the lost one had read; and the body is forgotten after that."""
    proxy = Proxy((before, []), (2, DONE))
    sent, asking = ask(proxy)
    assert sent == DONE
    assert proxy.read[1] == b"onetwo"
    assert asking.kept == 0


def test_what_is_answered_is_not_asked_again() -> None:
    for answered in (DONE, DONE[:1], [start(500), DONE[1]], [start(503), DONE[1]]):
        assert ask(Proxy((2, answered)))[0] == answered
    assert ask(Proxy((2, []), (2, [])), [*BODY[:1], {"type": "http.disconnect"}])[0] == []


@pytest.mark.parametrize("kind", ["lost twice", "no room", "none there"])
def test_what_cannot_be_answered(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "no room":
        monkeypatch.setattr(replica_loss, "_KEPT_BYTES", 5)
    tries = {"lost twice": [(2, []), (2, [])], "none there": [(2, [start(503, []), DONE[1]])]}.get(kind, [(2, [])])
    sent, asking = ask(Proxy(*tries))  # type: ignore[arg-type]  # tuples of lists
    headers = dict(sent[0]["headers"])
    assert (sent[0]["status"], headers[b"content-type"], len(sent)) == (503, b"application/problem+json", 2)
    assert int(headers[b"retry-after"]) > 0
    assert json.loads(sent[1]["body"])["detail"].startswith("Expected a replica")
    assert asking.kept == 0
