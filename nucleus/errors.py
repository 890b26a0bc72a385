"""Every error that this project raises on purpose, in one tree.

    NucleusError                         the command line prints its message and exits 1
    ├── UsageError (ValueError)          a wrong argument or recipe; exits 2
    │   ├── RecipeError                  a key, type or value in a recipe
    │   └── UriError                     a malformed URI, name or NAME@REF
    ├── StorageError (OSError)           the bucket could not do what was asked
    │   ├── BucketNotFoundError
    │   ├── ObjectNotFoundError          also a FileNotFoundError
    │   ├── ObjectExistsError            a create-only or compare-and-swap write lost; also a FileExistsError
    │   ├── UncertainWriteError          nobody can tell whether a compare-and-swap was done
    │   ├── ConditionalWritesError       the server ignores conditions, and others may write too
    │   ├── AccessDeniedError            wrong, missing or insufficient credentials; also a PermissionError
    │   ├── ClockError                   this machine's clock and the server's are too far apart
    │   ├── TransientStorageError        may work a moment later, so it was tried again for a while
    │   │   ├── UnreachableError         no answer from the endpoint; also a ConnectionError
    │   │   └── UnavailableError         the endpoint answered that it cannot now, or broke off
    │   └── StoreServerError             the embedded S3 server would not start or stop
    ├── CacheFullError                   the cache's limit is too low for what is in use at once
    ├── IntegrityError (ValueError)      bytes that do not have the sum that the manifest gives
    ├── DataError (ValueError)           images, masks, folders or datasets that cannot be used
    │   └── ImageError                   one image file
    ├── WeightsError                     encoder weights that cannot be had or do not fit
    ├── ModelError (ValueError)          a stored model that this version cannot rebuild
    ├── ClusterError                     a Ray cluster that cannot or must not be used
    └── JobError                         a training run that did not finish
        └── RunStoppedError              it was asked to (SIGTERM), and can go on; exits 143

Messages give what was expected, what was found, and the command that fixes it. Each error is made from one
string, so that it survives pickling on its way from a Ray worker.
"""

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
    "ModelError",
    "NucleusError",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "RecipeError",
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
    """What this project raises on purpose; its text is meant for the person at the keyboard."""

    exit_code = 1


class UsageError(NucleusError, ValueError):
    """The command was given something that it cannot accept."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has an unknown key, a wrong type or a value out of range."""


class UriError(UsageError):
    """A URI, name or NAME@REF is malformed."""


class StorageError(NucleusError, OSError):
    """The bucket could not do what was asked."""


class BucketNotFoundError(StorageError):
    """The bucket does not exist."""


class ObjectNotFoundError(StorageError, FileNotFoundError):
    """Nothing is stored under the key."""


class ObjectExistsError(StorageError, FileExistsError):
    """A create-only write found an object, or a compare-and-swap found another one than expected."""


class UncertainWriteError(StorageError):
    """Nobody can tell whether a compare-and-swap was done: its answer was lost, and another writer came."""


class ConditionalWritesError(StorageError):
    """The server ignores the conditions of writes, so several writers cannot be kept apart."""


class AccessDeniedError(StorageError, PermissionError):
    """The credentials are missing, wrong or not allowed to do this."""


class ClockError(StorageError):
    """The server refuses requests, as this machine's clock is too far from its own."""


class TransientStorageError(StorageError):
    """What may work a moment later."""


class UnreachableError(TransientStorageError, ConnectionError):
    """The endpoint did not answer."""


class UnavailableError(TransientStorageError):
    """The endpoint answered that it cannot now, or broke off in the middle of its answer."""


class StoreServerError(StorageError):
    """The embedded S3 server would not start or stop."""


class CacheFullError(NucleusError):
    """The cache's limit is too low for what is in use at once."""


class IntegrityError(NucleusError, ValueError):
    """Stored bytes do not have the size or SHA-256 that their manifest gives."""


class DataError(NucleusError, ValueError):
    """Images, masks, folders or datasets that cannot be used."""


class ImageError(DataError):
    """One image file that cannot be used."""


class WeightsError(NucleusError):
    """Encoder weights that cannot be had, or do not fit the encoder."""


class ModelError(NucleusError, ValueError):
    """A stored model that this version of the package cannot rebuild."""


class ClusterError(NucleusError):
    """A Ray cluster that does not answer, takes jobs from anybody, refuses the token or runs another Ray."""


class JobError(NucleusError):
    """A training run that did not finish."""


class RunStoppedError(JobError):
    """A training run that saved a checkpoint and ended because it was asked to."""

    exit_code = 143  # 128 + SIGTERM, as a shell says it
