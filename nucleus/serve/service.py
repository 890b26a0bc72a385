"""`Service`: what the routes of the API and of the page share: settings, model, admission of requests, segmentation."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nucleus.errors import RequestError, UsageError
from nucleus.predict.model import Model
from nucleus.serve.computation import Found, Ticket
from nucleus.serve.monitoring import Monitor
from nucleus.serve.uploads import SegmentOptions, Upload, open_upload
from nucleus.storage.bucket import Bucket

if TYPE_CHECKING:
    from nucleus.serve.following import ServedModel
    from nucleus.serve.lanes import Segmenter

__all__ = ["ServeSettings", "Service", "Token", "is_loopback", "read_token"]

_LEAST_TOKEN, _MOST_TOKEN = 16, 4096
_MAKE_ONE = "Run: openssl rand -hex 32 > FILE"
_MOST_LATER = 60
_MEMORY = 16
"""Number of requests over which the mean of the seconds of an answer goes."""


@dataclass(frozen=True)
class Token:
    """What requests must present, known by its sum alone: neither settings nor what Ray stores of them tell it.

    Attributes:
        sha256: SHA-256 of the token.
    """

    sha256: bytes = field(repr=False)

    @classmethod
    def of(cls, text: str) -> Token:
        """Return what is kept of a token."""
        return cls(hashlib.sha256(text.encode()).digest())

    def matches(self, presented: bytes) -> bool:
        """Return whether this is the token; it takes as long for a wrong one."""
        return hmac.compare_digest(hashlib.sha256(presented).digest(), self.sha256)


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a service.

    Attributes:
        host: Address that it listens on.
        port: Port; 0 for any free one.
        token: What requests must present, as `Authorization: Bearer TOKEN`; None on loopback alone.
        max_bytes: Largest body of a request, bytes.
        max_pixels: Largest image, all chosen planes of a stack together, px.
        max_seconds: How long a body may take to arrive, and after it an answer to be computed, seconds.
        max_requests: Number of requests that are accepted at once, the waiting ones included.
        images: Prefixes `s3://bucket/prefix` whose objects a request may name instead of sending an image.
        bucket: The project's bucket, for the page; None without one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: Token | None = None
    max_bytes: int = 128 << 20
    max_pixels: int = 100_000_000
    max_seconds: float = 120.0
    max_requests: int = 64
    images: tuple[str, ...] = ()
    bucket: Bucket | None = None

    def __post_init__(self) -> None:
        if self.token is None and not is_loopback(self.host):
            raise UsageError(
                f"Expected a token for a service on {self.host}, which other machines can reach; found none. Add: "
                "--token-file FILE, or leave --host out."
            )


def is_loopback(host: str) -> bool:
    """Return whether an address is that of this machine for itself alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> Token:
    """Return what is kept of the token in a file, without blanks around it.

    Raises:
        UsageError: The file cannot be read, or has no token of 16 to 4,096 printable characters without blanks.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"Expected a token in {path}; it cannot be read. {_MAKE_ONE}") from error
    if not _LEAST_TOKEN <= len(token) <= _MOST_TOKEN or not re.fullmatch(r"[!-~]+", token):
        raise UsageError(
            f"Expected a token of {_LEAST_TOKEN} to {_MOST_TOKEN:,} printable characters without blanks in {path}; "
            f"found {len(token)} characters. {_MAKE_ONE}"
        )
    return Token.of(token)


class Service:
    """A running service, for the routes that are added to it.

    A route of another module takes a request so:

        with service.admitted():                             # or RequestError, status 429
            found = await service.segment(Upload("a.tif", data), SegmentOptions(z="max"))
        found.nuclei, found.images[0].rows, found.images[0].labels.labels

    What it raises (`RequestError`, `ImageError` and the others of `nucleus.errors`) need not be caught: the application
    answers it as problem+json with the status that fits.

    Args:
        settings: Its settings.
        served: The model, which may be replaced by a newer version while the service runs.
        segmenter: What computes the requests.

    Attributes:
        settings: Its settings.
        monitor: Its figures.
        leaving: Whether it is about to end: it accepts no more requests, and finishes those that it has.
        requests: Number of requests that it is answering.
    """

    def __init__(self, settings: ServeSettings, served: ServedModel, segmenter: Segmenter) -> None:
        self.settings = settings
        self.served = served
        self.segmenter = segmenter
        self.leaving = False
        self.requests = 0
        self._tickets: set[Ticket] = set()
        self._mean = 1.0
        self.monitor = Monitor(lambda: self.requests, lambda: self.waiting)

    @property
    def model(self) -> Model:
        """The model that answers requests now."""
        return self.served.model

    @property
    def bucket(self) -> Bucket | None:
        """The project's bucket, or None."""
        return self.settings.bucket

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request among those at once, for the block.

        Raises:
            RequestError: There are as many as are accepted (429), or the service is about to end (503).
        """
        if self.leaving:
            raise RequestError("Expected a service that goes on; this one is about to end. Ask again.", 503, 1)
        if self.requests >= self.settings.max_requests:
            raise RequestError(
                f"Expected at most {self.settings.max_requests} requests at once; found one more. Ask again later.",
                429,
                min(_MOST_LATER, max(1, round(self._mean))),
            )
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    async def segment(self, upload: Upload, options: SegmentOptions) -> Found:
        """Segment an image, as `nucleus predict` does, within the limits of pixels and seconds.

        Raises:
            ImageError: The image is damaged, or there is no choice among its planes or channels.
            ModelError: The options do not fit the model.
            RequestError: The image is too large (413), or its turn (503) or its result (504) took too long.
            UsageError: An option has a wrong value.
        """
        started = time.monotonic()
        opened = await asyncio.to_thread(open_upload, upload, options, self.settings.max_pixels)
        ticket = Ticket(opened)
        self._tickets.add(ticket)
        try:
            async with asyncio.timeout(self.settings.max_seconds):
                found = await self.segmenter.segment(ticket)
        except TimeoutError as error:
            raise self._late(ticket) from error
        finally:
            ticket.given_up = True
            self._tickets.discard(ticket)
        self._mean += (time.monotonic() - started - self._mean) / _MEMORY
        self.monitor.segmented(found)
        return found

    @property
    def waiting(self) -> int:
        """Number of requests whose computation has not begun."""
        return sum(not ticket.started for ticket in self._tickets)

    def _late(self, ticket: Ticket) -> RequestError:
        limit = f"{self.settings.max_seconds:g} s"
        if ticket.started:
            return RequestError(
                f"Expected {ticket.opened.upload.name} to be segmented within {limit}; it takes longer. Cut it into "
                "tiles, or run nucleus predict on your own machine.",
                504,
            )
        return RequestError(f"Expected a turn within {limit}; others came before. Ask again later.", 503, 5)
