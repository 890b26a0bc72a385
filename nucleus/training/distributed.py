"""What is told of the crops that are trained on, besides their loss, from the logits that the step has anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import Heads
from nucleus.errors import JobError
from nucleus.lazy import keras, tf
from nucleus.model.heads import mask_of_logits
from nucleus.training.optimizer import ParameterGroup

__all__ = ["NO_SCORES", "ScoreFunction", "StepResult", "TrainingStep", "Workers", "mask_scores"]


@dataclass(frozen=True)
class ScoreFunction:
    """Scores of images.

    Attributes:
        names: Of the scores.
        compute: From logits and labels (N x H x W) to N x scores, float64.
    """

    names: tuple[str, ...]
    compute: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


NO_SCORES = ScoreFunction((), lambda logits, _: tf.zeros([tf.shape(logits)[0], 0], tf.float64))


def mask_scores(heads: Heads) -> ScoreFunction:
    """IoU, Dice and accuracy of the nucleus mask, as `nucleus.metrics.scores` defines them.

    The mask is where a nucleus is more probable than the ground: thresholds are tuned only after training.
    """

    def compute(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        truth, found = labels > 0, mask_of_logits(logits, heads)
        both, either, right = (
            tf.reduce_sum(tf.cast(pixels, tf.float64), axis=(1, 2))
            for pixels in (truth & found, truth | found, tf.equal(truth, found))
        )
        iou = tf.where(either > 0, both / tf.maximum(either, 1.0), 1.0)
        accuracy = right / tf.cast(tf.reduce_prod(tf.shape(labels)[1:]), tf.float64)
        return tf.stack([iou, 2 * iou / (1 + iou), accuracy], axis=1)

    return ScoreFunction(("iou", "dice", "accuracy"), compute)


class Workers:
    """The processes that train together (one or many), and sums over them.

    Must be made before any other TensorFlow operation runs. Reads TF_CONFIG.
    """

    def __init__(self) -> None:
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        resolver = self.strategy.cluster_resolver
        self.rank = int(resolver.task_id or 0)
        self.count = int(self.strategy.num_replicas_in_sync)
        processes = max(1, len(resolver.cluster_spec().as_dict().get("worker", ())))
        if self.count != processes:
            raise JobError(
                f"Expected one replica a process ({processes} processes); TensorFlow made {self.count}. Each worker "
                "must see one GPU at most: set gpus_per_worker to 0 or 1."
            )

        self._sum_one = tf.function(lambda values: self.all_reduce([values])[0], reduce_retracing=True)

    def all_reduce(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sum tensors over all workers, in one message; inside a `tf.function` that every worker calls."""
        if self.count == 1:
            return list(tensors)

        def on_replica(*local: tf.Tensor) -> list[tf.Tensor]:
            here = [tf.identity(tensor) for tensor in local]  # on the replica's device, which an argument is not
            return list(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, here))

        return list(self.strategy.run(on_replica, args=tuple(tensors)))

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum arrays of one shape over all workers; every worker must call it, and each gets the sum."""
        flat = self._sum_one(tf.constant(values.ravel()))
        return np.asarray(flat.numpy()).reshape(values.shape)

    def broadcast(self, variables: list[Any]) -> None:
        """Give every worker the first worker's values of float variables; every worker must call it."""
        values = [variable.numpy() for variable in variables]
        flat = np.concatenate([value.ravel().astype(np.float32) for value in values])
        flat = self.sum(flat if self.rank == 0 else np.zeros_like(flat))
        start = 0
        for variable, value in zip(variables, values, strict=True):
            variable.assign(flat[start : start + value.size].reshape(value.shape))
            start += value.size


class StepResult(NamedTuple):
    """Some steps of a worker.

    Attributes:
        loss: The sum over the steps of its part of the loss.
        attention: Whether any worker raised its flag; all get the same answer, with the gradients.
        scores: The sums over its images of each score, float64.
    """

    loss: float
    attention: bool
    scores: NDArray[np.float64]


class TrainingStep:
    """Optimizer steps over all workers.

    Args:
        workers: The processes.
        model: Images, N x H x W x 3 as float32, to logits.
        groups: What is trained.
        losses: From logits and labels (N x H x W) to N losses.
        global_batch: Images of one step over all workers.
        accumulation: Parts, one after the other, in which a worker computes its gradients: less memory, same result.
        global_clipnorm: Upper bound of the gradient's norm over all groups (Pascanu et al. 2013,
            https://arxiv.org/abs/1211.5063), or None.
        score: What else is told of the images trained on.
    """

    def __init__(
        self,
        workers: Workers,
        model: keras.Model,
        groups: Sequence[ParameterGroup],
        losses: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        global_batch: int,
        *,
        accumulation: int = 1,
        global_clipnorm: float | None = None,
        score: ScoreFunction = NO_SCORES,
    ) -> None:
        self._workers = workers
        self._model = model
        self._groups = list(groups)
        self._losses = losses
        self._global_batch = global_batch
        self._accumulation = accumulation
        self._global_clipnorm = global_clipnorm
        self._score = score

        @tf.function
        def steps(batches: Iterator[Any], count: tf.Tensor, flag: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            total, scores, flags = tf.zeros([]), tf.zeros([len(score.names)], tf.float64), tf.zeros([])
            for _ in tf.range(count):
                images, labels = next(batches)
                loss, found, flags = self._step(images, labels, flag)
                total += loss
                scores += found
            return total, scores, flags

        self._steps = steps

    def run(self, batches: Iterator[Any], count: int, *, flag: bool = False) -> StepResult:
        """Take that many batches of this worker."""
        loss, scores, flags = self._steps(batches, tf.constant(count), tf.constant(float(flag)))
        return StepResult(float(loss), bool(flags > 0), np.asarray(scores.numpy()))

    @tf.autograph.experimental.do_not_convert
    def _step(self, images: tf.Tensor, labels: tf.Tensor, flag: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        loss, scores, gradients = self._accumulated(images, labels)
        *gradients, flags = self._workers.all_reduce([*gradients, flag])
        if self._global_clipnorm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self._global_clipnorm)
        start = 0
        for group in self._groups:
            group.apply(gradients[start : start + len(group.variables)])
            start += len(group.variables)
        return loss, scores, flags

    def _accumulated(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        if self._accumulation == 1:
            return self._gradients(images, labels)

        def in_parts(tensor: tf.Tensor) -> tf.Tensor:
            # Part i has places i, i + accumulation, ...: what worker i of as many workers would have.
            rows = tf.reshape(tensor, [-1, self._accumulation, *tensor.shape[1:]])
            return tf.experimental.numpy.swapaxes(rows, 0, 1)

        def add(total: Any, part: Any) -> Any:
            return tf.nest.map_structure(tf.add, total, self._gradients(*part))

        zeros = [tf.zeros_like(variable.value) for group in self._groups for variable in group.variables]
        parts = (in_parts(images), in_parts(labels))
        nothing = (tf.zeros([]), tf.zeros([len(self._score.names)], tf.float64), zeros)
        loss, scores, gradients = tf.foldl(add, parts, nothing, parallel_iterations=1)
        return loss, scores, gradients

    def _gradients(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        variables = [variable.value for group in self._groups for variable in group.variables]
        # Watching nothing else keeps the frozen encoder off the tape, which makes tracing quicker.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            logits = self._model(tf.cast(images, tf.float32), training=True)
            loss = tf.reduce_sum(self._losses(logits, labels)) / self._global_batch
        scores = tf.reduce_sum(self._score.compute(logits, labels), axis=0)
        return loss, scores, tape.gradient(loss, variables)
