"""One worker's part of a training run: load, step, validate, save, until done."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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
from nucleus.training.demand import Demand
from nucleus.training.distributed import TrainingStep, Workers
from nucleus.training.parameters import active_groups, averaged, parameter_groups
from nucleus.training.state import History, Progress, load_checkpoint, save_checkpoint
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
    """Where a worker's progress goes, and where demands come from.

    Every worker makes each call, in the same order; but for `attention`, which each answers for itself.
    """

    def attention(self) -> bool:
        """Whether all workers should look for a demand at the end of the next step."""

    def demand(self) -> Demand:
        """What is to be done; the same on every worker."""

    def stage(self, text: str) -> None:
        """Something other than an epoch begins."""

    def resumed(self, history: History, where: str) -> None:
        """The run goes on from a checkpoint."""

    def steps(self, epoch: int, done: int, total: int, loss: float, images_per_second: float) -> None:
        """Some steps of an epoch are done, with this mean loss so far, by this worker's images, and at this speed."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """An epoch is done; its metrics are those over all workers."""

    def checkpoint(self, history: History, save: Callable[[Path], None]) -> None:
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
) -> Finished | None:
    """Train on this worker, together with all others, and evaluate the best weights.

    The training split must have at least one batch of images.

    Returns:
        What the run leaves, or None if it was asked to stop before its end; then a checkpoint was kept.

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
        self.open_reader = partial(cached_split, given.dataset, "train", given.cache)
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
        self.progress = Progress()
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

    def execute(self, resume_from: Path | None) -> Finished | None:
        """Train to the end, or until a demand to stop."""
        progress = self.progress
        if resume_from is not None:
            progress = self.progress = load_checkpoint(resume_from, self.model, self.groups, self.best)
            where = f"epoch {progress.epochs_done}, step {progress.steps_done} on {self.workers.count} workers"
            self.reporter.resumed(progress.history, where)
        else:
            self.workers.broadcast(list(self.model.weights))
            for group in self.groups:
                group.reset_averages()
        options = self.recipe.optimizer
        batches = self.batches(progress.epochs_done, progress.steps_done)
        for reader in self.readers.values():
            reader.prefetch(0, 0)
        while progress.epochs_done < options.epochs and progress.validations_since_best < options.patience:
            if not self._epoch(batches):
                return None
        self._load_best()
        self._tune()
        metrics = {split: self._validate(split).report() for split in ("val", "test")}
        examples = list(islice(self.images("test"), _EXAMPLES))
        finished = Finished(self.model, self.config, progress, metrics, examples)
        self.reporter.finished(finished, self._save)
        return finished

    def _epoch(self, batches: Iterator[Any]) -> bool:
        """Train and perhaps validate one epoch, or what is left of it; say whether to go on."""
        progress, options = self.progress, self.recipe.optimizer
        epoch = progress.epochs_done
        if not self._train_epoch(batches):
            return False
        metrics = self._epoch_metrics()
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
        progress.end_epoch(metrics)
        self.reporter.epoch(metrics)
        if not validated:
            return True
        demand = self.reporter.demand()
        self._keep(demand)
        return demand is not Demand.STOP

    def _keep(self, demand: Demand) -> None:
        """Keep a checkpoint, and tell who has demanded it, if anybody has."""
        if demand is not Demand.GO_ON:
            where = f"epoch {self.progress.epochs_done}, step {self.progress.steps_done}"
            self.reporter.stage(f"Saving after {where}, {demand.value}")
        self.reporter.checkpoint(self.progress.history, self._save)

    def _save(self, folder: Path) -> None:
        save_checkpoint(folder, self.progress, self.model, self.groups, self.best)

    def _plan(self, first_epoch: int, steps_before: int, epoch: int) -> EpochPlan:
        return epoch_plan(
            self.train_records,
            seed=self.recipe.seed,
            epoch=epoch,
            rank=self.workers.rank,
            world=self.workers.count,
            global_batch=self.recipe.input.batch_size,
            weights=self.weights,
            done=steps_before * self.recipe.input.batch_size if epoch == first_epoch else 0,
        )

    def batches(self, first_epoch: int, steps_before: int) -> Iterator[Any]:
        """This worker's batches from a step of an epoch on."""
        recipe = self.recipe
        self.reader = self.open_reader(partial(self._plan, first_epoch, steps_before))
        self.reader.enter(first_epoch, 0)  # here, and not in TensorFlow's threads, an error is still itself
        feed = Feed(
            reader=self.reader,
            crop=recipe.input.crop,
            normalization=recipe.input.normalization,
            batch=recipe.batch_per_worker(self.workers.count),
            augment=recipe.augment,
            seed=recipe.seed,
            threads=recipe.cpus_per_worker,
        )
        return iter(training_batches(feed, range(first_epoch, recipe.optimizer.epochs)))

    def _train_epoch(self, batches: Iterator[Any]) -> bool:
        """Take the steps of an epoch that are left; say whether to go on. What was done is noted in the progress."""
        progress, at_once, total = self.progress, self.recipe.optimizer.steps_per_execution, self.steps_per_epoch
        epoch = progress.epochs_done
        step, loss = self.step(epoch), 0.0
        started = time.monotonic()
        while progress.steps_done < total:
            count = min(at_once, total - progress.steps_done)
            try:
                part, attention = step.run(batches, count, flag=self.reporter.attention())
            except tf.errors.OpError as error:
                raise self.reader.failure or error from error
            loss += part
            progress.steps_done += count
            self._tell_steps(loss, started)
            demand = self.reporter.demand() if attention else Demand.GO_ON
            if demand is not Demand.GO_ON or progress.steps_done == total:
                progress.loss_done += float(self.workers.sum(np.array([loss]))[0])
                progress.seconds_done += time.monotonic() - started
                loss, started = 0.0, time.monotonic()
            if demand is not Demand.GO_ON:
                self._keep(demand)
            if demand is Demand.STOP:
                return False
        return True

    def _tell_steps(self, loss: float, started: float) -> None:
        """Tell how far the epoch is. `loss` is this worker's part of the losses since `started`."""
        progress = self.progress
        done, seconds = progress.steps_done, progress.seconds_done + time.monotonic() - started
        mean = (progress.loss_done + loss * self.workers.count) / done
        speed = done * self.recipe.input.batch_size / max(seconds, 1e-9)
        self.reporter.steps(progress.epochs_done, done, self.steps_per_epoch, mean, speed)

    def _epoch_metrics(self) -> dict[str, float]:
        """Of the epoch whose steps are done."""
        progress, total, batch = self.progress, self.steps_per_epoch, self.recipe.input.batch_size
        return {
            "epoch": float(progress.epochs_done),
            "loss": progress.loss_done / total,
            "learning_rate": float(np.asarray(self.groups[0].optimizer.learning_rate)),
            "images_per_second": total * batch / max(progress.seconds_done, 1e-9),
            "images_dropped": float(sum(self.train_records) - total * batch),
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
