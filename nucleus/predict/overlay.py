"""Pictures for people: nuclei outlined on their image."""

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from nucleus.data.cache import ShardCache
from nucleus.data.datasets import Dataset
from nucleus.data.images import RgbImage
from nucleus.data.kinds import Kind
from nucleus.predict.view import NetworkView
from nucleus.training.validation import images_of_split

__all__ = ["CYAN", "YELLOW", "brightened", "contact_sheet", "draw_outlines", "draw_overlay", "example_sheet", "fitted"]

YELLOW = (255, 220, 0)
CYAN = (0, 220, 255)
_GAP = 4
_LARGEST_SIDE = 4096


def draw_outlines(image: RgbImage, labels: NDArray[np.integer], colour: tuple[int, int, int] = YELLOW) -> RgbImage:
    """A copy of the image (H x W x 3) with the inner outline of each label (H x W) in `colour`, RGB."""
    drawn = image.copy()
    drawn[find_boundaries(labels, mode="inner")] = colour
    return drawn


def draw_overlay(view: NetworkView, labels: NDArray[np.integer]) -> RgbImage:
    """The image with its nuclei outlined, reduced by a whole number to at most 4,096 px a side, read band by band."""
    source = view.source
    every = -(-max(source.height, source.width) // _LARGEST_SIDE)
    bands = []
    for rows in source.bands(every):
        pixels = view.rgb(rows, slice(0, source.width))
        size = (-(-source.width // every), -(-pixels.shape[0] // every))
        bands.append(pixels if every == 1 else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
    return draw_outlines(np.concatenate(bands), labels[::every, ::every])


def contact_sheet(rows: list[list[RgbImage]], side: int = 256) -> RgbImage:
    """Pictures in rows, each fitted into a square of `side` pixels on white."""
    columns = max(len(row) for row in rows)
    step = side + _GAP
    sheet = np.full((len(rows) * step + _GAP, columns * step + _GAP, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            small = fitted(picture, side)
            top, left = _GAP + r * step, _GAP + c * step
            sheet[top : top + small.shape[0], left : left + small.shape[1]] = small
    return sheet


def brightened(image: RgbImage) -> RgbImage:
    """Dark images stretched to the full range, so that a person sees what is there."""
    high = max(1.0, float(np.percentile(image, 99.8)))
    return np.asarray(np.clip(image * max(1.0, 255 / high), 0, 255), np.uint8)


def fitted(picture: RgbImage, side: int) -> RgbImage:
    """The picture (H x W x 3), its longer side brought to `side` pixels."""
    scale = side / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, size, interpolation=way))


def example_sheet(dataset: Dataset, cache: ShardCache, per_kind: int = 2) -> RgbImage:
    """Training images of each kind, beside them the same with their labels outlined."""
    found: dict[Kind, int] = {}
    rows = []
    for sample in images_of_split(dataset, "train", cache):
        found[sample.kind] = found.get(sample.kind, 0) + 1
        if found[sample.kind] <= per_kind:
            rows.append([sample.image, draw_outlines(sample.image, sample.labels, CYAN)])
        if len(rows) == per_kind * len(Kind):
            break
    return contact_sheet(rows)
