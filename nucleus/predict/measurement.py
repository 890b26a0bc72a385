"""A row of measurements for each nucleus."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import regionprops_table

from nucleus.data.images import RgbImage

__all__ = ["COLUMNS", "measure_nuclei"]

_PROPERTIES = {
    "label": "label",
    "centroid-1": "centroid_x",
    "centroid-0": "centroid_y",
    "area": "area",
    "equivalent_diameter_area": "diameter",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
    "intensity_mean-0": "mean_red",
    "intensity_mean-1": "mean_green",
    "intensity_mean-2": "mean_blue",
}
COLUMNS = ("image", *_PROPERTIES.values(), "touches_edge")


def measure_nuclei(name: str, image: RgbImage, labels: NDArray[np.int32]) -> list[dict[str, Any]]:
    """Measure each nucleus, in pixels and grey values of 0 to 255.

    Args:
        name: Goes into the column `image`.
        image: H x W x 3.
        labels: H x W.

    Returns:
        One dictionary with the keys `COLUMNS` a nucleus. `diameter` is that of the circle of the same area,
        `solidity` the area over that of the convex hull.
    """
    wanted = sorted({key.partition("-")[0] for key in _PROPERTIES})
    table = regionprops_table(labels, image, properties=wanted)
    edge = _labels_at_edge(labels)
    return [
        {
            "image": name,
            **{column: round(float(table[key][i]), 3) for key, column in _PROPERTIES.items()},
            "label": int(table["label"][i]),
            "area": int(table["area"][i]),
            "touches_edge": int(table["label"][i]) in edge,
        }
        for i in range(len(table["label"]))
    ]


def _labels_at_edge(labels: NDArray[np.int32]) -> set[int]:
    lines = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
    return {int(value) for line in lines for value in np.unique(line)} - {0}
