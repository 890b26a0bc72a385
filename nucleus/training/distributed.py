"""Distributed training: collective operations over the workers, optimizer steps, and scores of the training crops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import Heads, Precision
from nucleus.errors import JobError
from nucleus.lazy import keras, tf
from nucleus.model.architecture import mask_of_logits
from nucleus.training.optimizer import ParameterGroup

__all__ = ["NO_SCORES", "ScoreFunction", "StepResult", "TrainingStep", "Workers", "mask_scores", "set_precision"]


@dataclass(frozen=True)
class ScoreFunction:
    """Scores of a training batch, computed from the logits of the training step.

    Attributes:
        names: Names of the scores.
        compute: Function from logits (N x H x W x C) and targets (N x H x W x T) to scores (N x number of names),
            float64.
    """

    names: tuple[str, ...]
    compute: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


NO_SCORES = ScoreFunction((), lambda logits, _: tf.zeros([tf.shape(logits)[0], 0], tf.float64))
"""No scores."""


def mask_scores(heads: Heads) -> ScoreFunction:
    """Return a function for IoU, Dice and accuracy of the nucleus mask, as defined in `nucleus.metrics.scores`.

    The mask contains the pixels where a nucleus is more probable than background; thresholds are tuned only at the end
    of a run.
    """

    def compute(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        truth, found = targets[..., 0] > 0, mask_of_logits(logits, heads)
        both, either, correct = (
            tf.cast(tf.math.count_nonzero(pixels, axis=(1, 2), dtype=tf.int32), tf.float64)
            for pixels in (truth & found, truth | found, tf.equal(truth, found))
        )
        iou = tf.where(either > 0, both / tf.maximum(either, 1.0), 1.0)
        accuracy = correct / tf.cast(tf.reduce_prod(tf.shape(truth)[1:]), tf.float64)
        return tf.stack([iou, 2 * iou / (1 + iou), accuracy], axis=1)

    return ScoreFunction(("iou", "dice", "accuracy"), compute)


def set_precision(precision: Precision) -> None:
    """Set in which precision this process computes networks that are built from now on.

    TensorFlow's own default is TensorFloat-32 wherever a GPU has it; here a recipe must ask for it.
    """
    tf.config.experimental.enable_tensor_float_32_execution(precision != "float32")
    keras.mixed_precision.set_global_policy("float32" if precision == "tensor_float32" else precision)


class Workers:
    """The training processes (one or more) and collective operations over them.

    Must be created before any other TensorFlow operation runs. Reads TF_CONFIG.

    Attributes:
        strategy: TensorFlow's distribution strategy.
        rank: Number of this process, from 0.
        count: Number of processes.
    """

    def __init__(self) -> None:
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        resolver = self.strategy.cluster_resolver
        self.rank = int(resolver.task_id or 0)
        self.count = int(self.strategy.num_replicas_in_sync)
        processes = max(1, len(resolver.cluster_spec().as_dict().get("worker", ())))
        if self.count != processes:
            raise JobError(
                f"Expected one replica per process ({processes} processes); TensorFlow made {self.count}. Each worker "
                "must see at most one GPU: set gpus_per_worker to 0 or 1."
            )

        self._sum_one = tf.function(lambda values: self.all_reduce([values])[0], reduce_retracing=True)

    def all_reduce(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return the sums of tensors over all workers, in one message; for a `tf.function` that every worker calls."""
        if self.count == 1:
            return list(tensors)

        def on_replica(*local: tf.Tensor) -> list[tf.Tensor]:
            here = [tf.identity(tensor) for tensor in local]  # moves the arguments to the replica's device
            return list(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, here))

        return list(self.strategy.run(on_replica, args=tuple(tensors)))

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the sum of an array over all workers. Every worker must call it, with arrays of the same shape."""
        flat = self._sum_one(tf.constant(values.ravel()))
        return np.asarray(flat.numpy()).reshape(values.shape)

    def broadcast(self, variables: list[Any]) -> None:
        """Assign the first worker's values of float variables on every worker. Every worker must call it."""
        values = [variable.numpy() for variable in variables]
        flat = np.concatenate([value.ravel().astype(np.float32) for value in values])
        flat = self.sum(flat if self.rank == 0 else np.zeros_like(flat))
        start = 0
        for variable, value in zip(variables, values, strict=True):
            variable.assign(flat[start : start + value.size].reshape(value.shape))
            start += value.size


