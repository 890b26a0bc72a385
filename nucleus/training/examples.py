"""A few images of a dataset, for people to look at."""

import tensorflow as tf

from nucleus.config.recipe import Recipe
from nucleus.data.cache import ShardCache
from nucleus.data.datasets import Dataset
from nucleus.data.examples import example_records
from nucleus.data.pipeline import training_sample
from nucleus.data.shards import decode_record
from nucleus.training.predictions import LabelledImage
from nucleus.training.reporter import Augmented

__all__ = ["augmented_examples", "example_images"]

_EXAMPLES = 4


def example_images(dataset: Dataset, cache: ShardCache, split: str) -> list[LabelledImage]:
    """A few images of a split; the same for the same dataset."""
    return [_image(dataset, split, record) for record in example_records(dataset, split, cache, _EXAMPLES)]


def augmented_examples(dataset: Dataset, cache: ShardCache, recipe: Recipe) -> list[Augmented]:
    """Training images, and for each a crop of it as the recipe changes crops."""
    found = []
    for number, record in enumerate(example_records(dataset, "train", cache, _EXAMPLES)):
        seeds = tf.constant([recipe.seed, number], tf.int64)
        image, labels = training_sample(
            tf.constant(record), seeds, recipe.input.crop, recipe.input.normalization, recipe.augment
        )
        found.append(Augmented(_image(dataset, "train", record), image.numpy(), labels.numpy()))
    return found


def _image(dataset: Dataset, split: str, record: bytes) -> LabelledImage:
    name, image, labels = decode_record(record)
    (kind,) = (sample.kind for sample in dataset.manifest.split_samples(split) if sample.name == name)
    return LabelledImage(name, kind, image, labels)
