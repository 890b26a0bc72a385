"""Checks of `nucleus doctor`: packages, model, service, disks, bucket, clock, writes, weights, engine and W&B."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from nucleus import errors
from nucleus.config.recipe import NetworkOptions, TrackingOptions
from nucleus.errors import ClockError, NucleusError, UsageError
from nucleus.lazy import SERVING, TRAINING, missing_packages, pip_install
from nucleus.model.engines import decide_engine
from nucleus.registry.encoder_weights import WEIGHTS, list_weights
from nucleus.registry.manifest import MODELS
from nucleus.registry.versions import read_included
from nucleus.storage.bucket import Bucket, check_conditional_writes, knows_checksums
from nucleus.storage.claims import lock_file
from nucleus.storage.client import Connection
from nucleus.storage.files import free_bytes, output_error
from nucleus.storage.local_server import served_folder
from nucleus.storage.s3_errors import CHECKSUM_FIX, endpoint_variable
from nucleus.storage.uri import BUCKET_VARIABLE, bucket_from_environment
from nucleus.surroundings import CACHE_VARIABLE, CLOCK_FIX, TRAINS_HERE, export, find_cache, installed_versions
from nucleus.tracking.failover import check_tracking, server_problem, tracking_mode

__all__ = [
    "Finding",
    "State",
    "call_in_subprocess",
    "check_cache",
    "check_disks",
    "check_engine",
    "check_model",
    "check_packages",
    "check_service",
    "check_storage",
    "check_wandb",
    "engine_here",
    "failed",
    "skipped",
    "wandb_problem",
]

State = Literal["ok", "warning", "failed", "skipped"]

_CACHE, _WANDB, _ENGINE, _MODEL, _SERVICE = "cache", "W&B", "engine", "model", "service"
_ENGINE_SECONDS = 60.0
_LOCKS, _TEMPORARY, _STORE = "file locks", "temporary folder", "store room"
_LITTLE_ROOM = 1 << 30
"""Bytes below which little room is a warning: the images of a dataset or a model with its checkpoints take as much."""
_BUCKET, _CLOCK, _CONDITIONS, _WEIGHTS = "bucket", "clock", "conditional writes", "weights"
_ENDPOINT, _CREDENTIALS, _CHECKSUMS = "endpoint", "credentials", "checksums"
_PROVIDERS = {
    "assume-role": "an assumed role",
    "container-role": "the container's role",
    "custom-process": "credential_process",
    "env": "environment variables",
    "iam-role": "the machine's role",
    "shared-credentials-file": "the AWS credentials file",
    "config-file": "the AWS configuration file",
    "sso": "SSO",
}
"""What botocore calls the places that credentials come from."""

_WANDB_SECONDS = 40.0
_CLOCK_WARNING, _CLOCK_FAILURE = 60.0, 300.0
"""Seconds of difference; S3 refuses requests at 15 minutes, which a drifting clock reaches sooner or later."""
_NOT_SENT = {
    "offline": "offline, set by WANDB_MODE; `wandb sync` uploads runs later",
    "disabled": "disabled, set by WANDB_MODE",
}
_MAX_MESSAGE = 200


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        check: Name of the check.
        state: `ok`; `warning`, if training works but perhaps not as expected; `failed`, if it cannot work; `skipped`,
            if another check has to be fixed first.
        found: What the check found.
        fix: How to fix it; None if nothing needs fixing.
    """

    check: str
    state: State
    found: str
    fix: str | None = None


def failed(check: str, error: NucleusError) -> Finding:
    """Return the finding of a check that raised an error: its first sentence is what was found, the rest is the fix."""
    found, _, fix = str(error).partition(". ")
    return Finding(check, "failed", found.rstrip("."), fix or None)


def skipped(check: str, first: str) -> Finding:
    """Return the finding of a check that is not possible before `first` is fixed."""
    return Finding(check, "skipped", f"not checked: fix {first} first")


def check_packages() -> Finding:
    """Check that the packages are installed, all or those of the light install, and list their versions."""
    found = installed_versions()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    missing = missing_packages()
    if _is_light():
        light = "the light install, which predicts, and does not train"
        return Finding("packages", "ok", f"{text}: {light}. {_to_train()}")
    if missing:
        return Finding("packages", "failed", f"{', '.join(missing)} not installed; found {text}", _to_train())
    return Finding("packages", "ok", text)


