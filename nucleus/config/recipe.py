"""Recipes: the options of a training run, their meaning, units, ranges and defaults."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nucleus.config.encoders import WITHOUT_IMAGENET, EncoderName
from nucleus.config.names import WorkerCount, WorkerRange, check_alias, check_name
from nucleus.errors import UriError

__all__ = [
    "DEFAULT_CACHE_LIMIT_GIB",
    "AugmentOptions",
    "CardOptions",
    "Decoder",
    "GateOptions",
    "Heads",
    "InputOptions",
    "KindName",
    "LossOptions",
    "NetworkOptions",
    "NormalizationOptions",
    "OptimizerOptions",
    "Precision",
    "Recipe",
    "TrackingOptions",
]

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
OneLine = Annotated[str, Field(pattern=r"^\S.*$", max_length=500)]
Heads = Literal["border", "distance", "both"]
Decoder = Literal["concat", "sum"]
KindName = Literal["dark-field", "bright-field", "stain"]
Precision = Literal["float32", "tensor_float32", "mixed_bfloat16"]

DEFAULT_CACHE_LIMIT_GIB = 50.0
"""Size limit of the shard cache on a machine, GiB."""

STRIDE = 32
"""Sides of crops and tiles are multiples of this: the encoder halves the resolution five times."""


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class NetworkOptions(_Options):
    """The network: a U-Net whose encoder can be pretrained.

    Attributes:
        start: Version of a model whose weights training starts with, all of them: `NAME[@REF]` in the bucket,
            `s3://bucket/models/NAME[@REF]` or a pulled folder. The network is then that of the version, which other
            values of `encoder`, `decoder`, `decoder_channels` and `heads` contradict, and `weights` is not used. If not
            set, `input.normalization` and `input.pixel_size` are those of the version too; the defaults in `optimizer`
            are then `learning_rate` 1e-3, `final_learning_rate` 1e-5 and `ema_momentum` 0.97.
        encoder: Backbone of the U-Net.
        weights: Initial weights of the encoder: `imagenet`, a local path, an `s3://` URI, or `none` (random).
        freeze_encoder: Whether the encoder keeps its initial weights, until `unfreeze_epoch` if that is set. Its
            BatchNorm layers are always frozen.
        unfreeze_epoch: Number of epochs after which a frozen encoder starts to train; if not set, it never does.
        encoder_learning_rate_factor: Learning rate of the encoder, as a multiple of the decoder's. If not set: 0.1 for
            pretrained weights, which larger steps would destroy, and 1 for random weights.
        decoder_channels: Channels of the five decoder levels, from 1/16 resolution to full resolution.
        decoder: How a decoder level joins the level below and the encoder's features: `concat` (concatenates all their
            channels, as in the first U-Net), or `sum` (maps both to the level's channels and adds them, as in feature
            pyramids; about two thirds of the time of a training step and of a prediction).
        heads: Outputs that separate touching nuclei: `border` (classes background, body, border), `distance`
            (foreground, and distance to the nucleus's edge) or `both`.
    """

    start: OneLine | None = None
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
    decoder: Decoder = "concat"
    heads: Heads = "both"

    @property
    def encoder_trained_from(self) -> int | None:
        """The epoch at which the encoder starts to train, or None."""
        return self.unfreeze_epoch if self.freeze_encoder else 0

    @property
    def encoder_rate_factor(self) -> float:
        """The encoder's learning rate, as a multiple of the decoder's."""
        random = self.weights == "none" and self.start is None
        return self.encoder_learning_rate_factor or (1.0 if random else 0.1)


class NormalizationOptions(_Options):
    """Intensity normalization, applied to each image before the network.

    Attributes:
        method: `robust` and `percentile` stretch the intensities linearly, `none` leaves them as they are. `robust`
            tells nuclei from noise, hot pixels and debris (see `nucleus.data.normalization`); `percentile` takes the
            two percentiles as they are, as versions before 0.3.0 did.
        low: The percentile, over all channels together, that is mapped to 0.
        high: The percentile, over all channels together, that is mapped to 255.
        smallest_range: Minimum difference between the two, in grey values of 8 bits.
        noise: Minimum difference between the two, in standard deviations of the noise (`robust` only), so that noise
            in an empty image is not amplified.
    """

    method: Literal["robust", "percentile", "none"] = "robust"
    low: Annotated[float, Field(ge=0, le=50)] = 1.0
    high: Annotated[float, Field(ge=50, le=100)] = 99.8
    smallest_range: Annotated[int, Field(ge=1, le=255)] = 16
    noise: Annotated[float, Field(ge=0)] = 32.0


class InputOptions(_Options):
    """The input of the network, in training and in prediction.

    Attributes:
        crop: Side of the square training crops, in pixels of the original image.
        batch_size: Crops per training step, summed over all workers.
        tile: Largest side of the tiles in validation and prediction, in pixels.
        overlap: Minimum overlap of neighbouring tiles, in pixels; at most half of `tile`.
        normalization: Intensity normalization.
        kind_weights: How often images of a kind (`dark-field`, `bright-field`, `stain`) are drawn, relative to kinds
            that are not listed. Without weights an epoch contains every image once; with weights it draws the same
            number of crops at random.
        pixel_size: Pixel size of the dataset's images in micrometres, if all have the same. The model then rescales
            an image whose pixel size is given at prediction.
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
    """Random augmentation of each crop, determined by the seed, the epoch and the sample's position in the epoch.

    Attributes:
        scale: Crops are rescaled by a factor 2^u, u uniform in [-scale, scale].
        flips: Whether crops are flipped and rotated by multiples of 90 degrees.
        invert: Fraction of crops whose intensities are inverted.
        grey: Fraction of crops that are converted to grey.
        contrast: The contrast is multiplied by a factor uniform in [1 - contrast, 1 + contrast].
        brightness: An offset uniform in [-brightness, brightness], as a fraction of the full intensity range, is added
            to all channels.
        gamma: All channels are raised to one power 2^u, u uniform in [-gamma, gamma].
        stain: Each channel is raised to its own power 2^u, u uniform in [-stain, stain]: transmitted light with a
            weaker or stronger stain (Beer-Lambert law).
        hed: Strength of the change of stains in coloured crops. The optical densities of haematoxylin, eosin and
            diaminobenzidine (Ruifrok & Johnston 2001) are each multiplied by a factor uniform in [1 - hed, 1 + hed] and
            shifted by up to 0.2 * hed (Tellez et al. 2018, https://doi.org/10.1109/TMI.2018.2820199).
        shading: Strength of uneven illumination and background: the crop is multiplied by a smooth field between
            1 - a and 1 + a, and another one of up to a / 2 of the full intensity range is added; a is uniform in
            [0, shading].
        blur: Fraction of crops that are blurred, as if out of focus.
        blur_sigma: Blur with a Gaussian of standard deviation uniform in [0.5, blur_sigma], px.
        noise: Gaussian noise is added with a standard deviation uniform in [0, noise], as a fraction of the full
            intensity range.
    """

    scale: Annotated[float, Field(ge=0, le=2)] = 0.3
    flips: bool = True
    invert: Fraction = 0.1
    grey: Fraction = 0.3
    contrast: Fraction = 0.3
    brightness: Fraction = 0.1
    gamma: Annotated[float, Field(ge=0, le=2)] = 0.0
    stain: Annotated[float, Field(ge=0, le=2)] = 0.0
    hed: Fraction = 0.0
    shading: Fraction = 0.0
    blur: Fraction = 0.0
    blur_sigma: Annotated[float, Field(ge=0.5, le=3)] = 1.0
    noise: Fraction = 0.0


class LossOptions(_Options):
    """The loss: cross entropy, soft Dice and, with a distance head, the distance error; see `nucleus.model.losses`.

    Attributes:
        border_weight: Weight of border pixels in the cross entropy; background and body have weight 1.
        dice: Weight of the soft Dice term.
        distance: Weight of the distance term.
    """

    border_weight: Positive = 2.0
    dice: Annotated[float, Field(ge=0)] = 1.0
    distance: Annotated[float, Field(ge=0)] = 1.0


class OptimizerOptions(_Options):
    """Optimization: AdamW with a linear warm-up and a cosine decay of the learning rate.

    Attributes:
        epochs: Number of epochs: passes over the training split of `dataset`, unless `steps_per_epoch` is set.
        steps_per_epoch: Training steps in an epoch. Set it for a few images, of which each then is read several times
            in an epoch; if not set, an epoch reads each image once, with what `mix` adds.
        learning_rate: Learning rate at the end of the warm-up, the highest of the run.
        final_learning_rate: Learning rate at the end of the last epoch.
        learning_rate_batch: The `input.batch_size` that both learning rates are meant for. If set, another batch
            multiplies them by its ratio to this one (the linear rule of Goyal et al. 2017,
            https://arxiv.org/abs/1706.02677); if not set, they are used as they are.
        warmup_steps: Number of steps in which the learning rate rises from 0 to `learning_rate`.
        weight_decay: Decoupled weight decay.
        patience: Number of validations without an improvement of `monitor` after which training stops early.
        validate_every: Epochs between validations; the last epoch is always validated. Each validation writes a
            checkpoint.
        monitor: Validation metric that selects the best weights; higher is better.
        precision: `float32`; `tensor_float32`, in which NVIDIA GPUs since Ampere round the factors of products to 10
            bits, and which is `float32` on all other devices; or `mixed_bfloat16`, which keeps the weights in float32
            and computes in bfloat16, in half the memory.
        jit_compile: Whether XLA compiles the network with its gradients: fewer passes over memory, and a first step
            that takes longer. `make gpu-check` measures both.
        gradient_accumulation_steps: Number of parts in which each worker computes its share of a batch, one after the
            other. More parts need less memory; the result is the same.
        global_clipnorm: Maximum global norm of a step's gradient; if not set, gradients are not clipped.
        ema_momentum: Momentum of an exponential moving average of the weights, such as 0.99. If set, the averaged
            weights are validated and published.
        steps_per_execution: Training steps per call of the compiled graph; progress and errors appear after each call.
    """

    epochs: PositiveInt = 30
    steps_per_epoch: PositiveInt | None = None
    learning_rate: Positive = 2e-3
    final_learning_rate: Positive = 1e-4
    learning_rate_batch: PositiveInt | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    patience: PositiveInt = 10
    validate_every: PositiveInt = 1
    monitor: Literal["val_map", "val_iou", "val_dice", "val_accuracy"] = "val_map"
    precision: Precision = "float32"
    jit_compile: bool = False
    gradient_accumulation_steps: PositiveInt = 1
    global_clipnorm: Positive | None = None
    ema_momentum: Annotated[float, Field(gt=0, lt=1)] | None = None
    steps_per_execution: PositiveInt = 8


class GateOptions(_Options):
    """The gate: whether an alias moves to the version that a run publishes.

    Attributes:
        enabled: Whether the alias may move at all.
        alias: The alias. It moves only if the new version scores higher on the same test split than the version it
            points to.
        metric: The metric that is compared, a mean over images; higher is better.
        minimum: Lowest score with which a version becomes the first that the alias points to. Set it higher if the
            metric is `iou`, `dice` or `accuracy`, in which a model that finds nothing useful can reach 0.1 to 0.9.
    """

    enabled: bool = True
    alias: str = "production"
    metric: Literal["map", "ap_50", "ap_70", "ap_90", "f1_50", "pq_50", "iou", "dice", "accuracy"] = "map"
    minimum: Fraction = 0.1


class TrackingOptions(_Options):
    """Experiment tracking with Weights & Biases and TensorBoard. The variable WANDB_MODE overrides `wandb`.

    Attributes:
        wandb: `online`, `offline` (needs no account; `wandb sync` uploads the run later) or `disabled`.
        project: W&B project.
        entity: W&B user or team; if not set, the account's default.
        profile_steps: Number of steps that TensorFlow's profiler records for TensorBoard on the first worker, starting
            with step 11 of the first epoch and ending with that epoch at the latest; 0 turns the profiler off. Rounded
            up to a multiple of `optimizer.steps_per_execution`.
    """

    wandb: Literal["online", "offline", "disabled"] = "offline"
    project: str = "nucleus"
    entity: str | None = None
    profile_steps: Annotated[int, Field(ge=0, le=1000)] = 0


class CardOptions(_Options):
    """Facts for the model card that only a person knows, one line each; the card states which of them are missing.

    Attributes:
        license: Licence of the published weights, such as `Apache-2.0`.
        data_license: Licence of the images and their labels, such as `CC0-1.0`, if it was not stated when they were
            imported (`nucleus data import --license`). If another one was, training does not start.
        data_source: Origin of the images, and how to cite them, if it was not stated when they were imported.
        data_import: Name, without extension, of the imported zip or folder that `data_license` and `data_source`
            describe. The card leaves both out for a dataset imported from anything else; if not set, they apply to
            every dataset.
        contact: Person or address to ask about the model.
    """

    license: OneLine | None = None
    data_license: OneLine | None = None
    data_source: OneLine | None = None
    data_import: OneLine | None = None
    contact: OneLine | None = None


class Recipe(_Options):
    """Keys of a training run that belong to no table.

    Attributes:
        model: Name under which the model is published.
        dataset: `NAME[@VERSION]` in the bucket, or `s3://bucket/prefix/NAME[@VERSION]`.
        mix: Other datasets, named as `dataset` is, with the share of all training crops that comes from their training
            splits, such as `{ "dsb2018@latest" = 0.5 }`; below 1 in all. The best weights are chosen on `dataset`
            alone; each dataset's validation split counts by its share when the thresholds are tuned, and the scores
            on each test split are reported.
        bucket: `s3://bucket[/prefix]` of runs, weights and models; if not set, NUCLEUS_BUCKET.
        workers: Number of training processes, which share every batch equally. A range `[fewest, most]` makes the run
            elastic: it uses as many workers as the cluster has room for, continues with fewer when machines are lost,
            and adds workers when machines become available.
        cpus_per_worker: CPU cores, and TensorFlow threads, per worker.
        gpus_per_worker: GPUs per worker: 0 or 1.
        max_failures: How often the run restarts from its last checkpoint after a worker has died.
        stall_timeout: Seconds without a sign of life after which a worker is considered dead.
        resize_interval: For a range of workers: seconds between checks for room for more workers, and between
            checkpoints.
        seed: Seed of the initial weights, the order of the images and the augmentation.
        cache_dir: Absolute path of the folder for cached shards on each worker's machine; if not set, a folder in the
            user's cache directory.
        cache_limit_gib: Size limit of cached shards and decoded images, GiB; the least recently used are deleted first.
    """

    model: str
    dataset: str
    mix: dict[str, Positive] = {}
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
        """Return a copy whose encoder starts with random weights and trains from the first epoch."""
        random = {"weights": "none", "freeze_encoder": False, "unfreeze_epoch": None}
        return self.model_copy(update={"network": self.network.model_copy(update=random)})

    @property
    def share(self) -> float:
        """Share of the training crops that comes from `dataset`; the others come from `mix`."""
        return 1 - sum(self.mix.values())

    @property
    def learning_rates(self) -> tuple[float, float]:
        """The highest and the final learning rate for the recipe's batch, by the linear rule if it is asked for."""
        options, batch = self.optimizer, self.input.batch_size
        factor = batch / (options.learning_rate_batch or batch)
        return factor * options.learning_rate, factor * options.final_learning_rate

    def steps_of_epoch(self, images: int) -> int:
        """Return the number of steps in an epoch, for the number of images in the training split of `dataset`."""
        return self.optimizer.steps_per_epoch or round(images / self.share) // self.input.batch_size

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        try:
            check_name(self.model, "model")
            check_alias(self.gate.alias)
        except UriError as error:
            raise ValueError(str(error)) from error
        self._check_batch_size()
        if self.share <= 0:
            raise ValueError(f"mix must be below 1 in all, found {1 - self.share:g}: the rest comes from dataset")
        if self.network.unfreeze_epoch is not None and not self.network.freeze_encoder:
            raise ValueError("network.unfreeze_epoch needs network.freeze_encoder = true")
        if self.network.start is None:  # which needs no encoder weights
            self._check_encoder_weights()
        if self.cache_dir is not None and not Path(self.cache_dir).is_absolute():
            raise ValueError(f"cache_dir must be an absolute path, found {self.cache_dir!r}")
        return self

    def _check_encoder_weights(self) -> None:
        if self.network.encoder in WITHOUT_IMAGENET and self.network.weights == "imagenet":
            raise ValueError(
                f"network.weights must not be 'imagenet': there are no ImageNet weights for the encoder "
                f"{self.network.encoder!r}; set it to 'none', and network.freeze_encoder to false"
            )
        if self.network.weights == "none" and self.network.freeze_encoder:
            raise ValueError("network.freeze_encoder must be false if network.weights is 'none'")

    def _check_batch_size(self) -> None:
        """Raise `ValueError` unless the batch divides equally among any number of workers the run may have."""
        steps = self.optimizer.gradient_accumulation_steps
        for count in self.workers.counts:
            if self.input.batch_size % count:
                every = f"every number of workers from {self.workers.fewest} to {self.workers.most}"
                raise ValueError(
                    f"input.batch_size ({self.input.batch_size}) must be a multiple of "
                    f"{every if self.workers.elastic else f'workers ({count})'}: the workers share each batch equally. "
                    + (f"The range may go up to {count - 1}" if count > self.workers.fewest else "Change either")
                )
            if self.batch_per_worker(count) % steps:
                raise ValueError(
                    f"input.batch_size / workers ({self.batch_per_worker(count)}) must be a multiple of "
                    f"optimizer.gradient_accumulation_steps ({steps})"
                )

    def batch_per_worker(self, workers: int) -> int:
        """Return the number of crops per step on each worker."""
        return self.input.batch_size // workers
