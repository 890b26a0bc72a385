"""One worker's part of a training run: load, step, validate, save, until done."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from nucleus.config.recipe import KindName, Recipe
from nucleus.data.cache import ShardCache
from nucleus.data.datasets import Dataset
from nucleus.data.generated import generated_image
from nucleus.data.kinds import Kind
from nucleus.data.manifest import DatasetManifest
from nucleus.data.pipeline import Feed, training_batches
from nucleus.data.reading import cached_split
from nucleus.data.sampling import EpochPlan, epoch_plan, stored_order
from nucleus.errors import JobError
from nucleus.metrics.scores import ScoreSums
from nucleus.model.architecture import ModelConfig, config_of_recipe
from nucleus.model.files import load_encoder_weights, load_weights
from nucleus.model.losses import image_losses
from nucleus.model.tiling import TiledNetwork
from nucleus.model.unet import build_unet, calibrate_encoder, encoder_of
from nucleus.training.distributed import TrainingStep, Workers
from nucleus.training.parameters import active_groups, averaged, parameter_groups
from nucleus.training.state import Progress, load_checkpoint, save_checkpoint
from nucleus.training.tuning import tune_instances
from nucleus.training.validation import LabelledImage, images_of_worker, score_images, split_reader

__all__ = ["Finished", "Reporter", "TrainingInput", "TrainingRun", "train"]

_CALIBRATION_IMAGES = 16
_EXAMPLES = 4


@dataclass(frozen=True)
class TrainingInput:
    """What a worker needs besides the recipe.

    Attributes:
        dataset: The dataset version to train on.
        cache: Where its shards are cached on this machine.
        encoder_weights: Local file of the encoder's weights, or None for random ones.
    """

    dataset: Dataset
    cache: ShardCache
    encoder_weights: Path | None


class Reporter(Protocol):
    """Where a worker's progress goes. Every worker makes each call, in the same order."""

    def stage(self, text: str) -> None:
        """Something other than an epoch begins."""

    def steps(self, epoch: int, done: int, total: int) -> None:
        """Some steps of an epoch are done."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """An epoch is done; its metrics are those over all workers."""

    def checkpoint(self, metrics: dict[str, float], save: Callable[[Path], None]) -> None:
        """Keep a checkpoint: on the first worker, `save` fills the folder it is given."""

    def finished(self, finished: "Finished", save: Callable[[Path], None]) -> None:
        """Keep the model, and a last checkpoint by `save`."""


@dataclass(frozen=True)
class Finished:
    """What a run leaves on each worker, the same on all.

    Attributes:
        model: The network with the best weights.
        config: What it is.
        progress: The run's history.
        metrics: Scores on `val` and `test`: split, then `all` or kind of image, then metric.
        examples: A few of this worker's test images.
    """

    model: keras.Model
    config: ModelConfig
    progress: Progress
    metrics: dict[str, dict[str, dict[str, float]]]
    examples: list[LabelledImage]


def train(
    recipe: Recipe, given: TrainingInput, workers: Workers, reporter: Reporter, resume_from: Path | None
) -> Finished:
    """Train on this worker, together with all others, and evaluate the best weights.

    The training split must have at least one batch of images.

    Raises:
        JobError: Training has diverged.
    """
    with tempfile.TemporaryDirectory(prefix="nucleus-train-") as folder:
        run = TrainingRun(recipe, given, workers, reporter, Path(folder) / "best.weights.h5")
        return run.execute(resume_from)


class TrainingRun:
    """One worker's part of a run. `best` is the file for the best weights so far."""

    def __init__(self, recipe: Recipe, given: TrainingInput, workers: Workers, reporter: Reporter, best: Path) -> None:
        self.recipe = recipe
        self.workers = workers
        self.reporter = reporter
        self.best = best
        self.manifest = given.dataset.manifest
        self.reader = cached_split(given.dataset, "train", given.cache, self._plan)
        self.readers = {
            split: split_reader(given.dataset, split, given.cache, workers.rank, workers.count)
            for split in ("val", "test")
        }
        self.train_records = [shard.records for shard in self.manifest.split_shards("train")]
        self.weights = _sample_weights(self.manifest, recipe.input.kind_weights)
        self.steps_per_epoch = sum(self.train_records) // recipe.input.batch_size
        self.config = config_of_recipe(recipe)
        self.model = self._build(given.encoder_weights)
        self.groups = parameter_groups(self.model, recipe, self.steps_per_epoch)
        self.steps: dict[int, TrainingStep] = {}
        self.network = TiledNetwork(self.model, self.config)

    def _build(self, encoder_weights: Path | None) -> keras.Model:
        recipe = self.recipe
        keras.utils.set_random_seed(recipe.seed)
        keras.mixed_precision.set_global_policy(recipe.optimizer.precision)
        model = build_unet(self.config)
        if encoder_weights is not None:
            load_encoder_weights(encoder_of(model), encoder_weights)
        else:
            side = recipe.input.crop
            images = [generated_image(seed, side, side)[0] for seed in range(_CALIBRATION_IMAGES)]
            calibrate_encoder(model, np.stack(images))
        return model

    def losses(self, logits: Any, labels: Any) -> Any:
        """The loss of each image from logits and labels (N x H x W)."""
        return image_losses(logits, labels, self.config.heads, self.recipe.loss)

    def step(self, epoch: int) -> TrainingStep:
        """The compiled step for the groups that are trained in an epoch."""
        recipe, groups = self.recipe, active_groups(self.groups, epoch)
        if len(groups) not in self.steps:
            self.steps[len(groups)] = TrainingStep(
                self.workers,
                self.model,
                groups,
                self.losses,
                recipe.input.batch_size,
                accumulation=recipe.optimizer.gradient_accumulation_steps,
                global_clipnorm=recipe.optimizer.global_clipnorm,
            )
        return self.steps[len(groups)]

    def execute(self, resume_from: Path | None) -> Finished:
        """Train to the end."""
        progress = Progress()
        if resume_from is not None:
            progress = load_checkpoint(resume_from, self.model, self.groups, self.best)
        else:
            self.workers.broadcast(list(self.model.weights))
            for group in self.groups:
                group.reset_averages()
        options = self.recipe.optimizer
        batches = self.batches(progress.epochs_done)
        for reader in self.readers.values():
            reader.prefetch(0, 0)
        while progress.epochs_done < options.epochs and progress.validations_since_best < options.patience:
            self._epoch(progress, batches)
        self._load_best()
        self._tune()
        metrics = {split: self._validate(split).report() for split in ("val", "test")}
        examples = list(islice(self.images("test"), _EXAMPLES))
        finished = Finished(self.model, self.config, progress, metrics, examples)
        self.reporter.finished(finished, lambda folder: self._save(folder, progress))
        return finished

    def _epoch(self, progress: Progress, batches: Iterator[Any]) -> None:
        epoch = progress.epochs_done
        options = self.recipe.optimizer
        metrics = self._train_epoch(epoch, batches)
        _check_finite(metrics)
        last = epoch + 1 == options.epochs
        validated = last or (epoch + 1) % options.validate_every == 0
        if validated:
            started = time.monotonic()
            with averaged(self.groups):
                scores = self._validate("val").scores()
                metrics |= {f"val_{name}": value for name, value in scores.items()}
                _check_finite(metrics)
                if progress.note_score(epoch, metrics[options.monitor]):
                    self.model.save_weights(self.best)
            metrics["validation_seconds"] = time.monotonic() - started
        progress.epochs_done = epoch + 1
        progress.history.append(metrics)
        self.reporter.epoch(metrics)
        if validated:
            self.reporter.checkpoint(metrics, lambda folder: self._save(folder, progress))

    def _save(self, folder: Path, progress: Progress) -> None:
        save_checkpoint(folder, progress, self.model, self.groups, self.best)

    def _plan(self, epoch: int) -> EpochPlan:
        return epoch_plan(
            self.train_records,
            seed=self.recipe.seed,
            epoch=epoch,
            rank=self.workers.rank,
            world=self.workers.count,
            global_batch=self.recipe.input.batch_size,
            weights=self.weights,
        )

    def batches(self, first_epoch: int) -> Iterator[Any]:
        """This worker's batches from an epoch on."""
        recipe = self.recipe
        self.reader.enter(first_epoch, 0)  # here, and not in TensorFlow's threads, an error is still itself
        feed = Feed(
            reader=self.reader,
            crop=recipe.input.crop,
            normalization=recipe.input.normalization,
            batch=recipe.batch_per_worker,
            augment=recipe.augment,
            seed=recipe.seed,
            threads=recipe.cpus_per_worker,
        )
        return iter(training_batches(feed, range(first_epoch, recipe.optimizer.epochs)))

    def _train_epoch(self, epoch: int, batches: Iterator[Any]) -> dict[str, float]:
        recipe, step, at_once = self.recipe, self.step(epoch), self.recipe.optimizer.steps_per_execution
        started, loss, total = time.monotonic(), 0.0, self.steps_per_epoch
        for done in range(0, total, at_once):
            count = min(at_once, total - done)
            try:
                loss += step.run(batches, count)
            except tf.errors.OpError as error:
                raise self.reader.failure or error from error
            self.reporter.steps(epoch, done + count, total)
        seconds = time.monotonic() - started
        return {
            "epoch": float(epoch),
            "loss": float(self.workers.sum(np.array([loss]))[0]) / total,
            "learning_rate": float(np.asarray(self.groups[0].optimizer.learning_rate)),
            "images_per_second": total * recipe.input.batch_size / seconds,
            "images_dropped": float(sum(self.train_records) - total * recipe.input.batch_size),
        }

    def _validate(self, split: str) -> ScoreSums:
        """Score a split over all workers."""
        return score_images(self.network, self.images(split), self.config, self.recipe.loss, self.workers)

    def _tune(self) -> None:
        """Choose how labels are made from the maps, on the validation split."""
        self.reporter.stage("Tuning the thresholds on the validation split")
        settings, diameter = tune_instances(self.network, lambda: self.images("val"), self.config, self.workers)
        self.config = self.config.model_copy(update={"instances": settings, "nucleus_diameter": diameter})

    def images(self, split: str) -> Iterator[LabelledImage]:
        """This worker's images of a split."""
        return images_of_worker(self.manifest, split, self.readers[split])

    def _load_best(self) -> None:
        load_weights(self.model, self.best)
        self.workers.broadcast(list(self.model.weights))


def _sample_weights(manifest: DatasetManifest, kind_weights: Mapping[KindName, float]) -> list[float] | None:
    """How often each training sample, in stored order, is drawn relative to the others; None if all alike."""
    if not kind_weights:
        return None
    by_kind = {Kind(name): weight for name, weight in kind_weights.items()}
    samples = manifest.split_samples("train")
    return [by_kind.get(samples[i].kind, 1.0) for i in stored_order(len(samples))]


def _check_finite(metrics: dict[str, float]) -> None:
    """Stop a run that has diverged; all workers have the same metrics, so all stop."""
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise JobError(
                f"Expected finite metrics; {name} is {value} in epoch {metrics['epoch'] + 1:.0f}: training has "
                "diverged. Set optimizer.learning_rate lower or optimizer.warmup_steps higher."
            )
