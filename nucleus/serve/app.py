"""The application: the routes of the API, and those that other modules add."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from pydantic_core import to_json

from nucleus import __version__
from nucleus.errors import RequestError
from nucleus.lazy import fastapi
from nucleus.serve.bodies import SegmentQuery, read_upload
from nucleus.serve.computation import Found
from nucleus.serve.guards import Guard
from nucleus.serve.problems import PROBLEM, add_problems
from nucleus.serve.representations import MEDIA_TYPES, chosen_type, represented
from nucleus.serve.service import Service
from nucleus.storage.files import temporary_folder

__all__ = ["AddRoutes", "create_app"]

AddRoutes = Callable[[Service], "fastapi.APIRouter"]
"""Makes the routes of another module, such as the page: `page_router(service)`. They are included at `/`."""
_POLL_SECONDS = 10.0
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODIES = {
    "image/*": _BINARY,
    "application/octet-stream": _BINARY,
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"file": {"type": "string", "format": "binary"}},
            "required": ["file"],
            "additionalProperties": False,
        }
    },
    "application/json": {
        "schema": {
            "type": "object",
            "properties": {"uri": {"type": "string", "pattern": "^s3://"}},
            "required": ["uri"],
            "additionalProperties": False,
        }
    },
}
_RESULT: dict[str, Any] = {
    "type": "object",
    "required": ["nuclei", "model", "width", "height", "seconds", "images", "table"],
    "properties": {
        "nuclei": {"type": "integer", "minimum": 0, "description": "Number of nuclei in all images."},
        "model": {"type": "string", "description": "NAME@VERSION."},
        "width": {"type": ["integer", "null"], "description": "px; null for images of several sizes."},
        "height": {"type": ["integer", "null"], "description": "px; null for images of several sizes."},
        "seconds": {"type": "number", "description": "From the whole request to the result."},
        "images": {"type": "array", "items": {"type": "object"}, "description": "A row of images.csv for each image."},
        "table": {"type": "array", "items": {"type": "object"}, "description": "A row of nuclei.csv for each nucleus."},
    },
}
_PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What was expected, what was found, and what helps."},
    },
}


def create_app(service: Service, more: Sequence[AddRoutes] = ()) -> fastapi.FastAPI:
    """Return the application of a service.

    Args:
        service: The service.
        more: Makers of further routes, which are included at `/`. Their errors of `nucleus.errors` are answered as
            problem+json; the token, the limit of bytes and the check of hosts hold for them too.
    """
    app = fastapi.FastAPI(
        title="nucleus",
        version=__version__,
        summary="Find, count and measure cell nuclei in microscope images.",
        docs_url=None,  # it would load code of another site
        redoc_url=None,
        redirect_slashes=False,  # a client that does not follow would take an empty answer for a result
        lifespan=lambda _: _running(service),
        responses={"default": {"description": "A problem.", "content": {PROBLEM: {"schema": _PROBLEM_SCHEMA}}}},
    )
    app.include_router(_api(service))
    app.include_router(_health(service))
    for make in more:
        app.include_router(make(service))
    add_problems(app)
    app.add_middleware(Guard, settings=service.settings, monitor=service.monitor)
    return app


@asynccontextmanager
async def _running(service: Service) -> AsyncIterator[None]:
    """Follow the alias while the application runs."""
    following = asyncio.create_task(_follow(service)) if service.served.follows else None
    try:
        yield
    finally:
        service.leaving = True
        if following is not None:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
        service.segmenter.close()


async def _follow(service: Service) -> None:
    while True:
        await asyncio.sleep(_POLL_SECONDS)
        await asyncio.to_thread(service.served.look)


def _api(service: Service) -> fastapi.APIRouter:
    router = fastapi.APIRouter(prefix="/v1")
    answers = {name: {"schema": _RESULT if name == "application/json" else {}} for name in MEDIA_TYPES}

    @router.post(
        "/segment",
        summary="Segment an image",
        response_class=fastapi.Response,
        responses={200: {"description": "The nuclei, in the form that Accept asks for.", "content": answers}},
        openapi_extra={"requestBody": {"content": _BODIES}},
    )
    async def segment(request: fastapi.Request, query: Annotated[SegmentQuery, fastapi.Query()]) -> fastapi.Response:
        """Segment an image as `nucleus predict` does, and measure its nuclei."""
        media_type = chosen_type(", ".join(request.headers.getlist("accept")))
        settings = service.settings
        with service.admitted(), temporary_folder("serve") as folder:
            upload = await read_upload(request, query, settings.images, settings.max_bytes, folder)
            started = time.monotonic()
            found = await _unless_gone(request, service.segment(upload, query.options))
            seconds = time.monotonic() - started
            content = await asyncio.to_thread(represented, found, media_type, seconds, folder)
        return fastapi.Response(content, media_type=media_type, headers=_facts(found))

    @router.get("/models", summary="The model that answers, and a version that did not load")
    async def models() -> fastapi.Response:
        return _json({"models": service.served.description()})

    return router


async def _unless_gone(request: fastapi.Request, work: Coroutine[Any, Any, Found]) -> Found:
    """Return the result of some work, which ends early if the client goes away.

    Raises:
        RequestError: The client is gone; nobody reads this.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestError("Expected a client that waits for the answer; it is gone. Ask again.", 408)
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(request: fastapi.Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _facts(found: Found) -> dict[str, str]:
    """Return headers with what labels and outlines do not say."""
    warnings = [image.row["warning"] for image in found.images if image.row["warning"]]
    warning = {"Nucleus-Warning": "; ".join(warnings)[:1000]} if warnings else {}
    return {"Nucleus-Count": str(found.nuclei), "Nucleus-Model": str(found.model), **warning}


def _health(service: Service) -> fastapi.APIRouter:
    router = fastapi.APIRouter()

    @router.get("/healthz", summary="Whether the process answers")
    async def healthz() -> fastapi.Response:
        return _json({"status": "ok"})

    @router.get("/readyz", summary="Whether it accepts requests")
    async def readyz() -> fastapi.Response:
        return _json({"status": "leaving"}, 503) if service.leaving else _json({"status": "ready"})

    @router.get("/metrics", summary="Figures for Prometheus", response_class=fastapi.responses.PlainTextResponse)
    async def metrics() -> fastapi.Response:
        return fastapi.Response(service.monitor.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _json(content: object, status: int = 200) -> fastapi.Response:
    return fastapi.Response(to_json(content), status, media_type="application/json")
