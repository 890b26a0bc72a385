"""Labels as OME-Zarr: a store of their own, or below `labels` in the group of the image that they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nucleus.lazy import zarr
from nucleus.predict.blocks import AssembledLabels
from nucleus.predict.measurement import Frame
from nucleus.storage.files import atomic_folder

__all__ = ["write_zarr"]

_CHUNK = 512
_SMALLEST_LEVEL = 512


def write_zarr(path: Path, labels: AssembledLabels, image: Frame) -> None:
    """Write an OME-Zarr 0.5 label image: a pyramid whose levels take every second pixel of the one before."""
    with atomic_folder(path) as folder:
        group = zarr.open_group(folder, mode="w", zarr_format=3)
        levels = [labels.labels]
        while max(levels[-1].shape) > _SMALLEST_LEVEL:
            levels.append(levels[-1][::2, ::2])
        for number, pixels in enumerate(levels):
            array = group.create_array(
                str(number), shape=pixels.shape, chunks=(_CHUNK, _CHUNK), dtype=labels.kind, dimension_names=("y", "x")
            )
            for top in range(0, pixels.shape[0], _CHUNK):
                rows = slice(top, top + _CHUNK)
                array[rows] = pixels[rows].astype(labels.kind)
                labels.release()
        group.attrs["ome"] = _ome_attributes(len(levels), image)


def _ome_attributes(levels: int, image: Frame) -> dict[str, Any]:
    unit = {"unit": "micrometer"} if image.pixel_size else {}
    size = image.pixel_size or 1.0
    scales: list[dict[str, Any]] = [{"type": "scale", "scale": [size * 2**level] * 2} for level in range(levels)]
    datasets = [{"path": str(level), "coordinateTransformations": [scale]} for level, scale in enumerate(scales)]
    axes = [{"name": axis, "type": "space", **unit} for axis in "yx"]
    return {
        "version": "0.5",
        "multiscales": [{"name": "nuclei", "axes": axes, "datasets": datasets, "type": "nearest"}],
        "image-label": {"version": "0.5"},
    }
