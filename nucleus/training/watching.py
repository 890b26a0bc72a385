"""How the predictions of a few images change while the network learns."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
from numpy.typing import NDArray

from nucleus.training.predictions import PredictedImage

__all__ = ["Watch"]

Predict = Callable[[], list[PredictedImage]]


class Watch:
    """Predicts a few images before training, after 1, 2, 4, 8, ... validations and at the end.

    The prediction before training is made up for at the first validation, from a copy of the first weights: the graph
    for prediction is built then anyway, and the first step need not wait for it.

    Args:
        model: The network.
        predict: Predicts the images with the model's weights.
        tell: Told of epochs done (None at the end) and predictions.
    """

    def __init__(
        self, model: keras.Model, predict: Predict, tell: Callable[[int | None, list[PredictedImage]], None]
    ) -> None:
        self._model = model
        self._first: list[NDArray[Any]] | None = [variable.numpy() for variable in model.weights]
        self._predict = predict
        self._tell = tell

    def validated(self, count: int, epochs_done: int) -> None:
        """A validation was the `count`-th, from 1; the model has the weights that it scored."""
        if count == 1 and self._first is not None:
            with self._weights(self._first):
                self._tell(0, self._predict())
        self._first = None
        if count & (count - 1) == 0:
            self._tell(epochs_done, self._predict())

    def ended(self) -> None:
        """The model has its best weights."""
        self._tell(None, self._predict())

    @contextmanager
    def _weights(self, values: list[NDArray[Any]]) -> Iterator[None]:
        """Give the model other weights meanwhile."""
        own = [variable.numpy() for variable in self._model.weights]
        self._assign(values)
        try:
            yield
        finally:
            self._assign(own)

    def _assign(self, values: list[NDArray[Any]]) -> None:
        for variable, value in zip(self._model.weights, values, strict=True):
            variable.assign(value)
