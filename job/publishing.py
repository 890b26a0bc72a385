"""Publishing of a finished run: model from the last checkpoint, card, and decision of the gate."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import nucleus
from job.final_model import FINAL_FOLDER, add_onnx
from nucleus import __version__
from nucleus.config.names import Reference
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import locate_dataset, open_dataset
from nucleus.data.origins import described_sources
from nucleus.errors import IntegrityError, ModelError, ObjectNotFoundError
from nucleus.model.architecture import (
    CARD_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    ONNX_FILE,
    WEIGHTS_FILE,
    read_model_config,
)
from nucleus.predict.model import Model
from nucleus.registry.aliases import pass_gate
from nucleus.registry.card import model_card
from nucleus.registry.encoder_weights import fetch_start
from nucleus.registry.manifest import MixOrigin, ModelManifest, Origin
from nucleus.registry.publish import publish
from nucleus.registry.versions import pull
from nucleus.runs.plan import RunPlan
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import SUMS_FILE, read_sums, temporary_folder
from nucleus.storage.uri import parse_uri
from nucleus.training.callbacks import Callback

__all__ = ["FinishedRun", "judge", "publish_run"]


@dataclass(frozen=True)
class FinishedRun:
    """Result of a run whose workers have finished.

    Attributes:
        metrics: Scores of the best weights: split, then `all` or kind of image, then metric.
        wandb_run: W&B's path `[entity/]project/id`; None if tracking was disabled.
        checkpoint: `bucket/key` of the last checkpoint, which holds the model.
        wandb_mode: How the run was tracked in the end: `online`, `offline` or `disabled`.
    """

    metrics: dict[str, dict[str, dict[str, float | None]]]
    wandb_run: str | None
    checkpoint: str
    wandb_mode: str


def judge(bucket: Bucket, manifest: ModelManifest, plan: RunPlan, callback: Callback) -> None:
    """Let the gate decide whether the recipe's alias moves to a version, and show the decision."""
    options = plan.recipe.gate
    if not options.enabled:
        return

    def rescore(incumbent: ModelManifest) -> float | None:
        start = manifest.origin.start
        if start is not None and incumbent.files[WEIGHTS_FILE].sha256 == start.sha256:  # scored already
            return start.scores.get("all", {}).get(options.metric)
        callback.on_stage(f"Scoring version {incumbent.version} on the test split of {plan.dataset}")
        with temporary_folder("incumbent") as temporary:
            folder = temporary / "model"
            with callback.progress(f"pull {incumbent}", "bytes") as advance:
                pull(bucket, Reference(incumbent.model, str(incumbent.version)), folder, advance)
            model = nucleus.predict.load_model_folder(folder)
            scores = _scores_on_test(model, str(incumbent), plan.dataset, plan, callback)
            return scores.get("all", {}).get(options.metric)

    decision = pass_gate(bucket, manifest, options, rescore)
    callback.on_stage(str(decision))


def _scores_on_test(
    model: Model, name: str, dataset: str, plan: RunPlan, callback: Callback
) -> dict[str, dict[str, float | None]]:
    """Return the scores of a model on the test split of a dataset: `all` or kind of image, then metric.

    Empty if the split has no images.
    """
    opened = open_dataset(locate_dataset(dataset))
    if not opened.manifest.split_samples("test"):
        return {}
    found = nucleus.predict.evaluate(
        model,
        opened,
        ("test",),
        _cache(plan),
        loss=plan.recipe.loss,
        progress=lambda _: callback.progress(f"evaluate {name} on {opened.manifest.name}"),
    )
    return found.overall


