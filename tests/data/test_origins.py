"""Licences and origins of sources: stated at the import, kept for each image, never contradicted."""

import json
from pathlib import Path

import pytest

from nucleus.config.recipe import CardOptions
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import DATASET_FORMAT, Dataset, DatasetLocation, list_versions, read_manifest
from nucleus.data.importing import add_to_dataset, import_dataset
from nucleus.data.origins import DataOrigin, DataSource, check_licenses, described_sources, stated_origin
from nucleus.data.splits import SplitOptions
from nucleus.errors import RecipeError, UsageError
from nucleus.storage.bucket import Bucket
from tests.data.test_adding import pairs, write

FREE, OTHERS = DataOrigin(license="CC0-1.0", origin="Doe 2020"), DataOrigin(license="CC-BY-4.0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "old", pairs(range(5)))


def imported(folder: Path, bucket: Bucket, stated: DataOrigin) -> Dataset:
    return import_dataset(folder, bucket.uri / "d", SplitOptions(), stated=stated).dataset


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("cc0-1.0", "CC0-1.0"),
        ("CC-BY-4.0 and cc0-1.0", "CC-BY-4.0 AND CC0-1.0"),
        ("LicenseRef-ours", "LicenseRef-ours"),
        (None, None),
    ],
)
def test_a_licence_is_one_of_spdx(given: str | None, known: str | None) -> None:
    assert stated_origin(given, None).license == known


@pytest.mark.parametrize(
    "wrong", [("free", None), ("", None), ("CC BY 4.0", None), (None, "a\nb"), (None, " "), (None, "x" * 501)]
)
def test_other_statements_are_refused(wrong: tuple[str | None, str | None]) -> None:
    with pytest.raises(UsageError):
        stated_origin(*wrong)


def test_each_image_keeps_the_licence_of_its_source(folder: Path, bucket: Bucket, tmp_path: Path) -> None:
    old = imported(folder, bucket, FREE)
    changed = pairs(range(4, 9))
    changed["n4"][1][changed["n4"][1] == 1] = 0  # other labels for an image that is there
    changed |= pairs(range(2, 3))  # and the same labels for another
    source, place = write(tmp_path / "new", changed), DatasetLocation(old.uri, "latest")
    done = add_to_dataset(source, place, SplitOptions(), ShardCache(tmp_path / "cache"), stated=OTHERS)
    manifest = done.dataset.manifest
    assert manifest.sample_sources == [0] * 5 + [1] * 4
    assert manifest.data_sources == [
        DataSource(name="old", images=5, **FREE.model_dump()),
        DataSource(name="new", images=4, labels=1, **OTHERS.model_dump()),
    ]
    assert manifest.additions[0].relabelled == ["n4"]
    assert [("n2" in line, "CC0-1.0" in line) for line in done.warnings if "keep what was stated" in line] == [
        (True, True)
    ]
    assert list_versions(old.uri)[-1] == done.dataset  # its version is that of its content


def test_another_licence_is_another_version(folder: Path, bucket: Bucket) -> None:
    """Versions that exist keep theirs; without a statement, the version is that of older packages."""
    plain, free = imported(folder, bucket, DataOrigin()), imported(folder, bucket, FREE)
    again = imported(folder, bucket, OTHERS)
    assert len({each.manifest.version for each in (plain, free, again)}) == 3
    assert imported(folder, bucket, FREE) == free
    assert list_versions(plain.uri)[:2] == [plain, free]


def test_older_manifests_are_read(folder: Path, bucket: Bucket) -> None:
    found = imported(folder, bucket, DataOrigin())
    document = found.manifest.model_dump(mode="json", exclude={"stated"}) | {"format": 2}
    Bucket(found.version_uri).put("manifest.json", json.dumps(document).encode())
    older = read_manifest(json.dumps(document).encode(), "here")
    assert (DATASET_FORMAT, older.data_sources) == (4, [DataSource(name="old", images=5)])
    assert list_versions(found.uri)[0].manifest == older


@pytest.mark.parametrize(
    ("card", "kind"),
    [
        ({"data_license": "CC-BY-4.0"}, RecipeError),
        ({"data_license": "CC-BY-4.0", "data_import": "plates"}, RecipeError),
        ({"data_license": "CC-BY-4.0", "data_import": "others"}, None),
        ({"data_license": "cc0 1.0"}, None),
        ({}, None),
    ],
)
def test_a_recipe_may_not_contradict(card: dict[str, str], kind: type[Exception] | None) -> None:
    sources = [DataSource(name="plates.zip", images=3, license="CC0-1.0"), DataSource(name="mine", images=1)]
    if kind is None:
        check_licenses(sources, CardOptions(**card), "d")
    else:
        with pytest.raises(kind):
            check_licenses(sources, CardOptions(**card), "d")


def test_a_recipe_says_what_was_not_stated() -> None:
    sources = [DataSource(name="plates.zip", images=3, license="CC0-1.0"), DataSource(name="mine", images=1)]
    card = CardOptions(data_license="CC-BY-4.0", data_source="us", data_import="mine")
    assert described_sources(sources, card) == [
        sources[0],
        DataSource(name="mine", images=1, license="CC-BY-4.0", origin="us"),
    ]