def _is_light() -> bool:
    """Return whether this is the light install."""
    return set(missing_packages()) == set(TRAINING)


def _to_train() -> str:
    return f"To train: {pip_install(extras=['train'])}"


def check_model() -> Finding:
    """Check that the model that comes along is whole."""
    try:
        found = read_included()
    except NucleusError as error:
        return failed(_MODEL, error)
    return Finding(_MODEL, "ok", f"{found} comes along, and its files match their sums")


def check_service() -> Finding:
    """Check that what `nucleus serve` needs is installed, and can be imported."""
    missing, command = missing_packages(SERVING), pip_install(extras=["serve"])
    if set(missing) == set(SERVING):
        return Finding(_SERVICE, "skipped", f"not installed. For nucleus serve: {command}")
    if missing:
        return Finding(_SERVICE, "failed", f"{', '.join(missing)} not installed", f"Run: {command}")
    for name in SERVING:
        try:
            import_module(name)
        except Exception as error:  # whatever a broken installation raises
            found = f"{name} cannot be imported: {type(error).__name__}: {str(error)[:_MAX_MESSAGE]}"
            return Finding(_SERVICE, "failed", found, f"Run: {pip_install('--force-reinstall', name)}")
    found = ", ".join(f"{name} {metadata.version(name)}" for name in ("fastapi", "uvicorn"))
    return Finding(_SERVICE, "ok", f"nucleus serve can run: {found}")


def not_installed(check: str) -> Finding:
    """Return the finding of a check that only training needs, in the light install."""
    return Finding(
        check, "skipped", f"not installed. {_to_train()}" if TRAINS_HERE else "Windows trains no models. Use WSL."
    )


def check_engine() -> Finding:
    """Say what computes predictions on this machine, and why."""
    try:
        found = call_in_subprocess(engine_here, who="TensorFlow", seconds=_ENGINE_SECONDS)
    except NucleusError as error:
        return failed(_ENGINE, error)
    return Finding(_ENGINE, "ok", found)


def engine_here() -> str:
    """Return the engine for a version with `model.onnx`, and why; where there is a GPU, this imports TensorFlow."""
    return str(decide_engine())


def check_cache() -> Finding:
    """Check whether the folder for caches can be written, and say how to choose another."""
    change = f"To choose another folder: {export(CACHE_VARIABLE)}."
    try:
        found = find_cache()
    except NucleusError as error:
        return failed(_CACHE, error)
    if not found.writable:
        return Finding(_CACHE, "failed", f"{found.path} cannot be written", change)
    if found.temporary:
        return Finding(_CACHE, "warning", f"{found.path}, which may be lost, because {found.problem}", change)
    if (room := free_bytes(found.path)) is not None and room < _LITTLE_ROOM:
        return Finding(_CACHE, "warning", f"{found.path}: {_room_text(room)}", f"Make room. {change}")
    return Finding(_CACHE, "ok", f"{found.path} can be written ({CACHE_VARIABLE} changes it)")


def check_disks() -> Iterator[Finding]:
    """Check locks in the cache, the room for temporary files, and the room of this machine's embedded S3 server."""
    yield _locks()
    yield _temporary_folder()
    folder = served_folder(os.environ.get(endpoint_variable() or "", ""))
    if folder is None:
        yield Finding(
            _STORE, "ok", "not known: the bucket's server is not one of `nucleus store start` on this machine"
        )
    else:
        fix = "Make room on that disk, or stop the server, move the folder and run: nucleus store start --dir DIR."
        yield _room(_STORE, folder, fix)


