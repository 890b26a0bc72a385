"""One run of the whole way, on two Ray workers and a dozen images, that many tests look at.

What is the same by construction is compared exactly: bytes, integers, weights after steps on the same batches with sums
in the same order. What a network computes for the same image in another batch is the same up to rounding: how images
share a batch decides the last bits of a convolution on some CPUs. Then a pixel at the threshold may change sides.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from numpy.typing import NDArray

from job.train import RunOptions, train
from nucleus.config.names import Reference
from nucleus.config.recipe import Recipe
from nucleus.config.settings import parse_recipe
from nucleus.data.dataset import Dataset
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.progress import Advance, no_progress
from nucleus.registry.manifest import ModelManifest
from nucleus.registry.versions import pull
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri, parse_uri
from nucleus.training.callbacks import Callback
from tests.faults.policy import JOB_POLICY, allows
from tests.faults.proxy import Fault, Proxy, Request

__all__ = ["Recorder", "Trained", "assert_same_labels", "assert_same_scores", "recipe_for", "trained_with_least_rights"]

_ROUNDING = 1e-3
"""What pixels that change sides may do to a score between 0 and 1, and the share of an image that they may be."""


class Recorder(Callback):
    """Remembers what a run shows."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.texts: list[str] = []

    def on_stage(self, text: str) -> None:
        self.texts.append(text)

    def on_warning(self, text: str) -> None:
        self.texts.append(text)

    def progress(self, title: str, unit: str = "items") -> AbstractContextManager[Advance]:  # noqa: ARG002
        self.texts.append(title)
        return nullcontext(no_progress)

    def on_steps_end(
        self, epoch: int, epochs: int, done: int, total: int, loss: float, images_per_second: float
    ) -> None:
        assert 0 < done <= total
        assert loss > 0
        assert images_per_second > 0
        assert 1 <= epoch <= epochs

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        self.epochs.append(metrics)


@dataclass
class Trained:
    """The run `first-run`, the version `tiny@1` that it published, and that version as it was pulled.

    Attributes:
        requests: How many requests its processes sent.
        denied: Those that the job's policy does not allow.
    """

    bucket: Bucket
    dataset: Dataset
    recipe: Recipe
    manifest: ModelManifest
    recorder: Recorder
    folder: Path
    wandb_dir: Path
    requests: int
    denied: list[str]


def recipe_for(bucket: S3Uri, cache: Path, **changes: Any) -> Recipe:
    content = {
        "model": "tiny",
        "dataset": "dozen",
        "bucket": str(bucket),
        "workers": 2,
        "max_failures": 0,
        "cache_dir": str(cache),
        "network": {
            "encoder": "plain",
            "weights": "none",
            "freeze_encoder": False,
            "decoder_channels": [16, 16, 16, 16, 16],
        },
        "input": {"crop": 64, "batch_size": 4, "tile": 64, "overlap": 16},
        "optimizer": {"epochs": 3, "validate_every": 2, "warmup_steps": 2},
        "gate": {"minimum": 0.0},  # so short a training finds next to nothing
        **changes,
    }
    return parse_recipe(content, "test")


def trained_with_least_rights(line: Proxy, dozen: Path, root: Path) -> Trained:
    """Train in a bucket where the job's policy is enforced on every request; everything is left in `root`."""
    uri, denied = parse_uri("s3://whole-way"), []
    boto3.client("s3").create_bucket(Bucket=uri.bucket)
    dataset = import_dataset(dozen, uri / "datasets" / "dozen", SplitOptions()).dataset
    recipe, recorder = recipe_for(uri, root / "cache"), Recorder()

    def decide(request: Request) -> Fault | None:
        if allows(JOB_POLICY, request, uri.bucket):
            return None
        denied.append(f"{request.method} {request.path}")
        return Fault.DENIED

    before = line.requests
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", line.endpoint)
        patch.setenv("WANDB_DIR", str(root))
        patch.delenv("WANDB_MODE", raising=False)
        patch.setattr(line, "decide", decide)
        manifest = train(recipe, RunOptions(run="first-run", folder=root / "runs"), recorder)
    requests = line.requests - before
    folder = root / "pulled"
    pull(Bucket(uri), Reference("tiny"), folder)
    return Trained(Bucket(uri), dataset, recipe, manifest, recorder, folder, root / "wandb", requests, denied)


def assert_same_scores(found: Mapping[str, Mapping[str, float]], expected: Mapping[str, Mapping[str, float]]) -> None:
    """The scores of a split by kind of image: the truth exactly, what was predicted up to rounding."""
    assert found.keys() == expected.keys()
    for kind, scores in expected.items():
        assert [found[kind][name] for name in ("images", "nuclei_true")] == [scores["images"], scores["nuclei_true"]]
        assert found[kind]["loss"] == pytest.approx(scores["loss"], rel=1e-5)
        assert found[kind] == pytest.approx(scores, abs=_ROUNDING)


def assert_same_labels(found: NDArray[np.integer], expected: NDArray[np.integer]) -> None:
    """Two label images have the same nuclei, up to rounding."""
    assert found.shape == expected.shape
    assert np.mean((found > 0) != (expected > 0)) <= _ROUNDING
