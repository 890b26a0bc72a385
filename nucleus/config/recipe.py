"""How many workers a run may have."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from nucleus.config.encoders import WITHOUT_IMAGENET, EncoderName
from nucleus.config.names import check_alias, check_name
from nucleus.errors import UriError
from nucleus.text import plural

__all__ = [
    "DEFAULT_CACHE_LIMIT_GIB",
    "AugmentOptions",
    "CardOptions",
    "GateOptions",
    "Heads",
    "InputOptions",
    "KindName",
    "LossOptions",
    "NetworkOptions",
    "NormalizationOptions",
    "OptimizerOptions",
    "Recipe",
    "TrackingOptions",
    "WorkerCount",
    "WorkerRange",
]


_LARGEST = 1024


class WorkerRange(NamedTuple):
    """From how many workers on a run goes on, and how many it takes at most; an elastic run has several counts.

    Attributes:
        fewest: Workers without which nothing goes on.
        most: Workers that are taken when the cluster has room.
    """

    fewest: int
    most: int

    @property
    def elastic(self) -> bool:
        """Whether the number may change while the run goes on."""
        return self.fewest < self.most

    @property
    def counts(self) -> range:
        """Every number that may occur."""
        return range(self.fewest, self.most + 1)

    def __str__(self) -> str:
        if self.elastic:
            return f"{self.fewest} to {self.most} workers"
        return plural(self.most, "worker")


def _read(value: Any) -> WorkerRange:
    ends = [value, value] if isinstance(value, int) else value
    right = (
        isinstance(ends, list | tuple)
        and len(ends) == 2
        and all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
        and 1 <= ends[0] <= ends[1] <= _LARGEST
    )
    if not right:
        raise ValueError(f"expected a number from 1 to {_LARGEST}, or [fewest, most]")
    return WorkerRange(*ends)


def _written(value: WorkerRange) -> int | list[int]:
    return list(value) if value.elastic else value.most


WorkerCount = Annotated[WorkerRange, PlainValidator(_read), PlainSerializer(_written)]
"""A recipe's `workers`: a number, or `[fewest, most]`."""


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
OneLine = Annotated[str, Field(pattern=r"^\S.*$", max_length=500)]
Heads = Literal["border", "distance", "both"]
KindName = Literal["dark-field", "bright-field", "stain"]

DEFAULT_CACHE_LIMIT_GIB = 50.0
"""Upper bound of the shards kept on a machine, GiB."""

STRIDE = 32
"""Crops and tiles are multiples of this: the encoder halves them five times."""


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class NetworkOptions(_Options):
    """The network.

    Attributes:
        encoder: Network whose features the U-Net decodes.
        weights: Where the encoder's weights come from: `imagenet`, a local path, an `s3://` URI, or `none`.
        freeze_encoder: Whether the encoder keeps its weights, up to `unfreeze_epoch` if that is given. Its BatchNorm is
            frozen in any case.
        unfreeze_epoch: The epoch, from 0, from which a frozen encoder is trained too; without it, never.
        encoder_learning_rate_factor: The encoder's learning rate as a multiple of the decoder's. Without it 0.1 for
            pretrained weights, which larger steps destroy, and 1 for random ones.
        decoder_channels: Channels of the decoder's levels, from 1/16 of the resolution to full resolution.
        heads: What the network predicts to tell touching nuclei apart: `border` (classes background, body, border),
            `distance` (nucleus, and the distance to its edge) or `both`.
    """

    encoder: EncoderName = "mobilenet_v2"
    weights: str = "imagenet"
    freeze_encoder: bool = True
    unfreeze_epoch: Annotated[int, Field(ge=1)] | None = None
    encoder_learning_rate_factor: Positive | None = None
    decoder_channels: Annotated[list[Annotated[int, Field(ge=8, multiple_of=8)]], Field(min_length=5, max_length=5)] = [
        128,
        96,
        64,
        32,
        16,
    ]
    heads: Heads = "both"

    @property
    def encoder_trained_from(self) -> int | None:
        """The epoch from which the encoder is trained, or None."""
        return self.unfreeze_epoch if self.freeze_encoder else 0

    @property
    def encoder_rate_factor(self) -> float:
        """The encoder's learning rate as a multiple of the decoder's."""
        return self.encoder_learning_rate_factor or (1.0 if self.weights == "none" else 0.1)


