"""How to run, as opposed to what."""

from dataclasses import dataclass
from pathlib import Path

from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import bucket_from_environment

__all__ = ["RunOptions"]


@dataclass(frozen=True)
class RunOptions:
    """Options of a run.

    Attributes:
        run: Name of a new run; None makes one up.
        weights_optional: Whether to go on with a random encoder when no weights can be had. Only the demo may.
        own_cluster: Whether to start a Ray cluster on this machine even if another is at hand.
        verbose: Whether to show the logs of Ray and the workers.
        folder: Where people find a run's report and TensorBoard's events on this machine, in `<run>/`; None is `runs`.
        single_writer: Whether nobody else publishes meanwhile, so that the server may ignore conditional writes.
    """

    run: str | None = None
    weights_optional: bool = False
    own_cluster: bool = False
    verbose: bool = False
    folder: Path | None = None
    single_writer: bool = False

    @property
    def local_folder(self) -> Path:
        """The folder, absolute: workers are in other ones."""
        return (self.folder or Path("runs")).absolute()

    def bucket(self, uri: str | None) -> Bucket:
        """The bucket `uri`, or else the environment's."""
        return Bucket(bucket_from_environment(uri), single_writer=self.single_writer)
