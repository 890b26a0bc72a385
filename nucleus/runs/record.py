"""The record of a run, `runs/<run>/report/record.json`: the content of its report as one document; its download."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from nucleus.config.names import Kind
from nucleus.errors import IntegrityError, JobError, UsageError
from nucleus.metrics.scores import count_from_one
from nucleus.progress import Advance, no_progress
from nucleus.registry.manifest import EncoderWeightsOrigin, MixOrigin, StartOrigin, tracked_text
from nucleus.runs.plan import WANDB_FOLDER, RunFolder
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import read_document

__all__ = [
    "ATTEMPTS_FILE",
    "EPOCH_PICTURE",
    "FACTS_FILE",
    "HISTORY_FILE",
    "PICTURES",
    "RECORD_FILE",
    "RECORD_FORMAT",
    "REPORT_FOLDER",
    "REPORT_PAGE",
    "Attempt",
    "ExampleImage",
    "Facts",
    "NetworkFacts",
    "RunRecord",
    "Stage",
    "TestImage",
    "WatchedImage",
    "attempts_json",
    "download_report",
    "epochs_of_picture",
    "names_below",
    "read_attempts",
    "read_facts",
    "read_history",
    "read_record",
]


RECORD_FORMAT = 2
"""In format 1, written before 0.3.0, epochs count from 0. They are read as if they had been counted from 1."""
HISTORY_FILE = "history.json"
"""File in a run's folder: the metrics of each finished epoch, as a list; written with every checkpoint."""
ATTEMPTS_FILE = "attempts.json"
"""File in a run's folder: its `Attempt`s, written at the first step of each."""
REPORT_FOLDER = "report"
"""Folder in a run's folder: the report and its data."""
REPORT_PAGE = "report.html"
RECORD_FILE = "record.json"
FACTS_FILE = "facts.json"
"""File in the report's folder with `Facts`, and in the folder of each test image's pictures with a `TestImage`."""
PICTURES = "pictures"
"""Folder in the report's folder: PNG pictures that the workers drew during training."""
EPOCH_PICTURE = "epoch-"
"""Prefix of the file names of a watched image's pictures; the number of finished epochs follows, in five digits."""

_AT_ONCE = 8
"""Files that are downloaded in parallel."""

Count = Annotated[int, Field(ge=0)]
_HISTORY = TypeAdapter(list[dict[str, float]])


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Stage(_Frozen):
    """A part of the run, and its duration in seconds."""

    name: str
    seconds: Annotated[float, Field(ge=0)]


class _CountsEpochs(_Frozen):
    """A document with the number of an epoch."""

    format: int = RECORD_FORMAT
    best_epoch: int

    @model_validator(mode="before")
    @classmethod
    def _count_from_one(cls, stored: Any) -> Any:
        if not isinstance(stored, dict) or stored.get("format") != 1:
            return stored
        try:
            history = {"history": count_from_one(stored["history"])} if "history" in stored else {}
            return {**stored, **history, "best_epoch": stored["best_epoch"] + 1, "format": RECORD_FORMAT}
        except (AttributeError, KeyError, TypeError):  # damaged, as the check of the fields says
            return stored


class NetworkFacts(_Frozen):
    """Size and structure of a network.

    Attributes:
        encoder: Name of the encoder.
        parameters: Number of parameters of encoder and decoder.
        encoder_parameters: Number of parameters of the encoder.
        trained_parameters: Number of parameters that were trained at the end.
        skips: Channels that the encoder passes to the decoder, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution.
        decoder: Channels of the decoder's levels, at 1/16, 1/8, 1/4, 1/2 and the whole resolution.
        outputs: Names of the output channels.
    """

    encoder: str
    parameters: Count
    encoder_parameters: Count
    trained_parameters: Count
    skips: list[int]
    decoder: list[int]
    outputs: list[str]


class Facts(_CountsEpochs):
    """Facts about a finished run that only its workers know. `RunRecord` describes the other fields.

    Attributes:
        format: Format of this document.
        seconds: Seconds that one worker spent on each part of the run outside the epochs, which are in the history.
    """

    network: NetworkFacts
    thresholds: dict[str, float]
    nucleus_diameter: float | None
    workers: Annotated[int, Field(ge=1)]
    device: str
    seconds: dict[str, float]
    versions: dict[str, str]


class Attempt(_Frozen):
    """A start of a run's workers: the first one, or after they were lost, resized or stopped.

    Attributes:
        driver: Machine, process id and start of the driver.
        epochs_done: Number of finished epochs at its first step.
        lost: Seconds from the last checkpoint of the attempts before (or their first step) to its own first step; 0 for
            the first attempt.
    """

    driver: str
    epochs_done: Count
    lost: Annotated[float, Field(ge=0)] = 0.0


class ExampleImage(_Frozen):
    """A training image, before and after augmentation.

    Its pictures in `pictures/examples/<name>/`: `image`, `labels` (outlined on the image), and a crop after
    augmentation, `augmented` and `augmented-labels`.
    """

    name: str
    kind: Kind


