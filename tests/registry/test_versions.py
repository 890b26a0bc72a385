import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nucleus.config.names import Reference
from nucleus.errors import IntegrityError, ModelError, UriError, UsageError
from nucleus.registry.aliases import list_aliases, move_alias, rollback_alias
from nucleus.registry.manifest import Origin, is_whole, list_models, list_versions, version_prefix
from nucleus.registry.publish import publish
from nucleus.registry.versions import (
    PulledModel,
    check_model_path,
    find_model,
    locate_model,
    pull,
    pull_uri,
    read_pulled,
    resolve_version,
    version_of_run,
)
from nucleus.storage.bucket import Bucket
from tests.small_model import origin


def test_publish_pull_and_references(bucket: Bucket, model_files: Path, tmp_path: Path) -> None:
    first, second = publish(bucket, "m", model_files, origin("a")), publish(bucket, "m", model_files, origin("b"))
    assert (first.version, second.version) == (1, 2)
    assert list_models(bucket) == ["m"]
    move_alias(bucket, "m", "production", 1)
    found = {ref: resolve_version(bucket, Reference("m", ref)) for ref in ("latest", "1", "2", "production")}
    assert found == {"latest": 2, "1": 1, "2": 2, "production": 1}
    assert version_of_run(bucket, "m", "a") == first
    assert version_of_run(bucket, "m", "c") is None
    manifest = pull(bucket, Reference("m"), tmp_path / "pulled")
    assert manifest == second
    for name, file in manifest.files.items():
        assert hashlib.sha256((tmp_path / "pulled" / name).read_bytes()).hexdigest() == file.sha256


def test_a_version_without_manifest_does_not_exist(bucket: Bucket, model_files: Path) -> None:
    publish(bucket, "m", model_files, origin())
    bucket.put(f"{version_prefix('m', 2)}/model.json", b"claimed, then the publisher died")
    assert list_versions(bucket, "m") == [1]
    assert resolve_version(bucket, Reference("m")) == 1
    assert publish(bucket, "m", model_files, origin()).version == 3


