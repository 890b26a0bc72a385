"""The record, dataset and pictures of a run that never was, for the tests of the report."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from nucleus.config.names import Kind
from nucleus.config.settings import parse_recipe
from nucleus.data.dataset import DatasetManifest, LeftOut, Shard
from nucleus.data.images import RgbImage, encode_png
from nucleus.data.samples import SPLITS, Sample
from nucleus.data.synthetic import generated_image
from nucleus.metrics.nuclei import THRESHOLDS
from nucleus.registry.manifest import EncoderWeightsOrigin
from nucleus.runs.record import ExampleImage, NetworkFacts, RunRecord, Stage, TestImage, WatchedImage

__all__ = ["make_dataset", "make_record", "write_pictures"]

_SIDE = 96
_COUNTS = {"train": 40, "val": 6, "test": 24}


def make_dataset(**changes: Any) -> DatasetManifest:
    """A dataset of generated images; `counts` gives the images of each split."""
    counts = changes.pop("counts", _COUNTS)
    samples = [_sample(split, number) for split in SPLITS for number in range(counts[split])]
    shards = [
        Shard(file=f"{split}-00000-of-00001.tfrecord", split=split, records=counts[split], size=10**6, sha256="0" * 64)
        for split in SPLITS
        if counts[split]
    ]
    content = {
        "format": 1,
        "name": "cells",
        "version": "0123456789ab",
        "created": "2026-11-20T08:00:00+00:00",
        "source": "cells.zip",
        "layout": "kaggle",
        "seed": 3,
        "samples": samples,
        "shards": shards,
        "duplicates": [LeftOut(title="copy-of-one", reason="the same pixels as one")],
        "left_out": [LeftOut(title="broken", reason="no image")],
    }
    return DatasetManifest.model_validate({**content, **changes})


def make_record(**changes: Any) -> RunRecord:
    """A run of two epochs, the second validated."""
    recipe = parse_recipe({"model": "cells", "dataset": "cells", "optimizer": {"epochs": 2}}, "the test")
    first = {"epoch": 1.0, "loss": 1.2, "learning_rate": 2e-3, "images_per_second": 30.5, "images_dropped": 0.0}
    second = {**first, "epoch": 2.0, "loss": 0.8, "val_loss": 0.9, **{f"val_{k}": v for k, v in _scores().items()}}
    content = {
        "run": "cells-20261123-080000",
        "group": None,
        "bucket": "s3://nucleus",
        "model": "cells",
        "version": 3,
        "gate": "production moved from version 2: map 0.61 beats 0.58",
        "begun": "2026-11-23T08:00:00+00:00",
        "ended": "2026-11-23T08:32:27+00:00",
        "recipe": recipe.model_dump(mode="json"),
        "dataset": "s3://nucleus/datasets/cells@0123456789ab",
        "encoder_weights": EncoderWeightsOrigin(source="imagenet", sha256="1" * 64),
        "metrics": {
            split: {
                "all": {"images": 24.0, **_scores()},
                "dark-field": {"images": 15.0, **_scores(0.05)},
                "stain": {"images": 9.0, **_scores(-0.15)},
            }
            for split in ("val", "test")
        },
        "history": [first, second],
        "best_epoch": 2,
        "network": NetworkFacts(
            encoder="mobilenet_v2",
            parameters=2_100_000,
            encoder_parameters=1_800_000,
            trained_parameters=2_000_000,
            skips=[96, 144, 192, 576, 1280],
            decoder=[128, 96, 64, 32, 16],
            outputs=["background", "body", "border", "distance"],
        ),
        "thresholds": {"seed_threshold": 0.6, "mask_threshold": 0.5, "min_area": 20.0},
        "nucleus_diameter": 19.5,
        "workers": 2,
        "device": "one core of a CPU",
        "stages": [Stage(name="start Ray", seconds=12.5), Stage(name="train", seconds=1840.0)],
        "worker_seconds": 3600.0,
        "cpus_per_worker": 1,
        "gpus_per_worker": 0,
        "versions": {"python": "3.11.7", "tensorflow": "2.21.0"},
        "code_version": "0.2.0",
        "commit": "57296d8",
        "wandb_run": None,
        "examples": [ExampleImage(name=f"train-{i}", kind=Kind.DARK_FIELD) for i in range(3)],
        "watched": [WatchedImage(name=f"val-{i}", kind=Kind.STAIN, epochs=[0, 1, 2]) for i in range(2)],
        "test_images": [_test_image(group, i) for group in ("best", "worst") for i in range(12)],
    }
    return RunRecord.model_validate({**content, **changes})


def write_pictures(folder: Path, record: RunRecord, noise: bool = False, side: int = _SIDE) -> None:
    """Write every picture that the record names below `folder/pictures`."""
    keys = [
        f"examples/{i.name}/{p}" for i in record.examples for p in ("image", "labels", "augmented", "augmented-labels")
    ]
    for image in record.watched:
        parts = ["image", "truth", "best", *(f"epoch-{epoch:05d}" for epoch in image.epochs)]
        keys += [f"watched/{image.name}/{part}" for part in parts]
    keys += [f"test/{image.name}/{part}" for image in record.test_images for part in ("image", "truth", "mistakes")]
    for seed, key in enumerate(keys):
        path = folder / "pictures" / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(_noise(seed, side) if noise else generated_image(seed, side, side)[0]))


def _scores(more: float = 0.0) -> dict[str, float]:
    ap = {f"ap_{round(100 * t)}": max(0.0, 0.9 + more - 1.2 * (float(t) - 0.5)) for t in THRESHOLDS}
    return {
        "loss": 0.9,
        "iou": 0.85 + more,
        "dice": 0.9 + more,
        "accuracy": 0.95 + more,
        **ap,
        "map": sum(ap.values()) / len(ap),
        "nuclei_true": 1000.0,
        "nuclei_predicted": 950.0,
        "pooled_f1_50": 2 * 880 / 1950,
    }


def _sample(split: str, number: int) -> Sample:
    name = f"{split}-{number}"
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Sample(
        name=name,
        split=split,
        kind=list(Kind)[number % 3],
        group=number,
        height=256,
        width=256 if number % 2 else 320,
        nuclei=7 * number,
        image_sha256=digest,
        labels_sha256=digest,
    )


def _test_image(group: str, number: int) -> TestImage:
    return TestImage.model_validate(
        {
            "name": f"{group}-{number}",
            "kind": "dark-field",
            "group": group,
            "scores": {"map": 0.9 - 0.05 * number, "ap_50": 0.95, "iou": 0.9, "dice": 0.95},
            "nuclei": 20,
            "predicted": 19,
            "missed": number,
            "extra": 0,
            "merged": number % 2,
            "split": 0,
        }
    )


def _noise(seed: int, side: int) -> RgbImage:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