def _locks() -> Finding:
    """Lock a file without a name in the cache, or in the nearest folder above it that exists."""
    try:
        found = find_cache()
    except NucleusError:
        return skipped(_LOCKS, _CACHE)
    if not found.writable:
        return skipped(_LOCKS, _CACHE)
    there = next(place for place in (found.path, *found.path.parents) if place.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            lock_file(file.fileno(), there, export(CACHE_VARIABLE), wait=False)
    except NucleusError as error:
        return failed(_LOCKS, error)
    except OSError as error:
        return failed(_LOCKS, output_error(there, error, export(CACHE_VARIABLE)))
    return Finding(_LOCKS, "ok", f"files in {there} can be locked")


def _temporary_folder() -> Finding:
    fix = f"To choose another folder: {export('TMPDIR')}."
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        return Finding(_TEMPORARY, "failed", str(error.strerror), f"Make room. {fix}")
    chosen = os.environ.get("TMPDIR")
    if chosen and Path(chosen).absolute() != folder:
        return Finding(_TEMPORARY, "warning", f"TMPDIR={chosen} cannot be written, so {folder} is used", fix)
    return _room(_TEMPORARY, folder, fix)


def _room(check: str, folder: Path, fix: str) -> Finding:
    room = free_bytes(folder)
    if room is None:
        return Finding(check, "ok", f"{folder}: its file system does not say how much room is left")
    if room < _LITTLE_ROOM:
        return Finding(check, "warning", f"{folder}: {_room_text(room)}", fix)
    return Finding(check, "ok", f"{folder}: {_room_text(room)}")


def _room_text(room: int) -> str:
    return f"{room >> 20:,} MiB are free" + (f", fewer than {_LITTLE_ROOM >> 20:,}" if room < _LITTLE_ROOM else "")


def check_storage() -> Iterator[Finding]:
    """Check the bucket of NUCLEUS_BUCKET, the clock, conditional writes and encoder weights, in this order.

    Leaves one small object in the bucket, `models/.conditional-writes`, as the first publication does. The light
    install needs no bucket to predict.
    """
    others = (_ENDPOINT, _CREDENTIALS, _CLOCK, _CHECKSUMS, _CONDITIONS, _WEIGHTS)
    if _is_light() and not os.environ.get(BUCKET_VARIABLE):
        command = export(BUCKET_VARIABLE, "s3://BUCKET")
        yield Finding(_BUCKET, "skipped", f"not set; the model that comes along needs none. For a bucket: {command}")
        yield from (Finding(check, "skipped", "not checked: there is no bucket") for check in others)
        return
    try:
        bucket = Bucket(bucket_from_environment())
        ahead = bucket.seconds_ahead(MODELS)
    except ClockError as error:
        yield from (skipped(check, _CLOCK) for check in (_BUCKET, _ENDPOINT, _CREDENTIALS))
        yield failed(_CLOCK, error)
        yield from (skipped(check, _CLOCK) for check in (_CHECKSUMS, _CONDITIONS, _WEIGHTS))
        return
    except NucleusError as error:
        yield failed(_BUCKET, error)
        yield from (skipped(check, _BUCKET) for check in others)
        return
    yield Finding(_BUCKET, "ok", f"{bucket.uri} at {bucket.endpoint}")
    yield _endpoint(bucket)
    yield _credentials(bucket.connection)
    yield _clock(ahead)
    checksums = _checksums(bucket)
    yield checksums
    yield _conditional_writes(bucket) if checksums.state == "ok" else skipped(_CONDITIONS, _CHECKSUMS)
    yield _weights(bucket)


def _endpoint(bucket: Bucket) -> Finding:
    """Show how the server is reached, and warn if the bucket is in another region, so that requests are redirected."""
    connection = bucket.connection
    region, route = connection.bucket_region, connection.route()
    if region not in {None, connection.client.meta.region_name}:
        return Finding(
            _ENDPOINT, "warning", f"{route}; the bucket is in {region}", f"Run: {export('AWS_REGION', region or '')}."
        )
    return Finding(_ENDPOINT, "ok", route)


def _credentials(connection: Connection) -> Finding:
    """Show where the credentials come from, and how long they last."""
    source = _PROVIDERS.get(str(connection.provider), str(connection.provider))
    if connection.expire is not None:
        minutes = (connection.expire - datetime.now(UTC)).total_seconds() / 60
        return Finding(_CREDENTIALS, "ok", f"{source}; renewed by themselves in {minutes:.0f} minutes or before")
    if connection.provider == "env" and os.environ.get("AWS_SESSION_TOKEN"):
        return Finding(
            _CREDENTIALS,
            "warning",
            f"{source}, temporary: they cannot be renewed while a run is going on",
            "Put them in the AWS credentials file, which is read again, or set up credential_process or SSO.",
        )
    return Finding(_CREDENTIALS, "ok", f"{source}, without known end")


def _checksums(bucket: Bucket) -> Finding:
    try:
        known = knows_checksums(bucket)
    except NucleusError as error:
        return failed(_CHECKSUMS, error)
    if known:
        return Finding(_CHECKSUMS, "ok", "the server takes the SDK's checksums of uploads")
    found = "the server does not take the SDK's newer checksums of uploads"
    return Finding(_CHECKSUMS, "failed", found, f"Run: {CHECKSUM_FIX}.")


def _clock(ahead: float | None) -> Finding:
    if ahead is None:
        return Finding(_CLOCK, "ok", "not compared: the server does not send its time")
    apart = abs(ahead)
    text = f"{apart:.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if apart <= _CLOCK_WARNING:
        return Finding(_CLOCK, "ok", text)
    return Finding(
        _CLOCK,
        "failed" if apart > _CLOCK_FAILURE else "warning",
        f"{text}; from 900 s, S3 refuses requests",
        CLOCK_FIX,
    )


def _conditional_writes(bucket: Bucket) -> Finding:
    try:
        check_conditional_writes(bucket)
    except NucleusError as error:
        return failed(_CONDITIONS, error)
    return Finding(_CONDITIONS, "ok", "the server honours If-None-Match and If-Match")


def _weights(bucket: Bucket) -> Finding:
    """Warn if there are no weights: the first run may still find them in Keras's cache, or download them."""
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
        f"none at {bucket.uri / WEIGHTS / encoder}/; the first run takes them from Keras's cache or downloads them",
        "Without internet access, run: nucleus weights add FILE.",
    )


