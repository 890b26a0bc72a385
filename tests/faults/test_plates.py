"""A plate of OME-Zarr in the bucket, predicted on two machines of which one is lost while it writes a result."""

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_allclose

from job.inference import predict_bucket
from nucleus.errors import JobError
from nucleus.predict import image_parts
from nucleus.predict.bucket_images import PredictionSettings
from nucleus.predict.model import load_pulled
from nucleus.registry.versions import read_included
from nucleus.storage.bucket import Bucket
from nucleus.storage.local_server import RunningStore
from nucleus.storage.uri import parse_uri
from tests.data.test_zarr_buckets import uploaded
from tests.faults.proxy import Fault, Proxy, Request, proxied
from tests.predict.test_bucket_images import outcomes_of
from tests.predict.test_predict import spots
from tests.ray_nodes import started_node
from tests.zarr_files import write_image, write_plate

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

WELLS = ("A/1", "A/2", "B/1", "B/2", "C/1", "C/2")
FIELDS = {f"p.zarr/{well}/{field}" for well in WELLS for field in "01"}
"""More than the two workers of the first machine get at a time."""
SECONDS = 600


@pytest.fixture
def settings(bucket: Bucket, tmp_path: Path) -> PredictionSettings:
    """Settings for a plate of twelve fields, and an absent well."""
    plate = write_plate(tmp_path / "p.zarr", wells=(*WELLS, "D/1"), absent=["D/1"], side=8)
    for number, name in enumerate(sorted(FIELDS)):
        field = tmp_path / name
        shutil.rmtree(field)
        write_image(field, spots(64, 60, number, count=4 + number)[np.newaxis], axes="cyx", labels=["DAPI"])
    uploaded(plate, bucket)
    places = {"images": str(bucket.uri / "p.zarr"), "out": str(bucket.uri / "out"), "registry": None}
    return PredictionSettings(model=str(read_included().reference), **places)


def undisturbed(settings: PredictionSettings) -> PredictionSettings:
    """Predict in this process, into another place."""
    there = settings.model_copy(update={"out": f"{settings.out}-undisturbed"})
    found = outcomes_of(there, load_pulled(read_included(), there.options))
    assert [outcome.failure for outcome in found] == [None] * 12
    return there


def tables_of(settings: PredictionSettings, folder: Path) -> list[dict[str, list[object]]]:
    """The two tables of a prediction, by columns."""
    found = []
    for name in ("nuclei.parquet", "images.parquet"):
        path = folder / f"{parse_uri(settings.out).name}-{name}"
        Bucket(parse_uri(settings.out)).download(name, path)
        found.append(pq.read_table(path).to_pydict())
    return found


def is_table(request: Request) -> bool:
    return request.method == "PUT" and "/parts/" in request.path


def tables_sent(line: Proxy) -> list[str]:
    return [request.path for request in line.log if is_table(request)]


@contextmanager
def second_machine(store: RunningStore, cache: Path) -> Iterator[tuple[Proxy, threading.Event]]:
    """A machine of one CPU that gets no answer to its first table; the event says that it has sent one."""
    import ray

    writes = threading.Event()

    def decide(request: Request) -> Fault | None:
        if not is_table(request):
            return None
        writes.set()
        return Fault.STALL

    with proxied(store.port, stall_seconds=float(SECONDS)) as line:
        line.decide = decide
        changes = {"AWS_ENDPOINT_URL_S3": line.endpoint, "XDG_CACHE_HOME": str(cache)}
        address = ray.get_runtime_context().gcs_address
        with started_node(address, 1, changes, cache / "node.log"):
            _wait_for_cpus(3)
            yield line, writes


def _wait_for_cpus(count: int) -> None:
    import ray

    found = threading.Event()
    for _ in range(5 * SECONDS):
        if ray.cluster_resources().get("CPU", 0) >= count:
            return
        found.wait(0.2)
    pytest.fail("the second machine did not join")


@pytest.mark.usefixtures("ray_cluster")
def test_a_machine_that_is_lost_costs_no_field(
    settings: PredictionSettings,
    store: RunningStore,
    cluster_line: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others do what it did not finish; what is done is not done again; the tables are those of a run without loss."""
    monkeypatch.setattr(image_parts, "IMAGES_OF_A_PART", 1)  # in this process, which deals the fields
    cluster_line.log.clear()
    with ThreadPoolExecutor(1) as pool:
        with second_machine(store, tmp_path) as (line, writes):
            # The first machine waits for the second one, so that none of its workers does all fields before that.
            cluster_line.decide = lambda request: writes.wait(SECONDS) and None if is_table(request) else None
            run = pool.submit(predict_bucket, settings, workers=3)
            assert writes.wait(SECONDS)
        try:
            assert set(run.result().counts) == FIELDS
        except JobError:  # as Ray may say, if it gives up the lost worker
            predict_bucket(settings)
    cluster_line.decide = lambda _: None
    again = predict_bucket(settings)
    assert (again.counts, again.failures, again.done_before) == ({}, {}, 12)
    assert [("D/1" in note) for note in again.notes] == [True]
    assert list(again.plates) == ["p"]
    assert len(again.plates["p"]) == 6

    written = Counter(tables_sent(cluster_line))
    assert list(written.values()) == [1] * 12  # each field once, that of the lost machine too
    assert tables_sent(line)
    there = undisturbed(settings)
    for found, expected in zip(tables_of(settings, tmp_path), tables_of(there, tmp_path), strict=True):
        assert found.keys() == expected.keys()
        for column, values in expected.items():
            if any(isinstance(value, float) for value in values):
                assert_allclose(np.array(found[column], float), np.array(values, float), rtol=1e-4, err_msg=column)
            else:
                assert found[column] == values, column
    keys = [f"{parse_uri(each.out).name}/p.plate.png" for each in (settings, there)]
    above = Bucket(parse_uri(settings.out).parent)
    assert above.get(keys[0]) == above.get(keys[1])
