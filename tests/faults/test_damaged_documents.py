"""What holds for any input: documents survive being written, and damaged ones end in this project's errors alone."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nucleus.config.names import Kind, check_name, clean_name
from nucleus.data.dataset import DATASET_FORMAT, DatasetManifest, LeftOut, Shard, read_manifest
from nucleus.data.images import encode_png
from nucleus.data.masks import labels_from_mask
from nucleus.data.samples import Sample
from nucleus.data.sampling import epoch_plan, shard_count
from nucleus.errors import DataError, ImageError, ModelError
from nucleus.registry.aliases import Alias
from nucleus.registry.manifest import EncoderWeightsOrigin, ModelManifest, Origin, StoredFile, read_model_manifest

texts = st.text(max_size=20)
counts = st.integers(0, 2**40)
sums = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
splits = st.sampled_from(["train", "val", "test"])
scores = st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False), max_size=3)

samples = st.builds(
    Sample,
    name=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,30}", fullmatch=True),
    split=splits,
    kind=st.sampled_from(Kind),
    group=counts,
    height=st.integers(1, 2**20),
    width=st.integers(1, 2**20),
    nuclei=counts,
    image_sha256=sums,
    labels_sha256=sums,
)
shards = st.builds(
    Shard,
    file=st.from_regex(r"(train|val|test)-[0-9]{5}-of-[0-9]{5}\.tfrecord", fullmatch=True),
    split=splits,
    records=st.integers(1, 2**20),
    size=st.integers(1, 2**40),
    sha256=sums,
)
dataset_manifests = st.builds(
    DatasetManifest,
    format=st.just(DATASET_FORMAT),
    version=st.from_regex(r"[0-9a-f]{12}", fullmatch=True),
    samples=st.lists(samples, max_size=3),
    shards=st.lists(shards, max_size=3),
    duplicates=st.lists(st.builds(LeftOut), max_size=2),
    left_out=st.lists(st.builds(LeftOut), max_size=2),
)
model_manifests = st.builds(
    ModelManifest,
    format=st.just(1),
    version=st.integers(1, 2**31),
    files=st.dictionaries(
        st.from_regex(r"[a-z0-9][a-z0-9._-]{0,9}", fullmatch=True), st.builds(StoredFile, size=counts, sha256=sums)
    ),
    origin=st.builds(
        Origin,
        recipe=st.dictionaries(texts, st.one_of(st.integers(), texts, st.booleans()), max_size=3),
        encoder_weights=st.builds(EncoderWeightsOrigin),
        metrics=st.dictionaries(texts, st.dictionaries(texts, scores, max_size=2), max_size=2),
    ),
)
aliases = st.builds(
    Alias, version=st.integers(1, 2**31), previous=st.one_of(st.none(), st.integers(1, 2**31)), moved=texts
)


@settings(max_examples=30)  # each has many values, and takes long to draw
@given(dataset_manifests)
def test_dataset_manifests_survive(manifest: DatasetManifest) -> None:
    assert read_manifest(manifest.model_dump_json().encode(), "x") == manifest


@settings(max_examples=30)
@given(model_manifests)
def test_model_manifests_survive(manifest: ModelManifest) -> None:
    assert read_model_manifest(manifest.model_dump_json().encode(), "x") == manifest


@given(aliases)
def test_aliases_survive(alias: Alias) -> None:
    assert Alias.model_validate_json(alias.model_dump_json()) == alias


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """The bytes with a part of them replaced by others."""
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, 8))
    return content[:start] + data.draw(st.binary(max_size=8)) + content[start + length :]


@given(st.data())
def test_damaged_manifests_end_in_our_errors(data: st.DataObject) -> None:
    content = damaged(data.draw(st.one_of(dataset_manifests, model_manifests)).model_dump_json().encode(), data)
    for read, error in ((read_manifest, DataError), (read_model_manifest, ModelError)):
        with suppress(error):
            read(content, "x")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format":' * 100_000, b"9" * 10_000, b'{"format": 1e999}'])
def test_documents_made_to_break_a_parser(content: bytes) -> None:
    with pytest.raises(DataError):
        read_manifest(content, "x")


@given(st.text(max_size=300))
def test_any_text_becomes_a_name(text: str) -> None:
    name = clean_name(text)
    assert check_name(name, "dataset") == name
    assert clean_name(name) == name


@given(arrays(np.uint16, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 5)))
def test_labels_survive_as_png_or_are_refused(labels: np.ndarray) -> None:
    """Numbers may change, not which pixels are one nucleus."""
    try:
        masks = labels_from_mask(("x", encode_png(labels)), labels.shape)
    except ImageError:
        return
    found = masks.labels
    assert np.array_equal(found > 0, labels > 0)
    if not masks.components:
        pairs = {(int(a), int(b)) for a, b in zip(labels.ravel(), found.ravel(), strict=True)}
        assert len(pairs) == len(np.unique(labels))
    assert sorted(np.unique(found[found > 0])) == list(range(1, int(found.max()) + 1))


@given(st.integers(1, 400), st.sampled_from([(1, 1), (2, 4), (3, 6), (4, 12)]), st.integers(0, 3), st.data())
def test_each_sample_is_read_once_however_many_read_and_wherever_they_begin(
    samples: int, sizes: tuple[int, int], epoch: int, data: st.DataObject
) -> None:
    world, batch = sizes
    count = shard_count(samples, 1)
    records = [samples // count + (shard < samples % count) for shard in range(count)]
    steps = samples // batch
    done = batch * data.draw(st.integers(0, steps))
    plans = [
        epoch_plan(records, seed=1, epoch=epoch, rank=rank, world=world, global_batch=batch, done=done)
        for rank in range(world)
    ]
    positions = np.concatenate([plan.positions for plan in plans])
    assert sorted(positions) == list(range(done, steps * batch))
    places = {(int(s), int(r)) for plan in plans for s, r in zip(plan.shards, plan.records, strict=True)}
    assert len(places) == len(positions)
    alone = epoch_plan(records, seed=1, epoch=epoch, rank=0, world=1, global_batch=batch)
    order = dict(zip(alone.positions.tolist(), zip(alone.shards, alone.records, strict=True), strict=True))
    for plan in plans:
        assert all(order[p] == (s, r) for p, s, r in zip(plan.positions, plan.shards, plan.records, strict=True))
