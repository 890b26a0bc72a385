"""Seconds per megapixel of a model on image files: `python -m tests.benchmarks.predict_images MODEL IMAGE...`.

`MODEL` is a folder that `nucleus models pull` made, with `model.onnx`. A JSON line, for each engine the median of five
rounds after one to warm up, all in turn: `bare` the network alone on the same tiles, `segment` from pixels in memory to
labels, `files` from files to labels, overlays and tables on disk. With each the processor's seconds, which other
programs on the machine disturb less, and ONNX Runtime's share of TensorFlow's time.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_AT_ONCE, _ROUNDS = 8, 5
_ENGINES = ("tensorflow", "onnx")


def predict_images(folder: Path, paths: list[Path]) -> dict[str, float]:
    """Time both engines on two cores."""
    import tensorflow as tf

    from nucleus.data.images import decode_image

    tf.config.threading.set_intra_op_parallelism_threads(2)
    images = [decode_image(path.read_bytes(), path.name) for path in paths]
    megapixels = sum(image.shape[0] * image.shape[1] for image in images) / 1e6
    works: dict[str, Callable[[], Any]] = {}
    for engine in _ENGINES:
        works |= {f"{name}_{engine}": work for name, work in works_of(folder, engine, paths, images).items()}
    found: dict[str, float] = {"images": len(images), "megapixels": megapixels}
    wall, processor = timed(works)
    for kind, times in (("s", wall), ("cpu_s", processor)):
        found |= {f"{name}_{kind}_megapixel": value / megapixels for name, value in times.items()}
        for name in ("bare", "segment", "files"):
            found[f"{name}_{kind}_ratio"] = times[f"{name}_onnx"] / times[f"{name}_tensorflow"]
    found["files_over_bare_onnx"] = wall["files_onnx"] / wall["bare_onnx"]
    return found


def works_of(folder: Path, engine: str, paths: list[Path], images: list[Any]) -> dict[str, Callable[[], Any]]:
    """The three works of an engine."""
    from nucleus.predict.image_files import predict_files
    from nucleus.predict.model import PredictionOptions, load_model_folder
    from nucleus.predict.source import array_source

    model = load_model_folder(folder, PredictionOptions(engine=engine))
    network = model._network._engine
    batches: list[Any] = []

    def noted(tiles: Any) -> Any:
        batches.append(np.array(tiles))
        return network(tiles)

    def segment() -> None:
        for first in range(0, len(images), _AT_ONCE):
            scaled = [model.scaled_image(array_source(image)) for image in images[first : first + _AT_ONCE]]
            for blocks in model.segment_blocks(scaled):
                list(blocks)

    def files() -> None:
        with tempfile.TemporaryDirectory(prefix="nucleus-bench-") as out:
            predict_files(model, paths, Path(out))

    model._network._engine = noted
    segment()
    model._network._engine = network
    return {"bare": lambda: [network(tiles) for tiles in batches], "segment": segment, "files": files}


def timed(works: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each work, and of the processor in it; each once before, then in turn."""
    for work in works.values():
        work()
    wall: dict[str, list[float]] = {name: [] for name in works}
    processor: dict[str, list[float]] = {name: [] for name in works}
    for number in range(_ROUNDS):
        for name in list(works) if number % 2 == 0 else reversed(works):
            before, used = time.perf_counter(), time.process_time()
            works[name]()
            wall[name].append(time.perf_counter() - before)
            processor[name].append(time.process_time() - used)
    medians = ({name: statistics.median(values) for name, values in times.items()} for times in (wall, processor))
    first, second = medians
    return first, second


if __name__ == "__main__":
    model_folder, *images_given = (Path(argument) for argument in sys.argv[1:])
    result = predict_images(model_folder, images_given)
    print(json.dumps({"bench": "predict_images", **{name: round(value, 3) for name, value in result.items()}}))
