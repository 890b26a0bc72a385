"""`predict_rate`: prediction against the bare network. `large_image`: peak memory of an image 64 times as large.
`outlines`: 100,000 nuclei as GeoJSON, against OpenCV's contours and against writing the JSON alone.
`small_images`: what an image of 64 px in a bucket costs over the network's time, and memory by the number of images.
`zarr_rate`: megapixels a second from OME-Zarr in the embedded store against the same pixels as TIFF on disk.
"""

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.measure import RECIPE, in_turn, report, temporary_store

_SIDES = (2_500, 20_000)
_NUCLEI_PER_BLOCK = 5_000
"""As in a block of 2,048 px."""


def predict_rate() -> None:
    """Labels of an image of 2,048 x 2,048 px against the network alone on as many pixels, in tiles of 512 px."""
    import tensorflow as tf

    from nucleus.data.synthetic import generated_image
    from nucleus.model.architecture import maps_of
    from nucleus.model.instances import label_nuclei
    from nucleus.predict.source import array_source

    segmenter, model = _segmenter()
    image = np.tile(generated_image(0, 512, 512)[0], (4, 4, 1))
    truth = np.tile(generated_image(0, 512, 512)[1] > 0, (4, 4))
    tiles = tf.constant(image.reshape(4, 512, 4, 512, 3).swapaxes(1, 2).reshape(8, 2, 512, 512, 3), tf.float32)
    network = tf.function(lambda batch: model(batch, training=False))
    blurred = _blurred(truth)
    maps = maps_of(np.stack([blurred, blurred], axis=-1), "distance")

    def bare() -> None:
        for batch in tiles:
            network(batch)

    def ours() -> None:
        for blocks in segmenter.segment_blocks([segmenter.scaled_image(array_source(image))]):
            list(blocks)

    def labels() -> None:
        label_nuclei(maps, segmenter.config.instances)

    found = in_turn({"bare": bare, "ours": ours, "labels": labels}, rounds=5, warm_up=True)
    megapixels = image.shape[0] * image.shape[1] / 1e6
    report(
        "predict_rate",
        found["ours"] / found["bare"],
        labels_of_network=found["labels"] / found["bare"],
        ours_s_megapixel=found["ours"] / megapixels,
        network_s_megapixel=found["bare"] / megapixels,
        labels_s_megapixel=found["labels"] / megapixels,
    )


def outlines() -> None:
    """GeoJSON of 100,000 nuclei against contours by OpenCV, one nucleus after the other; and the JSON alone."""
    import cv2

    from nucleus.predict.formats import open_outlines
    from nucleus.predict.measurement import Frame, MeasuredPart

    labels = _discs(_NUCLEI_PER_BLOCK)
    count = int(labels.max())
    rows = [
        {"label": label, "area": 300, "diameter": 19.5, "score": 0.97, "mean_0": 120.5, "z": None, "t": None}
        for label in range(1, count + 1)
    ]
    frame = Frame("image", labels.shape)
    part = MeasuredPart(frame, labels, rows)
    boxes = [tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box) for box in _boxes(labels)]
    blocks = round(100_000 / count)

    with tempfile.TemporaryDirectory() as folder:

        def ours() -> None:
            with open_outlines("geojson", Path(folder) / "ours", frame, "bench") as add:
                for _ in range(blocks):
                    add(part)

        def contours() -> None:
            for _ in range(blocks):
                for label, box in enumerate(boxes, 1):
                    cv2.findContours((labels[box] == label).view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)

        ours()
        features = json.loads((Path(folder) / "ours.geojson").read_text())["features"]

        gc.freeze()  # or the collector would look through them during the other sides

        def written() -> None:
            with (Path(folder) / "limit").open("w") as file:
                file.writelines(json.dumps(feature) for feature in features)

        found = in_turn({"ours": ours, "contours": contours, "written": written}, rounds=3)
    report("outlines", found["ours"] / found["written"], nuclei=blocks * count, seconds=found)


