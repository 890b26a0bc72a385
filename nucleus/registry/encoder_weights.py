"""Encoder weights: found once a run, kept in the bucket, fetched from there by every worker."""

from __future__ import annotations

import io
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import nucleus
from nucleus.config.encoders import EncoderName
from nucleus.errors import AccessDeniedError, ObjectExistsError, WeightsError
from nucleus.lazy import keras
from nucleus.progress import Advance, no_progress
from nucleus.registry.manifest import EncoderWeightsOrigin
from nucleus.storage.bucket import Bucket, StoredObject
from nucleus.storage.files import sha256_of
from nucleus.storage.uri import S3Uri, parse_uri

__all__ = ["WEIGHTS", "EncoderWeights", "add_weights", "fetch_weights", "list_weights", "provide_weights"]

WEIGHTS = "weights/"
"""Prefix of encoder weights in the project's bucket: in `<encoder>/` the files that `imagenet` means."""
_SUFFIX = ".weights.h5"
_PREFIX_DIGITS = 12
_DOWNLOAD_TIMEOUT = 10.0


@dataclass(frozen=True)
class EncoderWeights:
    """Weights in a bucket.

    Attributes:
        uri: Where they are.
        origin: Their source and sum.
    """

    uri: S3Uri
    origin: EncoderWeightsOrigin


def add_weights(path: Path, encoder: EncoderName, bucket: Bucket, advance: Advance = no_progress) -> EncoderWeights:
    """Put a weights file into the bucket's `weights/<encoder>/`, where `imagenet` finds it.

    The file is loaded into the encoder first. Keras's older `.h5` format is rewritten as `.weights.h5`. `advance` is
    told how many bytes are sent, of how many.

    Raises:
        WeightsError: No such file, or it does not fit the encoder.
    """
    with tempfile.TemporaryDirectory(prefix="nucleus-weights-") as folder:
        return _keep(_checked_file(path, encoder, Path(folder)), _folder(encoder), "imagenet", bucket, advance)


def _folder(encoder: EncoderName) -> str:
    return f"{WEIGHTS}{encoder}/"


def list_weights(bucket: Bucket, encoder: EncoderName | None = None) -> list[StoredObject]:
    """The weights files in the bucket, the newest last."""
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
    tell: Callable[[str], object] = lambda _: None,
) -> EncoderWeights | None:
    """Make the weights that a recipe names available in a bucket, so that workers need nothing but the bucket.

    Args:
        choice: `imagenet` (the bucket, then Keras's cache, then a download), a local path, an `s3://` URI or `none`.
        encoder: Name of the encoder.
        bucket: The project's bucket.
        beside: Folder of the run in the bucket, which keeps a local file, and a downloaded one where the bucket's
            `weights/` may not be written to.
        advance: Told how many bytes are read from the bucket or sent there, of how many.
        tell: Told that they are downloaded from elsewhere.

    Returns:
        Where the weights are; None for `none`.

    Raises:
        WeightsError: They cannot be had.
    """
    if choice == "none":
        return None
    if choice == "imagenet":
        stored = list_weights(bucket, encoder)
        if stored:
            return _known_by_prefix(bucket, stored[-1].key, advance)
    with tempfile.TemporaryDirectory(prefix="nucleus-weights-") as temporary:
        folder, beside = Path(temporary), f"{beside}/encoder-"
        if choice == "imagenet":
            with _downloaded(encoder, tell) as path:
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
    """Bring weights to this machine's cache; return the file. Raises `IntegrityError` if the sum is wrong."""
    path = cache_dir / WEIGHTS / f"{weights.origin.sha256}{_SUFFIX}"
    if not path.exists() or sha256_of(path) != weights.origin.sha256:
        Bucket(weights.uri.parent).download(weights.uri.name, path, sha256=weights.origin.sha256)
    return path


def _known_by_prefix(bucket: Bucket, key: str, advance: Advance) -> EncoderWeights:
    """Weights whose name begins with their sum, checked against it."""
    prefix = Path(key).name.removesuffix(_SUFFIX)
    with tempfile.TemporaryDirectory(prefix="nucleus-weights-") as folder:
        digest = bucket.download(key, Path(folder) / Path(key).name, advance=advance)
    if not digest.startswith(prefix):
        raise WeightsError(
            f"Expected {bucket.uri / key} to have a SHA-256 that begins with {prefix}; found {digest}. "
            "Remove it and run: nucleus weights add FILE"
        )
    return EncoderWeights(bucket.uri / key, EncoderWeightsOrigin(source="imagenet", sha256=digest))


def _keep_where_allowed(path: Path, starts: tuple[str, str], bucket: Bucket, advance: Advance) -> EncoderWeights:
    """Keep downloaded weights where all runs find them, or, in a job with the least rights, where this run does."""
    try:
        return _keep(path, starts[0], "imagenet", bucket, advance)
    except AccessDeniedError:
        return _keep(path, starts[1], "imagenet", bucket, advance)


def _keep(path: Path, start: str, source: str, bucket: Bucket, advance: Advance) -> EncoderWeights:
    """Put weights into the bucket under a key that begins with `start` and goes on with their sum."""
    digest = sha256_of(path)
    key = f"{start}{digest[:_PREFIX_DIGITS]}{_SUFFIX}"
    with suppress(ObjectExistsError):  # then they are there already
        bucket.put(key, path, if_absent=True, advance=advance)
    return EncoderWeights(bucket.uri / key, EncoderWeightsOrigin(source=source, sha256=digest))


def _checked_file(path: Path, encoder: EncoderName, folder: Path) -> Path:
    """Load a file into its encoder; return it, or a copy in `folder` in the `.weights.h5` format."""

    if not path.is_file():
        raise WeightsError(f"Expected a weights file at {path}; nothing is there.")
    model = nucleus.config.build_encoder(encoder)
    nucleus.model.load_encoder_weights(model, path)
    if path.name.endswith(_SUFFIX):
        return path
    copy = folder / f"{secrets.token_hex(4)}{_SUFFIX}"
    model.save_weights(copy)
    keras.backend.clear_session()
    return copy


class _Download(io.StringIO):
    """Takes what Keras writes during a download, a bar of its own kind, and tells where from."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__()
        self._tell = tell

    def write(self, text: str) -> int:
        """Tell the one line that says it."""
        if text.startswith("Downloading"):
            self._tell(text.strip())
        return len(text)


@contextmanager
def _downloaded(encoder: EncoderName, tell: Callable[[str], object]) -> Iterator[Path]:
    """ImageNet weights by Keras: from its cache, or downloaded into it."""

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # Keras sets none, and a firewall may drop silently
    try:
        with redirect_stdout(_Download(tell)):  # where Keras shows it
            model = nucleus.config.ENCODERS[encoder].build(
                input_shape=(224, 224, 3), include_top=False, weights="imagenet"
            )
    except Exception as error:  # urllib, ssl and Keras each raise their own
        raise WeightsError(
            f"Expected ImageNet weights of {encoder}: the bucket has none under weights/{encoder}/, Keras's cache "
            f"has none, and the download failed ({error}). Any of three ways helps: run `nucleus weights add FILE`; "
            "set network.weights to a local file or s3:// URI; or run once where the download works. "
            "(network.weights = 'none' trains without.)"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    with tempfile.TemporaryDirectory(prefix="nucleus-weights-") as folder:
        path = Path(folder) / f"{encoder}{_SUFFIX}"
        model.save_weights(path)
        yield path
