"""Connections: how long one may go without a whole request or leave its answer unread, and how many there may be."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from pydantic_core import to_json

from nucleus.serve.problems import PROBLEM

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

__all__ = ["HEADER_BYTES", "bounded_protocol"]

HEADER_BYTES = 32 << 10
"""Largest header of a request."""
_LOOK_SECONDS = 10.0
"""Seconds between two looks at a connection."""
_LEAST_READ = 64 << 10
"""Bytes of an answer that a client must read between two looks."""


def bounded_protocol(most: int) -> type[H11Protocol]:
    """Return uvicorn's protocol with limits that it lacks: it would wait for the end of a header for ever.

    Each connection is looked at every ten seconds. It is cut off if it has brought no whole header since the look
    before, while no request of it was being answered; or if its client has read less than 64 KiB of a whole answer.

    Args:
        most: Connections at once; one more is answered 503 and closed.
    """
    from h11 import IDLE, SEND_RESPONSE  # noqa: PLC0415  of the extra `serve`
    from uvicorn.protocols.http.h11_impl import H11Protocol  # noqa: PLC0415  of the extra `serve`

    refusal = _answer(503, f"Expected at most {most:,} connections at once; found one more. Ask again later.")
    malformed = _answer(
        400,
        f"Expected a request of HTTP/1.1 with a header of at most {HEADER_BYTES:,} bytes; found something else. "
        "Correct the client.",
    )

    class Bounded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._seen: tuple[RequestResponseCycle | None, int] | None = (None, 0)
            self._timer = self.loop.call_later(_LOOK_SECONDS, self._look)
            if len(self.connections) > most:
                transport.write(refusal)
                transport.close()

        def send_400_response(self, msg: str) -> None:  # noqa: ARG002  uvicorn's own words
            if self.conn.our_state in {IDLE, SEND_RESPONSE}:  # else an answer has begun
                self.transport.write(malformed)
            self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            now = self._state()
            if now is not None and self._seen is not None and _stays(now, self._seen):
                self.transport.abort()
                return
            self._seen = now
            self._timer = self.loop.call_later(_LOOK_SECONDS, self._look)

        def _state(self) -> tuple[RequestResponseCycle | None, int] | None:
            """Return the last exchange and the bytes of its answer that are not sent; None while it is answered."""
            if self.cycle is not None and not self.cycle.response_complete:
                return None
            return self.cycle, self.transport.get_write_buffer_size()

    return Bounded


def _answer(status: int, detail: str) -> bytes:
    """Return the last answer on a connection: an error that no application sees."""
    title = HTTPStatus(status).phrase
    problem = to_json({"type": "about:blank", "title": title, "status": status, "detail": detail})
    later = "Retry-After: 5\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
    head = (
        f"HTTP/1.1 {status} {title}\r\nConnection: close\r\n{later}"
        f"Content-Type: {PROBLEM}\r\nContent-Length: {len(problem)}\r\n\r\n"
    )
    return head.encode() + problem


def _stays(now: tuple[object, int], before: tuple[object, int]) -> bool:
    """Return whether nothing has come of a connection between two looks."""
    (cycle, unread), (cycle_before, unread_before) = now, before
    return cycle is cycle_before and (unread == unread_before == 0 or unread > max(0, unread_before - _LEAST_READ))
