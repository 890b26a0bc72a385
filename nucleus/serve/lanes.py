"""Where requests wait and are computed: small images together in one lane, large ones one by one in another.

A large image takes minutes, in which small ones go on. In each lane the first come are the first served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, TypeVarTuple

from nucleus.predict.model import IMAGES_AT_ONCE, Model
from nucleus.serve.computation import SMALL_PIXELS, Found, Ticket, segment_alone, segment_together

__all__ = ["Lanes", "Segmenter"]

_DECODED_AT_ONCE = 2 * IMAGES_AT_ONCE
_DECODERS = 2

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")
Computation = Callable[[Sequence[Ticket]], Coroutine[Any, Any, list[Found | Exception | None]]]
Batch = Callable[[Ticket], Coroutine[Any, Any, Found | None]]


class Segmenter(Protocol):
    """What computes the tickets of a service: `Lanes`, or another for tests and for Ray Serve."""

    async def segment(self, ticket: Ticket) -> Found:
        """Compute a ticket. Raises what its computation raises."""

    def close(self) -> None:
        """Wait for what is being computed, and free the threads."""


class Lanes:
    """Threads that compute tickets, and the queues before them.

    Args:
        model: Returns the model at the time of a computation: it may be replaced by a newer version.
        together: Computes a small ticket with others that wait, None if it is large for the network; by default, a
            queue of this process.
    """

    def __init__(self, model: Callable[[], Model], together: Batch | None = None) -> None:
        self._model = model
        self._together = together or _Queue(self.compute).put
        self._decoding = ThreadPoolExecutor(_DECODERS, "nucleus-decode")
        self._small = ThreadPoolExecutor(1, "nucleus-small")
        self._large = ThreadPoolExecutor(1, "nucleus-large")
        self._room = asyncio.Semaphore(_DECODED_AT_ONCE)

    async def segment(self, ticket: Ticket) -> Found:
        """Compute a ticket. Raises what its computation raises."""
        opened = ticket.opened
        if opened.pixels <= SMALL_PIXELS and len(opened.chosen) == 1:
            async with self._room:  # few images are decoded before their turn
                ticket.sources = [await _in(self._decoding, opened.source, opened.chosen[0])]
                found = await self._together(ticket)
            ticket.sources = []
            if found is not None:
                return found
        return await _in(self._large, segment_alone, self._model(), ticket)

    async def compute(self, tickets: Sequence[Ticket]) -> list[Found | Exception | None]:
        """Compute small tickets together, in the thread for them; see `segment_together`."""
        return await _in(self._small, segment_together, self._model(), tickets)

    def close(self) -> None:
        """Wait for what is being computed, and free the threads."""
        for pool in (self._decoding, self._small, self._large):
            pool.shutdown(cancel_futures=True)


async def _in(pool: ThreadPoolExecutor, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


class _Queue:
    """Tickets that wait for a computation of several; whoever finds none running starts one with all that wait."""

    def __init__(self, compute: Computation) -> None:
        self._compute = compute
        self._waiting: list[tuple[Ticket, asyncio.Future[Found | None]]] = []
        self._running: asyncio.Task[None] | None = None

    async def put(self, ticket: Ticket) -> Found | None:
        """Compute a ticket with others; see `segment_together`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((ticket, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        found: Found | None = await future
        return found

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:IMAGES_AT_ONCE], self._waiting[IMAGES_AT_ONCE:]
            batch = [(ticket, future) for ticket, future in batch if not future.done()]
            try:
                results = await self._compute([ticket for ticket, _ in batch])
            except Exception as error:  # each of them is answered
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                _settle(future, result)


def _settle(future: asyncio.Future[Found | None], result: Found | Exception | None) -> None:
    if future.done():  # nobody waits any more
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
