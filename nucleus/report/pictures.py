"""The run's pictures inside the page: JPEG without loss of colour resolution, as good as the page's size allows."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from nucleus.data.images import RgbImage, decode_image

__all__ = ["Picture", "PictureFolder", "embedded"]

# Longest side, px, and JPEG quality, from the best to the smallest.
_LADDER = (
    (1024, 95),
    (1024, 90),
    (768, 92),
    (768, 85),
    (640, 85),
    (640, 78),
    (512, 80),
    (512, 70),
    (448, 70),
    (384, 72),
    (384, 60),
    (320, 62),
    (320, 50),
    (256, 55),
    (256, 42),
    (192, 45),
    (192, 32),
    (128, 35),
    (128, 20),
)


@dataclass(frozen=True)
class Picture:
    """A picture that is part of the page.

    Attributes:
        uri: `data:image/jpeg;base64,...`.
        width: Pixels.
        height: Pixels.
    """

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class PictureFolder:
    """The PNG pictures of a run, by the part of their path below the folder and without suffix."""

    folder: Path

    def read(self, key: str) -> RgbImage | None:
        """A picture, H x W x 3; None if it was not kept, is damaged, or would lie outside the folder."""
        try:
            path = (self.folder / f"{key}.png").resolve()
            if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
                return None
            return decode_image(path.read_bytes(), key)
        except (OSError, ValueError):  # no picture (`ImageError`), or a name that no file can have
            return None


def embedded(
    folder: PictureFolder, sides: Mapping[str, int], fits: Callable[[Mapping[str, Picture]], bool]
) -> dict[str, Picture]:
    """Encode pictures as well as there is room; those that are missing are left out.

    Args:
        folder: Where they are.
        sides: Longest side in the page by picture, px.
        fits: Whether there is room for these pictures in the page.
    """
    low, high = 0, len(_LADDER) - 1
    while low < high:  # sizes fall along the ladder: the first step that fits, or the last
        middle = (low + high) // 2
        if fits(_encoded(folder, sides, *_LADDER[middle])):
            high = middle
        else:
            low = middle + 1
    return _encoded(folder, sides, *_LADDER[low])


def _encoded(folder: PictureFolder, sides: Mapping[str, int], longest: int, quality: int) -> dict[str, Picture]:
    pictures = ((key, folder.read(key), min(side, longest)) for key, side in sides.items())
    return {key: _jpeg(image, side, quality) for key, image, side in pictures if image is not None}


def _jpeg(image: RgbImage, side: int, quality: int) -> Picture:
    scale = side / max(image.shape[:2])
    if scale < 1:
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    # 4:4:4: with colours at half the resolution, outlines of one pixel would lose theirs.
    options = [
        cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]  # fmt: skip
    _, data = cv2.imencode(".jpg", image[..., ::-1], options)
    text = base64.b64encode(data.tobytes()).decode()
    return Picture(f"data:image/jpeg;base64,{text}", image.shape[1], image.shape[0])
