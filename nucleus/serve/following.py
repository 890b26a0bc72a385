"""The model of a service, and the alias that it follows: newer versions are loaded, warmed up, and put in its place."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from nucleus.predict.model import Model, load_pulled
from nucleus.registry.versions import PulledModel

__all__ = ["ServedModel"]

_WARM_SIDE = 256


class ServedModel:
    """The model that answers requests now.

    Args:
        pulled: A verified version.

    Attributes:
        model: The model.
        since: When it was loaded, UTC.

    Raises:
        ModelError: It cannot be loaded.
    """

    def __init__(self, pulled: PulledModel) -> None:
        self.model: Model = _warm(pulled)
        self.since = datetime.now(UTC)


def _warm(pulled: PulledModel) -> Model:
    """Load a version and let it segment an image, so that the first request is as fast as the others."""
    model = load_pulled(pulled)
    model.segment(np.zeros((_WARM_SIDE, _WARM_SIDE), np.uint8))
    return model
