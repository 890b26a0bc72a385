"""`Segmentation`: the nuclei of one image, with their table and overlay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import RgbImage
from nucleus.data.zarr_plates import plate_field
from nucleus.lazy import pandas
from nucleus.pictures import draw_overlay
from nucleus.predict.measurement import nucleus_columns
from nucleus.predict.scaled_image import ScaledImage

__all__ = ["Segmentation"]


class Segmentation:
    """The nuclei of one image.

    Attributes:
        image: Name of the image, as in the table.
        z: Depth of the plane in its stack, from 0; None for a projection, and where there is one depth.
        t: Time of the plane, from 0; None where there is one time.
        labels: H x W, int32: 0 background, 1..K nuclei.
        rows: One dictionary per nucleus with the columns of `nuclei.csv`: lengths in px, centroids in px from the
            centre of the first pixel, grey values in the depth of the image. Values in micrometres are None if the
            pixel size is unknown.
        diameter: Median diameter of the nuclei, px; None without nuclei.
        warning: Why the result may be wrong, or None.

    Examples:
        >>> found = model.segment("image.png")
        >>> found.table["label"].tolist() == list(range(1, found.count + 1))
        True
        >>> found.table.to_csv("nuclei.csv", index=False)
    """

    def __init__(
        self,
        image: ScaledImage,
        labels: NDArray[np.int32],
        rows: list[dict[str, Any]],
        diameter: float | None,
        warning: str | None,
    ) -> None:
        self.image, self.z, self.t = image.source.name, image.source.z, image.source.t
        self.labels = labels
        self.rows = rows
        self.diameter = diameter
        self.warning = warning
        self._image = image

    @property
    def table(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame; unknown values are NaN. Raises `MissingPackageError` without pandas."""
        channels = self._image.source.read_channels(slice(0, 1), slice(0, 1)).shape[2]
        return _table(self.rows, nucleus_columns(channels, plate=plate_field(self.image) is not None))

    @property
    def count(self) -> int:
        """Number of nuclei."""
        return len(self.rows)

    def overlay(self) -> RgbImage:
        """Return the image, H x W x 3, uint8, with each nucleus outlined in yellow and a circle of median diameter."""
        whole = self._image.whole
        return draw_overlay(self._image.rgb(whole.rows, whole.columns), self.labels, self.diameter)

    def __repr__(self) -> str:
        height, width = self.labels.shape
        nuclei = "1 nucleus" if self.count == 1 else f"{self.count} nuclei"
        warning = f"; {self.warning}" if self.warning else ""
        plane = "".join(f" {axis}={value}" for axis, value in (("z", self.z), ("t", self.t)) if value is not None)
        return f"<Segmentation of {self.image}{plane}: {width} x {height} px, {nuclei}{warning}>"


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> pandas.DataFrame:
    """Return rows from `measure_nuclei` as a table whose column types do not depend on the rows."""
    texts = dict.fromkeys(("image", "plate", "row", "column", "field"), "object")
    kinds = {**texts, "z": "Int64", "t": "Int64", "label": "int64", "area": "int64", "touches_edge": "bool"}
    return pandas.DataFrame(rows, columns=columns).astype({name: kinds.get(name, "float64") for name in columns})
