"""What `add_to_dataset` makes of an older version and a source: groups, splits, labels, records, and two at a time."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from nucleus.data import dataset_storage, grouping
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, DatasetLocation, list_versions, locate_dataset, open_dataset, read_manifest
from nucleus.data.dataset_storage import claim_succession, verify_dataset
from nucleus.data.fingerprints import Fingerprint
from nucleus.data.images import RgbImage, encode_png
from nucleus.data.importing import Imported, add_to_dataset, import_dataset
from nucleus.data.reader import images_of_split
from nucleus.data.samples import SPLITS
from nucleus.data.sampling import stored_order
from nucleus.data.shards import record_name
from nucleus.data.splits import SplitOptions
from nucleus.data.synthetic import generated_image
from nucleus.data.thumbnails import Pairs as Linked
from nucleus.errors import DataError, ObjectExistsError
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri

Pairs = dict[str, tuple[RgbImage, np.ndarray]]


def pairs(numbers: range) -> Pairs:
    return {f"n{number}": generated_image(number, 128, 128) for number in numbers}


def write(folder: Path, content: Pairs, below: str = "") -> Path:
    for name, both in content.items():
        for kind, pixels in zip(("images", "labels"), both, strict=True):
            path = folder / below / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(np.ascontiguousarray(pixels)))
    return folder


def tiles(number: int) -> Pairs:
    """Four tiles of one picture, which meet in content."""
    image, labels = generated_image(number, 512, 512)
    parts = {f"{y}{x}": np.s_[256 * y : 256 * (y + 1), 256 * x : 256 * (x + 1)] for y in (0, 1) for x in (0, 1)}
    return {f"p{number}-{name}": (image[part], labels[part]) for name, part in parts.items()}


@pytest.fixture
def uri(bucket_uri: S3Uri) -> S3Uri:
    return bucket_uri / "datasets" / "cells"


@pytest.fixture
def old(uri: S3Uri, tmp_path: Path) -> Dataset:
    """Thirty images, so that there are more samples than shards."""
    return import_dataset(write(tmp_path / "old", pairs(range(30))), uri, SplitOptions()).dataset


def add(source: Path, old: Dataset, options: SplitOptions | None = None, ref: str = "latest") -> Imported:
    cache = ShardCache(source.parent / "cache")
    return add_to_dataset(source, DatasetLocation(old.uri, ref), options or SplitOptions(), cache)


def records(dataset: Dataset, cache: Path) -> dict[str, bytes]:
    found = {}
    for split in SPLITS:
        members = dataset.manifest.split_samples(split)
        order = stored_order(len(members))
        shards = dataset.manifest.split_shards(split)
        for number, shard in enumerate(shards):
            file = ShardCache(cache).open(dataset, shard)
            assert len(file) == shard.records
            for place in range(len(file)):
                data = file.read(place)
                sample = members[order[place * len(shards) + number]]  # the layout that `sampling` describes
                assert record_name(data) == sample.name
                found[sample.name] = data
    return found


def test_it_is_told_if_neighbours_may_be_missed(old: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an import, and by one that adds to a version."""
    neighbours = grouping._neighbours

    def in_doubt(fingerprints: Sequence[Fingerprint], others: Linked, warn: Callable[[str], None]) -> Linked:
        warn(f"{len(fingerprints)} in doubt")
        return neighbours(fingerprints, others, warn)

    monkeypatch.setattr(grouping, "_neighbours", in_doubt)
    source = write(tmp_path / "new", pairs(range(43, 53)))
    assert import_dataset(source, old.uri.parent / "other", SplitOptions()).warnings == ["10 in doubt"]
    assert add(source, old).warnings == ["40 in doubt"]