def test_publishers_at_once_get_versions_of_their_own(bucket: Bucket, model_files: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        manifests = list(pool.map(lambda i: publish(bucket, "m", model_files, origin(f"r{i}")), range(8)))
    assert sorted(manifest.version for manifest in manifests) == list(range(1, 9))
    assert {version_of_run(bucket, "m", f"r{i}").version for i in range(8)} == set(range(1, 9))


def test_pull_leaves_the_whole_model_or_nothing(bucket: Bucket, model_files: Path, tmp_path: Path) -> None:
    manifest = publish(bucket, "m", model_files, origin())
    key = f"{version_prefix('m', 1)}/model.weights.h5"
    good = bucket.get(key)
    bucket.put(key, b"flipped")
    target = tmp_path / "pulled"
    with pytest.raises(IntegrityError, match=r"model\.weights\.h5 .* SHA-256"):
        pull(bucket, Reference("m"), target)
    assert not target.exists()
    bucket.put(key, good)
    pull(bucket, Reference("m"), target)
    (target / "card.md").write_text("damaged on disk")
    pull(bucket, Reference("m"), target)
    assert (target / "card.md").read_bytes() == bucket.get(f"{version_prefix('m', 1)}/card.md")
    bucket.put(key, b"flipped")
    assert pull(bucket, Reference("m"), target) == manifest  # whole on disk: nothing to fetch
    assert {path.name for path in tmp_path.iterdir()} == {"model", "pulled", ".pulled.lock"}


def test_pull_spares_other_folders(bucket: Bucket, model_files: Path, tmp_path: Path) -> None:
    publish(bucket, "m", model_files, origin())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="mine"):
        pull(bucket, Reference("m"), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_pull_spares_other_models(bucket: Bucket, model_files: Path, tmp_path: Path) -> None:
    """A folder is updated to another version of its model only; a damaged copy is repaired."""
    for name in ("m", "m", "other"):
        publish(bucket, name, model_files, origin())
    folder = tmp_path / "pulled"
    assert [pull(bucket, Reference("m", version), folder).version for version in ("1", "2")] == [1, 2]
    with pytest.raises(UsageError, match="it contains the model m"):
        pull(bucket, Reference("other"), folder)
    assert (read_pulled(folder).manifest.model, read_pulled(folder).manifest.version) == ("m", 2)
    (folder / "manifest.json").write_text("{")
    assert pull(bucket, Reference("m"), folder) == read_pulled(folder).manifest


def test_aliases_move_and_roll_back(bucket: Bucket, model_files: Path) -> None:
    for _ in range(2):
        publish(bucket, "m", model_files, origin())
    move_alias(bucket, "m", "production", 1)
    with pytest.raises(ModelError, match="production"):
        rollback_alias(bucket, "m", "production")
    moved = move_alias(bucket, "m", "production", 2)
    assert (moved.version, moved.previous) == (2, 1)
    assert rollback_alias(bucket, "m", "production").version == 1
    assert list_aliases(bucket, "m")["production"].previous == 2
    with pytest.raises(ModelError, match="nucleus models alias m@VERSION production"):
        rollback_alias(bucket, "m", "production")  # version 2 is the one that was left
    assert list_aliases(bucket, "m")["production"].version == 1
    with pytest.raises(ModelError, match="staging"):
        rollback_alias(bucket, "m", "staging")
    for wrong in ("latest", "7", "Bad Name"):
        with pytest.raises(UriError):
            move_alias(bucket, "m", wrong, 1)


def test_unknown_references(bucket: Bucket, model_files: Path) -> None:
    with pytest.raises(ModelError, match="version"):
        resolve_version(bucket, Reference("m"))
    publish(bucket, "m", model_files, origin())
    with pytest.raises(ModelError, match=r"version 9\b"):
        resolve_version(bucket, Reference("m", "9"))
    with pytest.raises(ModelError, match="staging"):
        resolve_version(bucket, Reference("m", "staging"))


@pytest.mark.parametrize("name", ["cells-3", "cells-000003"])
def test_a_folders_name_for_a_version_is_understood(bucket: Bucket, model_files: Path, name: str) -> None:
    publish(bucket, "cells", model_files, origin())
    with pytest.raises(ModelError, match=r"such as cells@3\. Run: nucleus models list"):
        resolve_version(bucket, Reference(name))
    with pytest.raises(ModelError, match=r"such as cells@3\. Run: nucleus models list cells"):
        resolve_version(bucket, Reference("cells", name))
    for path in (f"./{name}", f"/nowhere/{name}/"):
        with pytest.raises(UsageError, match=r"such as cells@3\."):
            check_model_path(path)


@pytest.mark.parametrize("text", ["cells", "cells@latest", "cells@2", "cells@production", "cells/versions/000002"])
def test_every_spelling_of_a_version_gives_its_files(
    bucket: Bucket, model_files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    """A name in the bucket, the same as a URI, the address that a published version is shown with, and a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    published = [publish(bucket, "cells", model_files, origin()) for _ in range(2)][1]
    move_alias(bucket, "cells", "production", 2)
    found = [find_model(f"{bucket.uri}/models/{text}")]
    if "/" not in text:
        found.append(find_model(text, str(bucket.uri)))
    for each in found:
        assert each.manifest == published
        assert each.uri == bucket.uri / "models/cells/versions/000002"
        assert (each.folder / "card.md").read_bytes() == (model_files / "card.md").read_bytes()
    assert find_model(str(found[0].folder)) == PulledModel(found[0].folder, published)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("s3://b/models/m", ("s3://b", "m@latest")),
        ("s3://b/a/b/models/m@7", ("s3://b/a/b", "m@7")),
        ("s3://b/models/m/versions/000007", ("s3://b", "m@7")),
        ("s3://b/models/models/m", ("s3://b/models", "m@latest")),
        ("s3://b/m@7", None),
        ("s3://b/othermodels/m", None),
        ("s3://b/models/m/aliases/production.json", None),
    ],
)
def test_where_a_uri_says_a_model_is(text: str, where: tuple[str, str] | None) -> None:
    if where is None:
        with pytest.raises(UsageError, match=r"bucket/models/NAME\[@REF\].*nucleus models list"):
            locate_model(text)
    else:
        found = locate_model(text, "s3://other")
        assert (str(found.bucket), str(found.reference)) == where


def test_a_version_is_fetched_by_its_address(bucket: Bucket, model_files: Path, tmp_path: Path) -> None:
    published = publish(bucket, "m", model_files, origin())
    uri = bucket.uri / version_prefix("m", 1)
    found = pull_uri(uri, tmp_path)
    assert (found.manifest, found.uri) == (published, uri)
    (found.folder / "card.md").write_text("damaged")
    assert (pull_uri(uri, tmp_path).folder / "card.md").read_bytes() == (model_files / "card.md").read_bytes()
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        pull_uri(bucket.uri / "models/m", tmp_path)


def test_a_model_that_is_not_there_names_those_near(bucket: Bucket, model_files: Path) -> None:
    publish(bucket, "cells", model_files, origin())
    with pytest.raises(ModelError, match=r"'cels'.* Did you mean cells\? Run: nucleus models list"):
        resolve_version(bucket, Reference("cels"))


def test_a_damaged_alias_is_named_and_can_be_set_anew(bucket: Bucket, model_files: Path) -> None:
    for _ in range(2):
        publish(bucket, "m", model_files, origin())
    move_alias(bucket, "m", "staging", 1)
    bucket.put("models/m/aliases/production.json", b"{")
    with pytest.raises(ModelError, match=r"production\.json.*nucleus models alias NAME@VERSION ALIAS"):
        list_aliases(bucket, "m")
    warnings: list[str] = []
    assert list_aliases(bucket, "m", warnings.append).keys() == {"staging"}
    assert len(warnings) == 1
    with pytest.raises(ModelError, match="damaged"):
        rollback_alias(bucket, "m", "production")
    assert move_alias(bucket, "m", "production", 2).previous is None
    assert list_aliases(bucket, "m").keys() == {"production", "staging"}


def test_manifests_that_could_not_be_read_again_are_refused() -> None:
    with pytest.raises(ValueError, match="finite number"):
        Origin.model_validate({**origin().model_dump(), "metrics": {"val": {"all": {"iou": float("nan")}}}})


def test_pulls_at_once_share_one_folder(bucket: Bucket, model_files: Path, tmp_path: Path) -> None:
    publish(bucket, "m", model_files, origin())
    target = tmp_path / "cache" / "m"
    with ThreadPoolExecutor(8) as pool:
        manifests = list(pool.map(lambda _: pull(bucket, Reference("m"), target), range(8)))
    assert len({manifest.version for manifest in manifests}) == 1
    assert {path.name for path in target.parent.iterdir()} <= {"m", ".m.lock"}
    assert is_whole(target, manifests[0])
