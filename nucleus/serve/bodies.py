"""From a request to an `Upload`: raw bodies, forms and addresses in a bucket; and the options in its query."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nucleus.data.zarr_plates import in_zarr, zarr_name
from nucleus.data.zarr_store import bucket_zarr
from nucleus.errors import ObjectNotFoundError, RequestError, UsageError
from nucleus.lazy import fastapi
from nucleus.predict.model import PIXEL_SIZES
from nucleus.serve.uploads import HEAD_BYTES, SegmentOptions, Upload, check_alone
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri, parse_uri
from nucleus.text import number_or_text, plural

__all__ = ["SegmentQuery", "read_upload", "safe_name"]

_IN_MEMORY = 8 << 20
"""Larger bodies lie in a temporary file until they are answered."""
_LONGEST_NAME = 200
_LONGEST_WORD = 100
_LONGEST_URI = 2000
_FORM, _JSON = "multipart/form-data", "application/json"
_NAME = "image"
_TIFF = (b"II", b"MM")

_Size = Annotated[float | None, Field(gt=0, allow_inf_nan=False)]
_PixelSize = Annotated[float | None, Field(ge=PIXEL_SIZES[0], le=PIXEL_SIZES[1])]
_Word = Annotated[str | None, Field(min_length=1, max_length=_LONGEST_WORD)]


class SegmentQuery(BaseModel):
    """The query of `POST /v1/segment`: the options of `nucleus predict`, and what names the image.

    Attributes:
        name: Name of the image in the table.  [default: that of the form or of the object, or "image"]
        uri: Image in a bucket, s3://bucket/key, in place of a body; also an OME-Zarr, or a part of one. Where allowed.
        diameter: Typical diameter of the nuclei, px. It rescales the image.  [default: estimated from the image]
        pixel_size: Side of a pixel in micrometres.  [default: from the file]
        channel: Segment this channel: its number, from 0, or its name in the file, such as DAPI.
        z: Of a stack: max, mean, best, a depth from 0, or all.
        t: Of a time series: a time from 0, or all.
        tta: Average over flips and quarter turns: better, but eight times slower.
        as_is: Do not even haze and vignettes before the network looks.  [default: where clear]
        denoise: Smooth images with strong noise before the network looks.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str | None, Field(max_length=_LONGEST_NAME)] = None
    uri: Annotated[str | None, Field(max_length=_LONGEST_URI, pattern="^s3://")] = None
    diameter: _Size = None
    pixel_size: _PixelSize = Field(default=None, alias="pixel-size")
    channel: _Word = None
    z: _Word = None
    t: _Word = None
    tta: bool = False
    as_is: bool = Field(default=False, alias="as-is")
    denoise: bool = False

    @property
    def options(self) -> SegmentOptions:
        """The options of the segmentation."""
        return SegmentOptions(
            self.diameter,
            self.pixel_size,
            _number(self.channel),
            _number(self.z),
            _number(self.t),
            self.tta,
            self.as_is,
            self.denoise,
        )


def _number(text: str | None) -> int | str | None:
    """Return what an option gives, as the command reads it."""
    return None if text is None else number_or_text(text)


class _Address(BaseModel):
    """The body of a request that names an image in a bucket."""

    model_config = ConfigDict(extra="forbid")

    uri: Annotated[str, Field(max_length=_LONGEST_URI)]


def safe_name(name: str) -> str:
    r"""Return the name of an image without folders and control characters; "image" if nothing is left.

    Raises:
        RequestError: It is longer than 200 bytes.

    >>> safe_name("../../a.tif"), safe_name("C:\\b.png"), safe_name("..")
    ('a.tif', 'b.png', 'image')
    """
    last = name.replace("\\", "/").rpartition("/")[2]
    kept = "".join(letter for letter in last if letter.isprintable()).encode(errors="replace").decode()
    if len(kept.encode()) > _LONGEST_NAME:
        raise RequestError(f"Expected a name of at most {_LONGEST_NAME} bytes; found {kept[:40]}... Shorten it.")
    return kept if kept.strip(". ") else _NAME


async def read_upload(
    request: fastapi.Request, query: SegmentQuery, images: Sequence[str], most: int, folder: Path
) -> Upload:
    """Read the image of a request.

    Args:
        request: A request whose body is an image, a form with a file, or JSON with a `uri`.
        query: Its query.
        images: Prefixes `s3://bucket/prefix` of the images that may be named.
        most: Largest size of an image, bytes; the body itself is limited before.
        folder: Private folder for a file that is too large for memory.

    Raises:
        RequestError: There is no image, or more than one, or it is too large.
        StorageError: The object cannot be read.
        UsageError: The URI is not allowed.
    """
    upload = await _read(request, query, images, most, folder)
    return await asyncio.to_thread(_as_slide, upload, folder)


