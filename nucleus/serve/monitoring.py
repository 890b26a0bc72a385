"""`Monitor`: figures for Prometheus, and a line of the log for each request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from nucleus.lazy import prometheus_client
from nucleus.serve.computation import Found

__all__ = ["Monitor"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes that are asked again and again, and not logged."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_log = logging.getLogger("nucleus.serve")


class Monitor:
    """Figures of one service, in a registry of its own.

    Args:
        requests: Returns the number of requests that are being answered.
        waiting: Returns the number of those whose computation has not begun.
    """

    def __init__(self, requests: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        self._requests = self._counter(
            "nucleus_requests", "Requests by method, route and status.", "method", "route", "status"
        )
        self._seconds = prometheus_client.Histogram(
            "nucleus_request_seconds", "Seconds from the first byte of a request to the last of its answer.", ["route"],
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._pixels = self._counter("nucleus_pixels", "Pixels of the images that were segmented.")
        self._nuclei = self._counter("nucleus_nuclei", "Nuclei that were found.")
        self._gauge("nucleus_requests_at_once", "Requests for a segmentation that are being answered.", requests)
        self._gauge("nucleus_queue", "Those of them whose computation has not begun.", waiting)

    def _counter(self, name: str, text: str, *labels: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(name, text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, value: Callable[[], int]) -> None:
        prometheus_client.Gauge(name, text, registry=self._registry).set_function(value)

    def answered(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        """Count and log a request; only names of routes appear, nothing that a client can choose."""
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if route not in _QUIET:
            _log.info("%s %s %s %.3f s", method, route, status or "gone", seconds)

    def segmented(self, found: Found) -> None:
        """Count the pixels and nuclei of a result."""
        self._pixels.inc(sum(image.frame.shape[0] * image.frame.shape[1] for image in found.images))
        self._nuclei.inc(found.nuclei)

    def text(self) -> bytes:
        """Return the figures as Prometheus reads them."""
        return prometheus_client.generate_latest(self._registry)
