"""Counts of a model in generated fields of discs: depths, sizes, noise, hot pixels, debris, offsets and gains.

`python -m tests.benchmarks.fields MODEL [GROUP...]`: `MODEL` is a folder that `nucleus models pull` made. Prints a JSON
line per field, and at the end the number of wrong counts.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tests.data.test_normalization import NUCLEUS, OFFSET, field, in_depth


@dataclass(frozen=True)
class Case:
    """A field: its name, the smallest and the largest right count, and its pixels."""

    name: str
    fewest: int
    most: int
    pixels: NDArray[Any]


def depths() -> Iterator[Case]:
    """0 to 100 nuclei in three depths."""
    for side, counts in ((256, (0, 1, 2, 14)), (1024, (0, 1, 2, 14, 100))):
        for nuclei in counts:
            values, _ = field(nuclei, side)
            for depth in ("uint8", "uint16", "float32"):
                yield Case(f"{side} px, {depth}", nuclei, nuclei, in_depth(values + OFFSET, depth))


def sizes() -> Iterator[Case]:
    """Large fields."""
    for side, counts in ((2048, (0, 1, 50)), (8192, (0, 50))):
        for nuclei in counts:
            values, _ = field(nuclei, side)
            yield Case(f"{side} px, uint16", nuclei, nuclei, in_depth(values + OFFSET, "uint16"))


def noise() -> Iterator[Case]:
    """Nuclei in weak and strong noise."""
    for sigma in (0.5, 3, 8, 30, 100):
        for nuclei in (0, 1, 14):
            values, _ = field(nuclei, 512, noise=sigma)
            yield Case(f"noise {sigma}, uint16", nuclei, nuclei, in_depth(values + OFFSET, "uint16"))


def empty() -> Iterator[Case]:
    """Noise of several kinds alone."""
    rng, shape = np.random.default_rng(0), (512, 512)
    rows, columns = np.mgrid[:512, :512]
    normal = rng.normal(0, 1, shape)
    found = {
        "normal": np.clip(120 + 20 * normal, 0, 255).astype(np.uint8),
        "of three channels": np.clip(rng.normal(120, 20, (*shape, 3)), 0, 255).astype(np.uint8),
        "cut off at 0": np.clip(20 * normal, 0, 255).astype(np.uint8),
        "Poisson": rng.poisson(30, shape).astype(np.uint16),
        "uniform": rng.integers(0, 65536, shape).astype(np.uint16),
        "exponential": rng.exponential(10, shape).astype(np.float32),
        "Laplace": rng.laplace(100, 10, shape).astype(np.float32),
        "blurred over 2 px": cv2.GaussianBlur(normal, (0, 0), 2).astype(np.float32),
        "blurred over 4 px": cv2.GaussianBlur(normal, (0, 0), 4).astype(np.float32),
        "on a gradient": (500 + 2 * columns + 8 * normal).astype(np.uint16),
        "on a vignette": (500 + 800 * np.exp(-((rows - 256) ** 2 + (columns - 256) ** 2) / 8e4) + 8 * normal).astype(
            np.uint16
        ),
        "bright": (60000 + 30 * normal).astype(np.uint16),
        "none": np.full(shape, 777, np.uint16),
    }
    for name, pixels in found.items():
        yield Case(f"empty, noise {name}", 0, 0, pixels)


def hot_pixels() -> Iterator[Case]:
    """Single saturated pixels."""
    for share in (1e-5, 1e-3, 5e-3):
        for nuclei in (0, 1, 14):
            values, _ = field(nuclei, 512)
            values[np.random.default_rng(2).random(values.shape) < share] = 3500
            for depth in ("uint8", "uint16"):
                yield Case(f"hot pixels {share:g}, {depth}", nuclei, nuclei, in_depth(values + OFFSET, depth))


def debris() -> Iterator[Case]:
    """A speck of .75 % of the field, which may count as one nucleus, and may cover some."""
    for side, counts in ((256, (1, 3, 14)), (512, (1, 3, 14, 40)), (1024, (1, 3, 14, 40))):
        for factor in (5, 20):
            for nuclei in counts:
                values, _ = field(nuclei, side)
                radius = round(np.sqrt(0.0075 / np.pi) * side)
                speck = np.zeros(values.shape, np.uint8)
                cv2.circle(speck, (side - radius - 6, side - radius - 6), radius, 1, -1)
                covered = cv2.connectedComponents(((values > NUCLEUS / 2) & (speck > 0)).astype(np.uint8))[0] - 1
                soft = cv2.GaussianBlur(speck.astype(np.float32), (0, 0), 1.2)
                pixels = in_depth(values * (1 - soft) + soft * NUCLEUS * factor + OFFSET, "uint16")
                yield Case(f"debris x {factor}, {side} px", nuclei - covered, nuclei + 1, pixels)


def offsets() -> Iterator[Case]:
    """Offsets and gains of cameras, in floats."""
    for offset, gain in ((0, 1), (100, 0.1), (5e3, 5), (3e4, 10), (1e6, 1), (-3e3, 1)):
        for nuclei in (0, 2, 14):
            values, _ = field(nuclei, 512)
            pixels = (values * gain + offset).astype(np.float32)
            yield Case(f"offset {offset:g}, gain {gain:g}, float32", nuclei, nuclei, pixels)


GROUPS = {each.__name__: each for each in (depths, sizes, noise, empty, hot_pixels, debris, offsets)}


def main(folder: Path, groups: list[str]) -> int:
    """Count the nuclei in the fields of the groups, or of all; return the number of wrong counts."""
    from nucleus.predict.model import load_model_folder

    model = load_model_folder(folder)
    wrong = total = 0
    for group in groups or GROUPS:
        for case in GROUPS[group]():
            count = model.segment(case.pixels).count
            right = case.fewest <= count <= case.most
            wrong, total = wrong + (not right), total + 1
            print(json.dumps({"field": case.name, "nuclei": case.most, "found": count, "right": right}), flush=True)
    print(json.dumps({"fields": total, "wrong": wrong}))
    return wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
