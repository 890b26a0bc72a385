"""The model of a service, and the alias that it follows: a newer version is loaded, warmed up, and put in its place."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from nucleus.config.names import EngineChoice, Reference
from nucleus.errors import NucleusError, StorageError
from nucleus.predict.model import Model, PredictionOptions, load_pulled
from nucleus.registry.versions import (
    PulledModel,
    find_model,
    is_included,
    is_pulled,
    locate_model,
    pull_cached,
    resolve_version,
)
from nucleus.serve.problems import without_paths
from nucleus.storage.bucket import Bucket

__all__ = ["FollowedAlias", "ServedModel", "find_served", "followed_alias"]

_WARM_SIDE = 256
_log = logging.getLogger("nucleus.serve")


@dataclass(frozen=True)
class FollowedAlias:
    """A name of a model whose version may change: an alias such as `production`, or `latest`.

    Attributes:
        registry: The bucket.
        reference: Name and alias.
    """

    registry: Bucket
    reference: Reference

    def version(self) -> int:
        """Return the version that it means now. Raises `ModelError`, `StorageError`."""
        return resolve_version(self.registry, self.reference)

    def pull(self, version: int) -> PulledModel:
        """Return a version, verified. Raises `ModelError`, `IntegrityError`, `StorageError`."""
        return pull_cached(self.registry, Reference(self.reference.name, str(version)))


@dataclass(frozen=True)
class _Failure:
    """A version that was not loaded, or None if the alias itself could not be read."""

    version: int | None
    error: str
    since: datetime


def followed_alias(model: str | None) -> FollowedAlias | None:
    """Return what a service follows if its model is named so; None for what never changes.

    Args:
        model: What `nucleus.registry.find_model` takes. The model that comes along, a folder and a number never change.
    """
    if model is None or is_included(model) or is_pulled(model):
        return None
    location = locate_model(model)
    if location.reference.ref.isdecimal():
        return None
    return FollowedAlias(Bucket(location.bucket), location.reference)


class ServedModel:
    """The model that answers requests, and the newer versions that replace it.

    Args:
        pulled: A verified version.
        alias: What is followed; None for a version that stays.
        engine: What computes the network.

    Attributes:
        model: The model that answers requests now.
        since: When it was loaded, UTC.

    Raises:
        ModelError: It cannot be loaded.
    """

    def __init__(self, pulled: PulledModel, alias: FollowedAlias | None = None, engine: EngineChoice = "auto") -> None:
        self._alias = alias
        self._engine = engine
        self._failure: _Failure | None = None
        self._take(pulled)

    def _take(self, pulled: PulledModel) -> None:
        """Load a version, let it segment an image, and only then have it answer requests."""
        model = load_pulled(pulled, PredictionOptions(engine=self._engine))
        model.segment(np.zeros((_WARM_SIDE, _WARM_SIDE), np.uint8))
        self.model: Model = model
        self._version = pulled.manifest.version
        self.since = datetime.now(UTC)

    @property
    def follows(self) -> bool:
        """Whether there is an alias to look at from time to time, by `look`."""
        return self._alias is not None

    def look(self) -> None:
        """Load the version that the alias means now, if it is another one; if that fails, the old one stays.

        A version that does not load is not tried again until the alias moves, unless the bucket was the reason.
        """
        assert self._alias is not None
        version = None
        try:
            version = self._alias.version()
            if version == self._version:
                self._failure = None
            elif self._failure is None or self._failure.version != version:
                self._take(self._alias.pull(version))
                self._failure = None
                _log.info("%s serves now, as %s says", self.model, self._alias.reference)
        except Exception as error:  # whatever a stored version holds, the service goes on
            self._failed(version, error)

    def _failed(self, version: int | None, error: Exception) -> None:
        said = " ".join(str(error).split()) if isinstance(error, NucleusError) else type(error).__name__
        before = self._failure
        if isinstance(error, StorageError):
            version = None  # it is tried again
        self._failure = _Failure(version, said, datetime.now(UTC))
        if before is None or (before.version, before.error) != (version, said):
            _log.warning("%s goes on, because %s cannot be loaded: %s", self.model, self._wanted(version), said)

    def _wanted(self, version: int | None) -> str:
        assert self._alias is not None
        return f"{self._alias.reference.name}@{version}" if version else str(self._alias.reference)

    def description(self) -> list[dict[str, Any]]:
        """Return what is known of the model, and of a version that could not be loaded, for JSON."""
        serving: dict[str, Any] = {"model": str(self.model), "state": "serving", "since": _text(self.since)}
        if self._alias is not None:
            serving["follows"] = str(self._alias.reference)
        if self._failure is None:
            return [serving]
        failed = {
            "model": self._wanted(self._failure.version),
            "state": "failed",
            "since": _text(self._failure.since),
            "error": without_paths(self._failure.error),
        }
        return [serving, failed]


def _text(time: datetime) -> str:
    return time.isoformat(timespec="seconds")


def find_served(model: str | None, engine: EngineChoice = "auto", **how: Any) -> ServedModel:
    """Return the model of a service by its name, loaded and warmed up.

    Args:
        model: What `nucleus.registry.find_model` takes; aliases and `latest` are followed.
        engine: What computes the network.
        **how: Further arguments of `find_model`.

    Raises:
        NucleusError: There is no such model, or it cannot be loaded.
    """
    return ServedModel(find_model(model, **how), followed_alias(model), engine)
