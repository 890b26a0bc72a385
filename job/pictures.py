"""Pictures of a run for people: the workers draw them, and put them beside its report."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import RgbImage, encode_png
from nucleus.metrics.scores import AP_NAMES
from nucleus.predict.gallery import draw_mistakes
from nucleus.predict.overlay import CYAN, YELLOW, brightened, draw_outlines
from nucleus.report.record import EPOCH_PICTURE, FACTS_FILE, PICTURES, TestImage, epochs_of_picture
from nucleus.storage.bucket import Bucket
from nucleus.training.extremes import Extreme
from nucleus.training.predictions import PredictedImage
from nucleus.training.reporter import Augmented

__all__ = ["RunPictures"]

_WATCHED = "watched"
_MOST_PIXELS = 384
"""Longer side of a picture: pages show them smaller."""


class RunPictures:
    """Draws and uploads the pictures that `nucleus.report.record` describes.

    Args:
        report: The run's report in the bucket.
    """

    def __init__(self, report: Bucket) -> None:
        self._report = report

    def predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> dict[str, bytes]:
        """Keep what the network makes of the watched images; return the pictures by the images' names."""
        when = "best" if epochs_done is None else f"{EPOCH_PICTURE}{epochs_done:05d}"
        drawn = {}
        for image in images:
            sample, place = image.sample, f"{_WATCHED}/{image.sample.name}"
            small = _small(sample.image, sample.labels, image.labels)
            if epochs_done == 0:
                self._keep(f"{place}/image", small.image)
                self._keep(f"{place}/truth", draw_outlines(small.image, small.truth, CYAN))
            drawn[sample.name] = self._keep(f"{place}/{when}", draw_outlines(small.image, small.found, YELLOW))
        return drawn

    def stored_predictions(self, epochs: int) -> dict[int, dict[str, bytes]]:
        """What was kept of the watched images in the first epochs: epochs done, then name, then picture."""
        found: dict[int, dict[str, bytes]] = {}
        for item in self._report.objects(f"{PICTURES}/{_WATCHED}/"):
            *_, name, file = item.key.split("/")
            done = epochs_of_picture(file)
            if done is not None and done <= epochs:
                found.setdefault(done, {})[name] = self._report.get(item.key)
        return found

    def extremes(self, images: Sequence[Extreme]) -> None:
        """Keep this worker's part of the best and worst test images: two pictures and what is to be said of each."""
        for extreme in images:
            predicted = extreme.predicted
            sample, place = predicted.sample, f"test/{predicted.sample.name}"
            small = _small(sample.image, sample.labels, predicted.labels)
            mistakes = predicted.scores.mistakes
            self._keep(f"{place}/image", small.image)
            self._keep(f"{place}/mistakes", draw_mistakes(small.image, small.truth, small.found, mistakes))
            pixels, nuclei = predicted.scores.pixels, predicted.scores.nuclei
            ap = dict(zip(AP_NAMES, nuclei.ap.tolist(), strict=True))
            mask = {"iou": pixels.iou, "dice": pixels.dice, "accuracy": pixels.accuracy}
            facts = TestImage(
                name=sample.name,
                kind=sample.kind,
                group=extreme.group,
                scores={"map": nuclei.mean_ap, **ap, **mask},
                nuclei=nuclei.true_nuclei,
                predicted=nuclei.predicted_nuclei,
                missed=len(mistakes.missed),
                extra=len(mistakes.extra),
                merged=len(mistakes.merged),
                split=len(mistakes.split),
            )
            self._report.put(f"{PICTURES}/{place}/{FACTS_FILE}", facts.model_dump_json(indent=1).encode())

    def examples(self, images: Sequence[Augmented]) -> None:
        """Keep a few training images, before and after augmentation."""
        for example in images:
            sample, place = example.sample, f"examples/{example.sample.name}"
            small = _small(sample.image, sample.labels, sample.labels)
            crop = _small(example.image, example.labels, example.labels)
            self._keep(f"{place}/image", small.image)
            self._keep(f"{place}/labels", draw_outlines(small.image, small.truth, CYAN))
            self._keep(f"{place}/augmented", crop.image)
            self._keep(f"{place}/augmented-labels", draw_outlines(crop.image, crop.truth, CYAN))

    def _keep(self, place: str, picture: RgbImage) -> bytes:
        data = encode_png(picture)
        self._report.put(f"{PICTURES}/{place}.png", data)
        return data


@dataclass(frozen=True)
class _Small:
    """An image as it is drawn: bright enough to see, and not too large."""

    image: RgbImage
    truth: NDArray[np.integer]
    found: NDArray[np.integer]


def _small(image: RgbImage, truth: NDArray[np.integer], found: NDArray[np.integer]) -> _Small:
    """Reduced before anything is drawn on it: lines that are reduced fade."""
    height, width = image.shape[:2]
    scale = min(1.0, _MOST_PIXELS / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    rows, columns = (np.arange(n) * full // n for n, full in ((size[1], height), (size[0], width)))
    shown = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    return _Small(brightened(shown), truth[np.ix_(rows, columns)], found[np.ix_(rows, columns)])