class NormalizationOptions(_Options):
    """How grey values are stretched, image by image, before the network sees them.

    Attributes:
        method: `percentile`, or `none` to keep them.
        low: This percentile of all channels together becomes 0.
        high: This percentile becomes 255.
        smallest_range: Grey values that the two are apart at least, so that an image without content stays dull.
    """

    method: Literal["percentile", "none"] = "percentile"
    low: Annotated[float, Field(ge=0, le=50)] = 1.0
    high: Annotated[float, Field(ge=50, le=100)] = 99.8
    smallest_range: Annotated[int, Field(ge=1, le=255)] = 16


class InputOptions(_Options):
    """What the network sees.

    Attributes:
        crop: Side of the square crops in training, pixels at native resolution; a multiple of 32.
        batch_size: Crops of one step, over all workers.
        tile: Side of the largest tile in validation and prediction, pixels; a multiple of 32.
        overlap: Pixels that neighbouring tiles share at least.
        normalization: How grey values are stretched.
        kind_weights: How often images of a kind (`dark-field`, `bright-field`, `stain`) are drawn, relative to others;
            1 where not given. Without any, an epoch has each image once; with them, as many crops as images.
        pixel_size: Side of a pixel of all the dataset's images, micrometres, if it is known and the same: the model
            then rescales images whose pixel size its user gives.
    """

    crop: Annotated[int, Field(ge=STRIDE, le=4096, multiple_of=STRIDE)] = 192
    batch_size: PositiveInt = 8
    tile: Annotated[int, Field(ge=2 * STRIDE, le=4096, multiple_of=STRIDE)] = 1024
    overlap: Annotated[int, Field(ge=0)] = 64
    normalization: NormalizationOptions = NormalizationOptions()
    kind_weights: dict[KindName, Positive] = {}
    pixel_size: Positive | None = None

    @model_validator(mode="after")
    def _overlap_is_below_half(self) -> "InputOptions":
        if self.overlap > self.tile // 2:
            raise ValueError(f"overlap must be at most half of tile ({self.tile // 2} px)")
        return self


class AugmentOptions(_Options):
    """Random changes to each crop; all follow from seed, epoch and the sample's place in the order.

    Attributes:
        scale: Sizes are multiplied by 2^u with u from -scale to scale.
        flips: Whether to turn by quarters and flip.
        invert: Fraction of crops whose grey values are inverted.
        grey: Fraction of crops that lose their colour.
        contrast: Contrast is multiplied by 1 - contrast to 1 + contrast.
        brightness: Added to all channels, as a fraction of the full range, from -brightness to brightness.
        gamma: All channels are raised to the power 2^u with u from -gamma to gamma.
        stain: Each channel by itself is raised to the power 2^u with u from -stain to stain: light that passes a stain
            of other strength (Beer-Lambert).
        blur: Fraction of crops that are blurred, as if out of focus.
        noise: Standard deviation of Gaussian noise, as a fraction of the full range, from 0 to noise.
    """

    scale: Annotated[float, Field(ge=0, le=2)] = 0.3
    flips: bool = True
    invert: Fraction = 0.1
    grey: Fraction = 0.3
    contrast: Fraction = 0.3
    brightness: Fraction = 0.1
    gamma: Annotated[float, Field(ge=0, le=2)] = 0.0
    stain: Annotated[float, Field(ge=0, le=2)] = 0.0
    blur: Fraction = 0.0
    noise: Fraction = 0.0


