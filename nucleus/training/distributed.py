"""Keras 3 over several workers with public interfaces only: one replica a process, gradients all-reduced.

Keras 3's own `fit` fails under `MultiWorkerMirroredStrategy` (keras issue 20585), so the step is written out here.
Exactness rests on three things. The loss of a step is the sum over this worker's images divided by the global
batch, and the optimizer sums gradients over workers: together the mean over the global batch. No layer looks across
the batch, and the encoder's BatchNorm is frozen, so no state differs from worker to worker. All workers begin from
the first worker's values.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from nucleus.errors import JobError

__all__ = ["TrainingStep", "Workers"]


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

        @tf.function(reduce_retracing=True)
        def all_reduce(values: tf.Tensor) -> tf.Tensor:
            def on_replica(local: tf.Tensor) -> tf.Tensor:
                here = tf.identity(local)  # on the replica's device, which an argument is not
                return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, here)

            return self.strategy.run(on_replica, args=(values,))

        self._all_reduce = all_reduce

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum arrays of one shape over all workers; every worker must call it, and each gets the sum."""
        flat = self._all_reduce(tf.constant(values.ravel()))
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


class TrainingStep:
    """Optimizer steps over all workers.

    Args:
        workers: The processes.
        model: Images, N x H x W x 3 as float32, to logits; made under the strategy's scope.
        optimizer: Made under the strategy's scope.
        losses: From logits and labels (N x H x W) to N losses.
        global_batch: Images of one step over all workers.
    """

    def __init__(
        self,
        workers: Workers,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        losses: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        global_batch: int,
    ) -> None:
        self._workers = workers

        def on_replica(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                logits = model(tf.cast(images, tf.float32), training=True)
                loss = tf.reduce_sum(losses(logits, labels)) / global_batch
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            return loss

        @tf.function
        def steps(batches: Iterator[Any], count: tf.Tensor) -> tf.Tensor:
            total = tf.zeros([])
            for _ in tf.range(count):
                total += workers.strategy.run(on_replica, args=next(batches))
            return total

        self._steps = steps

    def run(self, batches: Iterator[Any], count: int) -> float:
        """Take that many batches of this worker; return the sum over the steps of its part of the loss."""
        return float(self._steps(batches, tf.constant(count)))
