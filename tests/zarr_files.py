"""OME-Zarr images and plates for tests, written by zarr-python with metadata of our own: 0.4 and 0.5."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

AXES = {
    "t": {"name": "t", "type": "time", "unit": "second"},
    "c": {"name": "c", "type": "channel"},
    "z": {"name": "z", "type": "space", "unit": "micrometer"},
    "y": {"name": "y", "type": "space", "unit": "micrometer"},
    "x": {"name": "x", "type": "space", "unit": "micrometer"},
}
VERSIONS = (2, 3)


def document_of(zarr_format: int) -> str:
    """Name of the file with the metadata of a group."""
    return "zarr.json" if zarr_format == 3 else ".zattrs"


def write_group(folder: Path, metadata: dict[str, Any], zarr_format: int) -> Path:
    """Write a group with metadata of OME-Zarr."""
    folder.mkdir(parents=True, exist_ok=True)
    if zarr_format == 3:
        content = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"version": "0.5", **metadata}}}
        (folder / "zarr.json").write_text(json.dumps(content))
    else:
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps(metadata))
    return folder


def image_metadata(
    axes: str, scales: Sequence[Sequence[float]], zarr_format: int, labels: Sequence[str] = (), **changes: Any
) -> dict[str, Any]:
    """Metadata of an image; `changes` replace keys of its axes, such as `x={"unit": "nanometer"}`."""
    levels = [
        {"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": list(scale)}]}
        for number, scale in enumerate(scales)
    ]
    listed = [{**AXES[axis], **changes.get(axis, {})} for axis in axes]
    version = {} if zarr_format == 3 else {"version": "0.4"}
    found: dict[str, Any] = {"multiscales": [{"axes": listed, "datasets": levels, **version}]}
    if labels:
        found["omero"] = {"channels": [{"label": label, "color": "FFFFFF"} for label in labels]}
    return found


def write_image(
    folder: Path,
    pixels: NDArray[Any],
    zarr_format: int = 3,
    *,
    axes: str = "tczyx",
    chunk: int = 32,
    side: float = 0.5,
    levels: int = 1,
    labels: Sequence[str] = (),
    array: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write an image; each level has every second pixel of the one before."""
    scales = [[side * 2**level if axis in "yx" else 1.0 for axis in axes] for level in range(levels)]
    write_group(folder, image_metadata(axes, scales, zarr_format, labels, **changes), zarr_format)
    chunks = tuple(chunk if axis in "yx" else 1 for axis in axes)
    for level in range(levels):
        stored = zarr.create_array(
            folder / str(level),
            shape=pixels.shape,
            dtype=pixels.dtype,
            zarr_format=zarr_format,  # type: ignore[arg-type]
            chunks=chunks,
            **(array or {}),
        )
        stored[...] = pixels
        pixels = pixels[..., ::2, ::2]
    return folder


def write_plate(
    folder: Path,
    zarr_format: int = 3,
    *,
    wells: Sequence[str] = ("A/1", "B/3"),
    fields: int = 2,
    absent: Sequence[str] = (),
    side: int = 64,
) -> Path:
    """Write a plate of generated fields; wells that are absent are in the metadata alone."""
    rows = sorted({well.split("/")[0] for well in wells})
    columns = sorted({well.split("/")[1] for well in wells})
    version = {} if zarr_format == 3 else {"version": "0.4"}
    listed = [
        {"path": well, "rowIndex": rows.index(well.split("/")[0]), "columnIndex": columns.index(well.split("/")[1])}
        for well in wells
    ]
    plate = {"rows": [{"name": row} for row in rows], "columns": [{"name": column} for column in columns]}
    write_group(folder, {"plate": {**plate, "wells": listed, **version}}, zarr_format)
    random = np.random.default_rng(0)
    for well in set(wells) - set(absent):
        images = {"images": [{"path": str(number)} for number in range(fields)], **version}
        write_group(folder / well, {"well": images}, zarr_format)
        for number in range(fields):
            pixels = random.integers(0, 4096, (1, 2, 1, side, side), np.uint16)
            write_image(folder / well / str(number), pixels, zarr_format, labels=("DAPI", "GFP"))
    return folder