class WatchedImage(_Frozen):
    """A validation image that was predicted at several times, to show how the network learns.

    Its pictures in `pictures/watched/<name>/`: `image`, `truth` (outlined on the image), the predictions
    `epoch-00000` (before training), `epoch-00001` and so on, and `best`, with the best weights and tuned thresholds.

    Attributes:
        name: Name in the dataset.
        kind: Kind of image.
        epochs: Numbers of finished epochs at which it was predicted; 0 is before training.
    """

    name: str
    kind: Kind
    epochs: list[int]


class TestImage(_Frozen):
    """One of the best or worst test images. Its pictures in `pictures/test/<name>/`: `image`, `truth`, `mistakes`.

    Attributes:
        name: Name in the dataset.
        kind: Kind of image.
        group: `best` or `worst`.
        scores: Scores of this image by name: `map`, `ap_50`, `iou`, `dice` and others.
        nuclei: Number of true nuclei.
        predicted: Number of predicted nuclei.
        missed: True nuclei that no prediction matches at IoU 0.5; see `nucleus.metrics.nuclei`.
        extra: Predicted nuclei that match no true nucleus.
        merged: True nuclei that share one predicted nucleus.
        split: True nuclei that were divided into two or more predicted nuclei.
    """

    __test__ = False  # pytest would collect it as a test

    name: str
    kind: Kind
    group: Literal["best", "worst"]
    scores: dict[str, float]
    nuclei: Count
    predicted: Count
    missed: Count
    extra: Count
    merged: Count
    split: Count


_ATTEMPTS = TypeAdapter(list[Attempt])


class RunRecord(_CountsEpochs):
    """Everything about a finished run.

    Attributes:
        format: Format of this document.
        run: Name of the run.
        group: Group of the run, such as a sweep.
        bucket: `s3://bucket[/prefix]`.
        model: Name of the model.
        version: Number of the published version; None for a trial that was not published.
        gate: Whether the recipe's alias moved, and why; None if the gate was not asked.
        begun: Start of the run, UTC, ISO 8601.
        ended: End of the run, UTC, ISO 8601.
        recipe: The whole recipe.
        dataset: `s3://.../NAME@VERSION`.
        encoder_weights: Origin of the encoder's initial weights.
        start: Version that training started with, with its test scores; None without one.
        mix: Datasets that were mixed in, with the scores on their test splits.
        metrics: Scores of the best weights: split, then `all` or kind of image, then metric.
        history: Metrics of each epoch; `epoch` counts from 1.
        best_epoch: Epoch, counted from 1, with the best weights.
        network: Size and structure of the network.
        thresholds: Thresholds for turning maps into labels; see `nucleus.model.architecture.InstanceSettings`.
        nucleus_diameter: Median diameter of the validation split's nuclei, px.
        workers: Number of workers at the end.
        device: Device of each worker, such as a GPU's name or `4 CPU cores`.
        stages: Parts of the run, in order.
        worker_seconds: Seconds, summed over workers, of the epochs in the history and of the stages after them. What
            was computed and lost is not counted.
        cpus_per_worker: CPU cores of one worker.
        gpus_per_worker: GPUs of one worker.
        versions: Versions of Python and packages.
        code_version: Version of this package.
        commit: Commit of the code, with `-dirty` if files were changed; None if the code did not come from a clone.
        wandb_run: W&B's path `[entity/]project/id`; None if tracking was disabled.
        wandb_mode: How the run was tracked in the end: `online`, `offline` (also if W&B failed during the run) or
            `disabled`; None if an older version of this package wrote the record.
        examples: Training images with pictures.
        watched: Validation images that were predicted at several times.
        test_images: Best images of the test split, best first, then the worst ones, worst first.
        attempts: Starts of the workers; more than one if some were lost, or the run was resumed. Empty if an older
            version of this package trained it.
        endpoint: URL of the S3 server; None for AWS, or if an older version of this package wrote the record.
        repository: Address of the git repository of the code, without credentials; None if it is not known.
    """

    run: str
    group: str | None
    bucket: str
    model: str
    version: Annotated[int, Field(ge=1)] | None
    gate: str | None
    begun: str
    ended: str
    recipe: dict[str, Any]
    dataset: str
    encoder_weights: EncoderWeightsOrigin
    metrics: dict[str, dict[str, dict[str, float | None]]]
    history: list[dict[str, float]]
    network: NetworkFacts
    thresholds: dict[str, float]
    nucleus_diameter: float | None
    workers: int
    device: str
    stages: list[Stage]
    worker_seconds: float
    cpus_per_worker: int
    gpus_per_worker: int
    versions: dict[str, str]
    code_version: str
    commit: str | None
    wandb_run: str | None
    wandb_mode: str | None = None
    examples: list[ExampleImage]
    watched: list[WatchedImage]
    test_images: list[TestImage]
    attempts: list[Attempt] = []
    endpoint: str | None = None
    repository: str | None = None
    start: StartOrigin | None = None
    mix: list[MixOrigin] = []

    @property
    def restarts(self) -> list[tuple[Attempt, bool]]:
        """The attempts after the first, each with whether it has the same driver as the one before it."""
        return [(later, later.driver == before.driver) for before, later in pairwise(self.attempts)]

    @property
    def tracked(self) -> str | None:
        """The path of the W&B run, and whether it was offline; None if tracking was disabled."""
        return tracked_text(self.wandb_run, self.wandb_mode)

    @property
    def gpu_seconds(self) -> float:
        """GPU seconds that the run held."""
        return self.worker_seconds * self.gpus_per_worker

    @property
    def cpu_seconds(self) -> float:
        """CPU core seconds that the run held."""
        return self.worker_seconds * self.cpus_per_worker


