"""A run's workers on Ray Train, from the first step to the model in the run's last checkpoint."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nucleus
from job.events import Listener
from job.filesystem import run_storage
from job.run_callbacks import FINAL_FOLDER
from nucleus import __version__
from nucleus.config.names import Reference
from nucleus.data.cache import ShardCache, default_cache_dir
from nucleus.data.dataset import locate_dataset, open_dataset
from nucleus.model.architecture import read_model_config
from nucleus.registry.aliases import pass_gate
from nucleus.registry.card import model_card
from nucleus.registry.manifest import ModelManifest, Origin
from nucleus.registry.publish import publish
from nucleus.registry.versions import pull
from nucleus.runs.plan import RunPlan
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import check_sums
from nucleus.storage.retries import storage_timeout
from nucleus.storage.uri import parse_uri

__all__ = ["Fitted", "judge", "publish_fitted"]


@dataclass(frozen=True)
class Fitted:
    """What a finished run left.

    Attributes:
        metrics: By split, kind of image and name.
        wandb_run: Its W&B run.
        checkpoint: `bucket/key` of its last checkpoint, which holds the model.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    wandb_run: str | None
    checkpoint: str


def judge(bucket: Bucket, manifest: ModelManifest, plan: RunPlan, listener: Listener) -> None:
    """Let the gate decide, and say what it decided."""
    options = plan.recipe.gate
    if not options.enabled:
        return

    def rescore(incumbent: ModelManifest) -> float:
        listener.stage(f"Scoring version {incumbent.version} on the test split of {plan.dataset}")
        return _score_on_test(bucket, incumbent, plan, listener)

    decision = pass_gate(bucket, manifest, options.alias, options.metric, rescore)
    verb = "means" if decision.passed else "does not move to"
    listener.stage(f"{options.alias} {verb} version {manifest.version}: {decision.reason}")


def _score_on_test(bucket: Bucket, manifest: ModelManifest, plan: RunPlan, listener: Listener) -> float:
    """The recipe's metric of another version on this run's test split."""

    cache_dir = Path(plan.recipe.cache_dir) if plan.recipe.cache_dir else default_cache_dir()
    cache = ShardCache(cache_dir, plan.recipe.cache_limit_gib)
    dataset = open_dataset(locate_dataset(plan.dataset))
    with tempfile.TemporaryDirectory(prefix="nucleus-incumbent-") as temporary:
        folder = Path(temporary) / "model"
        with listener.watch(f"pull {manifest.model}@{manifest.version}", "bytes") as advance:
            pull(bucket, Reference(manifest.model, str(manifest.version)), folder, advance)
        found = nucleus.predict.evaluate(
            nucleus.predict.load_model_folder(folder),
            dataset,
            ("test",),
            cache,
            loss=plan.recipe.loss,
            progress=lambda _: listener.watch(f"evaluate {manifest.model}@{manifest.version}"),
        )
        return found["all"][plan.recipe.gate.metric]


def publish_fitted(plan: RunPlan, fitted: Fitted, bucket: Bucket, listener: Listener) -> ModelManifest:
    """Publish the model of a finished run, and let the gate decide on the recipe's alias.

    Raises:
        DataError: The dataset is gone, of which the card tells.
        IntegrityError: The checkpoint or the dataset's manifest is damaged.
        StorageError: The bucket cannot be used.
    """
    from ray.train import Checkpoint

    listener.stage(f"Publishing {plan.recipe.model}")
    origin = Origin(
        run=plan.run,
        recipe=plan.recipe.model_dump(mode="json"),
        dataset=plan.dataset,
        encoder_weights=plan.weights,
        metrics=fitted.metrics,
        code_version=__version__,
        wandb_run=fitted.wandb_run,
    )
    stored = Checkpoint(fitted.checkpoint, run_storage(parse_uri(plan.bucket), storage_timeout()))
    with tempfile.TemporaryDirectory(prefix="nucleus-model-") as temporary:
        folder = Path(temporary) / FINAL_FOLDER
        with stored.as_directory() as checkpoint:
            check_sums(Path(checkpoint), f"s3://{fitted.checkpoint}")
            shutil.copytree(Path(checkpoint) / FINAL_FOLDER, folder)
        config = read_model_config((folder / "model.json").read_bytes(), f"s3://{fitted.checkpoint}")
        dataset = open_dataset(locate_dataset(plan.dataset)).manifest
        (folder / "card.md").write_text(model_card(plan.recipe.model, origin, config, dataset))
        with listener.watch("publish", "bytes") as advance:
            manifest = publish(bucket, plan.recipe.model, folder, origin, advance)
    judge(bucket, manifest, plan, listener)
    return manifest