def _compared(origin: Origin, plan: RunPlan, folder: Path, callback: Callback) -> Origin:
    """Return the origin of a model with the scores on test splits of what it started with and what was mixed in.

    Args:
        origin: Origin of the model.
        plan: The run.
        folder: Folder with the model's files, `model.onnx` included.
        callback: Shows the progress.
    """
    start, before = plan.start, None
    if start is not None and plan.start_uri is not None:
        callback.on_stage(f"Scoring {start.version}, with which training started")
        before = nucleus.predict.load_pulled(fetch_start(parse_uri(plan.start_uri), start, plan.cache_dir))
        scores = _scores_on_test(before, start.version, plan.dataset, plan, callback)
        start = start.model_copy(update={"scores": scores})
    config = read_model_config((folder / CONFIG_FILE).read_bytes(), str(folder / CONFIG_FILE))
    after = nucleus.predict.Model(nucleus.model.load_engine(folder, config, "auto", has_onnx=True), config)
    mix = [
        MixOrigin(
            dataset=dataset,
            share=share,
            scores=_scores_on_test(after, plan.recipe.model, dataset, plan, callback),
            before=_scores_on_test(before, str(plan.start), dataset, plan, callback) if before else {},
            data=open_dataset(locate_dataset(dataset)).manifest.data_sources,
        )
        for dataset, share in plan.mix.items()
    ]
    return origin.model_copy(update={"start": start, "mix": mix})


def _cache(plan: RunPlan) -> ShardCache:
    return ShardCache(plan.cache_dir, plan.recipe.cache_limit_gib)


def publish_run(plan: RunPlan, fitted: FinishedRun, bucket: Bucket, callback: Callback) -> ModelManifest:
    """Publish the model of a finished run, and let the gate decide about the recipe's alias.

    Raises:
        DataError: The dataset, which the card describes, no longer exists.
        IntegrityError: The checkpoint or the dataset's manifest is damaged.
        ModelError: ONNX Runtime does not find the same nuclei as TensorFlow; nothing is published.
        StorageError: The bucket cannot be used.
    """
    callback.on_stage(f"Publishing {plan.recipe.model}")
    origin = Origin(
        run=plan.run,
        recipe=plan.recipe.model_dump(mode="json"),
        dataset=plan.dataset,
        encoder_weights=plan.weights,
        metrics=fitted.metrics,
        code_version=__version__,
        wandb_run=fitted.wandb_run,
        wandb_mode=fitted.wandb_mode,
    )
    checkpoint = Bucket(parse_uri(f"s3://{fitted.checkpoint}"))
    with temporary_folder("model") as folder:
        _fetch_model(checkpoint, folder)
        config = read_model_config((folder / CONFIG_FILE).read_bytes(), str(checkpoint.uri))
        dataset = open_dataset(locate_dataset(plan.dataset))
        callback.on_stage(f"Comparing {ONNX_FILE} with TensorFlow")
        try:
            add_onnx(folder, dataset, _cache(plan))
        except ModelError as error:
            raise ModelError(
                f"Expected to publish {plan.recipe.model}; nothing was published. {error} Install the versions of "
                f"tf2onnx and onnxruntime that requirements/ locks, and run: nucleus train --resume {plan.run}"
            ) from error
        data = described_sources(dataset.manifest.data_sources, plan.recipe.card)
        origin = origin.model_copy(update={"data": data})
        if plan.start is not None or plan.mix:
            origin = _compared(origin, plan, folder, callback)
        history = json.loads((folder / METRICS_FILE).read_bytes())["history"]
        (folder / CARD_FILE).write_text(model_card(plan.recipe.model, origin, config, dataset.manifest, history))
        with callback.progress("publish", "bytes") as advance:
            manifest = publish(bucket, plan.recipe.model, folder, origin, advance)
    judge(bucket, manifest, plan, callback)
    return manifest


def _fetch_model(checkpoint: Bucket, folder: Path) -> None:
    """Download the model's files from a checkpoint, which also holds the optimizer, and check their sums.

    Raises:
        IntegrityError: A file is missing or damaged.
    """
    prefix = f"{FINAL_FOLDER}/"
    try:
        sums = read_sums(checkpoint.get(SUMS_FILE), str(checkpoint.uri))
        for name in filter(lambda name: name.startswith(prefix), sums):
            checkpoint.download(name, folder / PurePosixPath(name).name, sha256=sums[name])
    except ObjectNotFoundError as error:
        raise IntegrityError(f"Expected a complete checkpoint at {checkpoint.uri}; a file is missing.") from error