class StepResult(NamedTuple):
    """Result of several training steps on one worker.

    Attributes:
        loss: This worker's part of the loss, summed over the steps.
        attention: Whether any worker raised its flag; the same on all workers, because it travels with the gradients.
        scores: Each score, summed over this worker's images, float64.
    """

    loss: float
    attention: bool
    scores: NDArray[np.float64]


class TrainingStep:
    """Optimizer steps over all workers.

    Args:
        workers: The training processes.
        network: Function from images, N x H x W x 3, float32, to logits: `nucleus.model.fast_network` of a model.
        groups: Groups of trained variables.
        losses: Function from logits and targets (N x H x W x T) to N losses.
        global_batch: Images per step, over all workers.
        accumulation: Number of parts into which a worker divides its batch to save memory; the result is the same.
        global_clipnorm: Maximum norm of the gradient over all groups (Pascanu et al. 2013,
            https://arxiv.org/abs/1211.5063); None for no limit.
        jit_compile: Whether XLA compiles network, loss and gradients.
        score: Scores of the training images.
    """

    def __init__(
        self,
        workers: Workers,
        network: Callable[[tf.Tensor], tf.Tensor],
        groups: Sequence[ParameterGroup],
        losses: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        global_batch: int,
        *,
        accumulation: int = 1,
        global_clipnorm: float | None = None,
        jit_compile: bool = False,
        score: ScoreFunction = NO_SCORES,
    ) -> None:
        self._workers = workers
        self._network = network
        self._groups = list(groups)
        self._losses = losses
        self._global_batch = global_batch
        self._accumulation = accumulation
        self._global_clipnorm = global_clipnorm
        self._score = score
        self._gradients = tf.function(self.gradients, jit_compile=True) if jit_compile else self.gradients

        @tf.function
        def steps(batches: Iterator[Any], count: tf.Tensor, flag: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            total, scores, flags = tf.zeros([]), tf.zeros([len(score.names)], tf.float64), tf.zeros([])
            for _ in tf.range(count):
                images, targets = next(batches)
                loss, found, flags = self._step(images, targets, flag)
                total += loss
                scores += found
            return total, scores, flags

        self._steps = steps

    def run(self, batches: Iterator[Any], count: int, *, flag: bool = False) -> StepResult:
        """Train on `count` batches of this worker. `flag` sets `StepResult.attention` on all workers."""
        loss, scores, flags = self._steps(batches, tf.constant(count), tf.constant(float(flag)))
        return StepResult(float(loss), bool(flags > 0), np.asarray(scores.numpy()))

    @tf.autograph.experimental.do_not_convert
    def _step(self, images: tf.Tensor, targets: tf.Tensor, flag: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        loss, scores, gradients = self._accumulated(images, targets)
        *gradients, flags = self._workers.all_reduce([*gradients, flag])
        if self._global_clipnorm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self._global_clipnorm)
        start = 0
        for group in self._groups:
            group.apply(gradients[start : start + len(group.variables)])
            start += len(group.variables)
        return loss, scores, flags

    def _accumulated(self, images: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        if self._accumulation == 1:
            return self._gradients(images, targets)

        def in_parts(tensor: tf.Tensor) -> tf.Tensor:
            # Part i contains images i, i + accumulation, ...: those of worker i if there were `accumulation` workers.
            rows = tf.reshape(tensor, [-1, self._accumulation, *tensor.shape[1:]])
            return tf.experimental.numpy.swapaxes(rows, 0, 1)

        def add(total: Any, part: Any) -> Any:
            return tf.nest.map_structure(tf.add, total, self._gradients(*part))

        zeros = [tf.zeros_like(variable.value) for group in self._groups for variable in group.variables]
        parts = (in_parts(images), in_parts(targets))
        nothing = (tf.zeros([]), tf.zeros([len(self._score.names)], tf.float64), zeros)
        loss, scores, gradients = tf.foldl(add, parts, nothing, parallel_iterations=1)
        return loss, scores, gradients

    def gradients(self, images: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Return this worker's part of the loss, the sums of its scores, and the gradients of the loss."""
        variables = [variable.value for group in self._groups for variable in group.variables]
        # The tape watches nothing else, so that it leaves out the frozen encoder, which makes tracing faster.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            logits = self._network(tf.cast(images, tf.float32))
            loss = tf.reduce_sum(self._losses(logits, targets)) / self._global_batch
        scores = tf.reduce_sum(self._score.compute(logits, targets), axis=0)
        return loss, scores, tape.gradient(loss, variables)
