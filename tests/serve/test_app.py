"""The API: the numbers of the command, in each form; what it says of itself; and what wrong requests are told."""

import csv
import errno
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from nucleus.cli.main import cli
from nucleus.data.images import read_stored
from nucleus.errors import IntegrityError, JobError, NucleusError
from nucleus.serve.problems import PROBLEM, problem_of
from nucleus.storage.bucket import Bucket
from tests.serve.conftest import Connect


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def as_csv(row: dict[str, Any], columns: list[str]) -> dict[str, str]:
    """A row of the API as the command writes it."""
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="").writerow(row)
    return dict(zip(columns, next(csv.reader([text.getvalue()])), strict=True))


def test_the_numbers_are_those_of_the_command(connect: Connect, pictures: Path, tmp_path: Path) -> None:
    """Tables, labels and outlines of each kind of image are the same as in the files of `nucleus predict`."""
    formats = ("--format", "labels", "--format", "geojson")
    command = ["predict", str(pictures), "--out", str(tmp_path), "--z", "max", "--engine", "onnx", *formats]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    nuclei, images = rows_of(tmp_path / "nuclei.csv"), rows_of(tmp_path / "images.csv")
    client = connect()
    for path in sorted(pictures.iterdir()):
        query = f"?z=max&name={path.name}"
        found = client.post(path.read_bytes(), query).json()
        expected = [row for row in nuclei if row["image"] == path.name]
        assert len(expected) > 5
        assert [as_csv(row, list(expected[0])) for row in found["table"]] == expected
        assert [as_csv(row, list(images[0])) for row in found["images"]] == [
            row for row in images if row["image"] == path.name
        ]
        assert (found["nuclei"], found["width"], found["height"]) == (len(expected), 192, 160)
        labels = tifffile.imread(tmp_path / f"{path.stem}.labels.tif")
        tiff = client.post(path.read_bytes(), query, "image/tiff")
        assert tiff.headers["content-type"] == "image/tiff"
        np.testing.assert_array_equal(tifffile.imread(io.BytesIO(tiff.content)), labels)
        png = client.post(path.read_bytes(), query, "image/png")
        np.testing.assert_array_equal(read_stored(png.content, "labels.png").pixels[..., 0], labels)
        assert (png.headers["nucleus-count"], png.headers["nucleus-model"]) == (str(len(expected)), found["model"])
        outlines = client.post(path.read_bytes(), query, "application/geo+json").json()
        written = json.loads((tmp_path / f"{path.stem}.geojson").read_text())
        assert [each["geometry"] for each in outlines["features"]] == [each["geometry"] for each in written["features"]]