class LossOptions(_Options):
    """Cross entropy plus soft Dice plus the distance; see `nucleus.model.losses`.

    Attributes:
        border_weight: Weight of border pixels in the cross entropy; background and body have 1.
        dice: Weight of the soft Dice term.
        distance: Weight of the distance's term.
    """

    border_weight: Positive = 2.0
    dice: Annotated[float, Field(ge=0)] = 1.0
    distance: Annotated[float, Field(ge=0)] = 1.0


class OptimizerOptions(_Options):
    """AdamW with a linear warm-up and a cosine decay.

    Attributes:
        epochs: Passes over the training split.
        learning_rate: At the end of the warm-up.
        final_learning_rate: At the end of the last epoch.
        warmup_steps: Steps from rate 0 to `learning_rate`.
        weight_decay: Decoupled weight decay.
        patience: Validations without a better `monitor` after which training stops.
        validate_every: Epochs between validations; the last epoch is always validated. A checkpoint goes with each.
        monitor: The validation metric that chooses the best weights; larger is better.
        precision: `float32`, or `mixed_bfloat16` for GPUs.
        gradient_accumulation_steps: Parts in which each worker computes its share of a batch, one after the other: less
            memory, the same result.
        global_clipnorm: Upper bound of the norm of a step's gradient; without it, none.
        ema_momentum: Momentum of an exponential moving average of the weights, such as 0.99; with it the averaged
            weights are validated and published.
        steps_per_execution: Steps in one call of the compiled graph; progress and errors show after each call.
    """

    epochs: PositiveInt = 30
    learning_rate: Positive = 2e-3
    final_learning_rate: Positive = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    patience: PositiveInt = 10
    validate_every: PositiveInt = 1
    monitor: Literal["val_map", "val_iou", "val_dice", "val_accuracy"] = "val_map"
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    gradient_accumulation_steps: PositiveInt = 1
    global_clipnorm: Positive | None = None
    ema_momentum: Annotated[float, Field(gt=0, lt=1)] | None = None
    steps_per_execution: PositiveInt = 8


class GateOptions(_Options):
    """When a published version becomes the one that an alias means.

    Attributes:
        enabled: Whether the alias may move at all.
        alias: It moves only to a version that beats the one it means, on the same test split.
        metric: By which; mean over images, larger is better.
    """

    enabled: bool = True
    alias: str = "production"
    metric: Literal["map", "ap_50", "ap_70", "ap_90", "f1_50", "pq_50", "iou", "dice", "accuracy"] = "map"


class TrackingOptions(_Options):
    """Weights & Biases, where the variable WANDB_MODE goes before `wandb`, and TensorBoard.

    Attributes:
        wandb: `online`, `offline` (needs no account; `wandb sync` sends it later) or `disabled`.
        project: The project's name there.
        entity: User or team; without it the account's default.
        profile_steps: Steps that TensorFlow's profiler records for TensorBoard on the first worker, from the eleventh
            of the first epoch on and within that epoch; 0 for none. Rounded up to `optimizer.steps_per_execution`.
    """

    wandb: Literal["online", "offline", "disabled"] = "offline"
    project: str = "nucleus"
    entity: str | None = None
    profile_steps: Annotated[int, Field(ge=0, le=1000)] = 0


class CardOptions(_Options):
    """What the model card says that only a person knows, one line each; of what is missing the card says so.

    Attributes:
        license: Licence of the published weights, such as `Apache-2.0`.
        data_license: Licence of the images and their labels, such as `CC0-1.0`.
        data_source: Whence they are, and how to cite them.
        data_import: Name, without its ending, of the zip or folder that `data_license` and `data_source` are about: of
            a dataset that was imported from another the card does not repeat them. Without it they are about any.
        contact: Whom to ask about the model.
    """

    license: OneLine | None = None
    data_license: OneLine | None = None
    data_source: OneLine | None = None
    data_import: OneLine | None = None
    contact: OneLine | None = None


