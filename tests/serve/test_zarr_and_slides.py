"""OME-Zarr in a bucket and whole slides: the numbers of the command, and the limits before a pixel is read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nucleus.cli.main import cli
from nucleus.data.synthetic import generated_image
from nucleus.data.zarr_planes import PlaneReader
from nucleus.storage.bucket import Bucket
from tests.serve.conftest import Client, Connect
from tests.serve.test_app import as_csv, rows_of
from tests.slide_files import write_dicom, write_mirax, write_svs
from tests.zarr_files import write_image, write_plate


def uploaded(bucket: Bucket, folder: Path) -> str:
    """The URI of a copy of a folder in the bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.put(f"in/{path.relative_to(folder.parent).as_posix()}", path)
    return f"{bucket.uri}/in/{folder.name}"


def commanded(path: Path, out: Path, *options: str) -> list[dict[str, str]]:
    """The rows of `nucleus predict`."""
    done = CliRunner().invoke(cli, ["predict", str(path), "--out", str(out), "--engine", "onnx", *options])
    assert done.exit_code == 0, done.output
    return rows_of(out / "nuclei.csv")


def check_numbers(found: dict[str, Any], expected: list[dict[str, str]]) -> None:
    assert len(expected) > 3
    assert [as_csv(row, list(expected[0])) for row in found["table"]] == expected


def refused(client: Client, status: int, *said: str, content: bytes = b"", query: str = "") -> None:
    answer = client.post(content, query)
    assert answer.status_code == status, answer.text[:300]
    assert [word for word in said if word not in answer.json()["detail"]] == []


def test_zarr(connect: Connect, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of OME-Zarr, and a field of a plate; too many pixels, and too many images, are refused unread."""
    grey = np.stack([generated_image(seed, 128, 96)[0][..., 1] for seed in (3, 4)])[None, None]
    image = write_image(tmp_path / "a.ome.zarr", grey, labels=("DAPI",))
    plate = write_plate(tmp_path / "p.zarr", 2)
    client = connect(images=(f"{bucket.uri}/in",), max_pixels=2 * 128 * 96)
    uri = uploaded(bucket, image)
    found = client.post(b"", f"?uri={uri}&z=max&channel=DAPI").json()
    check_numbers(found, commanded(image, tmp_path / "out", "--z", "max", "--channel", "DAPI"))
    assert found["images"][0]["image"] == "a.ome.zarr"
    wells = uploaded(bucket, plate)
    fields = [client.post(b"", f"?uri={wells}{path}&channel=0").json()["images"] for path in ("", "/B/3", "/B/3/1")]
    assert [[row["image"] for row in rows] for rows in fields] == [
        ["p.zarr/A/1/0", "p.zarr/A/1/1", "p.zarr/B/3/0", "p.zarr/B/3/1"],
        ["p.zarr/B/3/0", "p.zarr/B/3/1"],
        ["p.zarr/B/3/1"],
    ]
    assert (fields[2][0]["row"], fields[2][0]["column"], fields[2][0]["field"]) == ("B", "3", "1")
    monkeypatch.setattr(PlaneReader, "read", lambda *_: pytest.fail("pixels were read"))
    monkeypatch.setattr(PlaneReader, "fill", lambda *_: pytest.fail("pixels were read"))
    small = connect(images=(f"{bucket.uri}/in",), max_pixels=2 * 128 * 96 - 1)
    refused(small, 413, "24,576", query=f"?uri={uri}&z=all&channel=0")
    monkeypatch.setattr("nucleus.serve.uploads._MOST_IMAGES", 3)
    refused(client, 413, "found 4", f"{wells}/A/1/0", query=f"?uri={wells}&channel=0")
    refused(client, 422, "nothing of Zarr", query=f"?uri={bucket.uri}/in/none.zarr")
    refused(client, 400, "--images", query=f"?uri={bucket.uri}/other/a.zarr")
    refused(client, 400, "Expected", query=f"?uri={bucket.uri}/in/a.zarr/../../other/b.zarr")


def test_slides(connect: Connect, bucket: Bucket, tmp_path: Path) -> None:
    """An Aperio slide as a body and by its URI, without its label; slides of several files are refused."""
    slide = write_svs(tmp_path / "a.svs", generated_image(3, 256, 320)[0])
    expected = commanded(slide, tmp_path / "out")
    client = connect(images=(f"{bucket.uri}/in",), max_pixels=256 * 320)
    bucket.put("in/a.svs", slide)
    for content, query in ((slide.read_bytes(), "?name=a.svs"), (b"", f"?uri={bucket.uri}/in/a.svs")):
        found = client.post(content, query).json()
        check_numbers(found, expected)
        assert found["images"][0]["pixel_size_um"] == 0.25
    refused(connect(max_pixels=256 * 320 - 1), 413, "81,920", content=slide.read_bytes())
    mirax = write_mirax(tmp_path / "b.mrxs", generated_image(3, 256, 256)[0])
    refused(client, 415, "b.mrxs", "TIFF", content=mirax.read_bytes(), query="?name=b.mrxs")
    dicom = write_dicom(tmp_path / "d", generated_image(3, 256, 256)[0])
    refused(client, 415, "several files", content=dicom.read_bytes())
