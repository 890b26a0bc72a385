"""What the tests share: one S3 server and one Ray cluster a session, an empty bucket prefix and generated images."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nucleus.data.generated import write_generated
from nucleus.storage import server
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri, parse_uri

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.RunningStore]:
    """The embedded S3 server, reached through the SDK's variables as any other."""
    folder = tmp_path_factory.mktemp("store")
    running = server.start(folder, 0)
    server.make_bucket(running)
    before = dict(os.environ)
    os.environ.update(server.environment(running))
    yield running
    os.environ.clear()
    os.environ.update(before)
    server.stop(folder)


@pytest.fixture
def bucket_uri(store: server.RunningStore) -> S3Uri:  # noqa: ARG001
    """An empty prefix in the bucket."""
    return parse_uri("s3://nucleus") / f"t-{uuid.uuid4().hex[:10]}"


@pytest.fixture
def bucket(bucket_uri: S3Uri) -> Bucket:
    """The objects below an empty prefix."""
    return Bucket(bucket_uri)


@pytest.fixture(scope="session")
def dozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen generated images in Kaggle's layout, 96 px."""
    folder = tmp_path_factory.mktemp("dozen")
    write_generated(folder, 12, side=96)
    return folder


@pytest.fixture(scope="session")
def ray_cluster(store: server.RunningStore) -> Iterator[None]:  # noqa: ARG001
    """A local Ray cluster of two CPUs, started after the store so that workers see its variables."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The real images, where they are at hand."""
    path = SHARED / "data" / "dsb2018" / "stage1_train.zip"
    if not path.exists():
        pytest.skip("the DSB2018 images are not at hand (shared/data/dsb2018)")
    return path


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """Pretrained MobileNetV2 weights, where they are at hand."""
    path = SHARED / "weights" / "mobilenet_v2_1.0_imagenet_no_top.weights.h5"
    if not path.exists():
        pytest.skip("the MobileNetV2 weights are not at hand (shared/weights)")
    return path
