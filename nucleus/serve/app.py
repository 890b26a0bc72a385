"""The application: the routes of the API, and those that other modules add."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nucleus import __version__
from nucleus.lazy import fastapi
from nucleus.serve.service import Service
from nucleus.serve.uploads import SegmentOptions, Upload

__all__ = ["AddRoutes", "create_app"]

AddRoutes = Callable[[Service], "fastapi.APIRouter"]
"""Makes the routes of another module, such as the page: `page_router(service)`. They are included at `/`."""


def create_app(service: Service, more: Sequence[AddRoutes] = ()) -> fastapi.FastAPI:
    """Return the application of a service.

    Args:
        service: The service.
        more: Makers of further routes, which are included at `/`. Their errors of `nucleus.errors` are answered as
            problem+json; the token, the limit of bytes and the check of hosts hold for them too.
    """
    app = fastapi.FastAPI(title="nucleus", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(_api(service))
    for make in more:
        app.include_router(make(service))
    return app


def _api(service: Service) -> fastapi.APIRouter:
    router = fastapi.APIRouter()

    @router.post("/v1/segment")
    async def segment(request: fastapi.Request) -> fastapi.Response:
        with service.admitted():
            found = await service.segment(Upload("image", await request.body()), SegmentOptions())
        (image,) = found.images
        return fastapi.responses.JSONResponse({"nuclei": found.nuclei, "table": image.rows, "model": str(found.model)})

    return router
