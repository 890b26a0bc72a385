"""What a prediction of a bucket tells and claims; the batches are predicted here in place of Ray's actors."""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from job import inference
from job.inference import predict_bucket
from nucleus.data.images import encode_png
from nucleus.errors import OutputError
from nucleus.predict import bucket_images
from nucleus.predict.bucket_images import PredictionSettings
from nucleus.predict.image_parts import ImagePart
from nucleus.predict.part_prediction import PartOutcome, PartPredictor
from nucleus.storage.bucket import Bucket
from nucleus.storage.claims import claimed_prefix
from tests.predict.test_predict import small_model, spots


@pytest.fixture
def settings(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> PredictionSettings:
    """Settings of two images, one of which has an odd key, and a damaged one."""
    whole = encode_png(spots(60, 70, 7, count=8))
    for key, data in {"a/b.png": whole, "a//b.png": b"another", "broken.png": b"no image"}.items():
        bucket._client.put_object(Bucket=bucket.uri.bucket, Key=f"{bucket.uri.key}/images/{key}", Body=data)
    places = {"images": str(bucket.uri / "images"), "out": str(bucket.uri / "out"), "registry": str(bucket.uri)}
    found = PredictionSettings(model="m@1", **places)

    def here(
        parts: Iterable[tuple[int, ImagePart]], _: Callable[[], object], **__: object
    ) -> Iterator[tuple[int, PartOutcome]]:
        worker = PartPredictor(found, small_model())
        yield from ((number, worker.predict(part)) for number, part in parts)

    monkeypatch.setattr(inference, "map_on_cluster", here)
    return found


def test_odd_keys_are_told_and_the_others_predicted(
    settings: PredictionSettings, bucket: Bucket, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    found = predict_bucket(settings, advance=lambda done, total: steps.append((done, total)))
    assert list(found.counts) == ["a/b.png"]
    assert list(found.failures) == ["a//b.png", "broken.png"]
    assert found.done_before == 0
    assert steps[-1] == (3, 3)
    bucket.download("out/images.parquet", tmp_path / "images.parquet")
    assert pq.read_table(tmp_path / "images.parquet")["image"].to_pylist() == ["a/b.png"]
    again = predict_bucket(settings)
    assert (again.counts, list(again.failures), again.done_before) == ({}, ["a//b.png", "broken.png"], 1)


def test_a_prefix_with_odd_keys_only(settings: PredictionSettings, bucket: Bucket) -> None:
    for key in ("images/a/b.png", "images/broken.png"):
        bucket.delete(key)
    found = predict_bucket(settings)
    assert (found.counts, list(found.failures)) == ({}, ["a//b.png"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_prediction_is_refused_while_one_runs(
    overwrite: bool, settings: PredictionSettings, bucket: Bucket
) -> None:
    with (
        claimed_prefix(Bucket(bucket.uri / "out"), "prediction.claim.json"),
        pytest.raises(OutputError, match=f"process {os.getpid()} on "),
    ):
        predict_bucket(settings, overwrite=overwrite)
    assert [item.key for item in bucket.objects("out/")] == ["out/prediction.claim.json"]
    assert predict_bucket(settings, overwrite=overwrite).counts


def test_of_many_images_the_numbers_are_told(
    settings: PredictionSettings, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names are in the tables alone: no process holds those of a million."""
    bucket.put("images/a/c.png", bucket.get("images/a/b.png"))
    monkeypatch.setattr(inference, "IMAGES_OF_A_TABLE", 1)
    monkeypatch.setattr(bucket_images, "MOST_MESSAGES", 1)
    many = predict_bucket(settings)
    table = pq.read_table(io.BytesIO(bucket.get("out/nuclei.parquet")))
    assert (many.counts, many.images, many.nuclei) == (None, 2, table.num_rows)
    assert (len(many.failures), many.failed) == (1, 2)
