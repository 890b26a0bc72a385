"""Fingerprints of images: what is kept of each image to find the others that belong to the same picture."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Base64Bytes

from nucleus.data.images import RgbImage

__all__ = ["THUMBNAIL", "Fingerprint", "fingerprint"]

THUMBNAIL = 16
"""Side of a thumbnail, pixels."""
_PATCH = 17
_PATCH_CONTRAST = 3.0
_PATCHES = 64

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Features of an image for comparing it with others, in as few bytes as possible: there may be a million.

    Attributes:
        height: Height of the image, pixels.
        width: Width of the image, pixels.
        lines: Grey values along the borders: top, bottom, left, right.
        patches: Hashes of exact patches, 8 bytes each, little-endian, sorted.
        thumbnail: 16 x 16 grey values, row by row.
    """

    height: int
    width: int
    lines: Base64Bytes  # bytes here, text in JSON
    patches: Base64Bytes
    thumbnail: Base64Bytes

    def line(self, side: int) -> bytes:
        """Return the grey values along a border: 0 is the top, 1 the bottom, 2 the left, 3 the right."""
        start = side * self.width if side < 2 else 2 * self.width + (side - 2) * self.height
        return self.lines[start : start + (self.width if side < 2 else self.height)]


def fingerprint(image: RgbImage) -> Fingerprint:
    """Return the fingerprint of an image (H x W x 3, uint8)."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    lines = b"".join(line.tobytes() for line in (grey[0], grey[-1], grey[:, 0], grey[:, -1]))
    height, width = grey.shape
    return Fingerprint(height, width, lines, _patch_hashes(grey).astype("<u8").tobytes(), small.tobytes())


def _patch_hashes(grey: Bytes) -> NDArray[np.uint64]:
    half = _PATCH // 2
    if min(grey.shape) < 2 * _PATCH:
        return np.empty(0, np.uint64)
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 2)
    window = np.ones((2 * _PATCH - 1, 2 * _PATCH - 1), np.uint8)
    highest, lowest = cv2.dilate(smooth, window), cv2.erode(smooth, window)
    # Bright peaks are nuclei in dark-field images; dark peaks are nuclei in stained and bright-field images.
    peak = ((smooth == highest) | (smooth == lowest)) & (highest - lowest >= _PATCH_CONTRAST)
    # Peaks near the border depend on pixels outside the image, so another tile would not find them.
    peak[: 2 * _PATCH] = peak[-2 * _PATCH :] = False
    peak[:, : 2 * _PATCH] = peak[:, -2 * _PATCH :] = False
    hashes = set()
    for y, x in np.argwhere(peak):
        patch = grey[y - half : y + half + 1, x - half : x + half + 1]
        if patch.std() >= _PATCH_CONTRAST:
            hashes.add(int.from_bytes(hashlib.blake2b(patch.tobytes(), digest_size=8).digest(), "big"))
    return np.array(sorted(hashes)[:_PATCHES], np.uint64)  # the lowest, so that every tile makes the same choice
