"""Initial weights, of the encoder or a whole version: found once per run, and read from a bucket by every worker."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import nucleus
from nucleus.config.encoders import EncoderName
from nucleus.errors import AccessDeniedError, IntegrityError, ObjectExistsError, WeightsError
from nucleus.lazy import keras, missing_packages
from nucleus.model.architecture import WEIGHTS_FILE
from nucleus.progress import Advance, no_progress
from nucleus.registry.manifest import MANIFEST_FILE, EncoderWeightsOrigin, StartOrigin
from nucleus.registry.versions import PulledModel, find_model, pull_uri
from nucleus.storage.bucket import Bucket, StoredObject
from nucleus.storage.files import is_full, output_error, sha256_of, temporary_folder
from nucleus.storage.uri import S3Uri, parse_uri
from nucleus.surroundings import export, proxy_advice

__all__ = [
    "WEIGHTS",
    "EncoderWeights",
    "add_weights",
    "fetch_start",
    "fetch_weights",
    "list_weights",
    "provide_start",
    "provide_weights",
    "start_origin",
]

WEIGHTS = "weights/"
"""Prefix of encoder weights in the project's bucket; `imagenet` takes them from its folder `<encoder>/`."""
_SUFFIX = ".weights.h5"
_PREFIX_DIGITS = 12
_DOWNLOAD_TIMEOUT = 10.0
_DOWNLOADS = "https://storage.googleapis.com"
"""Host of the ImageNet weights that Keras downloads."""


@dataclass(frozen=True)
class EncoderWeights:
    """Encoder weights in a bucket.

    Attributes:
        uri: Address of the file.
        origin: Source and SHA-256.
    """

    uri: S3Uri
    origin: EncoderWeightsOrigin


def add_weights(path: Path, encoder: EncoderName, bucket: Bucket, advance: Advance = no_progress) -> EncoderWeights:
    """Add a weights file to the bucket's `weights/<encoder>/`, where `imagenet` finds it.

    The file is checked by loading it into the encoder. Keras's older `.h5` format is rewritten as `.weights.h5`.
    `advance` is called with the bytes sent and their total.

    Raises:
        WeightsError: The file does not exist, or does not fit the encoder.
    """
    with temporary_folder("weights") as folder:
        return _keep(_checked_file(path, encoder, folder), _folder(encoder), "imagenet", bucket, advance)


def _folder(encoder: EncoderName) -> str:
    return f"{WEIGHTS}{encoder}/"


def list_weights(bucket: Bucket, encoder: EncoderName | None = None) -> list[StoredObject]:
    """Return the weights files in the bucket, newest last."""
    prefix = _folder(encoder) if encoder else WEIGHTS
    return sorted(
        (item for item in bucket.objects(prefix) if item.key.endswith(_SUFFIX)),
        key=lambda item: item.modified,
    )


def provide_weights(
    choice: str,
    encoder: EncoderName,
    bucket: Bucket,
    beside: str,
    advance: Advance = no_progress,
    report: Callable[[str], object] = lambda _: None,
) -> EncoderWeights | None:
    """Make the encoder weights of a recipe available in a bucket, so that workers need only the bucket.

    Args:
        choice: `imagenet` (the bucket, then Keras's cache, then a download), a local path, an `s3://` URI or `none`.
        encoder: Name of the encoder.
        bucket: The project's bucket.
        beside: Folder of the run in the bucket. Weights from a local file are stored in it; so are downloaded ones if
            the credentials do not allow writing to the bucket's `weights/`.
        advance: Called with the bytes read from or sent to the bucket, and their total.
        report: Called with a message if the weights are downloaded from elsewhere.

    Returns:
        The weights in the bucket; None for `none`.

    Raises:
        WeightsError: The weights are not available or do not fit the encoder.
    """
    if choice == "none":
        return None
    if choice == "imagenet":
        stored = list_weights(bucket, encoder)
        if stored:
            return _known_by_prefix(bucket, stored[-1].key, advance)
    beside = f"{beside}/encoder-"
    with temporary_folder("weights") as folder:
        if choice == "imagenet":
            with _downloaded(encoder, report) as path:
                return _keep_where_allowed(path, (_folder(encoder), beside), bucket, advance)
        if "://" not in choice:
            return _keep(_checked_file(Path(choice), encoder, folder), beside, "file", bucket, advance)
        uri = parse_uri(choice)
        digest = Bucket(uri.parent).download(uri.name, folder / uri.name, advance=advance)
        checked = _checked_file(folder / uri.name, encoder, folder)
        if checked == folder / uri.name:
            return EncoderWeights(uri, EncoderWeightsOrigin(source="s3", sha256=digest))
        return _keep(checked, beside, "s3", bucket, advance)


