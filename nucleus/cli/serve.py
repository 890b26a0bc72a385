"""`nucleus serve`: the service, in this process or as a deployment of Ray Serve."""

import os
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

import job
import nucleus
from nucleus.cli.options import FiniteRange, engine_option
from nucleus.cli.output import note
from nucleus.cli.progress_bars import show_progress
from nucleus.config.names import EngineChoice
from nucleus.surroundings import check_can_train

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import APIRouter

    from nucleus.serve.service import ServeSettings, Service
    from nucleus.storage.bucket import Bucket

__all__ = ["serve"]


@click.command()
@click.option(
    "--model",
    metavar="NAME[@REF]",
    help="A model in the bucket, or a pulled folder. An alias, such as cells@production, is followed.  [default: "
    "nuclei, the model that comes along]",
)
@engine_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 for any free one."
)
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File with the token that requests must present. Needed for a --host that other machines can reach.",
)
@click.option(
    "--images",
    multiple=True,
    metavar="s3://BUCKET/PREFIX",
    help="Requests may name images below this prefix in place of sending one. Can be repeated.",
)
@click.option(
    "--max-bytes", type=click.IntRange(1), default=128 << 20, show_default=True, help="Largest body of a request."
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=100_000_000,
    show_default=True,
    help="Largest image, all chosen planes of a stack together.",
)
@click.option(
    "--max-seconds",
    type=FiniteRange(1, 86_400),
    default=120.0,
    show_default=True,
    help="How long a body may take to arrive, and an answer to be computed.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests that are accepted at once, the waiting ones included.",
)
@click.option(
    "--corrections",
    metavar="DIR|s3://BUCKET/PREFIX",
    help="Where the page saves corrections.  [default: corrections/ in NUCLEUS_BUCKET, or here without a bucket]",
)
@click.option(
    "--recipe",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Recipe of the runs that the page starts on the cluster of RAY_ADDRESS, with {dataset} and {model} in their "
    "places.  [default: the one that it shows]",
)
@click.option(
    "--ray", "on_ray", is_flag=True, help="Serve the API on a Ray cluster, by Ray Serve; replicas follow the load."
)
def serve(
    model: str | None,
    engine: EngineChoice,
    token_file: Path | None,
    images: tuple[str, ...],
    corrections: str | None,
    recipe: Path | None,
    on_ray: bool,
    **limits: "str | int | float",
) -> None:
    """Look at images, correct their nuclei, and segment images for other programs, by HTTP (extra `serve`).

    Open http://127.0.0.1:8000 in a browser: drop images, see their nuclei, correct them, and save the corrections for
    training (docs/page.md).

    POST an image to /v1/segment. The answer is JSON with the number of nuclei and their table, or what Accept asks for:
    application/geo+json, image/tiff or image/png (labels). The query has the options of nucleus predict, and the
    numbers are the same. /openapi.json describes it all, docs/service.md shows clients.

    Without --host it can be reached from this machine only. It ends by Ctrl-C or SIGTERM, after the requests that are
    running.
    """
    nucleus.lazy.need(*nucleus.lazy.SERVING)
    for prefix in images:
        nucleus.storage.parse_uri(prefix)
    token = None if token_file is None else nucleus.serve.read_token(token_file)
    settings = nucleus.serve.ServeSettings(token=token, images=images, bucket=_bucket(), **limits)  # type: ignore[arg-type]  # as click has checked
    for option, value in (("--corrections", corrections), ("--recipe", recipe)):
        if on_ray and value is not None:
            raise click.UsageError(f"{option} is for the page, which --ray does not serve; leave one of them out")
    if on_ray:
        check_can_train("--ray")
        nucleus.lazy.need(*nucleus.lazy.TRAINING)
        job.serve_on_cluster(model, settings, engine=engine, started=note)
        return
    text = nucleus.page.RECIPE if recipe is None else nucleus.page.read_template(recipe)
    _serve_here(model, engine, settings, partial(nucleus.page.page_router, corrections=corrections, recipe=text))


def _serve_here(
    model: str | None, engine: EngineChoice, settings: "ServeSettings", make_page: "Callable[..., APIRouter]"
) -> None:
    with closing(nucleus.serve.bound_socket(settings)) as bound:  # before a model is downloaded for nothing
        served = nucleus.serve.find_served(model, engine, progress=show_progress)
        service = nucleus.serve.Service(settings, served, nucleus.serve.Lanes(lambda: served.model))
        limits = nucleus.page.PageLimits(image_bytes=settings.max_bytes, image_pixels=settings.max_pixels)
        page = partial(make_page, limits=limits, cluster=_cluster())
        app = nucleus.serve.create_app(service, [page])
        nucleus.serve.run_server(app, service, bound, lambda address: note(_welcome(service, address)))


def _welcome(service: "Service", address: str) -> str:
    return f"{service.model} on {address}; programs ask {address}/v1/segment (to stop it: Ctrl-C)"


def _cluster() -> str | None:
    """Return the cluster to which the page submits runs: that of RAY_ADDRESS, if it is one of `nucleus submit`."""
    address = os.environ.get("RAY_ADDRESS", "")
    if urlsplit(address).scheme not in {"http", "https"} or nucleus.lazy.missing_packages(nucleus.lazy.TRAINING):
        return None
    return job.cluster_address(None)


def _bucket() -> "Bucket | None":
    """Return the bucket of NUCLEUS_BUCKET, or None where it is not set. Raises `UriError` if it is malformed."""
    if not os.environ.get(nucleus.storage.BUCKET_VARIABLE):
        return None
    return nucleus.storage.Bucket(nucleus.storage.bucket_from_environment())
