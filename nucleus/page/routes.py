"""The routes of the page: its files, and what it asks: images, tiles, nuclei, edits, downloads and corrections."""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from nucleus.data.sources import is_image
from nucleus.errors import ObjectExistsError, RequestError, UsageError
from nucleus.lazy import fastapi
from nucleus.page.corrections import (
    CorrectionSet,
    Place,
    Saved,
    checked_who,
    place_of,
    sets_of,
)
from nucleus.page.display import parse_views
from nucleus.page.editing import DOWNLOADS, Download, edited_nuclei, measure_labels, missed_nucleus, write_download
from nucleus.page.layers import Changes, Label, NucleusShape, new_layer, simplified
from nucleus.page.page_images import FOUND, ImageOptions, PageImage, corrected_image, image_document
from nucleus.page.sessions import PageLimits, Workspace, Workspaces
from nucleus.predict.blocks import AssembledLabels
from nucleus.predict.model import Model
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import temporary_folder

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


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Edited(_Asked):
    """Nuclei with changes: those of `layer` without `removed` and `hidden`, and with `shapes`."""

    layer: str = FOUND
    changes: Changes = Changes()
    hidden: tuple[Label, ...] = Field(default=(), max_length=5_000_000)


class _Missed(_Asked):
    """A click where a nucleus was missed."""

    x: float
    y: float
    taken: tuple[NucleusShape, ...] = Field(default=(), max_length=5000)
    diameter: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class _Save(_Edited):
    """Changes to save as a revision over the one whose tag is `base`."""

    who: str
    base: str | None = None


class _Keys(_Asked):
    """Images of the bucket."""

    keys: tuple[str, ...] = Field(min_length=1, max_length=_MOST_LISTED)


def page_router(
    service: PageService, *, corrections: str | None = None, limits: PageLimits | None = None
) -> "fastapi.APIRouter":
    """Return the routes of the page at `/` and below `/page/`.

    Args:
        service: The service, with the model and the project's bucket.
        corrections: Where corrections are saved, `s3://bucket/prefix` or a folder; by default, `corrections/` in the
            project's bucket, and without a bucket the folder `corrections` here.
        limits: Limits of what a browser may send.

    Raises:
        UriError: `corrections` is a malformed URI.
    """
    page = _Page(service, place_of(corrections, service.bucket), limits or PageLimits())
    router = fastapi.APIRouter(include_in_schema=False)
    router.add_api_route("/", page.index, methods=["GET"])
    router.add_api_route("/static/page/{name:path}", page.static, methods=["GET"])
    for method, path, answer in page.routes():
        router.add_api_route(_API + path, answer, methods=[method])
    return router


@cache
def _static_file(name: str) -> tuple[bytes, str, str] | None:
    """Return the bytes, type and sum of a file of the page; None if there is none."""
    suffix = PurePosixPath(name).suffix
    file = resources.files("nucleus.page") / "static" / name
    if suffix not in _TYPES or ".." in PurePosixPath(name).parts or not file.is_file():
        return None
    data = file.read_bytes()
    return data, _TYPES[suffix], hashlib.sha256(data).hexdigest()[:32]