def test_old_images_stay_and_new_ones_are_split_alone(old: Dataset, tmp_path: Path) -> None:
    before = {item.key: item.etag for item in Bucket(old.uri).objects("")}
    done = add(write(tmp_path / "new", pairs(range(43, 53))), old)
    assert done.created
    assert done.warnings == []
    manifest = done.dataset.manifest
    assert manifest.samples[:30] == old.manifest.samples
    added = manifest.samples[30:]
    assert [sample.name for sample in added] == [f"n{number}" for number in range(43, 53)]
    assert {sample.split for sample in added} == set(SPLITS)
    assert not {sample.group for sample in added} & {sample.group for sample in old.manifest.samples}
    kept, grown = records(old, tmp_path / "a"), records(done.dataset, tmp_path / "b")
    assert {name: grown[name] for name in kept} == kept  # byte for byte
    assert len(grown) == 40
    assert verify_dataset(done.dataset) == []
    for split in SPLITS:
        for found in images_of_split(done.dataset, split, ShardCache(tmp_path / "b")):
            image, labels = generated_image(int(found.name[1:]), 128, 128)
            assert (found.image == image).all()
            assert ((found.labels > 0) == (labels > 0)).all()
    after = {item.key: item.etag for item in Bucket(old.uri).objects("")}
    assert {key: after[key] for key in before} == before  # the old version is as it was
    assert open_dataset(locate_dataset(str(old.uri))) == done.dataset
    (addition,) = manifest.additions
    assert done.addition == addition
    assert (addition.added, addition.replaced, addition.known) == (10, 0, 0)
    assert (manifest.parent, manifest.source, manifest.sources) == (old.manifest.version, "old", ["old", "new"])


def test_one_version_for_the_same_images(old: Dataset, tmp_path: Path) -> None:
    source = write(tmp_path / "new", pairs(range(28, 36)))
    first = add(source, old)
    assert (first.addition.added, first.addition.known) == (6, 2)
    again = add(source, old)  # to the latest version, which has them
    assert (again.created, again.dataset, again.addition.known) == (False, first.dataset, 8)
    same = add(source, old, ref=old.manifest.version)
    assert (same.created, same.dataset) == (False, first.dataset)
    assert len(list_versions(old.uri)) == 2
    other = add(source, old, SplitOptions(seed=5), ref=old.manifest.version)
    assert other.dataset.manifest.version != first.dataset.manifest.version


def test_other_labels_replace_the_old_ones(old: Dataset, tmp_path: Path) -> None:
    chosen = next(sample for sample in old.manifest.samples if sample.split == "test")
    image, labels = generated_image(int(chosen.name[1:]), 128, 128)
    corrected = labels * (labels != labels.max())
    same = generated_image(3, 128, 128)
    done = add(write(tmp_path / "corrections", {"any name": (image, corrected), "b": same}), old)
    assert done.created
    assert (done.addition.added, done.addition.replaced, done.addition.known) == (0, 1, 1)
    assert any(chosen.name in warning for warning in done.warnings)
    by_name = {sample.name: sample for sample in done.dataset.manifest.samples}
    found = by_name.pop(chosen.name)
    assert (found.nuclei, found.split, found.group) == (chosen.nuclei - 1, "test", chosen.group)
    assert by_name == {s.name: s for s in old.manifest.samples if s.name != chosen.name}
    labelled = {i.name: i for i in images_of_split(done.dataset, "test", ShardCache(tmp_path / "b"))}[chosen.name]
    assert ((labelled.labels > 0) == (corrected > 0)).all()
    assert (labelled.image == image).all()
    before = {i.name: i for i in images_of_split(old, "test", ShardCache(tmp_path / "b"))}[chosen.name]
    assert before.labels.max() == chosen.nuclei


