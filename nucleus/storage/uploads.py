"""How much of a file has been sent, by boto3's own transfer module: it knows the sending from the summing before."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nucleus.progress import Advance, no_progress

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["body_of", "watch_uploads"]

_EVENT = "request-created.s3"


def watch_uploads(client: "S3Client") -> None:
    """Let a client tell the bodies of its requests when they are signed, and read for it, and when they are sent."""
    from s3transfer.utils import signal_not_transferring, signal_transferring  # noqa: PLC0415

    client.meta.events.register_first(_EVENT, signal_not_transferring, unique_id="nucleus-upload-signed")
    client.meta.events.register_last(_EVENT, signal_transferring, unique_id="nucleus-upload-sent")


@contextmanager
def body_of(body: bytes | Path, advance: Advance) -> Iterator[Any]:
    """What a request sends: the bytes, or the open file, of which `advance` is told how much is sent."""
    if isinstance(body, bytes):
        yield body
        return
    if advance is no_progress:
        with body.open("rb") as file:
            yield file
        return
    from s3transfer.utils import ReadFileChunk  # noqa: PLC0415

    size = body.stat().st_size
    sent = 0
    advance(sent, size)

    def count(bytes_transferred: int) -> None:
        nonlocal sent
        sent += bytes_transferred
        advance(sent, size)

    with ReadFileChunk.from_filename(str(body), 0, size, callbacks=[count], enable_callbacks=False) as chunk:
        yield chunk
