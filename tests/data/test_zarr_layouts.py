"""OME-Zarr as public stores have it: metadata of IDR, the BioImage Archive and bioformats2raw, with pixels of ours."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from nucleus.data.stacks import Stack
from nucleus.data.zarr_plates import open_zarr
from nucleus.errors import ImageError
from tests.data.test_zarr_images import filled, pixels_of

WINDOW = {"start": 0.0, "end": 1500.0, "min": 0.0, "max": 65535.0}


def put(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def group(folder: Path, metadata: dict[str, Any]) -> Path:
    """Write a group of Zarr v2."""
    put(folder / ".zgroup", {"zarr_format": 2})
    put(folder / ".zattrs", metadata)
    return folder


def levels(folder: Path, paths: Sequence[str], pixels: NDArray[Any], chunks: tuple[int, ...]) -> None:
    """Write arrays of Zarr v2 with `/` in the names of chunks, packed by Blosc."""
    for level, path in enumerate(paths):
        part = pixels[..., :: 2**level, :: 2**level]
        stored = zarr.create_array(
            str(folder / path),
            shape=part.shape,
            dtype=part.dtype,
            zarr_format=2,
            chunks=chunks,
            compressors=numcodecs.Blosc(cname="lz4", clevel=5, shuffle=1),
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )
        stored[...] = part


def axes(names: str, unit: str | None = "micrometer") -> list[dict[str, Any]]:
    kinds = {"t": "time", "c": "channel"}
    space = {"unit": unit} if unit else {}
    return [{"name": n, "type": kinds.get(n, "space"), **(space if n in "zyx" else {})} for n in names]


def datasets(paths: Sequence[str], names: str, side: float) -> list[dict[str, Any]]:
    scales = [[side * 2**level if name in "yx" else 1.0 for name in names] for level in range(len(paths))]
    return [
        {"coordinateTransformations": [{"scale": scale, "type": "scale"}], "path": path}
        for scale, path in zip(scales, paths, strict=True)
    ]


def channel(label: str, colour: str) -> dict[str, Any]:
    shown = {"active": True, "coefficient": 1, "family": "linear", "inverted": False, "window": WINDOW}
    return {"label": label, "color": colour, **shown}


def idr_image(folder: Path) -> Path:
    """Like idr0062's 6001240.zarr: two channels, a stack, big-endian numbers, and labels."""
    side = 0.3603981534640209
    scales = {"axes": axes("czyx"), "datasets": datasets("01", "czyx", side), "version": "0.4"}
    omero = {
        "channels": [channel("LaminB1", "0000FF"), channel("Dapi", "FFFF00")],
        "id": 1,
        "rdefs": {"defaultT": 0, "defaultZ": 118, "model": "color"},
        "version": "0.4",
    }
    image = group(folder / "6001240.zarr", {"multiscales": [scales], "omero": omero})
    levels(image, "01", np.stack([pixels_of((3, 60, 54))] * 2).astype(">u2"), (1, 1, 60, 54))
    group(image / "labels", {"labels": ["0"]})
    scales = {"axes": axes("zyx"), "datasets": datasets("0", "zyx", side), "version": "0.4"}
    about = {
        "version": "0.4",
        "colors": [{"label-value": 1, "rgba": [255, 255, 255, 255]}],
        "source": {"image": "../../"},
    }
    group(image / "labels" / "0", {"image-label": about, "multiscales": [scales]})
    levels(image / "labels" / "0", "0", np.ones((3, 60, 54), np.int32), (1, 60, 54))
    return image


def series(folder: Path, unit: str | None = "micrometer") -> Path:
    """One image as bioformats2raw writes it: five axes, and chunks that are larger than it."""
    scales = {
        "metadata": {"method": "loci.common.image.SimpleImageScaler", "version": "Bio-Formats 6.13.0"},
        "axes": axes("tczyx", unit),
        "name": "scan",
        "datasets": datasets("01", "tczyx", 0.325),
        "version": "0.4",
    }
    omero = {"channels": [channel("Channel 0", "FF0000")], "rdefs": {"defaultT": 0, "model": "color", "defaultZ": 0}}
    group(folder, {"multiscales": [scales], "omero": omero})
    levels(folder, "01", pixels_of((1, 1, 1, 40, 50)), (1, 1, 1, 1024, 1024))
    return folder


