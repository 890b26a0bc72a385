"""How much a model learns from ten images, and forgets: `python -m tests.benchmarks.learning DATA.zip MODEL [K=V...]`.

Ten generated images of a kind that no model here has seen (dark rings around lighter, granular middles, on textured
ground) are trained on two workers of one core as docs/guide.md says, starting with MODEL and with DATA mixed in; every
K=V changes the recipe. One JSON line: seconds in all and of the training, and test mAP before and after, on 40 further
images of the new kind and on DATA.
"""

import json
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from job.train import RunOptions, train
from nucleus.config.names import Reference
from nucleus.config.recipe import Recipe
from nucleus.config.settings import read_recipe
from nucleus.data.cache import ShardCache
from nucleus.data.images import LabelImage, RgbImage, encode_png
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.predict.evaluation import evaluate
from nucleus.predict.model import Model, load_pulled
from nucleus.registry.versions import find_model, pull_cached
from nucleus.runs.record import read_history
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri, parse_uri
from tests.benchmarks.measure import temporary_store

_SIDE = 320
_ANNOTATED, _OTHERS = 10, 40
_SPLITS = SplitOptions(val=0.2, test=0.2)
_RECIPE = """
model = "rings"
dataset = "rings"
workers = 2
seed = 1
mix = { dsb2018 = 0.75 }

[input]
kind_weights = { stain = 2.0, bright-field = 3.0 }

[optimizer]
epochs = 10
steps_per_epoch = 24
validate_every = 5

[gate]
enabled = false
"""


def ring_image(seed: int) -> tuple[RgbImage, LabelImage]:
    """Draw an image of the new kind, 320 px, and its labels."""
    rng = np.random.default_rng([77, seed])
    labels = _ellipses(rng)
    edges, middles = np.zeros(labels.shape, np.float32), np.zeros(labels.shape, np.float32)
    for label in range(1, int(labels.max()) + 1):
        mask = (labels == label).astype(np.uint8)
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
        depth = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
        edges += np.exp(-(((depth - 2) / 2.2) ** 2)) * mask * rng.uniform(0.7, 1.2)
        middles += (depth > 4) * rng.uniform(0.5, 1.1)
    grey = 0.55 + 0.05 * _noise(rng, 2) + 0.06 * _noise(rng, 12) - 0.22 * cv2.GaussianBlur(edges, (0, 0), 1)
    grey += 0.1 * cv2.GaussianBlur(middles, (0, 0), 1.2) * (1 + 0.5 * _noise(rng, 1.5))
    image = grey[..., np.newaxis] * np.array([0.9, 1.0, 0.85]) + rng.normal(0, 0.02, (_SIDE, _SIDE, 1))
    return np.rint(np.clip(image * 255, 0, 255)).astype(np.uint8), labels


def _ellipses(rng: np.random.Generator) -> LabelImage:
    """Draw nuclei of 20 to 60 px that touch but hardly overlap."""
    labels = np.zeros((_SIDE, _SIDE), np.uint16)
    for _ in range(rng.integers(25, 60)):
        radius, shape = rng.uniform(13, 22), np.zeros(labels.shape, np.uint8)
        axes = (round(radius * rng.uniform(1.1, 1.6)), round(radius * rng.uniform(0.7, 1)))
        centre = (int(rng.integers(_SIDE)), int(rng.integers(_SIDE)))
        cv2.ellipse(shape, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, cv2.FILLED)
        inside = (shape > 0) & (labels == 0)
        if inside.sum() >= max(120, 0.92 * shape.sum()):
            labels[inside] = labels.max() + 1
    return labels


def _noise(rng: np.random.Generator, sigma: float) -> NDArray[np.float32]:
    noise = cv2.GaussianBlur(rng.normal(size=(_SIDE, _SIDE)).astype(np.float32), (0, 0), sigma)
    return np.asarray(noise / noise.std(), np.float32)


def write_rings(folder: Path, seeds: range) -> Path:
    """Write images of the new kind with their labels into a folder, for the import; return it."""
    for seed in seeds:
        for part, pixels in zip(("images", "labels"), ring_image(seed), strict=True):
            path = folder / part / f"ring-{seed:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(pixels))
    return folder


def learning(data: Path, start: str, settings: list[str]) -> None:
    """Train, score and tell."""
    with temporary_store() as root:
        os.environ |= {"NUCLEUS_BUCKET": "s3://nucleus", "WANDB_MODE": "disabled"}
        home = parse_uri("s3://nucleus")
        datasets = home / "datasets"
        old = import_dataset(data, datasets / "dsb2018", SplitOptions()).dataset
        import_dataset(write_rings(root / "rings", range(_ANNOTATED)), datasets / "rings", _SPLITS)
        others = write_rings(root / "others", range(1000, 1000 + _OTHERS))
        new = import_dataset(others, datasets / "others", SplitOptions(val=0.05, test=0.9)).dataset
        cache, begun = ShardCache(root / "cache"), time.monotonic()
        manifest = train(_recipe(root, start, settings), RunOptions(own_cluster=True, folder=root / "runs"))
        seconds = time.monotonic() - begun
        models = {
            "before": load_pulled(find_model(start)),
            "after": load_pulled(pull_cached(Bucket(home), Reference("rings"))),
        }

        def scores(model: Model) -> dict[str, float | None]:
            found = {name: evaluate(model, each, ("test",), cache) for name, each in {"new": new, "old": old}.items()}
            return {name: each["all"]["map"] for name, each in found.items()}

        found = {name: scores(model) for name, model in models.items()}
        print(json.dumps({"settings": settings, "seconds": seconds, **_times(home, manifest.origin.run), **found}))


def _recipe(root: Path, start: str, settings: list[str]) -> Recipe:
    path = root / "rings.toml"
    path.write_text(_RECIPE)
    return read_recipe(path, [f"network.start={json.dumps(start)}", f"cache_dir={json.dumps(str(root))}", *settings])


def _times(home: S3Uri, run: str) -> dict[str, float]:
    """Return the seconds of a run's steps and of its validations."""
    history = read_history(Bucket(home).get(f"runs/{run}/history.json"), run)
    names = {"steps": "seconds", "validations": "validation_seconds"}
    return {title: sum(epoch.get(name, 0.0) for epoch in history) for title, name in names.items()}


if __name__ == "__main__":
    learning(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
