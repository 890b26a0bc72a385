"""The ablation of docs/segmentation.md: `python -m tests.benchmarks.ablation DATA.zip WEIGHTS.h5 [LINE...]`.

Every line is trained by `job.train` on two workers for as many pixels as 8 epochs of the recipe see, published, and
scored on the validation split; a JSON line each. The last lines use the first one's model in other ways.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from job.train import RunOptions, train
from nucleus.config.names import Reference
from nucleus.config.recipe import Recipe
from nucleus.config.settings import read_recipe, recipe_path
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.model.architecture import InstanceSettings
from nucleus.registry.encoder_weights import add_weights
from nucleus.registry.manifest import ModelManifest
from nucleus.registry.versions import pull
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri
from tests.benchmarks.measure import temporary_store

_EPOCHS = 8
_CROP = 192
_FLIPS_ALONE = tuple(
    f"augment.{key}=0.0" for key in ("gamma", "stain", "contrast", "brightness", "invert", "grey", "scale")
)
LINES: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "encoder frozen throughout": (f"network.unfreeze_epoch={_EPOCHS}",),
    "encoder from random weights": (),
    "EfficientNetV2-B0 from random weights": ('network.encoder="efficientnet_v2_b0"',),
    "heads: border": ('network.heads="border"',),
    "heads: distance": ('network.heads="distance"',),
    "crops of 128 px": ("input.crop=128",),
    "crops of 256 px": ("input.crop=256",),
    "no normalisation": ('input.normalization.method="none"',),
    "percentiles as they are": ('input.normalization.method="percentile"',),
    "augmentation: flips alone": _FLIPS_ALONE,
}
_NUMBERS = ("ap_50", "ap_70", "ap_90", "map", "iou", "dice")


def ablation(data: Path, weights: Path, lines: list[str]) -> None:
    """Train and score the lines."""
    with temporary_store() as root:
        os.environ["NUCLEUS_BUCKET"] = "s3://nucleus"
        os.environ["WANDB_MODE"] = "disabled"
        dataset = import_dataset(data, parse_uri("s3://nucleus/datasets/dsb2018"), SplitOptions()).dataset
        bucket = Bucket(parse_uri("s3://nucleus"))
        add_weights(weights, "mobilenet_v2", bucket)
        for line in lines:
            started = time.monotonic()
            recipe = _recipe(line, root / "cache")
            manifest = train(recipe, RunOptions(own_cluster=True, folder=root / "runs"))
            _tell(line, manifest.origin.metrics["val"], recipe, seconds=time.monotonic() - started)
            if line == "recipe":
                _other_uses(bucket, manifest, recipe, dataset, root)


def _recipe(line: str, cache: Path) -> Recipe:
    """The recipe for 8 epochs of crops of 192 px, or as many pixels of other crops."""
    settings = LINES[line]
    crop = next((int(setting.partition("=")[2]) for setting in settings if setting.startswith("input.crop")), _CROP)
    epochs = round(_EPOCHS * (_CROP / crop) ** 2)
    common = (
        *(f"optimizer.epochs={epochs}", f"optimizer.validate_every={epochs}", f'cache_dir="{cache}"'),
        *(f"network.unfreeze_epoch={max(1, epochs // 4)}", "gate.enabled=false"),
    )
    recipe = read_recipe(recipe_path("dsb2018-cpu"), (*common, *settings))
    return recipe.with_random_encoder() if "random weights" in line else recipe


def _other_uses(bucket: Bucket, manifest: ModelManifest, recipe: Recipe, dataset: Dataset, root: Path) -> None:
    """The same weights with untuned thresholds, and averaged over flips and turns."""
    from nucleus.model.engines import KerasEngine
    from nucleus.model.unet import load_model
    from nucleus.predict.evaluation import evaluate
    from nucleus.predict.model import Model, PredictionOptions

    folder = root / "pulled"
    pull(bucket, Reference(manifest.model, str(manifest.version)), folder)
    model, config = load_model(folder)
    engine = KerasEngine(model, config.heads)
    untuned = config.model_copy(update={"instances": InstanceSettings()})
    for line, segmenter in {
        "recipe, thresholds not tuned": Model(engine, untuned),
        "recipe, flips and turns averaged": Model(engine, config, PredictionOptions(turns=True)),
    }.items():
        started = time.monotonic()
        found = evaluate(segmenter, dataset, ("val",), ShardCache(root / "cache"), loss=recipe.loss)
        _tell(line, found.overall, recipe, seconds=time.monotonic() - started)


def _tell(line: str, metrics: dict[str, dict[str, float]], recipe: Recipe, seconds: float) -> None:
    scores: dict[str, Any] = {kind: {name: round(of[name], 4) for name in _NUMBERS} for kind, of in metrics.items()}
    print(
        json.dumps({"line": line, "epochs": recipe.optimizer.epochs, "seconds": round(seconds), **scores}), flush=True
    )


if __name__ == "__main__":
    data_file, weights_file, *chosen = sys.argv[1:]
    ablation(Path(data_file).absolute(), Path(weights_file).absolute(), chosen or list(LINES))
