"""mAP on a validation split whose images are changed as other microscopes, cameras and stains would.

`python -m tests.benchmarks.robustness DATASET MODEL...`: `MODEL` is a folder that `nucleus models pull` made. Prints a
JSON line a model.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from nucleus.data.cache import ShardCache
from nucleus.data.dataset import locate_dataset, open_dataset
from nucleus.data.images import LabelImage, RgbImage

Change = Callable[[RgbImage, LabelImage], tuple[RgbImage, LabelImage]]


def colours(change: Callable[[Any], Any]) -> Change:
    """A change of an image's values from 0 to 255."""
    return lambda image, labels: (np.clip(np.rint(change(image.astype(float))), 0, 255).astype(np.uint8), labels)


def resized(factor: float) -> Change:
    """A change of scale."""

    def change(image: RgbImage, labels: LabelImage) -> tuple[RgbImage, LabelImage]:
        smooth = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        sizes = {"dsize": None, "fx": factor, "fy": factor}
        found = cv2.resize(image, interpolation=smooth, **sizes)
        return np.asarray(found, np.uint8), cv2.resize(labels, interpolation=cv2.INTER_NEAREST, **sizes)

    return change


def changes() -> dict[str, Change]:
    """Each change by its name; the noise is the same in every call."""
    noise = np.random.default_rng(0)
    return {
        "as they are": lambda image, labels: (image, labels),
        "gamma 0.5": colours(lambda image: 255 * (image / 255) ** 0.5),
        "gamma 2": colours(lambda image: 255 * (image / 255) ** 2),
        "half the contrast": colours(lambda image: image / 2 + 64),
        "red at 0.7": colours(lambda image: image * (0.7, 1, 1)),
        "inverted": colours(lambda image: 255 - image),
        "noise, sigma 10": colours(lambda image: image + noise.normal(0, 10, image.shape)),
        "blurred, sigma 1.5 px": colours(lambda image: cv2.GaussianBlur(image, (0, 0), 1.5)),
        "scale 0.7": resized(0.7),
        "scale 1.4": resized(1.4),
    }


def robustness(folder: Path, dataset: str) -> dict[str, float]:
    """mAP, mean over the validation images, under each change."""
    from nucleus.data.reader import images_of_split
    from nucleus.metrics.nuclei import match_nuclei
    from nucleus.predict.model import load_model_folder

    model = load_model_folder(folder)
    samples = list(images_of_split(open_dataset(locate_dataset(dataset)), "val", ShardCache()))
    found = {}
    for name, change in changes().items():
        images, truths = zip(*(change(sample.image, sample.labels) for sample in samples), strict=True)
        scores = [
            match_nuclei(truth, model.segment(image).labels).mean_ap
            for image, truth in zip(images, truths, strict=True)
        ]
        found[name] = float(np.mean(scores))
    return found


if __name__ == "__main__":
    dataset_given, *folders = sys.argv[1:]
    for path in folders:
        scores = {name: round(score, 3) for name, score in robustness(Path(path), dataset_given).items()}
        print(json.dumps({"bench": "robustness", "model": path, **scores}), flush=True)