def test_real_images_have_the_numbers_of_the_command(connect: Connect, real_images: Path, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(real_images) as archive:
        names = sorted(name for name in archive.namelist() if "/images/" in name and name.endswith(".png"))[::200]
        for name in names:
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / Path(name).name).write_bytes(archive.read(name))
    command = ["predict", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--engine", "onnx"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    nuclei = rows_of(tmp_path / "out" / "nuclei.csv")
    client = connect()
    for path in sorted((tmp_path / "in").iterdir()):
        found = client.post(path.read_bytes(), f"?name={path.name}").json()
        expected = [row for row in nuclei if row["image"] == path.name]
        assert [as_csv(row, list(nuclei[0])) for row in found["table"]] == expected


def test_options_are_those_of_the_command(connect: Connect, pictures: Path, tmp_path: Path) -> None:
    options = {"diameter": "25", "pixel-size": "0.5", "channel": "1"}
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [
        "predict",
        str(pictures / "plain.png"),
        "--out",
        str(tmp_path),
        "--engine",
        "onnx",
        "--tta",
        "--as-is",
        *given,
    ]
    assert CliRunner().invoke(cli, command).exit_code == 0
    query = "&".join(f"{name}={value}" for name, value in options.items())
    found = connect().post((pictures / "plain.png").read_bytes(), f"?{query}&tta=true&as-is=true&name=plain.png").json()
    expected = rows_of(tmp_path / "nuclei.csv")
    assert [as_csv(row, list(expected[0])) for row in found["table"]] == expected
    assert found["images"][0]["pixel_size_um"] == 0.5


def test_each_plane_of_a_stack(connect: Connect, pictures: Path) -> None:
    """JSON and GeoJSON have the nuclei of all planes; labels are those of one image, so they need a choice."""
    client, data = connect(), (pictures / "stack.tif").read_bytes()
    found = client.post(data, "?z=all").json()
    assert [image["z"] for image in found["images"]] == [0, 1, 2]
    assert found["nuclei"] == len(found["table"]) == sum(image["nuclei"] for image in found["images"])
    features = client.post(data, "?z=all", "application/geo+json").json()["features"]
    assert [each["geometry"]["plane"]["z"] for each in features] == [row["z"] for row in found["table"]]
    refused = client.post(data, "?z=all", "image/tiff")
    assert (refused.status_code, "z and t" in refused.json()["detail"]) == (422, True)
    alone = client.post(data, "?z=1").json()
    assert alone["table"] == [row for row in found["table"] if row["z"] == 1]


def test_forms_and_names(connect: Connect, small_png: bytes) -> None:
    client = connect()

    def form(**how: Any) -> Any:
        return client.runner.run(client.ask("POST", "/v1/segment", **how))

    found = form(files={"anything": ("../../etc/a b.png", small_png)}).json()
    assert {row["image"] for row in found["table"]} == {"a b.png"}
    assert found["table"] == client.post(small_png, "?name=a%20b.png").json()["table"]
    for wrong in ({"data": {"diameter": "20"}, "files": {"file": small_png}}, {"files": [("a", b"1"), ("b", b"2")]}):
        refused = form(**wrong)
        assert (refused.status_code, "query" in refused.json()["detail"]) == (400, True)


def test_large_uploads_lie_in_a_folder_that_is_deleted(
    connect: Connect, small_png: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raw bodies and forms give the same result from a file as from memory; nothing stays, and no path is told."""
    client = connect()
    expected = client.post(small_png, "?name=x.png").json()["table"]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("nucleus.serve.bodies._IN_MEMORY", 100)
    assert client.post(small_png, "?name=x.png").json()["table"] == expected
    formed = client.runner.run(client.ask("POST", "/v1/segment", files={"file": ("x.png", small_png)}))
    assert formed.json()["table"] == expected
    damaged = client.post(small_png[:900] + b"0" * 300, "?name=x.png")
    assert (damaged.status_code, "x.png" in damaged.text, str(tmp_path) in damaged.text) == (422, True, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "application/json"),
        ("", "application/json"),
        ("image/*", "image/tiff"),
        ("image/png, image/tiff;q=0.9", "image/png"),
        ("application/json;q=0, */*", "application/geo+json"),
        ("text/html, application/geo+json;q=0.1", "application/geo+json"),
        ("text/html", None),
        ("application/json;q=0", None),
    ],
)
def test_the_form_of_the_answer(connect: Connect, small_png: bytes, accept: str, expected: str | None) -> None:
    answer = connect().post(small_png, accept=accept)
    kind = answer.headers["content-type"].partition(";")[0]
    assert (answer.status_code, kind) == ((200, expected) if expected else (406, PROBLEM))


@pytest.mark.parametrize(
    ("query", "content", "status", "word"),
    [
        ("?diametre=20", None, 400, "diametre"),
        ("?diameter=20&diameter=30", None, 400, "'diameter' more than once"),
        ("?diameter=20&diam%65ter=30", None, 400, "'diameter' more than once"),
        ("?" + "&".join(map(str, range(101))), None, 400, "at most 100"),
        ("?diameter=0", None, 400, "diameter"),
        ("?diameter=nan", None, 400, "diameter"),
        ("?pixel-size=1e-300", None, 400, "pixel-size"),
        ("?pixel-size=1e300", None, 400, "pixel-size"),
        ("?z=lots", None, 400, "lots"),
        ("?channel=7", None, 422, "7"),
        ("?channel=" + "9" * 5000, None, 400, "channel"),
        ("?name=" + "n" * 201, None, 400, "name"),
        ("?name=" + "%C3%A9" * 150, None, 400, "200 bytes"),
        ("?uri=s3://bucket/a.png", b"", 400, "--images"),
        ("", b"", 422, "0 bytes"),
        ("", b"GIF89a", 422, "GIF"),
        ("?diameter=0.01", None, 422, "--diameter"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(
    connect: Connect, small_png: bytes, query: str, content: bytes | None, status: int, word: str
) -> None:
    answer = connect().post(small_png if content is None else content, query)
    problem = answer.json()
    assert (answer.status_code, problem["status"], answer.headers["content-type"]) == (status, status, PROBLEM)
    assert problem["detail"].startswith("Expected ")
    assert word in problem["detail"]


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=x"])
def test_a_body_that_is_no_form(connect: Connect, small_png: bytes, kind: str) -> None:
    answer = connect().post(small_png, **{"content-type": kind})
    assert (answer.status_code, answer.json()["detail"][:9]) == (400, "Expected ")


def test_a_compressed_body(connect: Connect, small_png: bytes) -> None:
    answer = connect().post(gzip.compress(small_png), **{"content-encoding": "gzip"})
    assert (answer.status_code, "'gzip'" in answer.json()["detail"]) == (415, True)


def test_accept_in_several_lines(connect: Connect, small_png: bytes) -> None:
    client = connect()
    lines = [("accept", "text/html"), ("accept", "image/png")]
    answer = client.runner.run(client.ask("POST", "/v1/segment", content=small_png, headers=lines))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")


def test_too_many_nuclei_for_png(connect: Connect, small_png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nucleus.serve.representations._MOST_LABELS", 0)
    answer = connect().post(small_png, accept="image/png")
    assert (answer.status_code, "image/tiff" in answer.json()["detail"]) == (422, True)


def test_what_the_service_says_of_itself(connect: Connect, small_png: bytes) -> None:
    client = connect()
    assert (client.get("/healthz").status_code, client.get("/readyz").status_code) == (200, 200)
    (model,) = client.get("/v1/models").json()["models"]
    assert (model["model"].startswith("nuclei@"), model["state"]) == (True, "serving")
    found = client.post(small_png).json()
    client.get("/nowhere")
    lines = client.get("/metrics").text.splitlines()
    assert 'nucleus_requests_total{method="POST",route="/v1/segment",status="200"} 1.0' in lines
    assert 'nucleus_requests_total{method="GET",route="other",status="404"} 1.0' in lines
    assert {"nucleus_pixels_total 9216.0", f"nucleus_nuclei_total {found['nuclei']}.0", "nucleus_queue 0.0"} <= {*lines}
    client.service.leaving = True
    assert (client.get("/healthz").status_code, client.get("/readyz").status_code) == (200, 503)
    assert client.post(small_png).status_code == 503


def test_head_and_other_methods(connect: Connect) -> None:
    """HEAD has the headers of GET, and is counted as itself; an address with a slash too many is no redirect."""
    client = connect()

    def status(method: str, path: str) -> int:
        return int(client.runner.run(client.ask(method, path)).status_code)

    for path in ("/healthz", "/readyz", "/v1/models", "/metrics", "/openapi.json"):
        assert (status("HEAD", path), status("PUT", path), status("GET", f"{path}/")) == (200, 405, 404)
    assert (status("HEAD", "/v1/segment"), status("POST", "/v1/segment/")) == (405, 404)
    lines = client.get("/metrics").text.splitlines()
    assert 'nucleus_requests_total{method="HEAD",route="/v1/models",status="200"} 1.0' in lines


def test_the_description_is_of_openapi_3_1(connect: Connect) -> None:
    described = connect().get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    segment = described["paths"]["/v1/segment"]["post"]
    assert {each["name"] for each in segment["parameters"]} == {
        *("name", "uri", "diameter", "pixel-size", "channel", "z", "t", "tta", "as-is", "denoise")
    }
    assert {"application/json", "application/geo+json", "image/tiff", "image/png"} == {
        *segment["responses"]["200"]["content"]
    }
    assert "image/*" in segment["requestBody"]["content"]


def test_images_in_a_bucket(connect: Connect, bucket: Bucket, small_png: bytes) -> None:
    """Only below the prefixes of `--images`, and within the limit of bytes."""
    bucket.put("in/a.png", small_png)
    bucket.put("inside/b.png", small_png)
    client = connect(images=(f"{bucket.uri}/in",))
    expected = client.post(small_png, "?name=a.png").json()["table"]
    assert client.post(b"", f"?uri={bucket.uri}/in/a.png").json()["table"] == expected
    body = json.dumps({"uri": f"{bucket.uri}/in/a.png"})
    assert client.post(body, **{"content-type": "application/json"}).json()["table"] == expected
    assert client.post(b"", f"?uri={bucket.uri}/inside/b.png").status_code == 400
    assert client.post(b"", f"?uri={bucket.uri}/in/none.png").status_code == 404
    assert client.post(small_png, f"?uri={bucket.uri}/in/a.png").status_code == 400
    twice = f'{{"uri": "{bucket.uri}/in/none.png", "uri": "{bucket.uri}/in/a.png"}}'
    for wrong in ("{}", twice, "[" * 100_000):
        assert client.post(wrong, **{"content-type": "application/json"}).status_code == 400
    other = client.post(body, f"?uri={bucket.uri}/in/none.png", **{"content-type": "application/json"})
    assert (other.status_code, "found both" in other.json()["detail"]) == (400, True)
    small = connect(images=(str(bucket.uri),), max_bytes=100)
    assert small.post(b"", f"?uri={bucket.uri}/in/a.png").status_code == 413


def test_an_error_of_the_service_tells_nothing_of_it(connect: Connect, small_png: bytes) -> None:
    class Broken:
        async def segment(self, _ticket: object) -> Any:
            raise RuntimeError("secret of /srv/here")

        def close(self) -> None:
            pass

    answer = connect(Broken()).post(small_png)
    assert (answer.status_code, "secret" in answer.text, answer.headers["content-type"]) == (500, False, PROBLEM)


def test_a_full_disk(connect: Connect) -> None:
    """Also where a route of another module writes, such as the page's."""
    client = connect()

    @client.app.get("/full")
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/var/secret/file")

    answer = client.get("/full")
    assert (answer.status_code, answer.headers["content-type"], "secret" in answer.text) == (507, PROBLEM, False)
    assert answer.json()["detail"].startswith("Expected room to write file; found none")


@pytest.mark.parametrize(("error", "status"), [(IntegrityError, 502), (JobError, 404)])
def test_what_is_stored_is_no_error_of_the_service(error: type[NucleusError], status: int) -> None:
    assert problem_of(error("Expected something else.")).status_code == status


def test_requests_at_once_are_not_mixed_up(connect: Connect, pictures: Path, small_png: bytes) -> None:
    """Each of many requests at once gets the answer of its own image, options and name."""
    import asyncio

    client = connect()
    asked = [(small_png, f"?name={n}.png&diameter={20 + n % 3}") for n in range(12)]
    asked += [((pictures / "deep.tif").read_bytes(), f"?name=d{n}.tif") for n in range(4)]
    alone = [client.post(data, query).json()["table"] for data, query in asked]

    async def together() -> list[Any]:
        calls = (client.ask("POST", f"/v1/segment{query}", content=data) for data, query in asked)
        return [answer.json()["table"] for answer in await asyncio.gather(*calls)]

    found = client.runner.run(together())
    assert [[row["image"] for row in rows] for rows in found] == [[row["image"] for row in rows] for rows in alone]
    assert [[row["area"] for row in rows] for rows in found] == [[row["area"] for row in rows] for rows in alone]
