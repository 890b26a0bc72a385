"""Labels by tiles and blocks against those of the image in one piece.

`python -m tests.benchmarks.stitching MODEL IMAGE...`: `MODEL` is a folder that `nucleus models pull` made; images no
larger than a tile are left out. A JSON line tells to how many nuclei of the untiled images the stitched labels have no
counterpart (IoU above 0.5), no very like one (0.9), no identical one.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.metrics.nuclei import pair_labels
from nucleus.model.architecture import ModelConfig
from nucleus.predict.model import Model, PredictionOptions

_BLOCK_SIDE = 256
"""Small, so that images of 500 px have seams of blocks too."""


def stitching(folder: Path, paths: list[Path]) -> dict[str, Any]:
    """Compare the two ways on the images that are larger than a tile."""
    from nucleus.data.images import decode_image
    from nucleus.model.engines import KerasEngine
    from nucleus.model.unet import load_model

    model, config = load_model(folder)
    network = KerasEngine(model, config.heads)
    stitched = Model(network, config, PredictionOptions(block_side=_BLOCK_SIDE))
    worst: list[float] = []
    images = 0
    for path in paths:
        image = decode_image(path.read_bytes(), path.name)
        if max(image.shape[:2]) <= config.tile:
            continue
        images += 1
        worst += _overlaps(_untiled(network, config, image), stitched.segment(image).labels)
    overlaps = np.array(worst)
    return {
        "images": images,
        "nuclei": len(overlaps),
        "without_counterpart": int((overlaps <= 0.5).sum()),
        "iou_below_0.9": int((overlaps < 0.9).sum()),
        "not_identical": int((overlaps < 1.0).sum()),
    }


def _untiled(network: Any, config: ModelConfig, image: NDArray[np.uint8]) -> NDArray[np.int32]:
    side = -(-max(image.shape[:2]) // 32) * 32
    whole = Model(network, config.model_copy(update={"tile": side}), PredictionOptions(block_side=side))
    return whole.segment(image).labels


def _overlaps(truth: NDArray[np.int32], labels: NDArray[np.int32]) -> list[float]:
    """Of each true label its largest IoU with a label of the others."""
    pairs = pair_labels(truth, labels)
    best = np.zeros(int(truth.max()))
    np.maximum.at(best, pairs.true - 1, pairs.iou)
    return [float(value) for value in best]


if __name__ == "__main__":
    model_folder, *images_given = (Path(argument) for argument in sys.argv[1:])
    print(json.dumps({"benchmark": "stitching", **stitching(model_folder, images_given)}))
