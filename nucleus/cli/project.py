"""The project's bucket, as the commands that take only a name know it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nucleus.storage.bucket import Bucket

__all__ = ["project_bucket"]


def project_bucket(below: str, *, single_writer: bool = False) -> "Bucket":
    """The bucket that NUCLEUS_BUCKET names, once what lies below a prefix of it could be listed.

    Raises:
        NucleusError: What is wrong with the name, or with the bucket.
    """
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import bucket_from_environment

    bucket = Bucket(bucket_from_environment(), single_writer=single_writer)
    bucket.check(below)
    return bucket
