"""The routes of the page: its files, and what it asks: images, tiles, nuclei, edits, downloads and corrections."""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pydantic import Field

from nucleus.config.names import parse_reference
from nucleus.data.folder_listing import is_image
from nucleus.errors import ObjectExistsError, RequestError, UsageError
from nucleus.lazy import fastapi
from nucleus.page.corrections import CorrectionSet, Place, checked_who, place_of, sets_of
from nucleus.page.display import parse_views
from nucleus.page.editing import DOWNLOADS, Download, missed_nucleus, write_download
from nucleus.page.layers import Asked, EditedLayer, MissedPlace, NucleusShape, simplified
from nucleus.page.other_layers import compared_layers, edited_layer, revision_document, saved_layer, version_layer
from nucleus.page.page_images import ImageOptions, PageImage, corrected_image, image_document
from nucleus.page.sessions import PageLimits, Workspace, Workspaces
from nucleus.page.teaching import RECIPE, Teaching
from nucleus.predict.model import Model, PredictionOptions, load_pulled
from nucleus.registry.versions import pull_cached
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import temporary_folder
from nucleus.storage.uri import parse_uri

__all__ = ["PageService", "page_router"]

_COOKIE = "nucleus-page"
_API = "/page/api"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_MOST_LISTED = 500
_NOT_ROWS = {"image", "z", "t", "plate", "row", "column", "field"}
"""Columns that are the same for all nuclei of an image."""
_NO_SESSION, _CONFLICT, _TOO_LARGE = 410, 409, 413


class PageService(Protocol):
    """What the page needs of a service: `nucleus.serve.Service`, or another for tests."""

    @property
    def model(self) -> Model:
        """The model that segments images now."""

    @property
    def bucket(self) -> Bucket | None:
        """The project's bucket, whose images the page may open; None without one."""


class _Save(EditedLayer):
    """Changes to save as a revision over the one whose tag is `base`."""

    who: str
    base: str | None = None


class _Teach(Asked):
    """A set of corrections to teach, and the dataset that it goes into."""

    set: str
    dataset: str


class _OtherVersion(Asked):
    """A version to look at an image with; and what somebody saved of it, as the layer that is open."""

    model: str
    corrected: str | None = None


class _Keys(Asked):
    """Images of the bucket."""

    keys: tuple[str, ...] = Field(min_length=1, max_length=_MOST_LISTED)


def page_router(
    service: PageService,
    *,
    corrections: str | None = None,
    limits: PageLimits | None = None,
    cluster: str | None = None,
    recipe: str = RECIPE,
) -> "fastapi.APIRouter":
    """Return the routes of the page at `/` and below `/page/`.

    Args:
        service: The service, with the model and the project's bucket.
        corrections: Where corrections are saved, `s3://bucket/prefix` or a folder; by default, `corrections/` in the
            project's bucket, and without a bucket the folder `corrections` here.
        limits: Limits of what a browser may send.
        cluster: Address of the cluster to which the page submits runs; None for none.
        recipe: Recipe of these runs, from `read_template`.

    Raises:
        UriError: `corrections` is a malformed URI.
    """
    place = place_of(corrections, service.bucket)
    page = _Page(service, place, limits or PageLimits(), Teaching(place.title, service.bucket, cluster, recipe))
    router = fastapi.APIRouter(include_in_schema=False)
    router.add_api_route("/", page.index, methods=["GET"])
    router.add_api_route("/static/page/{name:path}", page.static, methods=["GET"])
    for method, path, answer in page.routes():
        router.add_api_route(_API + path, answer, methods=[method])
    return router


@cache
def _static_files() -> dict[str, tuple[bytes, str, str]]:
    """Return the bytes, type and sum of each file of the page, by its path."""
    found: dict[str, tuple[bytes, str, str]] = {}
    with resources.as_file(resources.files("nucleus.page") / "static") as folder:
        for file in folder.rglob("*"):
            if file.suffix in _TYPES:
                data, name = file.read_bytes(), file.relative_to(folder).as_posix()
                found[name] = data, _TYPES[file.suffix], hashlib.sha256(data).hexdigest()[:32]
    return found