def fetch_weights(weights: EncoderWeights, cache_dir: Path) -> Path:
    """Download weights to this machine's cache; return the file. Raises `IntegrityError` if the SHA-256 is wrong."""
    path = cache_dir / WEIGHTS / f"{weights.origin.sha256}{_SUFFIX}"
    if not path.exists() or sha256_of(path) != weights.origin.sha256:
        Bucket(weights.uri.parent).download(weights.uri.name, path, sha256=weights.origin.sha256)
    return path


def provide_start(
    choice: str,
    bucket: Bucket,
    beside: str,
    progress: Callable[[str, Literal["bytes"]], AbstractContextManager[Advance]],
) -> PulledModel:
    """Make the version that a training starts with available in a bucket, so that workers need only the bucket.

    Args:
        choice: The version, as `find_model` takes it.
        bucket: The project's bucket.
        beside: Folder of the run in the bucket. A version that is only on this machine is copied into it.
        progress: Shows the progress of a transfer; called with a title and its unit.

    Returns:
        The version on this machine, with its address in a bucket.

    Raises:
        NucleusError: As for `find_model`.
    """
    found = find_model(choice, str(bucket.uri), progress)
    if found.uri is not None:
        return found
    copy = Bucket(bucket.uri / beside / f"start-{start_origin(found).sha256[:_PREFIX_DIGITS]}")
    for name in (*found.manifest.files, MANIFEST_FILE):  # the manifest last: a copy with one is complete
        with progress(f"upload {name}", "bytes") as advance, suppress(ObjectExistsError):
            copy.put(name, found.folder / name, if_absent=True, advance=advance)
    return replace(found, uri=copy.uri)


def start_origin(start: PulledModel) -> StartOrigin:
    """Return what is recorded of a version that a training starts with."""
    return StartOrigin(version=str(start), sha256=start.manifest.files[WEIGHTS_FILE].sha256)


def fetch_start(uri: S3Uri, origin: StartOrigin, cache_dir: Path) -> PulledModel:
    """Return the version that a training starts with, from this machine's cache or a bucket.

    Raises:
        IntegrityError: It is missing, damaged or another version.
    """
    found = pull_uri(uri, cache_dir)
    if start_origin(found).sha256 != origin.sha256:
        raise IntegrityError(
            f"Expected {origin} at {uri}, with which the run started; found {start_origin(found)}. Start a new run."
        )
    return found


def _known_by_prefix(bucket: Bucket, key: str, advance: Advance) -> EncoderWeights:
    """Return weights whose file name begins with their SHA-256, after checking it."""
    prefix = Path(key).name.removesuffix(_SUFFIX)
    with temporary_folder("weights") as folder:
        digest = bucket.download(key, folder / Path(key).name, advance=advance)
    if not digest.startswith(prefix):
        raise WeightsError(
            f"Expected {bucket.uri / key} to have a SHA-256 that begins with {prefix}; found {digest}. "
            "Remove it and run: nucleus weights add FILE"
        )
    return EncoderWeights(bucket.uri / key, EncoderWeightsOrigin(source="imagenet", sha256=digest))


