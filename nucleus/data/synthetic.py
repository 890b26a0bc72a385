"""Synthetic microscope images with exact labels, for the demo, the tests and the calibration of random encoders."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.names import Kind
from nucleus.data.images import LabelImage, RgbImage, encode_png

__all__ = ["generated_image", "write_generated"]


# Of ten images, six are dark-field, two stained and two bright-field.
_KINDS = (Kind.DARK_FIELD,) * 6 + (Kind.STAIN,) * 2 + (Kind.BRIGHT_FIELD,) * 2
# Colours of background and nuclei of each kind, RGB from 0 to 1; for stains violet on pink, as in H&E.
_COLOURS = {
    Kind.DARK_FIELD: ((0.05, 0.05, 0.05), (0.6, 0.6, 0.6)),
    Kind.STAIN: ((0.88, 0.72, 0.83), (0.42, 0.28, 0.58)),
    Kind.BRIGHT_FIELD: ((0.82, 0.82, 0.82), (0.45, 0.45, 0.45)),
}


def generated_image(seed: int, height: int = 256, width: int = 256) -> tuple[RgbImage, LabelImage]:
    """Draw an image and its labels: textured ellipses that touch but do not overlap, blur, shading and noise.

    Args:
        seed: Determines the image; consecutive seeds cycle through the kinds.
        height: Height, pixels.
        width: Width, pixels.

    Returns:
        Image, height x width x 3, uint8, and labels, height x width, uint16.
    """
    rng = np.random.default_rng(seed)
    kind = _KINDS[seed % len(_KINDS)]
    labels = _draw_labels(rng, height, width)
    brightness = np.concatenate([[0.0], rng.uniform(0.7, 1.2, int(labels.max()))]).astype(np.float32)
    nuclei = cv2.GaussianBlur(brightness[labels], (0, 0), rng.uniform(0.7, 1.5))
    texture = 1 + 0.15 * _smooth_noise(rng, height, width, 3)
    ground, colour = (np.array(value, np.float32) for value in _COLOURS[kind])
    shading = 1 + 0.1 * _smooth_noise(rng, height, width, max(height, width) / 3)
    amount = (nuclei * texture)[..., np.newaxis]
    image = (ground + amount * (colour - ground)) * shading[..., np.newaxis]
    image += rng.normal(0, 0.02, image.shape if kind is Kind.STAIN else (height, width, 1))
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8), labels


def write_generated(folder: Path, count: int, *, seed: int = 0, side: int = 256) -> None:
    """Write images in Kaggle's layout: `<id>/images/<id>.png`, and one mask per nucleus in `<id>/masks/`."""
    for number in range(count):
        image, labels = generated_image(seed + number, side, side)
        name = f"generated-{seed + number:05d}"
        files = {Path("images") / f"{name}.png": image}
        for label in range(1, int(labels.max()) + 1):
            files[Path("masks") / f"{label:04d}.png"] = (labels == label).astype(np.uint8) * 255
        for path, pixels in files.items():
            target = folder / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(encode_png(pixels))


def _draw_labels(rng: np.random.Generator, height: int, width: int) -> LabelImage:
    labels = np.zeros((height, width), np.uint16)
    wanted = max(1, round(height * width * rng.uniform(2e-4, 7e-4)))
    radius = rng.uniform(7, 13)
    count = 0
    for _ in range(wanted):
        shape = np.zeros((height, width), np.uint8)
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        axes = (round(radius * rng.uniform(0.7, 1.3)), round(radius * rng.uniform(0.7, 1.3)))
        cv2.ellipse(shape, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, cv2.FILLED)
        inside = shape.astype(bool)
        if np.count_nonzero(labels[inside]) > 0.1 * np.count_nonzero(inside):
            continue  # overlaps another nucleus too much
        inside &= labels == 0
        if np.count_nonzero(inside) >= 30:
            count += 1
            labels[inside] = count
    return labels


def _smooth_noise(rng: np.random.Generator, height: int, width: int, sigma: float) -> NDArray[np.float32]:
    noise = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), sigma)
    return np.asarray(noise / max(float(noise.std()), 1e-6), np.float32)