async def _read(
    request: fastapi.Request, query: SegmentQuery, images: Sequence[str], most: int, folder: Path
) -> Upload:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORM and query.uri is None:
        return await _form(request, query, folder)
    body = await _spooled(request.stream(), folder)
    uri = _address(body) if kind == _JSON and query.uri is None else query.uri
    if uri is None:
        return Upload(safe_name(query.name or _NAME), body)
    if body and query.uri is not None:
        raise RequestError("Expected either a body or uri; found both. Leave one out.")
    return await asyncio.to_thread(_named, uri, query, images, most, folder)


def _as_slide(upload: Upload, folder: Path) -> Upload:
    """Return an upload in a file if it may be a whole slide, which is read from files alone.

    Raises `RequestError` for a slide that is several files.
    """
    content = upload.content
    if not isinstance(content, bytes | Path):
        return upload
    if isinstance(content, Path):
        with content.open("rb") as file:
            head = file.read(HEAD_BYTES)
    else:
        head = content[:HEAD_BYTES]
    check_alone(upload.name, head)
    if isinstance(content, bytes) and head.startswith(_TIFF):
        (folder / "upload").write_bytes(content)
        return Upload(upload.name, folder / "upload")
    return upload


def _address(body: bytes | Path) -> str:
    try:
        return _Address.model_validate(
            json.loads(body if isinstance(body, bytes) else b"", object_pairs_hook=_once)
        ).uri
    except (ValueError, RecursionError) as error:  # of JSON and of its content
        raise RequestError(
            'Expected an image, or application/json such as {"uri": "s3://bucket/image.tif"}; found something else. '
            "Correct the body, or its Content-Type."
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises `ValueError` if it has a name twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


async def _form(request: fastapi.Request, query: SegmentQuery, folder: Path) -> Upload:
    """Read the one file of a form."""
    async with request.form(max_files=2, max_fields=8) as form:
        parts = list(form.multi_items())
        files = [part for _, part in parts if not isinstance(part, str)]
        if len(files) != 1 or len(parts) > 1:
            others = ", ".join(repr(name[:40]) for name, part in parts if isinstance(part, str)) or "none"
            raise RequestError(
                f"Expected a form of one file and no fields; found {plural(len(files), 'file')}, and as fields: "
                f"{others}. Send the image as a file (curl --form file=@image.png), and options in the query, such as "
                "/v1/segment?diameter=20."
            )
        (file,) = files
        content = await asyncio.to_thread(_kept, file.file, folder)
        return Upload(safe_name(query.name or file.filename or _NAME), content)


def _kept(file: IO[bytes], folder: Path) -> bytes | Path:
    """Return the content of a form's file, or a copy in the folder if it is large."""
    content = file.read(_IN_MEMORY + 1)
    if len(content) <= _IN_MEMORY:
        return content
    file.seek(0)
    with (folder / "upload").open("wb") as copied:
        shutil.copyfileobj(file, copied)
    return folder / "upload"


async def _spooled(chunks: AsyncIterator[bytes], folder: Path) -> bytes | Path:
    """Return a body, or the file in the folder that it was written to if it is large."""
    parts = bytearray()
    async for chunk in chunks:
        parts += chunk
        if len(parts) > _IN_MEMORY:
            break
    else:
        return bytes(parts)
    with (folder / "upload").open("wb") as file:
        await asyncio.to_thread(file.write, parts)
        async for chunk in chunks:
            await asyncio.to_thread(file.write, chunk)
    return folder / "upload"


def _named(uri: str, query: SegmentQuery, images: Sequence[str], most: int, folder: Path) -> Upload:
    """Return an object of an allowed prefix, downloaded; or an OME-Zarr or a part of one, which is read in parts."""
    found = parse_uri(uri)
    if not any(_is_below(found, parse_uri(prefix)) for prefix in images):
        raise UsageError(
            f"Expected an image below one of the prefixes that this service reads ({', '.join(images) or 'none'}); "
            f"found {uri}. Send the image itself, or start the service with --images."
        )
    bucket = Bucket(S3Uri(found.bucket))
    if in_zarr(found.key):
        return Upload(safe_name(query.name) if query.name else zarr_name(found.key), bucket_zarr(bucket, found.key))
    stored = bucket.find(found.key)
    if stored is None:
        raise ObjectNotFoundError(f"Expected an image at {uri}; nothing is there. Check the address.")
    if stored.size > most:
        raise RequestError(f"Expected an image of at most {most:,} bytes; {uri} has {stored.size:,}.", 413)
    bucket.download(found.key, folder / "upload")
    content = folder / "upload"
    name = safe_name(query.name or found.name)
    return Upload(name, content.read_bytes() if stored.size <= _IN_MEMORY else content)


def _is_below(uri: S3Uri, prefix: S3Uri) -> bool:
    above = f"{prefix.key}/" if prefix.key else ""
    return uri.bucket == prefix.bucket and f"{uri.key}/".startswith(above)
