"""One worker's part of a training run: load, step, validate, save, until done."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nucleus.config.recipe import KindName, Recipe
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, DatasetManifest
from nucleus.data.images import Kind
from nucleus.data.pipeline import Feed, training_batches
from nucleus.data.reader import LabelledImage, cached_split, images_of_worker, split_reader
from nucleus.data.sampling import EpochPlan, epoch_plan, stored_order
from nucleus.data.synthetic import generated_image
from nucleus.errors import JobError
from nucleus.lazy import keras, tf
from nucleus.model.architecture import config_of_recipe
from nucleus.model.losses import image_losses
from nucleus.model.tiling import TiledNetwork
from nucleus.model.unet import build_unet, calibrate_encoder, encoder_of
from nucleus.model.weight_files import load_encoder_weights, load_weights
from nucleus.text import plural
from nucleus.training.callbacks import Demand, Finished, Reporter, Watch, augmented_examples, example_images
from nucleus.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from nucleus.training.distributed import TrainingStep, Workers, mask_measure
from nucleus.training.optimizer import active_groups, averaged, parameter_groups
from nucleus.training.tuning import tune_instances
from nucleus.training.validation import Extremes, PredictedImage, predict_images, score_images

__all__ = ["TrainingInput", "TrainingRun", "train"]


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
        self.seconds: dict[str, float] = {}
        self.recipe = recipe
        self.given = given
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
        self.measure = mask_measure(self.config.heads)
        with self._timed("build the network"):
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
                measure=self.measure,
            )
        return self.steps[len(groups)]

    def execute(self, resume_from: Path | None) -> Finished | None:
        """Train to the end, or until a demand to stop."""
        progress = self.progress
        if resume_from is not None:
            progress = self.progress = load_checkpoint(resume_from, self.model, self.groups, self.best)
            where = (
                f"epoch {progress.epochs_done}, step {progress.steps_done} on {plural(self.workers.count, 'worker')}"
            )
            self.reporter.resumed(progress.history, where)
        else:
            self.workers.broadcast(list(self.model.weights))
            for group in self.groups:
                group.reset_averages()
        watch = self._watch()
        options = self.recipe.optimizer
        batches = self.batches(progress.epochs_done, progress.steps_done)
        for reader in self.readers.values():
            reader.prefetch(0, 0)
        while progress.epochs_done < options.epochs and progress.validations_since_best < options.patience:
            if not self._epoch(batches, watch):
                return None
        finished = self._finish(watch)
        self.reporter.finished(finished, self._save)
        return finished

    def _finish(self, watch: Watch | None) -> Finished:
        """Score the best weights, and show what they make of some images."""
        self._load_best()
        with self._timed("tune the thresholds"):
            self._tune()
        with self._timed("score val and test"):
            extremes = Extremes(sample.name for sample in self.manifest.split_samples("test"))
            metrics = {
                "val": score_images(self.predicted("val"), self.workers).report(),
                "test": score_images(extremes.watching(self.predicted("test")), self.workers).report(),
            }
            chosen = extremes.chosen(self.workers)
        with self._timed("draw pictures"):
            self.reporter.extremes(chosen)
            if watch is not None:
                watch.ended()
                self.reporter.examples(augmented_examples(self.given.dataset, self.given.cache, self.recipe))
        examples = list(islice(self.images("test"), _EXAMPLES))
        return Finished(self.model, self.config, self.progress, metrics, examples, self.seconds, self.workers.count)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started

    def _watch(self) -> Watch | None:
        """On the first worker: who shows how predictions change."""
        return Watch(self.model, self._predict_watched, self.reporter.predictions) if self.workers.rank == 0 else None

    @cached_property
    def _watched(self) -> list[LabelledImage]:
        return example_images(self.given.dataset, self.given.cache, "val")

    def _predict_watched(self) -> list[PredictedImage]:
        return list(predict_images(self.network, self._watched, self.config, self.recipe.loss))

    def _epoch(self, batches: Iterator[Any], watch: Watch | None) -> bool:
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
                scores = score_images(self.predicted("val"), self.workers).scores()
                metrics |= {f"val_{name}": value for name, value in scores.items()}
                _check_finite(metrics)
                if progress.note_score(epoch, metrics[options.monitor]):
                    self.model.save_weights(self.best)
                metrics["validation_seconds"] = time.monotonic() - started
                if watch is not None:
                    watch.validated(1 + sum("val_loss" in before for before in progress.history), epoch + 1)
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
        step, sums = self.step(epoch), np.zeros(1 + len(self.measure.names))
        started = time.monotonic()
        while progress.steps_done < total:
            count = min(at_once, total - progress.steps_done)
            try:
                taken = step.run(batches, count, flag=self.reporter.attention())
            except tf.errors.OpError as error:
                raise self.reader.failure or error from error
            sums += (taken.loss, *taken.scores)
            progress.steps_done += count
            self._tell_steps(float(sums[0]), started)
            demand = self.reporter.demand() if taken.attention else Demand.GO_ON
            if demand is not Demand.GO_ON or progress.steps_done == total:
                progress.add(self.workers.sum(sums).tolist())
                progress.seconds_done += time.monotonic() - started
                sums, started = np.zeros_like(sums), time.monotonic()
            if demand is not Demand.GO_ON:
                self._keep(demand)
            if demand is Demand.STOP:
                return False
        return True

    def _tell_steps(self, loss: float, started: float) -> None:
        """Tell how far the epoch is. `loss` is this worker's part of the losses since `started`."""
        progress = self.progress
        done, seconds = progress.steps_done, progress.seconds_done + time.monotonic() - started
        before = progress.sums_done[0] if progress.sums_done else 0.0
        mean = (before + loss * self.workers.count) / done
        speed = done * self.recipe.input.batch_size / max(seconds, 1e-9)
        self.reporter.steps(progress.epochs_done, done, self.steps_per_epoch, mean, speed)

    def _epoch_metrics(self) -> dict[str, float]:
        """Of the epoch whose steps are done; IoU, Dice and accuracy are means over its crops as they were trained."""
        progress, total, batch = self.progress, self.steps_per_epoch, self.recipe.input.batch_size
        loss, *scores = progress.sums_done
        seconds = max(progress.seconds_done, 1e-9)
        return {
            "epoch": float(progress.epochs_done),
            "loss": loss / total,
            **{name: value / (total * batch) for name, value in zip(self.measure.names, scores, strict=True)},
            "learning_rate": float(np.asarray(self.groups[0].optimizer.learning_rate)),
            "seconds": seconds,
            "workers": float(self.workers.count),
            "images_per_second": total * batch / seconds,
            "images_per_second_per_worker": total * batch / seconds / self.workers.count,
            "images_dropped": float(sum(self.train_records) - total * batch),
        }

    def predicted(self, split: str) -> Iterator[PredictedImage]:
        """This worker's images of a split, predicted by the weights that the model has."""
        return predict_images(self.network, self.images(split), self.config, self.recipe.loss)

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