class _Page:
    """Answers of the page; each method is a route."""

    def __init__(self, service: PageService, place: Place, limits: PageLimits) -> None:
        self._service, self._place, self._limits = service, place, limits
        self._workspaces = Workspaces(lambda: service.model, limits)

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
            ("GET", "/corrections", self.corrections),
            ("GET", "/bucket", self.bucket),
            ("POST", "/bucket", self.from_bucket),
        ]

    # The page and its session

    def index(self, request: "fastapi.Request") -> "fastapi.Response":
        return self.static(request, "index.html")

    def static(self, request: "fastapi.Request", name: str) -> "fastapi.Response":
        found = _static_file(name)
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
        folder, file = workspace.new_file(name)
        try:
            await self._receive(request, workspace, file)
            image = await fastapi.concurrency.run_in_threadpool(workspace.add, name, folder, file)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._workspaces.start(workspace, image)
        return _json(image.document())

    async def _receive(self, request: "fastapi.Request", workspace: Workspace, file: Path) -> None:
        size = 0
        with file.open("wb") as opened:
            async for chunk in request.stream():
                size += len(chunk)
                if size > self._limits.image_bytes:
                    limit = self._limits.image_bytes >> 20
                    raise RequestError(f"Expected an image of at most {limit:,} MiB; found more.", _TOO_LARGE)
                opened.write(chunk)
        workspace.spend(size)

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

    def missed(self, request: "fastapi.Request", name: str, asked: _Missed) -> "fastapi.Response":
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

    def download(self, request: "fastapi.Request", name: str, what: Download, asked: _Edited) -> "fastapi.Response":
        workspace, image = self._image(request, name)
        with temporary_folder("download") as folder:
            labels, rows = _edited(workspace, image, asked, folder)
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
        return _json(_revision(found, None))

    def open_saved(self, request: "fastapi.Request", name: str, chosen: str) -> "fastapi.Response":
        """Make a layer of what a set has of an image."""
        workspace, image = self._image(request, name)
        stem, _ = corrected_image(image, workspace.opened(image))
        found = CorrectionSet(self._place, chosen).find(stem)
        return _json(_revision(found, None if found is None else _layer_of(workspace, image, found)))

    def save(self, request: "fastapi.Request", name: str, chosen: str, asked: _Save) -> "fastapi.Response":
        """Save nuclei with changes; 409 with what is there if somebody else has saved since."""
        workspace, image = self._image(request, name)
        corrections, (stem, file) = CorrectionSet(self._place, chosen), corrected_image(image, workspace.opened(image))
        with temporary_folder("save") as folder:
            labels, _ = _edited(workspace, image, asked, folder, measured=False)
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
                there = _revision(corrections.find(stem), None)
                return _json({"detail": str(error), **there}, _CONFLICT)
        return _json(_revision(found, _layer_of(workspace, image, found)) | {"set": corrections.title})

    # The bucket

    def bucket(self, request: "fastapi.Request", prefix: str = "") -> "fastapi.Response":
        """Answer with the folders and images directly below a prefix of the project's bucket."""
        self._workspace(request)
        objects, folders = self._project().children(prefix.strip("/"))
        images = [{"key": each.key, "size": each.size} for each in objects if is_image(each.key)]
        return _json({"folders": folders, "images": images[:_MOST_LISTED], "more": max(0, len(images) - _MOST_LISTED)})

    def from_bucket(self, request: "fastapi.Request", asked: _Keys) -> "fastapi.Response":
        """Take images from the project's bucket."""
        workspace, bucket = self._workspace(request), self._project()
        added = []
        for key in asked.keys:
            if not is_image(key):
                raise UsageError(f"Expected the key of an image; found {key!r}.")
            folder, file = workspace.new_file(key)
            bucket.download(key, file)
            workspace.spend(file.stat().st_size)
            added.append(workspace.add(key, folder, file))
            self._workspaces.start(workspace, added[-1])
        return _json([image.document() for image in added])

    def _project(self) -> Bucket:
        bucket = self._service.bucket
        if bucket is None:
            raise UsageError("Expected a bucket; none is configured. Set NUCLEUS_BUCKET, and start the service again.")
        return bucket


def _edited(
    workspace: Workspace, image: PageImage, asked: _Edited, folder: Path, *, measured: bool = True
) -> tuple[AssembledLabels, list[dict[str, Any]]]:
    """Return labels and rows of a layer with changes, without nuclei that are hidden; new rows only if `measured`."""
    layer = image.layer(asked.layer)
    hidden = set(asked.hidden)
    changes = Changes(
        removed=tuple({*asked.changes.removed, *hidden} - {shape.label for shape in asked.changes.shapes}),
        shapes=tuple(shape for shape in asked.changes.shapes if shape.label not in hidden),
    )
    there = set(np.unique(layer.labels).tolist()) if hidden else set()
    if hidden:
        changes = changes.model_copy(update={"removed": tuple(label for label in changes.removed if label in there)})

    def row_of(shape: NucleusShape) -> dict[str, Any]:
        return workspace.measure(image, shape) if measured else {"label": shape.label}

    return edited_nuclei(layer.labels, layer.rows, changes, row_of, folder)


def _layer_of(workspace: Workspace, image: PageImage, saved: Saved) -> str:
    """Return the name of the layer of a saved revision, which is made if there is none yet."""
    name = f"saved-{saved.revision.labels_sha256[:20]}"
    if not image.layer_folder(name).is_dir():
        edited = workspace.opened(image).edited
        labels = saved.labels
        new_layer(image.layer_folder(name), edited.frame, labels, measure_labels(edited, labels))
    return name


def _revision(saved: Saved | None, layer: str | None) -> dict[str, Any]:
    if saved is None:
        return {"saved": None}
    return {"saved": {**saved.revision.model_dump(), "tag": saved.tag, "layer": layer}}


def _json(content: Any, status: int = 200) -> "fastapi.Response":
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    headers = {"Cache-Control": "no-store", **_HEADERS}
    return fastapi.Response(data, status, headers, media_type="application/json")


def _bytes(data: bytes, kind: str, *, lasting: bool = False) -> "fastapi.Response":
    keep = "private, max-age=3600" if lasting else "no-store"
    return fastapi.Response(data, headers={"Cache-Control": keep, **_HEADERS}, media_type=kind)
