"""A predicted image as W&B shows it: the picture, and truth and prediction as masks that a click lays over it."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.images import RgbImage
from nucleus.data.normalization import histogram_of, normalization_table
from nucleus.training.predictions import PredictedImage

__all__ = ["CLASSES", "LARGEST_SIDE", "class_mask", "overlay_image", "shown_image"]

LARGEST_SIDE = 512
"""Larger pictures are reduced to it, px."""
CLASSES = {0: "background", 1: "nucleus", 2: "contact"}
"""What a mask's pixels are. `contact` are those of a nucleus with a pixel of another one beside it (of eight): W&B
colours a mask by its classes, and without that line touching nuclei would look like one."""


def overlay_image(predicted: PredictedImage) -> Any:
    """A `wandb.Image` with the masks `truth` and `prediction`, whose pixels are `CLASSES`."""
    import wandb  # noqa: PLC0415  over half a second

    masks = {"truth": class_mask(predicted.sample.labels), "prediction": class_mask(predicted.labels)}
    return wandb.Image(
        shown_image(predicted.sample.image),
        mode="RGB",
        file_type="png",
        caption=f"{predicted.sample.name} ({predicted.sample.kind})",
        masks={name: {"mask_data": mask, "class_labels": CLASSES} for name, mask in masks.items()},
    )


def shown_image(image: RgbImage) -> RgbImage:
    """The image (H x W x 3) at most `LARGEST_SIDE` a side, its grey values stretched as a recipe does by default."""
    table = normalization_table(histogram_of(image), NormalizationOptions())
    return np.asarray(table[_reduced(image, cv2.INTER_AREA)], np.uint8)


def class_mask(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The `CLASSES` of labels (H x W, 0 background), at most `LARGEST_SIDE` a side.

    The labels are reduced first (to the nearest), then contacts are looked for: a line of two pixels would be lost.
    """
    small = _reduced(labels.astype(np.int32), cv2.INTER_NEAREST)
    around = np.ones((3, 3), np.uint8)
    nucleus = small > 0
    values = small.astype(np.float64)  # exact, and known to OpenCV's morphology
    highest = cv2.dilate(values, around)
    lowest = cv2.erode(np.where(nucleus, values, np.inf), around)  # of the nuclei alone
    return np.asarray(nucleus + (nucleus & (highest != lowest)).astype(np.uint8), np.uint8)


def _reduced(pixels: NDArray[Any], way: int) -> NDArray[Any]:
    scale = LARGEST_SIDE / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=way))
