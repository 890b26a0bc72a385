"""Seconds per megapixel of a model on image files: `python -m tests.benchmarks.predict_images MODEL IMAGE...`.

`MODEL` is a folder that `nucleus models pull` made. A JSON line, median of five rounds after one to warm up: `segment`
from pixels in memory to labels, `files` from files to labels, overlays and tables on disk.
"""

import json
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.measure import in_turn

_AT_ONCE = 8


def predict_images(folder: Path, paths: list[Path]) -> dict[str, float]:
    """Time both on two cores."""
    import tensorflow as tf

    from nucleus.data.images import decode_image
    from nucleus.predict.image_files import predict_files
    from nucleus.predict.model import load_model_folder
    from nucleus.predict.source import array_source

    tf.config.threading.set_intra_op_parallelism_threads(2)
    model = load_model_folder(folder)
    images = [decode_image(path.read_bytes(), path.name) for path in paths]
    megapixels = sum(image.shape[0] * image.shape[1] for image in images) / 1e6

    def segment() -> None:
        for first in range(0, len(images), _AT_ONCE):
            scaled = [model.scaled_image(array_source(image)) for image in images[first : first + _AT_ONCE]]
            for blocks in model.segment_blocks(scaled):
                list(blocks)

    def files() -> None:
        with tempfile.TemporaryDirectory(prefix="nucleus-bench-") as out:
            predict_files(model, paths, Path(out))

    seconds = in_turn({"segment": segment, "files": files}, rounds=5, warm_up=True)
    return {"images": len(images), "megapixels": megapixels, **{k: v / megapixels for k, v in seconds.items()}}


if __name__ == "__main__":
    model_folder, *images_given = (Path(argument) for argument in sys.argv[1:])
    found = predict_images(model_folder, images_given)
    print(json.dumps({"bench": "predict_images", **{name: round(value, 3) for name, value in found.items()}}))