class _Page:
    """Answers of the page; each method is a route."""

    def __init__(self, service: PageService, place: Place, limits: PageLimits, teaching: Teaching) -> None:
        self._service, self._place, self._limits, self._teaching = service, place, limits, teaching
        self._workspaces = Workspaces(lambda: service.model, limits)
        self._other: Model | None = None

    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """Return method, path and function of each route below the API."""
        image, saved = "/images/{name}", "/images/{name}/corrections/{chosen}"
        return [
            ("POST", "/session", self.session),
            ("GET", "/images", self.images),
            ("POST", "/images", self.upload),
            ("GET", image, self.image),
            ("DELETE", image, self.remove),
            ("POST", f"{image}/segment", self.segment),
            ("GET", f"{image}/thumbnail.png", self.thumbnail),
            ("GET", f"{image}/tiles/{{level}}/{{column}}/{{row}}.png", self.tile),
            ("GET", f"{image}/layers/{{layer}}/outlines", self.outlines),
            ("GET", f"{image}/layers/{{layer}}/rows", self.rows),
            ("POST", f"{image}/missed", self.missed),
            ("POST", f"{image}/measure", self.measure),
            ("POST", f"{image}/download/{{what}}", self.download),
            ("GET", saved, self.saved),
            ("POST", f"{saved}/open", self.open_saved),
            ("POST", saved, self.save),
            ("POST", f"{image}/version", self.other_version),
            ("GET", "/corrections", self.corrections),
            ("GET", "/teach", self.teach_state),
            ("POST", "/teach", self.teach),
            ("GET", "/runs", self.newest_run),
            ("GET", "/runs/{run}", self.run),
            ("GET", "/bucket", self.bucket),
            ("POST", "/bucket", self.from_bucket),
        ]

    # The page and its session

    def index(self, request: "fastapi.Request") -> "fastapi.Response":
        return self.static(request, "index.html")

    def static(self, request: "fastapi.Request", name: str) -> "fastapi.Response":
        found = _static_files().get(name)
        if found is None:
            raise RequestError("Expected a file of the page; there is none of this name. Open /.", 404)
        data, kind, tag = found
        headers = {**_HEADERS, "Cache-Control": "no-cache", "ETag": f'"{tag}"'}
        if request.headers.get("if-none-match") == f'"{tag}"':
            return fastapi.Response(status_code=304, headers=headers)
        return fastapi.Response(data, media_type=kind, headers=headers)

    def session(self, request: "fastapi.Request") -> "fastapi.Response":
        """Begin a session, or go on with the one of the cookie; answer with what the page shows of the service."""
        cookie = self._cookie(request)
        token, workspace = request.cookies.get(cookie), self._workspaces.get(request.cookies.get(cookie))
        if workspace is None:
            token, workspace = self._workspaces.create()
        answer = _json(
            {
                "model": str(self._service.model),
                "images": len(workspace.images),
                "corrections": self._place.title,
                "bucket": str(self._service.bucket.uri) if self._service.bucket else None,
                "image_bytes": self._limits.image_bytes,
                "downloads": list(DOWNLOADS),
                "recipe": self._teaching.recipe,
            }
        )
        secure = request.url.scheme == "https"
        answer.set_cookie(cookie, token or "", path="/page", httponly=True, samesite="strict", secure=secure)
        return answer

    def _cookie(self, request: "fastapi.Request") -> str:
        return f"{_COOKIE}-{request.url.port or 0}"  # browsers send cookies to every port of a host

    def _workspace(self, request: "fastapi.Request") -> Workspace:
        found = self._workspaces.get(request.cookies.get(self._cookie(request)))
        if found is None:
            raise RequestError("Expected the session of this page; it has ended. Load the page again.", _NO_SESSION)
        return found

    def _image(self, request: "fastapi.Request", name: str) -> tuple[Workspace, PageImage]:
        workspace = self._workspace(request)
        return workspace, workspace.image(name)

    # Images

    def images(self, request: "fastapi.Request") -> "fastapi.Response":
        return _json([image.document() for image in list(self._workspace(request).images.values())])

    async def upload(self, request: "fastapi.Request", name: str) -> "fastapi.Response":
        """Take the bytes of an image file as the body, and segment it when its turn comes."""
        workspace = self._workspace(request)
        with workspace.new_file(name) as (folder, file):
            await self._receive(request, file)
            image = await fastapi.concurrency.run_in_threadpool(workspace.add, name, folder, file)
        self._workspaces.start(workspace, image)
        return _json(image.document())

    async def _receive(self, request: "fastapi.Request", file: Path) -> None:
        size = 0
        with file.open("wb") as opened:
            async for chunk in request.stream():
                size += len(chunk)
                self._check_size(size)
                opened.write(chunk)

    def _check_size(self, size: int) -> None:
        if size > self._limits.image_bytes:
            limit = self._limits.image_bytes >> 20
            raise RequestError(f"Expected an image of at most {limit:,} MiB; found more.", _TOO_LARGE)

    def image(self, request: "fastapi.Request", name: str) -> "fastapi.Response":
        workspace, image = self._image(request, name)
        return _json(image_document(image, workspace.opened(image)))

    def remove(self, request: "fastapi.Request", name: str) -> "fastapi.Response":
        workspace, image = self._image(request, name)
        workspace.remove(image)
        return _json({})

    def segment(self, request: "fastapi.Request", name: str, options: ImageOptions) -> "fastapi.Response":
        """Find the nuclei of an image again, with other options."""
        workspace, image = self._image(request, name)
        workspace.segment_again(image, options)
        self._workspaces.start(workspace, image)
        return _json(image.document())

    def thumbnail(self, request: "fastapi.Request", name: str) -> "fastapi.Response":
        _, image = self._image(request, name)
        file = image.folder / "thumbnail.png"
        if not file.exists():
            raise RequestError("Expected a thumbnail; the image is not done yet.", 404)
        return _bytes(file.read_bytes(), "image/png", lasting=True)

    def tile(
        self, request: "fastapi.Request", name: str, level: int, column: int, row: int, views: str
    ) -> "fastapi.Response":
        workspace, image = self._image(request, name)
        data = workspace.opened(image).pyramid.tile(level, column, row, parse_views(views))
        return _bytes(data, "image/png", lasting=True)

    # Nuclei

    def outlines(self, request: "fastapi.Request", name: str, layer: str) -> "fastapi.Response":
        _, image = self._image(request, name)
        return _bytes(image.layer(layer).outlines, "application/octet-stream")

    def rows(self, request: "fastapi.Request", name: str, layer: str) -> "fastapi.Response":
        """Answer with the columns of a layer's table."""
        _, image = self._image(request, name)
        rows = image.layer(layer).rows
        names = [column for column in (rows[0] if rows else {}) if column not in _NOT_ROWS]
        return _json({column: [row[column] for row in rows] for column in names})

    def missed(self, request: "fastapi.Request", name: str, asked: MissedPlace) -> "fastapi.Response":
        workspace, image = self._image(request, name)
        edited = workspace.opened(image).edited
        found = missed_nucleus(edited, asked.x, asked.y, asked.taken, asked.diameter)
        return _bytes(found or b"", "application/octet-stream")

    def measure(self, request: "fastapi.Request", name: str, shape: NucleusShape) -> "fastapi.Response":
        """Answer with the row of a nucleus that was drawn, and the simplified outline of its pixels."""
        workspace, image = self._image(request, name)
        row, rings = workspace.measure(image, shape), simplified(shape, workspace.opened(image).edited.frame.shape)
        shown = {column: value for column, value in row.items() if column not in _NOT_ROWS}
        return _json({"row": shown, "rings": rings})

    def download(self, request: "fastapi.Request", name: str, what: Download, asked: EditedLayer) -> "fastapi.Response":
        workspace, image = self._image(request, name)
        with temporary_folder("download") as folder:
            labels, rows = edited_layer(workspace, image, asked, folder)
            stem = folder / (PurePosixPath(image.name).stem or "image")
            path = write_download(what, workspace.opened(image).edited, labels, rows, stem)
            answer = _bytes(path.read_bytes(), "application/octet-stream")
        answer.headers["X-File-Ending"] = DOWNLOADS[what]
        return answer

    # Corrections

    def corrections(self, request: "fastapi.Request") -> "fastapi.Response":
        self._workspace(request)
        return _json(sets_of(self._place))

    def saved(self, request: "fastapi.Request", name: str, chosen: str) -> "fastapi.Response":
        """Answer with what a set has of an image."""
        workspace, image = self._image(request, name)
        stem, _ = corrected_image(image, workspace.opened(image))
        found = CorrectionSet(self._place, chosen).find(stem)
        return _json(revision_document(found, None))

    def open_saved(self, request: "fastapi.Request", name: str, chosen: str) -> "fastapi.Response":
        """Make a layer of what a set has of an image."""
        workspace, image = self._image(request, name)
        stem, _ = corrected_image(image, workspace.opened(image))
        found = CorrectionSet(self._place, chosen).find(stem)
        return _json(revision_document(found, None if found is None else saved_layer(workspace, image, found)))

    def save(self, request: "fastapi.Request", name: str, chosen: str, asked: _Save) -> "fastapi.Response":
        """Save nuclei with changes; 409 with what is there if somebody else has saved since."""
        workspace, image = self._image(request, name)
        corrections, (stem, file) = CorrectionSet(self._place, chosen), corrected_image(image, workspace.opened(image))
        with temporary_folder("save") as folder:
            labels, _ = edited_layer(workspace, image, asked, folder, measured=False)
            facts = {
                "who": checked_who(asked.who),
                "model": image.model,
                "image": image.name,
                "image_sha256": image.sha256,
                "options": image.options.model_dump(exclude_none=True),
                "removed": len({*asked.changes.removed, *asked.hidden}),
                "drawn": len(asked.changes.shapes),
            }
            try:
                found = corrections.save(stem, file, labels.labels, facts, asked.base)
            except ObjectExistsError as error:
                there = revision_document(corrections.find(stem), None)
                return _json({"detail": str(error), **there}, _CONFLICT)
        return _json(revision_document(found, saved_layer(workspace, image, found)) | {"set": corrections.title})

    # Teaching

    def teach_state(self, request: "fastapi.Request") -> "fastapi.Response":
        self._workspace(request)
        return _json(self._teaching.document())

    def teach(self, request: "fastapi.Request", asked: _Teach) -> "fastapi.Response":
        """Begin to import a set, and to train from it on the cluster."""
        self._workspace(request)
        self._teaching.start(asked.set, asked.dataset, str(self._service.model))
        return _json(self._teaching.document())

    def newest_run(self, request: "fastapi.Request", model: str) -> "fastapi.Response":
        self._workspace(request)
        return _json({"run": self._teaching.newest(model)})

    def run(self, request: "fastapi.Request", run: str) -> "fastapi.Response":
        self._workspace(request)
        return _json({"run": self._teaching.run(run)})

    def other_version(self, request: "fastapi.Request", name: str, asked: _OtherVersion) -> "fastapi.Response":
        """Make a layer of what a version in the bucket finds in an image; answer with how it differs."""
        workspace, image = self._image(request, name)
        model = self._version(asked.model)
        layer = self._workspaces.in_turn(lambda: version_layer(workspace, image, model))
        return _json({"model": str(model), "layer": layer, **compared_layers(image, layer, asked.corrected)})

    def _version(self, text: str) -> Model:
        """Return a version in the project's bucket; the last one is kept. Raises `UriError`, `ModelError`."""
        reference = parse_reference(text, "model")
        if self._other is None or str(self._other) != str(reference):
            pulled = pull_cached(self._project(), reference)
            self._other = load_pulled(pulled, PredictionOptions(engine=self._service.model.options.engine))
        return self._other

    # The bucket

    def bucket(self, request: "fastapi.Request", prefix: str = "") -> "fastapi.Response":
        """Answer with the folders and images directly below a prefix of the project's bucket."""
        self._workspace(request)
        bucket, inside = self._project(), prefix.strip("/")
        parse_uri(f"{bucket.uri}/{inside}")  # no steps upwards
        objects, folders = bucket.children(inside)
        images = [{"key": each.key, "size": each.size} for each in objects if is_image(each.key)]
        return _json({"folders": folders, "images": images[:_MOST_LISTED], "more": max(0, len(images) - _MOST_LISTED)})

    def from_bucket(self, request: "fastapi.Request", asked: _Keys) -> "fastapi.Response":
        """Take images from the project's bucket."""
        workspace, bucket = self._workspace(request), self._project()
        added = []
        for key in asked.keys:
            if not is_image(key):
                raise UsageError(f"Expected the key of an image; found {key!r}.")
            parse_uri(f"{bucket.uri}/{key}")  # no steps upwards, which some servers take for another prefix
            there = bucket.find(key)
            self._check_size(there.size if there else 0)
            with workspace.new_file(key) as (folder, file):
                bucket.download(key, file)
                added.append(workspace.add(key, folder, file))
            self._workspaces.start(workspace, added[-1])
        return _json([image.document() for image in added])

    def _project(self) -> Bucket:
        bucket = self._service.bucket
        if bucket is None:
            raise UsageError("Expected a bucket; none is configured. Set NUCLEUS_BUCKET, and start the service again.")
        return bucket


def _json(content: Any, status: int = 200) -> "fastapi.Response":
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    headers = {"Cache-Control": "no-store", **_HEADERS}
    return fastapi.Response(data, status, headers, media_type="application/json")


def _bytes(data: bytes, kind: str, *, lasting: bool = False) -> "fastapi.Response":
    keep = "private, max-age=3600" if lasting else "no-store"
    return fastapi.Response(data, headers={"Cache-Control": keep, **_HEADERS}, media_type=kind)