def _discs(count: int) -> NDArray[np.int32]:
    """Draw ellipses of 16 to 24 px on a grid of 26 px."""
    import cv2

    rng, side = np.random.default_rng(0), int(np.sqrt(count))
    labels = np.zeros((26 * side, 26 * side), np.int32)
    for label in range(side * side):
        centre = (26 * (label % side) + 13, 26 * (label // side) + 13)
        axes = (int(rng.integers(8, 13)), int(rng.integers(8, 13)))
        cv2.ellipse(labels, centre, axes, float(rng.uniform(0, 180)), 0, 360, label + 1, -1)
    return labels


def _boxes(labels: NDArray[np.int32]) -> list[tuple[slice, slice]]:
    from scipy import ndimage

    return list(ndimage.find_objects(labels))


def large_image() -> None:
    """Images of 2,500 and 20,000 px a side as tiled TIFF, from file to labels, overlay and tables."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="nucleus-bench-") as folder:
        for side in _SIDES:
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.prediction", str(side), folder],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
            )
            found[side] = json.loads(done.stdout.splitlines()[-1])
    small, large = (found[side] for side in _SIDES)
    report("large_image", large["peak_mib"] / small["peak_mib"], **{f"px_{side}": found[side] for side in _SIDES})


def zarr_rate() -> None:
    """Two fields of 1,024 px a side in chunks and tiles of 512 px, predicted by the model that comes along."""
    import tifffile

    from nucleus.data.synthetic import generated_image
    from nucleus.data.zarr_store import bucket_zarr
    from nucleus.predict.image_files import find_inputs, predict_files
    from nucleus.predict.model import load_pulled
    from nucleus.registry.versions import read_included
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import parse_uri
    from tests.zarr_files import write_image

    segmenter, side, fields = load_pulled(read_included()), 1024, 2
    with temporary_store() as root:
        (root / "tiff").mkdir()
        bucket = Bucket(parse_uri("s3://nucleus/bench"))
        for number in range(fields):
            pixels = generated_image(number, side, side)[0][..., 0].astype(np.uint16) * 16
            tifffile.imwrite(root / "tiff" / f"{number}.tif", pixels, tile=(512, 512), compression="zlib")
            folder = write_image(root / f"{number}.zarr", pixels, axes="yx", chunk=512)
            for path in folder.rglob("*"):
                if path.is_file():
                    bucket.put(path.relative_to(root).as_posix(), path)

        def tiff() -> None:
            predict_files(segmenter, find_inputs([root / "tiff"]).images, root / "from-tiff")

        def zarr() -> None:
            places = [bucket_zarr(bucket, f"{number}.zarr") for number in range(fields)]
            predict_files(segmenter, find_inputs(places).images, root / "from-zarr")

        found = in_turn({"tiff": tiff, "zarr": zarr}, rounds=3, warm_up=True)
        assert (root / "from-tiff/1.labels.tif").read_bytes() == (root / "from-zarr/1.labels.tif").read_bytes()
    megapixels = fields * side * side / 1e6
    report("zarr_rate", found["tiff"] / found["zarr"], **{f"{name}_mp_s": megapixels / found[name] for name in found})


def small_images() -> None:
    """Images of 64 px in the embedded store, predicted in one process with one thread, 150 and 600 of them."""
    with temporary_store():
        few, many = (_child("small", str(count)) for count in (150, 600))
    overhead = many["cpu_ms"] - many["network_ms"]
    memory = many["peak_mib"] / few["peak_mib"]
    report("small_images", overhead / 3, overhead_ms=overhead, memory_4_times=memory, few=few, many=many)


def _predict_small(count: int) -> None:
    """Predict images below a prefix; print what one costs, without the first part, which warms up."""
    from nucleus.data.images import encode_png
    from nucleus.data.synthetic import generated_image
    from nucleus.predict.bucket_images import ImageListing, PredictionSettings
    from nucleus.predict.image_parts import parts_of_listing
    from nucleus.predict.model import load_pulled
    from nucleus.predict.part_prediction import PartPredictor
    from nucleus.predict.part_tables import join_share, table_shares
    from nucleus.registry.versions import read_included
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.small_objects import SmallObjects
    from nucleus.storage.uri import parse_uri

    bucket = Bucket(parse_uri(f"s3://nucleus/small-{count}"))
    store, contents = SmallObjects(bucket), [encode_png(generated_image(number, 64, 64)[0]) for number in range(100)]
    for number in range(count):
        store.put(f"images/{number:07d}.png", contents[number % len(contents)])
    pulled, uri = read_included(), str(bucket.uri)
    settings = PredictionSettings(images=f"{uri}/images", out=f"{uri}/out", registry=None, model=str(pulled))
    model, spent = load_pulled(pulled), 0.0
    network = model._network._engine

    def timed(tiles: Any) -> Any:
        nonlocal spent
        before = time.thread_time()
        values = network(tiles)
        spent += time.thread_time() - before
        return values

    worker, parts = PartPredictor(settings, model), parts_of_listing(ImageListing(settings))
    worker.predict(next(parts))
    model._network._engine = timed
    images, nuclei, tables, began = 0, 0, [], time.process_time()
    for part in parts:
        found = worker.predict(part)
        images += len(part.images)
        nuclei += sum(outcome.nuclei or 0 for outcome in found.images)
        tables.append((found.table, len(part.images)))
    cpu, began = time.process_time() - began, time.process_time()
    for share in table_shares(tables):
        join_share(settings, share)
    joined = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = {"cpu_ms": cpu, "network_ms": spent, "join_ms": joined}
    milliseconds = {name: 1e3 * value / images for name, value in seconds.items()}
    print(json.dumps({"images": images, "nuclei": nuclei, **milliseconds, "peak_mib": peak}))


def _child(*arguments: str) -> dict[str, Any]:
    """Return what this module prints in a process of its own, on one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.prediction", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_NUM_INTRAOP_THREADS": "1"},
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _segmenter() -> tuple[Any, Any]:
    """The recipe's network, untrained, its output drowned by a simple threshold: the same time, and sensible nuclei."""
    import keras
    from keras import layers

    from nucleus.config.settings import parse_recipe
    from nucleus.model.architecture import config_of_recipe
    from nucleus.model.engines import KerasEngine
    from nucleus.model.unet import build_unet
    from nucleus.predict.model import Model

    config = config_of_recipe(parse_recipe({**RECIPE, "network": {"heads": "distance"}}, "bench"))
    image = keras.Input((None, None, 3))
    grey = layers.Conv2D(1, 1, use_bias=False, kernel_initializer=keras.initializers.Constant(1 / 3))(image)
    bright = layers.Concatenate()([grey, layers.AveragePooling2D(5, 1, padding="same")(grey)])
    drowned = layers.Rescaling(1e-6)(build_unet(config)(image))
    model = keras.Model(image, layers.Add()([layers.Rescaling(0.05, -5.0)(bright), drowned]))
    return Model(KerasEngine(model, config.heads), config), model


def _blurred(mask: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 2.0)


def _predict_large(side: int, folder: Path) -> None:
    """Write the image, predict it, and print peak memory and seconds; in a process of its own."""
    import tifffile

    from nucleus.data.synthetic import generated_image
    from nucleus.predict.image_files import predict_files

    path = folder / f"{side}.tif"
    if not path.exists():
        tile = np.ascontiguousarray(np.tile(generated_image(0, 500, 500)[0][..., 0], (1, 1))[:500, :500])

        def tiles():
            for _ in range((-(-side // 512)) ** 2):
                yield np.pad(tile, ((0, 12), (0, 12)), mode="reflect")

        tifffile.imwrite(path, tiles(), shape=(side, side), dtype=np.uint8, tile=(512, 512), compression="zlib")
    segmenter, _ = _segmenter()
    started = time.perf_counter()
    found = predict_files(segmenter, [path], folder / "out")
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": round(peak), "seconds": round(seconds, 1), "nuclei": sum(found.counts.values())}))


if __name__ == "__main__":
    if sys.argv[1] == "small":
        _predict_small(int(sys.argv[2]))
    else:
        _predict_large(int(sys.argv[1]), Path(sys.argv[2]))