def read_record(data: bytes, where: str) -> RunRecord:
    """Parse and validate a record. Raises `JobError` if it is damaged or newer than this package."""
    return read_document(RunRecord, data, what="a run's record", where=where, newest=RECORD_FORMAT, error=JobError)


def read_facts(data: bytes, where: str) -> Facts:
    """Parse and validate the workers' facts. Raises `JobError` if it is damaged or newer than this package."""
    return read_document(Facts, data, what="a run's facts", where=where, newest=RECORD_FORMAT, error=JobError)


def read_history(data: bytes, where: str) -> list[dict[str, float]]:
    """Parse and validate the metrics of a run's epochs, which count from 1. Raises `JobError` if they are damaged."""
    try:
        return count_from_one(_HISTORY.validate_json(data))
    except ValidationError as error:
        raise JobError(f"Expected a run's history at {where}; it is damaged: {error}") from error


def read_attempts(data: bytes, where: str) -> list[Attempt]:
    """Parse and validate the attempts of a run. Raises `JobError` if they are damaged."""
    try:
        return _ATTEMPTS.validate_json(data)
    except ValidationError as error:
        raise JobError(f"Expected a run's attempts at {where}; they are damaged: {error}") from error


def attempts_json(attempts: list[Attempt]) -> bytes:
    """Return the document that `read_attempts` reads."""
    return _ATTEMPTS.dump_json(attempts, indent=1)


def epochs_of_picture(name: str) -> int | None:
    """Return the number of finished epochs from the file name of a watched image's picture; None for another name."""
    digits = name.removeprefix(EPOCH_PICTURE).removesuffix(".png")
    return int(digits) if name.startswith(EPOCH_PICTURE) and digits.isdecimal() else None


def download_report(bucket: Bucket, run: str, folder: Path, advance: Advance = no_progress) -> list[Path]:
    """Download a run's report into a folder, each file atomically; return the paths of the files.

    W&B's files that were kept offline go to `wandb/` in the folder, ready for `wandb sync`. Files of an earlier
    download are replaced.

    Args:
        bucket: The project's bucket.
        run: Name of the run.
        folder: A folder that does not exist, is empty, or holds only files of this report.
        advance: Called with the number of files downloaded, and their total number.

    Raises:
        JobError: The run has no report.
        UsageError: The folder holds other files; nothing is changed.
        IntegrityError: An object's key would be a file outside the folder.
    """
    home = RunFolder(bucket, run)
    report = f"{home.key(REPORT_FOLDER)}/"
    names = names_below(bucket, report)
    if not names:
        raise JobError(
            f"Expected a report at {bucket.uri / report}; found none: a run writes it at its end. "
            f"Run: nucleus runs show {run}"
        )
    offline = f"{home.key(WANDB_FOLDER)}/"
    keys = {folder / name: report + name for name in names}
    keys |= {folder / WANDB_FOLDER / name: offline + name for name in names_below(bucket, offline)}
    _check_replaceable(folder, keys, run)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        downloads = pool.map(lambda path: bucket.download(keys[path], path), keys)
        for done, _ in enumerate(downloads, start=1):
            advance(done, len(keys))
    return list(keys)


def names_below(bucket: Bucket, prefix: str) -> list[str]:
    """Return the keys below a prefix, relative to it, and safe as relative paths of files on disk.

    Raises:
        IntegrityError: A key would be a file outside the folder.
    """
    return [_checked(bucket, prefix, item.key.removeprefix(prefix)) for item in bucket.objects(prefix)]


def _checked(bucket: Bucket, prefix: str, name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name:
        raise IntegrityError(f"Expected the files of a report below {bucket.uri / prefix}; found the key {name!r}.")
    return name


def _check_replaceable(folder: Path, paths: Iterable[Path], run: str) -> None:
    if not folder.exists():
        return
    expected = set(paths)
    if not folder.is_dir() or any(not path.is_dir() and path not in expected for path in folder.rglob("*")):
        raise UsageError(
            f"Expected {folder} to be new, empty or a copy of the report of {run}; it holds other files. "
            "Choose another folder."
        )
