"""The driver of a training run: from a recipe to a published model.

`nucleus train` calls it; `python -m job.train RECIPE` is the same for a Ray job. Options before the recipe are those of
`nucleus` itself, such as `--debug`.
"""

import os
import sys
import time
from itertools import takewhile
from pathlib import Path

from job.cluster import connected
from job.events import Listener, SilentListener
from job.fitting import fit
from job.gate import judge
from job.options import RunOptions
from job.plan import RunPlan, load_plan, new_run_name, save_plan
from job.publishing import publish_fitted
from job.reporting import has_facts, report_published
from nucleus.config.recipe import Recipe
from nucleus.data.datasets import locate_dataset, open_dataset
from nucleus.errors import DataError, WeightsError
from nucleus.registry.encoder_weights import provide_weights
from nucleus.registry.manifest import EncoderWeightsOrigin, ModelManifest
from nucleus.registry.versions import version_of_run
from nucleus.storage.conditions import check_conditional_writes
from nucleus.tracking.weights_and_biases import check_tracking, tracking_mode
from nucleus.versions import commit

__all__ = ["plan_run", "resume", "train"]


def train(recipe: Recipe, options: RunOptions | None = None, listener: Listener | None = None) -> ModelManifest:
    """Train by a recipe on the Ray cluster at hand and publish the best weights.

    Raises:
        NucleusError: Whatever prevents it, before anything is started where it can be known.
    """
    options = options or RunOptions()
    listener = listener or SilentListener()
    return _execute(plan_run(recipe, options, listener), options, listener, new=True)


def resume(
    run: str, bucket: str | None, options: RunOptions | None = None, listener: Listener | None = None
) -> ModelManifest:
    """Go on with a run from its last checkpoint, by the recipe and data that it began with.

    Raises:
        JobError: There is no such run.
    """
    options = options or RunOptions()
    listener = listener or SilentListener()
    store = options.bucket(bucket)
    check_conditional_writes(store)
    plan = load_plan(store, run).model_copy(update={"folder": str(options.local_folder)})
    published = version_of_run(store, plan.recipe.model, run)
    if published is None:
        return _execute(plan, options, listener, new=False)
    judge(store, published, plan, listener)
    if has_facts(store, run):
        report_published(plan, published, store, listener, {})
    else:
        listener.warn(f"The run {run} has no report: an older version of this package trained it.")
    return published


def plan_run(recipe: Recipe, options: RunOptions, listener: Listener, group: str | None = None) -> RunPlan:
    """Find out what can be wrong before a cluster is used.

    Args:
        recipe: What to run.
        options: How to run it.
        listener: Is warned.
        group: What the run belongs to, such as a sweep.

    Raises:
        NucleusError: What is wrong.
    """
    bucket = options.bucket(recipe.bucket)
    bucket.check("runs/")
    dataset = open_dataset(locate_dataset(recipe.dataset, recipe.bucket))
    images = len(dataset.manifest.split_samples("train"))
    if images < recipe.input.batch_size:
        raise DataError(
            f"Expected at least one batch of {recipe.input.batch_size} images in the training split of {dataset}; "
            f"found {images}. Set input.batch_size lower or import more."
        )
    mode = tracking_mode(recipe.tracking)
    check_tracking(mode)
    check_conditional_writes(bucket)
    run = options.run or new_run_name(recipe.model)
    try:
        with listener.watch("encoder weights", "bytes") as advance:
            network = recipe.network
            weights = provide_weights(network.weights, network.encoder, bucket, run, advance, listener.stage)
    except WeightsError as error:
        if not (options.weights_optional and recipe.network.weights == "imagenet"):
            raise
        weights = None
        recipe = recipe.with_random_encoder()
        listener.warn(f"Going on WITHOUT pretrained encoder weights, so results will be worse. {error}")
    return RunPlan(
        run=run,
        bucket=str(bucket.uri),
        recipe=recipe,
        dataset=str(dataset),
        weights_uri=str(weights.uri) if weights else None,
        weights=weights.origin if weights else EncoderWeightsOrigin(source="none", sha256=None),
        wandb_mode=mode,
        group=group,
        wandb_dir=str(Path(os.environ.get("WANDB_DIR") or Path.cwd()).absolute()),
        folder=str(options.local_folder),
        commit=commit(),
    )


def _execute(plan: RunPlan, options: RunOptions, listener: Listener, *, new: bool) -> ModelManifest:
    bucket = options.bucket(plan.bucket)
    listener.stage(f"Training {plan.run} on {plan.recipe.workers}")
    options.local_folder.mkdir(parents=True, exist_ok=True)  # workers on this machine use it if it is there
    with connected(plan.recipe, own=options.own_cluster, verbose=options.verbose):
        if new:  # only now, so that a run which could not begin leaves its name free
            save_plan(bucket, plan)
        begun = time.monotonic()
        fitted = fit(plan, options, listener)
        trained = time.monotonic()
        manifest = publish_fitted(plan, fitted, bucket, listener)
    seconds = {"train": trained - begun, "publish": time.monotonic() - trained}
    report_published(plan, manifest, bucket, listener, seconds)
    return manifest


if __name__ == "__main__":
    from nucleus.cli.main import cli

    general = list(takewhile(lambda argument: argument.startswith("--"), sys.argv[1:]))
    cli([*general, "train", *sys.argv[1 + len(general) :]], prog_name="nucleus")
