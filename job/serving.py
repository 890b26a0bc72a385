"""The service on Ray: the same application as a deployment of Ray Serve, whose replicas follow the load.

Each replica holds the model, computes small images of several requests together (`serve.batch`), and follows the alias
by itself: it loads a newer version beside the old one, and switches when it is ready. The page is not served: what a
browser sends stays in one process. Of the token, Ray gets its SHA-256 alone.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from job.capacity import capacities
from job.cluster import connection
from job.replica_loss import PROXY_CALLBACK
from job.worker import limit_devices
from nucleus.config.names import EngineChoice
from nucleus.errors import JobError, RequestError
from nucleus.lazy import fastapi
from nucleus.predict.model import IMAGES_AT_ONCE
from nucleus.serve.app import create_app
from nucleus.serve.computation import Found, Ticket
from nucleus.serve.following import find_served
from nucleus.serve.lanes import Lanes
from nucleus.serve.service import ServeSettings, Service, read_token
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import BUCKET_VARIABLE, bucket_from_environment

__all__ = ["ServingArguments", "build", "deployed", "serve_on_cluster"]

_NAME = "nucleus"
_WAIT_SECONDS = 0.01
"""How long a small image waits for others."""


class ServingArguments(BaseModel):
    """Arguments of `build`, as a configuration of Ray Serve has them; those of `nucleus serve`.

    Attributes:
        model: A model in the bucket; an alias is followed. None for the one that comes along.
        engine: What computes the network.
        token_file: File with the token, on each machine: Ray reads this configuration on any.
        images: Prefixes whose images requests may name.
        max_bytes: Largest body of a request, bytes.
        max_pixels: Largest image, px.
        max_seconds: How long a body may take to arrive, and an answer to be computed, seconds.
        max_requests: Requests that a replica accepts at once.
        cpus: CPUs of a replica.
        gpus: GPUs of a replica, 0 or 1.
        least: Smallest number of replicas.
        most: Largest number of replicas.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    engine: EngineChoice = "auto"
    token_file: str
    images: tuple[str, ...] = ()
    max_bytes: int = ServeSettings.max_bytes
    max_pixels: int = ServeSettings.max_pixels
    max_seconds: float = ServeSettings.max_seconds
    max_requests: int = ServeSettings.max_requests
    cpus: int = 1
    gpus: int = 0
    least: int = 1
    most: int = 8


def build(arguments: ServingArguments) -> Any:
    """Return the application for a configuration of Ray Serve: `import_path: job.serving:build`.

    Raises:
        UsageError: The file with the token cannot be read.
    """
    token = read_token(Path(arguments.token_file))
    limits = {name: getattr(arguments, name) for name in ("max_bytes", "max_pixels", "max_seconds", "max_requests")}
    bucket = Bucket(bucket_from_environment()) if os.environ.get(BUCKET_VARIABLE) else None
    settings = ServeSettings(host="0.0.0.0", token=token, images=arguments.images, bucket=bucket, **limits)  # noqa: S104  the proxies' address
    return _application(settings, arguments)


def serve_on_cluster(
    model: str | None, settings: ServeSettings, *, engine: EngineChoice = "auto", started: Callable[[str], None]
) -> None:
    """Serve on a Ray cluster until the process is told to end; see `deployed`.

    Args:
        model: What `nucleus.registry.find_model` takes; each machine pulls it from the bucket.
        settings: Settings of the service.
        engine: What computes the network.
        started: Called with a line for people when requests are accepted.

    Raises:
        JobError: Ray cannot be reached or started, or no replica could start.
    """
    with deployed(model, settings, engine=engine):
        started(f"http://{settings.host}:{settings.port}/v1/segment on Ray Serve (to stop it: Ctrl-C)")
        threading.Event().wait()


@contextmanager
def deployed(model: str | None, settings: ServeSettings, *, engine: EngineChoice = "auto") -> Iterator[None]:
    """Serve on the Ray cluster at hand, or on a new one on this machine, for the block.

    Args:
        model: What `nucleus.registry.find_model` takes; each machine pulls it from the bucket.
        settings: Settings of the service.
        engine: What computes the network.

    Raises:
        JobError: Ray cannot be reached or started, or no replica could start.
    """
    from ray import serve

    with connection():
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        cpus, gpus = (capacities()[kind] for kind in ("CPU", "GPU"))
        one, most = (1, gpus.most) if gpus.most else (0, cpus.most)
        arguments = ServingArguments(model=model, engine=engine, token_file="", gpus=one, most=max(1, int(most)))
        _check_free()
        serve.start(
            http_options={"host": settings.host, "port": settings.port},
            controller_options={"runtime_env": {"env_vars": PROXY_CALLBACK}},
        )
        try:
            serve.run(_application(settings, arguments), name=_NAME, route_prefix="/")
            yield
        finally:
            serve.shutdown()


def _check_free() -> None:
    """Raise `JobError` if Ray Serve has applications on the cluster: they would end with this one."""
    from ray import serve

    others = sorted(serve.status().applications)
    if others:
        raise JobError(
            f"Expected a cluster without applications of Ray Serve; found {', '.join(others)}. Use another cluster, or "
            "add the application to their configuration: serve deploy, with import_path job.serving:build."
        )


def _without_page(_service: Service) -> fastapi.APIRouter:
    """Return the route of the page, which says where it is."""
    router = fastapi.APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> None:
        raise RequestError(
            "Expected an address of /openapi.json, such as /v1/segment; found that of the page, which a cluster does "
            "not serve: the images of a browser stay in one process. For the page run: nucleus serve, without --ray.",
            404,
        )

    return router


def _application(settings: ServeSettings, arguments: ServingArguments) -> Any:
    """Return the application as Ray Serve has it, with its arguments bound."""
    from ray import serve

    class Replica:
        """A replica: ready when its model has been loaded and has segmented an image."""

        def __init__(self, settings: ServeSettings, arguments: ServingArguments) -> None:
            _limit(arguments)
            served = find_served(arguments.model, arguments.engine)
            self._lanes = Lanes(lambda: served.model, self._together)
            self._service = Service(settings, served, self._lanes)

        def __serve_build_asgi_app__(self) -> Any:
            return create_app(self._service, [_without_page])

        async def _together(self, ticket: Ticket) -> Found | None:
            found: Found | Exception | None = (await self._batched(ticket))[0]
            if isinstance(found, Exception):
                raise found
            return found

        @serve.batch(max_batch_size=IMAGES_AT_ONCE, batch_wait_timeout_s=_WAIT_SECONDS)
        async def _batched(self, tickets: list[Ticket]) -> list[tuple[Found | Exception | None]]:
            return [(found,) for found in await self._lanes.compute(tickets)]

    deployed: Any = serve.deployment(
        name="Service",
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        autoscaling_config={
            "min_replicas": arguments.least,
            "max_replicas": arguments.most,
            "target_ongoing_requests": IMAGES_AT_ONCE,
        },
        max_ongoing_requests=settings.max_requests,
        graceful_shutdown_timeout_s=settings.max_seconds,
    )
    return deployed(serve.ingress()(Replica)).bind(settings, arguments)


def _limit(arguments: ServingArguments) -> None:
    """Limit this process to the cores and the GPU that Ray has assigned."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(arguments.cpus)  # of ONNX Runtime too
    if arguments.gpus:
        limit_devices(arguments.cpus, arguments.gpus)
