"""The training loop of one worker: load, train, validate, save, and score the best weights at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nucleus.config.names import Kind
from nucleus.config.recipe import KindName, Recipe
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, DatasetManifest, check_has_nuclei
from nucleus.data.pipeline import Feed, training_batches
from nucleus.data.reader import LabelledImage, cached_splits, images_of_worker, split_reader
from nucleus.data.sampling import EpochPlan, SplitShare, epoch_plan, mixed_plan, stored_order
from nucleus.data.synthetic import generated_image
from nucleus.lazy import keras, tf
from nucleus.model.architecture import CONFIG_FILE, WEIGHTS_FILE, ModelConfig, config_of_recipe, read_model_config
from nucleus.model.engines import KerasEngine
from nucleus.model.fast_network import fast_network
from nucleus.model.losses import image_losses, pixel_targets
from nucleus.model.unet import build_unet, calibrate_encoder, encoder_of, load_encoder_weights, load_weights
from nucleus.predict.evaluation import PredictedImage, predict_images
from nucleus.predict.model import Model
from nucleus.storage.files import temporary_folder
from nucleus.text import plural
from nucleus.training.callbacks import (
    Callback,
    Signal,
    Signals,
    TrainingResult,
    Watch,
    augmented_examples,
    example_images,
)
from nucleus.training.checkpoint import BEST_WEIGHTS, Progress, load_checkpoint, save_checkpoint
from nucleus.training.distributed import TrainingStep, Workers, mask_scores, set_precision
from nucleus.training.optimizer import active_groups, averaged, parameter_groups
from nucleus.training.validation import ImageRanking, check_finite, score_images, tune_instances, usual_images

__all__ = ["MixedDataset", "TrainingInput", "TrainingRun", "train"]


_CALIBRATION_IMAGES = 16
"""Number of synthetic images that calibrate a random encoder."""
_EXAMPLES = 4
"""Number of test images in a result."""


@dataclass(frozen=True)
class MixedDataset:
    """A dataset version besides the main one, and its share of the training crops."""

    dataset: Dataset
    share: float


@dataclass(frozen=True)
class TrainingInput:
    """The input of a worker besides the recipe.

    Attributes:
        dataset: The dataset version to train on.
        cache: Cache of the dataset's shards on this machine.
        encoder_weights: Local file of the encoder's weights; None for random weights.
        start: Local folder of the version whose weights and thresholds training starts with; None without one.
        mix: Datasets that are mixed in.
    """

    dataset: Dataset
    cache: ShardCache
    encoder_weights: Path | None
    start: Path | None = None
    mix: tuple[MixedDataset, ...] = ()


def train(
    recipe: Recipe,
    given: TrainingInput,
    workers: Workers,
    callback: Callback,
    signals: Signals | None = None,
    resume_from: Path | None = None,
) -> TrainingResult | None:
    """Train on this worker, together with all others, and score the best weights. Every worker must call it.

    The training split must have at least one batch of images, unless the recipe says how many steps an epoch has; both
    it and the validation split need nuclei, also of datasets that are mixed in.

    Args:
        recipe: The recipe.
        given: The dataset and the encoder's weights.
        workers: All workers of the run.
        callback: Receives progress, pictures, checkpoints and the result. Its `on_close` is left to the caller.
        signals: Signals to save or stop; None if there are none.
        resume_from: Folder of the checkpoint to resume from; None to start from the beginning.

    Returns:
        The result; None if a signal stopped the run, after saving a checkpoint.

    Raises:
        DataError: No image of the training or the validation split has a nucleus.
        JobError: Training has diverged.
        IntegrityError: The checkpoint is incomplete, damaged or of another network.
    """
    for dataset in (given.dataset, *(mixed.dataset for mixed in given.mix)):
        check_has_nuclei(dataset)
    with temporary_folder("train") as folder:
        run = TrainingRun(recipe, given, workers, callback, signals or Signals(), folder / BEST_WEIGHTS)
        return run.execute(resume_from)


class TrainingRun:
    """One worker's part of a run. Arguments as in `train`; `best` is the file for the best weights so far."""

    def __init__(
        self,
        recipe: Recipe,
        given: TrainingInput,
        workers: Workers,
        callback: Callback,
        signals: Signals,
        best: Path,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.recipe = recipe
        self.given = given
        self.workers = workers
        self.callback = callback
        self.signals = signals
        self.best = best
        self.manifest = given.dataset.manifest
        datasets = [given.dataset, *(mixed.dataset for mixed in given.mix)]
        self.open_reader = partial(cached_splits, datasets, "train", given.cache, decoded=True)
        worker = given.cache, workers.rank, workers.count
        self.readers = {
            "val": split_reader(given.dataset, "val", *worker, beside=datasets[1:]),  # read in each validation
            "test": split_reader(given.dataset, "test", *worker),
        }
        shares = [recipe.share, *(mixed.share for mixed in given.mix)]
        self.splits = [
            _training_split(each.manifest, share, recipe.input.kind_weights)
            for each, share in zip(datasets, shares, strict=True)
        ]
        self.train_images = sum(self.splits[0].records_by_shard)
        self.steps_per_epoch = recipe.steps_of_epoch(self.train_images)
        self.is_pass = len(self.splits) == 1 and recipe.optimizer.steps_per_epoch is None
        self.config = _first_config(recipe, given.start)
        self.score = mask_scores(self.config.heads)
        with self._timed("build the network"):
            self.model = self._build(given)
        self.network = fast_network(self.model)
        self.groups = parameter_groups(self.model, recipe, self.steps_per_epoch)
        self.steps: dict[int, TrainingStep] = {}
        self.progress = Progress()
        self.segmenter = Model(KerasEngine(self.network, self.config.heads), self.config)

    def _build(self, given: TrainingInput) -> keras.Model:
        recipe = self.recipe
        keras.utils.set_random_seed(recipe.seed)
        set_precision(recipe.optimizer.precision)
        model = build_unet(self.config)
        if given.start is not None:
            load_weights(model, given.start / WEIGHTS_FILE)
        elif given.encoder_weights is not None:
            load_encoder_weights(encoder_of(model), given.encoder_weights)
        else:
            side = recipe.input.crop
            images = [generated_image(seed, side, side)[0] for seed in range(_CALIBRATION_IMAGES)]
            calibrate_encoder(model, np.stack(images))
        return model

    def losses(self, logits: Any, targets: Any) -> Any:
        """Return N losses, one per image, for logits (N x H x W x channels) and targets (N x H x W x T)."""
        return image_losses(logits, targets, self.config.heads, self.recipe.loss)

    def step(self, epoch: int) -> TrainingStep:
        """Return the compiled step for the parameter groups that are trained in an epoch."""
        recipe, groups = self.recipe, active_groups(self.groups, epoch)
        if len(groups) not in self.steps:
            self.steps[len(groups)] = TrainingStep(
                self.workers,
                self.network,
                groups,
                self.losses,
                recipe.input.batch_size,
                accumulation=recipe.optimizer.gradient_accumulation_steps,
                global_clipnorm=recipe.optimizer.global_clipnorm,
                jit_compile=recipe.optimizer.jit_compile,
                score=self.score,
            )
        return self.steps[len(groups)]

    def execute(self, resume_from: Path | None) -> TrainingResult | None:
        """Train to the end or until a signal to stop. Arguments and result are those of `train`."""
        progress = self.progress
        watch = self._watch()  # before the weights of a checkpoint: it shows what the network predicts untrained
        if resume_from is not None:
            progress = self.progress = load_checkpoint(resume_from, self.model, self.groups, self.best)
            where = f"epoch {progress.epochs_done}, step {progress.steps_done}"
            self.callback.on_resume(progress.history, f"{where} on {plural(self.workers.count, 'worker')}")
        else:
            self.workers.broadcast(list(self.model.weights))
            for group in self.groups:
                group.reset_averages()
        options = self.recipe.optimizer
        batches = self.batches(progress.epochs_done, progress.steps_done)
        for reader in self.readers.values():
            reader.prefetch(0, 0)
        while progress.epochs_done < options.epochs and progress.validations_since_best < options.patience:
            if not self._epoch(batches, watch):
                return None
        result = self._finish(watch)
        self.callback.on_train_end(result, self._save)
        return result

    def _finish(self, watch: Watch | None) -> TrainingResult:
        """Score the best weights, pass the final pictures to the callback, and return the result."""
        self._load_best()
        with self._timed("tune the thresholds"):
            self._tune()
        with self._timed("score val and test"):
            ranking = ImageRanking(self.manifest.split_samples("test").texts("name"))
            metrics = {
                "val": score_images(self.predicted("val"), self.workers).report(),
                "test": score_images(ranking.observe(self.predicted("test")), self.workers).report(),
            }
            ranked = ranking.ranked(self.workers)
        with self._timed("draw pictures"):
            self.callback.on_ranked_images(ranked)
            if watch is not None:
                watch.at_end()
                self.callback.on_examples(augmented_examples(self.given.dataset, self.given.cache, self.recipe))
        examples = list(islice(self.images("test"), _EXAMPLES))
        return TrainingResult(
            self.model, self.config, self.progress, metrics, examples, self.seconds, self.workers.count
        )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started

    def _watch(self) -> Watch | None:
        """Return the watch of the example images on the first worker, None on the others."""
        if self.workers.rank:
            return None
        return Watch(self.model, self._predict_watched, self.callback.on_predictions)

    @cached_property
    def _watched(self) -> list[LabelledImage]:
        return example_images(self.given.dataset, self.given.cache, "val")

    def _predict_watched(self) -> list[PredictedImage]:
        return list(predict_images(self.segmenter, self._watched, self.recipe.loss))

    def _epoch(self, batches: Iterator[Any], watch: Watch | None) -> bool:
        """Train the rest of an epoch, and validate if it is time; return whether to continue."""
        progress, options = self.progress, self.recipe.optimizer
        epoch = progress.epochs_done
        if not self._train_epoch(batches):
            return False
        metrics = self._epoch_metrics()
        check_finite(metrics)
        last = epoch + 1 == options.epochs
        validated = last or (epoch + 1) % options.validate_every == 0
        if validated:
            started = time.monotonic()
            with averaged(self.groups):
                scores = score_images(self.predicted("val"), self.workers).scores()
                metrics |= {f"val_{name}": value for name, value in scores.items() if value is not None}
                check_finite(metrics)
                if progress.note_score(epoch + 1, metrics[options.monitor]):
                    self.model.save_weights(self.best)
                metrics["validation_seconds"] = time.monotonic() - started
                if watch is not None:
                    validations = 1 + sum("val_loss" in before for before in progress.history)
                    watch.after_validation(validations, epoch + 1)
        progress.end_epoch(metrics)
        self.callback.on_epoch_end(metrics)
        if not validated:
            return True
        signal = self.signals.read()
        self._checkpoint(signal)
        return signal is not Signal.STOP

    def _checkpoint(self, signal: Signal) -> None:
        """Save a checkpoint; show the signal that asks for it, if any."""
        if signal is not Signal.CONTINUE:
            where = f"epoch {self.progress.epochs_done}, step {self.progress.steps_done}"
            self.callback.on_stage(f"Saving after {where}: {signal.value}")
        self.signals.saved()
        self.callback.on_checkpoint(self.progress.history, self._save)

    def _save(self, folder: Path) -> None:
        save_checkpoint(folder, self.progress, self.model, self.groups, self.best)

    def _plan(self, first_epoch: int, steps_before: int, epoch: int) -> EpochPlan:
        batch, split = self.recipe.input.batch_size, self.splits[0]
        plan = (
            partial(epoch_plan, split.records_by_shard, weights=split.weights)
            if self.is_pass
            else partial(mixed_plan, self.splits, steps=self.steps_per_epoch)
        )
        return plan(
            seed=self.recipe.seed,
            epoch=epoch,
            rank=self.workers.rank,
            world=self.workers.count,
            global_batch=batch,
            done=steps_before * batch if epoch == first_epoch else 0,
        )

    def batches(self, first_epoch: int, steps_before: int) -> Iterator[Any]:
        """Return this worker's batches, from a step of an epoch to the end of the run.

        Args:
            first_epoch: Epoch to start in, from 0.
            steps_before: Number of finished steps of that epoch.
        """
        recipe = self.recipe
        self.reader = self.open_reader(partial(self._plan, first_epoch, steps_before))
        self.reader.enter(first_epoch, 0)  # an error in TensorFlow's threads would lose its class
        feed = Feed(
            reader=self.reader,
            targets=partial(pixel_targets, heads=self.config.heads),
            crop=recipe.input.crop,
            normalization=recipe.input.normalization,
            batch=recipe.batch_per_worker(self.workers.count),
            augment=recipe.augment,
            seed=recipe.seed,
            threads=recipe.cpus_per_worker,
        )
        return iter(training_batches(feed, range(first_epoch, recipe.optimizer.epochs)))

    def _train_epoch(self, batches: Iterator[Any]) -> bool:
        """Take the remaining steps of an epoch and record them in the progress; return whether the run continues."""
        progress, at_once, total = self.progress, self.recipe.optimizer.steps_per_execution, self.steps_per_epoch
        epoch = progress.epochs_done
        step, sums = self.step(epoch), np.zeros(1 + len(self.score.names))
        started = time.monotonic()
        while progress.steps_done < total:
            count = min(at_once, total - progress.steps_done)
            try:
                taken = step.run(batches, count, flag=self.signals.pending())
            except tf.errors.OpError as error:
                raise self.reader.failure or error from error
            sums += (taken.loss, *taken.scores)
            progress.steps_done += count
            self._report_steps(float(sums[0]), started)
            signal = self.signals.read() if taken.attention else Signal.CONTINUE
            if signal is not Signal.CONTINUE or progress.steps_done == total:
                progress.add(self.workers.sum(sums).tolist())
                progress.seconds_done += time.monotonic() - started
                sums, started = np.zeros_like(sums), time.monotonic()
            if signal is not Signal.CONTINUE:
                self._checkpoint(signal)
            if signal is Signal.STOP:
                return False
        return True

    def _report_steps(self, loss: float, started: float) -> None:
        """Report the progress of the epoch. `loss` is this worker's part of the losses since `started`."""
        progress = self.progress
        done, seconds = progress.steps_done, progress.seconds_done + time.monotonic() - started
        before = progress.sums_done[0] if progress.sums_done else 0.0
        mean = (before + loss * self.workers.count) / done
        speed = done * self.recipe.input.batch_size / max(seconds, 1e-9)
        epochs = self.recipe.optimizer.epochs
        self.callback.on_steps_end(progress.epochs_done + 1, epochs, done, self.steps_per_epoch, mean, speed)

    def _epoch_metrics(self) -> dict[str, float]:
        """Return the metrics of a finished epoch; IoU, Dice and accuracy are means over its training crops."""
        progress, total, batch = self.progress, self.steps_per_epoch, self.recipe.input.batch_size
        loss, *scores = progress.sums_done
        seconds = max(progress.seconds_done, 1e-9)
        return {
            "epoch": float(progress.epochs_done + 1),
            "loss": loss / total,
            **{name: value / (total * batch) for name, value in zip(self.score.names, scores, strict=True)},
            "learning_rate": float(np.asarray(self.groups[0].optimizer.learning_rate)),
            "seconds": seconds,
            "workers": float(self.workers.count),
            "images_per_second": total * batch / seconds,
            "images_per_second_per_worker": total * batch / seconds / self.workers.count,
            "images_dropped": float(self.train_images - total * batch if self.is_pass else 0),
        }

    def predicted(self, split: str) -> Iterator[PredictedImage]:
        """Predict this worker's images of a split with the model's current weights."""
        return predict_images(self.segmenter, self.images(split), self.recipe.loss)

    def _tune(self) -> None:
        """Tune the thresholds for turning maps into labels, on the validation splits of all datasets, by their shares.

        What is best for a few images of a new kind alone may cost the kinds that the network knows.
        """
        self.callback.on_stage("Tuning the thresholds on the validation split")
        sources = [(self.recipe.share, lambda: self.images("val")), *map(self._mixed_images, self.given.mix)]
        settings, diameter = tune_instances(
            self.segmenter, sources, self.workers, prefer_current=self.given.start is not None
        )
        self.config = self.config.model_copy(update={"instances": settings, "nucleus_diameter": diameter})
        self.segmenter = self.segmenter.with_config(self.config)
        diameters, lowest = usual_images(self.segmenter, sources, self.workers)
        self.config = self.config.model_copy(update={"diameters": diameters, "lowest_score": lowest})
        self.segmenter = self.segmenter.with_config(self.config)

    def _mixed_images(self, mixed: MixedDataset) -> tuple[float, Callable[[], Iterator[LabelledImage]]]:
        """Return the share of a mixed dataset, and a function that returns this worker's images of its val split."""
        workers, dataset = self.workers, mixed.dataset
        reader = split_reader(dataset, "val", self.given.cache, workers.rank, workers.count)
        return mixed.share, lambda: images_of_worker(dataset.manifest, "val", reader)

    def images(self, split: str) -> Iterator[LabelledImage]:
        """Return this worker's images of a split."""
        return images_of_worker(self.manifest, split, self.readers[split])

    def _load_best(self) -> None:
        load_weights(self.model, self.best)
        self.workers.broadcast(list(self.model.weights))


def _first_config(recipe: Recipe, start: Path | None) -> ModelConfig:
    """Return the configuration of the network before training, with the thresholds of the version it starts with."""
    config = config_of_recipe(recipe)
    if start is None:
        return config
    theirs = read_model_config((start / CONFIG_FILE).read_bytes(), str(start / CONFIG_FILE))
    return config.model_copy(update={"instances": theirs.instances})


def _training_split(manifest: DatasetManifest, share: float, kind_weights: Mapping[KindName, float]) -> SplitShare:
    """Return the training split of a dataset, with the sampling weight of each image if not all are equal."""
    records = [shard.records for shard in manifest.split_shards("train")]
    if not kind_weights:
        return SplitShare(records, share)
    by_kind = {Kind(name): weight for name, weight in kind_weights.items()}
    kinds = manifest.split_samples("train").texts("kind")
    return SplitShare(records, share, [by_kind.get(Kind(kinds[i]), 1.0) for i in stored_order(len(kinds))])