def test_images_of_old_groups_go_to_their_splits(uri: S3Uri, tmp_path: Path) -> None:
    numbers = (0, 1, 2, 3, 5, 7)  # of 0 to 9 those whose tiles all meet in content
    pictures = {number: tiles(number) for number in numbers}
    first = {name: pair for number in numbers for name, pair in list(pictures[number].items())[:2]}
    old = import_dataset(write(tmp_path / "old", first), uri, SplitOptions(val=0.2, test=0.2)).dataset
    rest = {name: pair for number in numbers for name, pair in list(pictures[number].items())[2:]}
    turned = next(name for name, pair in first.items() if pair[1].max() > 3)
    image, labels = first[turned]
    rest[f"{turned}-turned"] = (cv2.rotate(image, cv2.ROTATE_180) // 2, cv2.rotate(labels, cv2.ROTATE_180))
    done = add(write(tmp_path / "new", {**rest, **pairs(range(43, 49))}), old)
    splits = defaultdict(set)
    for sample in done.dataset.manifest.samples:
        if sample.name.startswith("p"):
            splits[sample.name.split("-")[0]].add(sample.split)
    assert all(len(found) == 1 for found in splits.values()), splits
    assert set.union(*splits.values()) == set(SPLITS)
    assert {s.group for s in done.dataset.manifest.samples if s.name.startswith("p")} == {
        sample.group for sample in old.manifest.samples
    }
    others = [sample.split for sample in done.dataset.manifest.samples if sample.name.startswith("n")]
    assert set(others) == set(SPLITS)


def test_what_would_join_two_splits_is_left_out(old: Dataset, tmp_path: Path) -> None:
    by_split = {sample.split: int(sample.name[1:]) for sample in old.manifest.samples}
    halves = [generated_image(by_split[split], 128, 128) for split in ("train", "test")]
    labels = np.concatenate([halves[0][1], halves[1][1] + halves[0][1].max() * (halves[1][1] > 0)], axis=1)
    joined = (np.concatenate([image for image, _ in halves], axis=1), labels)
    done = add(write(tmp_path / "new", {"both": joined, **pairs(range(50, 54))}), old)
    assert "both" not in {sample.name for sample in done.dataset.manifest.samples}
    (item,) = [item for item in done.left_out if item.title == "both"]
    assert "test and train" in item.reason
    assert item in done.dataset.manifest.left_out


@pytest.mark.parametrize("pattern", [r"^(plate\d+)", r"^(Plate\d+)"])
def test_names_put_images_into_groups(uri: S3Uri, tmp_path: Path, pattern: str) -> None:
    by = SplitOptions(group_by=re.compile(pattern, re.IGNORECASE), val=0.2, test=0.2)
    first = {f"Plate{n % 6}_{n}": generated_image(n, 128, 128) for n in range(12)}
    old = import_dataset(write(tmp_path / "old", first), uri, by).dataset
    second = {f"Plate{n % 6}_{n}": generated_image(n, 128, 128) for n in range(12, 18)}
    source = write(tmp_path / "new", second)
    options = SplitOptions(group_by=re.compile(pattern.replace("plate", "[Pp]late")))
    done = add(source, old, options)
    splits = defaultdict(set)
    for sample in done.dataset.manifest.samples:
        splits[sample.name.split("_")[0]].add(sample.split)
    assert all(len(found) == 1 for found in splits.values()), splits
    alone = add(source, old, SplitOptions(group_by=re.compile("_(1.)$")), ref=old.manifest.version)
    assert not any("--group-by" in text for text in alone.warnings)
    none = add(source, old, SplitOptions(group_by=re.compile("_(1[2-9])$")), ref=old.manifest.version)
    assert any("--group-by" in text for text in none.warnings)


@pytest.mark.parametrize(("count", "missing"), [(1, ["val", "test"]), (2, ["val", "test"]), (3, [])])
def test_few_images_are_for_training(old: Dataset, tmp_path: Path, count: int, missing: list[str]) -> None:
    done = add(write(tmp_path / "new", pairs(range(43, 43 + count))), old)
    splits = {sample.split for sample in done.dataset.manifest.samples[30:]}
    assert splits == set(SPLITS) - set(missing)
    assert any(" or ".join(missing) in text for text in done.warnings) == bool(missing)


def test_a_test_folder_is_for_testing(old: Dataset, tmp_path: Path) -> None:
    trained = next(int(sample.name[1:]) for sample in old.manifest.samples if sample.split == "train")
    image, labels = generated_image(trained, 128, 128)
    write(tmp_path / "new", pairs(range(43, 47)), "train")
    write(tmp_path / "new", {**pairs(range(47, 49)), "darker": (image // 2, labels)}, "test")
    done = add(tmp_path / "new", old)
    splits = {sample.name: sample.split for sample in done.dataset.manifest.samples[30:]}
    assert {name for name, split in splits.items() if split == "test"} == {"n47", "n48"}
    assert set(splits.values()) == set(SPLITS)
    assert splits["darker"] == "train"
    assert any("darker" in text for text in done.warnings)


def test_names_that_are_taken_get_a_number(old: Dataset, tmp_path: Path) -> None:
    other = {f"n{number}": generated_image(number + 50, 128, 128) for number in range(3)}
    done = add(write(tmp_path / "new", other), old)
    assert [sample.name for sample in done.dataset.manifest.samples[30:]] == ["n0-2", "n1-2", "n2-2"]


def test_added_images_without_nuclei_are_no_alarm(old: Dataset, tmp_path: Path) -> None:
    empty = {name: (image, 0 * labels) for name, (image, labels) in pairs(range(43, 47)).items()}
    done = add(write(tmp_path / "new", empty), old)
    assert not any("NO NUCLEI" in text for text in done.warnings)
    assert any("0 or 1 nuclei" in text for text in done.warnings)


def test_a_manifest_of_format_1_is_added_to(old: Dataset, tmp_path: Path) -> None:
    text = old.manifest.model_dump(mode="json", exclude={"additions"}) | {"format": 1}
    stored = old.manifest.model_validate(text).model_dump_json(exclude={"additions"}).encode()
    assert read_manifest(stored, "x").parent is None
    Bucket(old.version_uri).put("manifest.json", stored)
    done = add(write(tmp_path / "new", pairs(range(43, 47))), old)
    assert done.dataset.manifest.parent == old.manifest.version


def test_nothing_to_add_to(uri: S3Uri, old: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nucleus data import SRC s3://"):
        add_to_dataset(tmp_path / "old", locate_dataset(f"{uri}2"), SplitOptions(), ShardCache(tmp_path))
    with pytest.raises(DataError, match="nucleus data list"):
        add(tmp_path / "old", old, ref="0" * 12)


def test_a_version_is_later_than_the_one_it_follows(old: Dataset, tmp_path: Path) -> None:
    """The clock of the machine that made the old version may be ahead."""
    ahead = old.manifest.model_copy(update={"created": "2999-01-01T00:00:00+00:00"})
    Bucket(old.version_uri).put("manifest.json", ahead.model_dump_json().encode())
    done = add(write(tmp_path / "new", pairs(range(43, 47))), old)
    assert open_dataset(DatasetLocation(old.uri, "latest")) == done.dataset


def test_two_at_a_time_lose_nothing(old: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second import begins after the first has read the old version, and is done before it."""
    mine, yours = write(tmp_path / "mine", pairs(range(43, 47))), write(tmp_path / "yours", pairs(range(50, 54)))
    real = claim_succession
    others: list[Imported] = []

    def claim(bucket: Bucket, parent: str, version: str) -> None:
        if not others:
            others.append(Imported(old, created=False))  # only once
            others.append(add(yours, old))
        real(bucket, parent, version)

    monkeypatch.setattr("nucleus.data.dataset_storage.claim_succession", claim)
    done = add(mine, old)
    names = {sample.name for sample in done.dataset.manifest.samples}
    assert names == {f"n{number}" for number in (*range(30), *range(43, 47), *range(50, 54))}
    assert done.dataset.manifest.parent == others[1].dataset.manifest.version
    assert [item.source for item in done.dataset.manifest.additions] == ["yours", "mine"]
    assert open_dataset(DatasetLocation(old.uri, "latest")) == done.dataset


def test_a_named_version_may_be_added_to_twice(old: Dataset, tmp_path: Path) -> None:
    first = add(write(tmp_path / "a", pairs(range(43, 47))), old, ref=old.manifest.version)
    second = add(write(tmp_path / "b", pairs(range(50, 54))), old, ref=old.manifest.version)
    assert first.dataset.manifest.parent == second.dataset.manifest.parent == old.manifest.version


def test_claims(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(dataset_storage.time, "sleep", waits.append)
    parent, mine, yours = "0" * 12, "1" * 12, "2" * 12
    claim_succession(bucket, parent, mine)
    claim_succession(bucket, parent, mine)  # an import that was repeated
    assert waits == []
    claim_succession(bucket, parent, yours)  # the first one never wrote its manifest
    assert len(waits) == 20
    bucket.put(f"{yours}/manifest.json", b"{}")
    with pytest.raises(ObjectExistsError, match="--into"):
        claim_succession(bucket, parent, mine)
    assert len(waits) == 20
