"""A few images of a split that stand for all, each read without the others."""

from nucleus.data.cache import ShardCache
from nucleus.data.datasets import Dataset
from nucleus.data.manifest import DatasetManifest
from nucleus.data.sampling import stored_order

__all__ = ["example_positions", "example_records"]

_LOOKED_AT = 256


def example_positions(manifest: DatasetManifest, split: str, count: int) -> list[int]:
    """Places in a split's stored order, which is a random one: of each kind the first image, then the next ones.

    Images without nuclei, which show little, come last. The same for the same dataset.
    """
    samples = manifest.split_samples(split)
    places = list(enumerate(samples[i] for i in stored_order(len(samples))[:_LOOKED_AT]))
    seen: dict[object, int] = {}
    ranked = []
    for place, sample in places:
        seen[sample.kind] = seen.get(sample.kind, 0) + (sample.nuclei > 0)
        ranked.append((sample.nuclei == 0, seen[sample.kind], place))
    return [place for _, _, place in sorted(ranked)[:count]]


def example_records(dataset: Dataset, split: str, cache: ShardCache, count: int) -> list[bytes]:
    """The records of these images; only their shards are fetched."""
    shards = dataset.manifest.split_shards(split)
    return [
        cache.open(dataset, shards[place % len(shards)]).read(place // len(shards))
        for place in example_positions(dataset.manifest, split, count)
    ]