_NO_KEY = Finding(
    _WANDB,
    "warning",
    "offline, because there is no API key; runs are kept on disk",
    f"To see runs online: wandb login, and {export('WANDB_MODE', 'online')}. To stay offline: "
    f"{export('WANDB_MODE', 'offline')}.",
)


def check_wandb() -> Finding:
    """Check where W&B records a run, by WANDB_MODE and the recipe's defaults."""
    chosen = os.environ.get("WANDB_MODE")
    if missing_packages(["wandb"]):
        return not_installed(_WANDB)
    try:
        mode = tracking_mode(TrackingOptions())
        if chosen in _NOT_SENT:
            return Finding(_WANDB, "ok", _NOT_SENT[chosen])
        problem = call_in_subprocess(wandb_problem, mode, who="W&B", seconds=_WANDB_SECONDS)
    except UsageError as error:
        return failed(_WANDB, error) if chosen else _NO_KEY
    except NucleusError as error:
        return failed(_WANDB, error)
    if problem is not None:
        found, _, fix = problem.partition(". ")
        return Finding(_WANDB, "warning", f"{found.rstrip('.')}; runs are tracked offline, for wandb sync", fix or None)
    return Finding(_WANDB, "ok", f"{mode}; there is a key" + ("" if chosen else ": WANDB_MODE=online uploads runs"))


def wandb_problem(mode: str) -> str | None:
    """Return why W&B's server cannot be used; None if it can, or if the mode is not `online`, so that it is not asked.

    Raises:
        UsageError: There is no API key.
    """
    check_tracking("online")
    return server_problem() if mode == "online" else None


def call_in_subprocess(function: Callable[..., Any], *arguments: str, who: str, seconds: float) -> Any:
    """Call a function in a separate Python process, with a time limit, and return its result.

    The function may be slow, hang, print or hold memory; none of that affects this process.

    Args:
        function: Function at the top level of a module, whose result can be written as JSON.
        arguments: Arguments of the function.
        who: Name of the program or service that the function asks, for error messages.
        seconds: Time limit.

    Raises:
        NucleusError: The function raised it (the class is kept), took too long, or failed in another way.
    """
    command = [sys.executable, "-P", "-m", __name__, function.__module__, function.__name__, *arguments]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise NucleusError(
            f"Expected {who} to answer within {seconds:.0f} s; it did not. Try again, or restart it."
        ) from None
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise NucleusError(f"Expected an answer from {who}; found {last[:_MAX_MESSAGE]}")
    result = json.loads(done.stdout)
    if "error" in result:
        raise getattr(errors, result["kind"])(result["error"])
    return result["answer"]


def _call_and_print(module: str, function: str, *arguments: str) -> None:
    """Call a function and print its result, or its error, as JSON."""
    with redirect_stdout(sys.stderr):
        try:
            result = {"answer": getattr(import_module(module), function)(*arguments)}
        except NucleusError as error:
            result = {"error": str(error), "kind": type(error).__name__}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    _call_and_print(*sys.argv[1:])
