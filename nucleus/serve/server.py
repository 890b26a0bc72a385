"""The process: uvicorn on one address, its log, and its end, at which running requests are finished."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import socket
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import TYPE_CHECKING

from nucleus.errors import UsageError
from nucleus.lazy import fastapi, uvicorn
from nucleus.serve.connections import HEADER_BYTES, bounded_protocol
from nucleus.serve.service import ServeSettings, Service
from nucleus.surroundings import REUSES_ADDRESSES

if TYPE_CHECKING:
    from uvicorn import Server

__all__ = ["bound_socket", "run_server"]

_LEAVING_SECONDS = 2.0
"""How long `/readyz` is red before connections are refused: balancers look again within it."""
_KEPT_SECONDS = 5
_BACKLOG = 2048
_CONNECTIONS = 512
"""Fewer than the files that a process may have open, which are 1,024 by default."""


def run_server(app: fastapi.FastAPI, service: Service, bound: socket.socket, started: Callable[[str], None]) -> None:
    """Serve an application until SIGTERM or Ctrl-C; then finish the requests that are running.

    Args:
        app: The application.
        service: Its service.
        bound: Socket of its address, from `bound_socket`.
        started: Called with the address when it accepts requests.
    """
    _log_to_stderr()
    bound.listen(_BACKLOG)  # who comes before the application has started waits
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        http=bounded_protocol(max(_CONNECTIONS, 2 * service.settings.max_requests)),
        ws="none",
        timeout_keep_alive=_KEPT_SECONDS,
        timeout_graceful_shutdown=round(service.settings.max_seconds) + 1,
    )
    server = _server(config, service)
    started(_address(bound))
    server.run([bound])


def bound_socket(settings: ServeSettings) -> socket.socket:
    """Return a socket with the address of a service; nobody can connect before `run_server`.

    Raises:
        UsageError: The address is in use, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if REUSES_ADDRESSES:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((settings.host, settings.port))
    except (OSError, UnicodeError) as error:  # the second of a name that cannot be one
        made.close()
        raise UsageError(
            f"Expected a free port {settings.port} on {settings.host}; found an obstacle: "
            f"{getattr(error, 'strerror', None) or error}. Name another one: --port 0 takes any free one, and --host "
            "takes an address of this machine."
        ) from error
    return made


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr() -> None:
    """Write the log of the service and uvicorn's warnings to stderr, a line each with its time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    for name, level in (("nucleus.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _server(config: uvicorn.Config, service: Service) -> Server:
    """Return uvicorn's server with an end of our own: uvicorn would refuse connections at once."""

    class Leaving(uvicorn.Server):
        ends = math.inf

        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            """Have SIGTERM announce the end, and Ctrl-C end at once; the exit status is 0, as both are how it ends."""
            numbers = (signal.SIGTERM, signal.SIGINT)
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
            again, service.leaving = service.leaving, True
            if again or sig == signal.SIGINT:
                self.should_exit = True
                self.force_exit = again and sig == signal.SIGINT
            else:
                self.ends = time.monotonic() + _LEAVING_SECONDS

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or time.monotonic() > self.ends

    return Leaving(config)
