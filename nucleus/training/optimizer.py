"""Parameter groups: variables of decoder and encoder, with optimizer, learning rate, first epoch and moving average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nucleus.config.recipe import Recipe
from nucleus.lazy import keras, tf
from nucleus.model.unet import decoder_variables, encoder_variables

__all__ = ["ParameterGroup", "active_groups", "averaged", "parameter_groups"]


class ParameterGroup:
    """Variables that one optimizer trains.

    With `ema_momentum`, their exponential moving average is updated after each step n (from 0): a <- m a + (1 - m) w,
    with m = min(ema_momentum, (1 + n) / (10 + n)), so that early values soon lose their weight (as in
    `tf.train.ExponentialMovingAverage`).

    Attributes:
        name: Name of the group and of its file in a checkpoint.
        first_epoch: Epoch from which the group is trained.
        variables: Variables of the network.
        optimizer: Optimizer of these variables.
        averages: Moving averages of the variables; empty without `ema_momentum`.
    """

    def __init__(
        self,
        name: str,
        first_epoch: int,
        variables: list[Any],
        optimizer: keras.optimizers.Optimizer,
        ema_momentum: float | None,
    ) -> None:
        optimizer.build(variables)
        self.name = name
        self.first_epoch = first_epoch
        self.variables = variables
        self.optimizer = optimizer
        self.averages = [] if ema_momentum is None else [tf.Variable(v.value, trainable=False) for v in variables]
        self._ema_momentum = ema_momentum or 0.0

    def apply(self, gradients: Sequence[tf.Tensor]) -> None:
        """Take one step of the optimizer, with gradients summed over all workers."""
        steps_before = tf.cast(self.optimizer.iterations.value, tf.float32)
        self.optimizer.apply(gradients, self.variables)
        momentum = tf.minimum(self._ema_momentum, (1.0 + steps_before) / (10.0 + steps_before))
        for average, variable in zip(self.averages, self.variables, strict=bool(self.averages)):
            average.assign_add((1.0 - momentum) * (variable.value - average))

    def reset_averages(self) -> None:
        """Set the averages to the current values of the variables."""
        for average, variable in zip(self.averages, self.variables, strict=bool(self.averages)):
            average.assign(variable.value)

    @property
    def state(self) -> list[Any]:
        """Variables in a checkpoint besides the weights: those of the optimizer, and the averages."""
        return [*self.optimizer.variables, *self.averages]


def parameter_groups(model: keras.Model, recipe: Recipe, steps_per_epoch: int) -> list[ParameterGroup]:
    """Return the group of the decoder and, if the recipe trains the encoder, the group of the encoder."""
    options = recipe.optimizer
    schedule = _schedule(recipe, steps_per_epoch)
    decoder = keras.optimizers.AdamW(schedule, options.weight_decay)
    groups = [ParameterGroup("decoder", 0, decoder_variables(model), decoder, options.ema_momentum)]
    first_epoch = recipe.network.encoder_trained_from
    if first_epoch is not None and first_epoch < options.epochs:
        delayed = _Delayed(
            schedule, first_epoch * steps_per_epoch, recipe.network.encoder_rate_factor, options.warmup_steps
        )
        encoder = keras.optimizers.AdamW(delayed, options.weight_decay)
        variables = encoder_variables(model)
        groups.append(ParameterGroup("encoder", first_epoch, variables, encoder, options.ema_momentum))
    return groups


def active_groups(groups: Sequence[ParameterGroup], epoch: int) -> list[ParameterGroup]:
    """Return the groups that are trained in an epoch."""
    return [group for group in groups if group.first_epoch <= epoch]


@contextmanager
def averaged(groups: Sequence[ParameterGroup]) -> Iterator[None]:
    """Use the averaged weights for the duration of the block; without averages, nothing changes."""
    pairs = [pair for group in groups for pair in zip(group.variables, group.averages, strict=bool(group.averages))]
    trained = [np.array(variable.value) for variable, _ in pairs]
    for variable, average in pairs:
        variable.assign(average)
    try:
        yield
    finally:
        for (variable, _), value in zip(pairs, trained, strict=True):
            variable.assign(value)


def _schedule(recipe: Recipe, steps_per_epoch: int) -> keras.optimizers.schedules.LearningRateSchedule:
    options = recipe.optimizer
    total = options.epochs * steps_per_epoch
    warmup = min(options.warmup_steps, total // 2)
    highest, final = recipe.learning_rates
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else highest,
        total - warmup,
        alpha=min(1.0, final / highest),
        warmup_target=highest if warmup else None,
        warmup_steps=warmup,
    )


class _Delayed(keras.optimizers.schedules.LearningRateSchedule):
    """The run's schedule for an optimizer that starts later: multiplied by a factor, with a separate warm-up."""

    def __init__(
        self,
        schedule: keras.optimizers.schedules.LearningRateSchedule,
        first_step: int,
        factor: float,
        warmup_steps: int,
    ) -> None:
        self._schedule, self._first_step, self._factor, self._warmup_steps = schedule, first_step, factor, warmup_steps

    def __call__(self, step: Any) -> Any:
        rate = self._factor * self._schedule(step + self._first_step)
        if not (self._first_step and self._warmup_steps):  # an optimizer that starts at step 0 has the run's warm-up
            return rate
        return rate * tf.minimum(1.0, tf.cast(step, tf.float32) / float(self._warmup_steps))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the schedule."""
        return {
            "schedule": self._schedule,
            "first_step": self._first_step,
            "factor": self._factor,
            "warmup_steps": self._warmup_steps,
        }