def _keep_where_allowed(path: Path, starts: tuple[str, str], bucket: Bucket, advance: Advance) -> EncoderWeights:
    """Store downloaded weights for all runs or, if the credentials do not allow that, for this run only."""
    try:
        return _keep(path, starts[0], "imagenet", bucket, advance)
    except AccessDeniedError:
        return _keep(path, starts[1], "imagenet", bucket, advance)


def _keep(path: Path, start: str, source: str, bucket: Bucket, advance: Advance) -> EncoderWeights:
    """Store weights in the bucket under a key that consists of `start` and their SHA-256."""
    digest = sha256_of(path)
    key = f"{start}{digest[:_PREFIX_DIGITS]}{_SUFFIX}"
    with suppress(ObjectExistsError):  # the same weights are stored already
        bucket.put(key, path, if_absent=True, advance=advance)
    return EncoderWeights(bucket.uri / key, EncoderWeightsOrigin(source=source, sha256=digest))


def _checked_file(path: Path, encoder: EncoderName, folder: Path) -> Path:
    """Check that a file fits its encoder; return it, or a copy in `folder` in the `.weights.h5` format.

    A file that holds what Keras writes for this encoder fits. To load any other one takes ten seconds: TensorFlow has
    to be imported first.
    """
    if not path.is_file():
        raise WeightsError(f"Expected a weights file at {path}; nothing is there.")
    if path.name.endswith(_SUFFIX) and _layout(path) == nucleus.config.ENCODERS[encoder].layout:
        return path
    model = nucleus.config.build_encoder(encoder)
    nucleus.model.load_encoder_weights(model, path)
    if path.name.endswith(_SUFFIX):
        return path
    copy = folder / f"{secrets.token_hex(4)}{_SUFFIX}"
    model.save_weights(copy)
    keras.backend.clear_session()
    return copy


def _layout(path: Path) -> str | None:
    """Return the SHA-256 of the names, shapes and types of the arrays in a file; None if one cannot be read."""
    if missing_packages(["h5py"]):  # comes with Keras, whose absence has an error of its own
        return None
    import h5py  # noqa: PLC0415  a tenth of a second, and only a run that starts needs it

    lines: list[str] = []

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            lines.append(f"{name} {item.shape} {item[...].dtype}")  # a damaged array cannot be read

    try:
        with h5py.File(path) as file:
            file.visititems(note)
    except (OSError, RuntimeError):
        return None
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


class _Download(io.StringIO):
    """Replacement of stdout during a download by Keras: hides its progress bar, and reports the address."""

    def __init__(self, report: Callable[[str], object]) -> None:
        super().__init__()
        self._report = report

    def write(self, text: str) -> int:
        """Report the line with the address."""
        if text.startswith("Downloading"):
            self._report(text.strip())
        return len(text)


@contextmanager
def _downloaded(encoder: EncoderName, report: Callable[[str], object]) -> Iterator[Path]:
    """Yield a file with the ImageNet weights from Keras's cache, downloaded if need be."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # Keras sets none, and a firewall may drop packets silently
    try:
        with redirect_stdout(_Download(report)):
            model = nucleus.config.ENCODERS[encoder].build(
                input_shape=(224, 224, 3), include_top=False, weights="imagenet"
            )
    except Exception as error:  # urllib, ssl and Keras each raise their own
        if isinstance(error, OSError) and is_full(error):
            kept = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / encoder
            raise output_error(kept, error, export("KERAS_HOME")) from error
        raise WeightsError(
            f"Expected ImageNet weights of {encoder}: the bucket has none under weights/{encoder}/, Keras's cache "
            f"has none, and the download failed ({error}).{proxy_advice(_DOWNLOADS)} Do one of these: run `nucleus "
            "weights add FILE`; set network.weights to a local file or s3:// URI; run once where the download works; "
            "or train without pretrained weights: network.weights = 'none'."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    with temporary_folder("weights") as folder:
        path = folder / f"{encoder}{_SUFFIX}"
        model.save_weights(path)
        yield path
