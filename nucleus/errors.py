"""Exceptions of this project, in one tree.

    NucleusError                         the command line prints its message and exits with status 1
    ├── UsageError (ValueError)          a wrong argument or recipe; exit status 2
    │   ├── RecipeError                  a wrong key, type or value in a recipe
    │   └── UriError                     a malformed URI, name or NAME@REF
    ├── MissingPackageError (ImportError) a package that this command needs is not installed
    ├── StorageError (OSError)           a request to the bucket failed
    │   ├── BucketNotFoundError
    │   ├── ObjectNotFoundError          also a FileNotFoundError
    │   ├── ObjectExistsError            the condition of a write did not hold; also a FileExistsError
    │   ├── UncertainWriteError          a compare-and-swap with an unknown outcome
    │   ├── ConditionalWritesError       the server ignores the conditions of writes
    │   ├── AccessDeniedError            missing, wrong or insufficient credentials; also a PermissionError
    │   ├── ClockError                   this machine's clock differs too much from the server's
    │   ├── TransientStorageError        a temporary failure that outlasted the retries
    │   │   ├── UnreachableError         no answer from the endpoint; also a ConnectionError
    │   │   └── UnavailableError         the endpoint is overloaded, or its answer broke off
    │   └── StoreServerError             the embedded S3 server did not start or stop
    ├── CacheFullError                   the cache's limit is too low for the shards in use
    ├── OutputError (OSError)            a file or folder that cannot be written or locked, or is in use
    ├── IntegrityError (ValueError)      bytes with another SHA-256 than their manifest states
    ├── DataError (ValueError)           unusable images, masks, folders or datasets
    │   └── ImageError                   one unusable image file
    ├── WeightsError                     encoder weights that are not available or do not fit
    ├── ModelError (ValueError)          a stored model that this version cannot rebuild
    ├── RequestError                     a request that the service refuses: too large, too slow, too many at once
    ├── ClusterError                     a Ray cluster that cannot or must not be used
    └── JobError                         a training run that did not finish
        └── RunStoppedError              stopped by a signal, can be resumed; exit status 143, after Ctrl-C 130

Messages state what was expected, what was found, and the command that fixes it. Every error is created from a single
string, so that it survives pickling on its way from a Ray worker.
"""

import signal

__all__ = [
    "AccessDeniedError",
    "BucketNotFoundError",
    "CacheFullError",
    "ClockError",
    "ClusterError",
    "ConditionalWritesError",
    "DataError",
    "ImageError",
    "IntegrityError",
    "JobError",
    "MissingPackageError",
    "ModelError",
    "NucleusError",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "OutputError",
    "RecipeError",
    "RequestError",
    "RunStoppedError",
    "StorageError",
    "StoreServerError",
    "TransientStorageError",
    "UnavailableError",
    "UncertainWriteError",
    "UnreachableError",
    "UriError",
    "UsageError",
    "WeightsError",
]


class NucleusError(Exception):
    """Base class of this project's exceptions; the message is written for the user."""

    exit_code = 1


class UsageError(NucleusError, ValueError):
    """A wrong argument or option."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe with an unknown key, a value of the wrong type or a value out of range."""


class UriError(UsageError):
    """A malformed URI, name or NAME@REF."""


class MissingPackageError(NucleusError, ImportError):
    """A package that only some commands need, and that is not installed."""


class StorageError(NucleusError, OSError):
    """A request to the bucket failed."""


class BucketNotFoundError(StorageError):
    """The bucket does not exist."""


class ObjectNotFoundError(StorageError, FileNotFoundError):
    """No object has this key."""


class ObjectExistsError(StorageError, FileExistsError):
    """A create-only write found an object, or a compare-and-swap found a different object than expected."""


class UncertainWriteError(StorageError):
    """The outcome of a compare-and-swap is unknown: its answer was lost, and another writer followed."""


class ConditionalWritesError(StorageError):
    """The server ignores the conditions of writes, so concurrent writers could overwrite each other."""


class AccessDeniedError(StorageError, PermissionError):
    """The credentials are missing, wrong or insufficient."""


class ClockError(StorageError):
    """The server refuses requests because this machine's clock differs too much from its own."""


class TransientStorageError(StorageError):
    """A failure that may be temporary; requests are repeated for a while before it is raised."""


class UnreachableError(TransientStorageError, ConnectionError):
    """The endpoint did not answer."""


class UnavailableError(TransientStorageError):
    """The endpoint is overloaded or restarting, or its answer broke off."""


class StoreServerError(StorageError):
    """The embedded S3 server did not start or stop."""


class CacheFullError(NucleusError):
    """The cache's limit is too low for the shards that are in use at the same time."""


class OutputError(NucleusError, OSError):
    """A file or folder that cannot be written or locked, or that another process is writing to."""


class IntegrityError(NucleusError, ValueError):
    """Stored bytes with another size or SHA-256 than their manifest states."""


class DataError(NucleusError, ValueError):
    """Unusable images, masks, folders or datasets."""


class ImageError(DataError):
    """One unusable image file."""


class WeightsError(NucleusError):
    """Encoder weights that are not available, or do not fit the encoder."""


class ModelError(NucleusError, ValueError):
    """A stored model that this version of the package cannot rebuild."""


class RequestError(NucleusError):
    """A request that the service refuses.

    Attributes:
        status: Status of the answer, as HTTP has them.
        retry_after: Seconds after which a client may try again; None if that would not help.
    """

    def __init__(self, message: str, status: int = 400, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class ClusterError(NucleusError):
    """A Ray cluster that does not answer, requires no token, refuses the token or runs another version of Ray."""


class JobError(NucleusError):
    """A training run that did not finish."""


class RunStoppedError(JobError):
    """A training run that a signal ended, after saving a checkpoint if it could.

    Attributes:
        signal: Number of the signal.
        exit_code: 128 + number of the signal, as in a shell: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal = int(number)
        self.exit_code = 128 + self.signal