def collection(folder: Path) -> Path:
    """Two images of one file, by bioformats2raw."""
    found = group(folder / "b2r.zarr", {"bioformats2raw.layout": 3})
    group(found / "OME", {"series": ["0", "1"]})
    (found / "OME" / "METADATA.ome.xml").write_text("<OME/>")
    series(found / "0")
    series(found / "1", unit=None)
    return found


def idr_plate(folder: Path) -> Path:
    """A plate by bioformats2raw, of which one listed well is absent."""
    wells = [{"path": "A/1", "rowIndex": 0, "columnIndex": 0}, {"path": "B/2", "rowIndex": 1, "columnIndex": 1}]
    plate = {
        "acquisitions": [{"id": 0, "maximumfieldcount": 2, "name": "Meas_01", "starttime": 1343731272000}],
        "columns": [{"name": "1"}, {"name": "2"}],
        "field_count": 2,
        "name": "422",
        "rows": [{"name": "A"}, {"name": "B"}],
        "version": "0.4",
        "wells": wells,
    }
    found = group(folder / "422.zarr", {"bioformats2raw.layout": 3, "plate": plate})
    group(found / "OME", {"series": ["A/1/0", "A/1/1"]})
    images = [{"acquisition": 0, "path": path} for path in "01"]
    group(found / "A/1", {"well": {"images": images, "version": "0.4"}})
    for each in images:
        series(found / "A/1" / str(each["path"]))
    return found


def sharded(folder: Path) -> Path:
    """An image of the 2024 challenge: 0.5, shards, levels in groups of their own, translations."""
    image = folder / "ebi.zarr"
    pixels = pixels_of((1, 200, 190))
    found = datasets(("scale0/image", "scale1/image"), "cyx", 0.25)
    for level, each in enumerate(found):
        shift = [0, 0.125 * level, 0.125 * level]
        each["coordinateTransformations"].append({"type": "translation", "translation": shift})
        put(image / f"scale{level}" / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {}})
        part = pixels[..., :: level + 1, :: level + 1]
        path = str(image / each["path"])
        stored = zarr.create_array(path, shape=part.shape, dtype=part.dtype, chunks=(1, 32, 32), shards=(1, 128, 128))
        stored[...] = part
    scales = {
        "name": "/",
        "axes": axes("cyx"),
        "datasets": found,
        "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1]}],
        "type": "gaussian",
        "metadata": {"method": "skimage"},
    }
    ome = {
        "version": "0.5",
        "_creator": {"name": "ome2024-ngff-challenge", "version": "1.0.1"},
        "multiscales": [scales],
        "omero": {"channels": [channel("DAPI", "0000FF")]},
    }
    put(image / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}})
    return image


def facts(stack: Stack) -> tuple[Any, ...]:
    plane = stack.plane(0, stack.depths - 1)
    return stack.name, stack.depths, stack.channels, plane.shape, plane.pixel_size


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (idr_image, [("6001240.zarr", 3, ("LaminB1", "Dapi"), (60, 54, 2), 0.3603981534640209)]),
        (
            collection,
            [
                ("b2r.zarr/0", 1, ("Channel 0",), (40, 50, 1), 0.325),
                ("b2r.zarr/1", 1, ("Channel 0",), (40, 50, 1), None),
            ],
        ),
        (idr_plate, [(f"422.zarr/A/1/{field}", 1, ("Channel 0",), (40, 50, 1), 0.325) for field in "01"]),
        (sharded, [("ebi.zarr", 1, ("DAPI",), (200, 190, 1), 0.25)]),
    ],
)
def test_public_layouts_open(tmp_path: Path, write: Callable[[Path], Path], expected: list[tuple[Any, ...]]) -> None:
    told: list[str] = []
    found = open_zarr(write(tmp_path), tell=told.append)
    assert [facts(stack) for stack in found] == expected
    assert [("B/2" in line) for line in told] == [True] * (write is idr_plate)
    height, width, channels = expected[0][3]
    pixels = pixels_of((found[0].depths, height, width))[-1].astype(int)
    for stack in found:
        read = filled(stack.plane(0, stack.depths - 1)).astype(int)
        assert np.array_equal(read, np.dstack([pixels] * channels))


def test_a_series_that_is_listed_but_absent_is_told(tmp_path: Path) -> None:
    folder = collection(tmp_path)
    shutil.rmtree(folder / "1")
    told: list[str] = []
    assert [stack.name for stack in open_zarr(folder, tell=told.append)] == ["b2r.zarr/0"]
    assert ["images without data: 1" in line for line in told] == [True]


def test_labels_are_no_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="labels of one"):
        open_zarr(idr_image(tmp_path) / "labels" / "0")
