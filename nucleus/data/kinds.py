"""What kind of picture an image is; splits are stratified by it and metrics are told apart by it."""

from enum import StrEnum

import cv2
import numpy as np

from nucleus.data.images import RgbImage

__all__ = ["Kind", "kind_of"]

# On the DSB2018 images the medians of dark-field images end below 50 and those of the others begin at 120; the
# colourfulness of grey images is 0 and that of stains begins at 11.
_BRIGHT_MEDIAN = 90.0
_COLOURFUL = 6.0


class Kind(StrEnum):
    """The three kinds of images that microscopists bring."""

    DARK_FIELD = "dark-field"
    """Bright nuclei on dark ground: fluorescence."""
    BRIGHT_FIELD = "bright-field"
    """Grey, on bright ground."""
    STAIN = "stain"
    """Colour on bright ground: H&E and other stains."""


def kind_of(image: RgbImage) -> Kind:
    """Tell the kind of an image (H x W x 3, uint8) from the median of its grey values and its colourfulness.

    Colourfulness is the mean over the pixels of the largest minus the smallest channel.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if float(np.median(grey)) < _BRIGHT_MEDIAN:
        return Kind.DARK_FIELD
    colourfulness = float((image.max(axis=2).astype(np.int16) - image.min(axis=2)).mean())
    return Kind.STAIN if colourfulness >= _COLOURFUL else Kind.BRIGHT_FIELD
