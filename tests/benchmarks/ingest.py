"""`ingest_tfdata`: batches from warm shards against a hand-written tf.data pipeline of the same operations."""

from functools import partial

import tensorflow as tf

from nucleus.config.recipe import AugmentOptions, NormalizationOptions
from nucleus.data.augmentation import CHOICES
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset
from nucleus.data.pipeline import Feed, training_batches
from nucleus.data.reader import cached_splits
from nucleus.data.sampling import epoch_plan
from nucleus.model.losses import pixel_targets
from tests.benchmarks.measure import generated_dataset, in_turn, report, temporary_store
from tests.benchmarks.tensor_augmentation import sample_by_tensors

CROP, BATCH, THREADS = 192, 8, 2
TARGETS = partial(pixel_targets, heads="both")


def ingest_tfdata() -> None:
    """Batches from warm shards, decode + crop + augment."""
    with temporary_store() as root:
        dataset = generated_dataset(root, 400)
        cache = ShardCache(root / "cache")
        ours = iter(training_batches(feed(dataset, cache), range(1000)))
        shards = dataset.manifest.split_shards("train")
        for shard in shards:
            cache.open(dataset, shard)
        theirs = iter(handwritten(sorted(map(str, (root / "cache").rglob("train-*.tfrecord")))))
        steps = sum(shard.records for shard in shards) // BATCH

        def drain(batches: object) -> None:
            for _ in range(steps):
                next(batches)  # type: ignore[call-overload]

        found = in_turn({"ours": lambda: drain(ours), "theirs": lambda: drain(theirs)}, rounds=8, warm_up=True)
    images = steps * BATCH
    report(
        "ingest_tfdata",
        found["theirs"] / found["ours"],
        ours_images_s=images / found["ours"],
        theirs_images_s=images / found["theirs"],
    )


def feed(dataset: Dataset, cache: ShardCache, threads: int = THREADS, rank: int = 0, world: int = 1) -> Feed:
    """The training split as a worker reads it."""
    counts = [shard.records for shard in dataset.manifest.split_shards("train")]
    reader = cached_splits(
        [dataset],
        "train",
        cache,
        lambda epoch: epoch_plan(counts, seed=0, epoch=epoch, rank=rank, world=world, global_batch=BATCH),
        decoded=True,
    )
    batch = BATCH // world
    return Feed(
        reader=reader,
        targets=TARGETS,
        crop=CROP,
        normalization=NormalizationOptions(),
        batch=batch,
        augment=AugmentOptions(),
        seed=0,
        threads=threads,
    )


def handwritten(paths: list[str]) -> tf.data.Dataset:
    """TFRecords read by TensorFlow itself, shuffled in memory, decoded and augmented by the same operations."""

    def load(number: tf.Tensor, data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seeds = tf.stack([number, number])
        numbers = tf.unstack(tf.random.stateless_uniform((len(CHOICES),), seeds))
        fields = tf.random.stateless_uniform((3, 3, 2), seeds, -1.0, 1.0)
        noise = tf.random.stateless_normal((CROP, CROP, 3), seeds)
        choices = dict(zip(CHOICES, numbers, strict=True))
        image, labels = sample_by_tensors(data, choices, fields, noise, CROP, NormalizationOptions(), AugmentOptions())
        return image, tf.numpy_function(TARGETS, [labels], tf.float32)

    options = tf.data.Options()
    options.autotune.enabled = False  # as ours: it does not pay here, and hangs at the end
    return (
        tf.data.TFRecordDataset(paths)
        .shuffle(400)
        .repeat()
        .enumerate()
        .map(load, num_parallel_calls=THREADS)
        .batch(BATCH, drop_remainder=True)
        .prefetch(4)
        .with_options(options)
    )
