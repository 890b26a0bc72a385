"""From a run's last checkpoint to a published version."""

import shutil
import tempfile
from pathlib import Path

from job.events import Listener
from job.final_model import FINAL_FOLDER
from job.fitting import Fitted
from job.gate import judge
from job.plan import RunPlan
from job.storage import run_storage
from nucleus import __version__
from nucleus.data.datasets import locate_dataset, open_dataset
from nucleus.model.architecture import read_model_config
from nucleus.registry.card import model_card
from nucleus.registry.manifest import ModelManifest, Origin
from nucleus.registry.versions import publish
from nucleus.storage.bucket import Bucket
from nucleus.storage.retries import storage_timeout
from nucleus.storage.sums import check_sums
from nucleus.storage.uri import parse_uri

__all__ = ["publish_fitted"]


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