class Recipe(_Options):
    """One training run.

    Attributes:
        model: The name under which the model is published.
        dataset: `NAME[@VERSION]` in the bucket, or `s3://bucket/prefix/NAME[@VERSION]`.
        bucket: `s3://bucket[/prefix]` for runs, weights and models; without it NUCLEUS_BUCKET.
        workers: Processes that train, each with its part of every batch; `[fewest, most]` takes as many as the cluster
            has room for, and goes on with fewer when machines are lost and with more when they come.
        cpus_per_worker: CPU cores and TensorFlow threads of one worker.
        gpus_per_worker: GPUs of one worker: 0 or 1.
        max_failures: How often a run whose worker died is started again from its last checkpoint.
        stall_timeout: Seconds after which a worker that does not answer counts as dead.
        resize_interval: Where `workers` is a range: seconds between looks for room for more, and between checkpoints.
        seed: Decides initial weights, order and augmentation.
        cache_dir: Absolute folder for shards on each worker's machine; without it the user's cache folder.
        cache_limit_gib: Upper bound of the shards kept there, GiB; the least recently used go first.
    """

    model: str
    dataset: str
    bucket: str | None = None
    workers: WorkerCount = WorkerRange(1, 1)
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    max_failures: Annotated[int, Field(ge=0)] = 1
    stall_timeout: Positive = 300.0
    resize_interval: Positive = 60.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    cache_dir: str | None = None
    cache_limit_gib: Positive = DEFAULT_CACHE_LIMIT_GIB
    network: NetworkOptions = NetworkOptions()
    input: InputOptions = InputOptions()
    augment: AugmentOptions = AugmentOptions()
    loss: LossOptions = LossOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    gate: GateOptions = GateOptions()
    tracking: TrackingOptions = TrackingOptions()
    card: CardOptions = CardOptions()

    def with_random_encoder(self) -> "Recipe":
        """The recipe with an encoder that begins at random, and so is trained from the start."""
        begin = {"weights": "none", "freeze_encoder": False, "unfreeze_epoch": None}
        return self.model_copy(update={"network": self.network.model_copy(update=begin)})

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        try:
            check_name(self.model, "model")
            check_alias(self.gate.alias)
        except UriError as error:
            raise ValueError(str(error)) from error
        self._batch_is_divided()
        if self.network.unfreeze_epoch is not None and not self.network.freeze_encoder:
            raise ValueError("network.unfreeze_epoch needs network.freeze_encoder = true: it ends the freezing")
        if self.network.encoder in WITHOUT_IMAGENET and self.network.weights == "imagenet":
            raise ValueError(
                f"network.weights must not be 'imagenet' for the encoder {self.network.encoder!r}, which has no such "
                "weights: set it to 'none', and network.freeze_encoder to false"
            )
        if self.network.weights == "none" and self.network.freeze_encoder:
            raise ValueError("network.freeze_encoder must be false where network.weights is 'none': random features")
        if self.cache_dir is not None and not Path(self.cache_dir).is_absolute():
            raise ValueError(f"cache_dir must be an absolute path, found {self.cache_dir!r}")
        return self

    def _batch_is_divided(self) -> None:
        """Every worker has as many crops as the others, however many workers there are."""
        steps = self.optimizer.gradient_accumulation_steps
        for count in self.workers.counts:
            if self.input.batch_size % count:
                every = f"every number of workers from {self.workers.fewest} to {self.workers.most}"
                raise ValueError(
                    f"input.batch_size ({self.input.batch_size}) must be a multiple of "
                    f"{every if self.workers.elastic else f'workers ({count})'}: it is the batch over all workers. "
                    + (f"It divides for up to {count - 1}" if count > self.workers.fewest else "Set either anew")
                )
            if self.batch_per_worker(count) % steps:
                raise ValueError(
                    f"input.batch_size / workers ({self.batch_per_worker(count)}) must be a multiple of "
                    f"optimizer.gradient_accumulation_steps ({steps})"
                )

    def batch_per_worker(self, workers: int) -> int:
        """Crops of one step on each of so many workers."""
        return self.input.batch_size // workers
