"""The checks of the bucket: whether it can be used, its server's clock, conditional writes and encoder weights."""

from collections.abc import Iterator

from nucleus.config.recipe import NetworkOptions
from nucleus.doctor.findings import Finding, failed, skipped
from nucleus.errors import ClockError, NucleusError
from nucleus.registry.encoder_weights import list_weights
from nucleus.storage.bucket import Bucket
from nucleus.storage.conditions import check_conditional_writes
from nucleus.storage.explanations import endpoint
from nucleus.storage.uri import bucket_from_environment

__all__ = ["check_storage"]

_BUCKET, _CLOCK, _CONDITIONS, _WEIGHTS = "bucket", "clock", "conditional writes", "weights"
_REMARKABLE, _TOO_MUCH = 60.0, 300.0
"""Seconds; S3 refuses requests at 15 minutes, and clocks that drift get there."""
_SET_THE_CLOCK = "Run: timedatectl set-ntp true (for a container, on its host)."


def check_storage() -> Iterator[Finding]:
    """Look at the bucket of NUCLEUS_BUCKET and at what needs it, one after the other.

    As a first publisher does, it leaves one small object in the bucket: `models/.conditional-writes`.
    """
    try:
        bucket = Bucket(bucket_from_environment())
        ahead = bucket.seconds_ahead("models/")
    except ClockError as error:
        yield skipped(_BUCKET, _CLOCK)
        yield failed(_CLOCK, error)
        yield from (skipped(check, _CLOCK) for check in (_CONDITIONS, _WEIGHTS))
        return
    except NucleusError as error:
        yield failed(_BUCKET, error)
        yield from (skipped(check, _BUCKET) for check in (_CLOCK, _CONDITIONS, _WEIGHTS))
        return
    yield Finding(_BUCKET, "ok", f"{bucket.uri} at {endpoint()}")
    yield _clock(ahead)
    yield _conditional_writes(bucket)
    yield _weights(bucket)


def _clock(ahead: float | None) -> Finding:
    if ahead is None:
        return Finding(_CLOCK, "ok", "the server does not tell its own")
    apart = abs(ahead)
    text = f"{apart:.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if apart <= _REMARKABLE:
        return Finding(_CLOCK, "ok", text)
    return Finding(
        _CLOCK,
        "failed" if apart > _TOO_MUCH else "warning",
        f"{text}; S3 refuses requests from 900 s on",
        _SET_THE_CLOCK,
    )


def _conditional_writes(bucket: Bucket) -> Finding:
    try:
        check_conditional_writes(bucket)
    except NucleusError as error:
        return failed(_CONDITIONS, error)
    return Finding(_CONDITIONS, "ok", "the server honours If-None-Match and If-Match")


def _weights(bucket: Bucket) -> Finding:
    """A warning where there are none: the first run may still find them in Keras's cache, or download them."""
    encoder = NetworkOptions().encoder
    try:
        stored = list_weights(bucket, encoder)
    except NucleusError as error:
        return failed(_WEIGHTS, error)
    if stored:
        return Finding(_WEIGHTS, "ok", f"{bucket.uri / stored[-1].key} ({stored[-1].size / 1e6:.1f} MB)")
    return Finding(
        _WEIGHTS,
        "warning",
        f"none at {bucket.uri}/weights/{encoder}/; the first run takes them from Keras's cache or downloads them",
        "Where the internet cannot be reached, run: nucleus weights add FILE.",
    )
