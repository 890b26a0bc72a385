"""Shared fixtures: one S3 server, Ray cluster and trained run per session; marks of tests by the fixtures they use."""

import os
import secrets
import shutil
import signal
import sys
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from nucleus.data.synthetic import write_generated
from nucleus.storage import local_server as server
from nucleus.storage.bucket import Bucket
from nucleus.storage.retries import DEFAULT_STORAGE_TIMEOUT, set_storage_timeout
from nucleus.storage.uri import S3Uri, parse_uri
from tests.faults.proxy import Proxy, proxied
from tests.ray_nodes import started_head
from tests.small_model import write_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.whole_way import Trained

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["RAY_AUTH_MODE"] = "token"  # Ray looks at both once, when it is imported
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("WANDB_X_SERVICE_WAIT", "600")  # W&B waits 30 s for its own process, and fails then
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:  # as in the background or under nohup; children would ignore it too
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)
settings.register_profile("suite", deadline=None, derandomize=True, database=None)  # the same examples on every machine
settings.load_profile("suite")

SECRET = f"marked{secrets.token_hex(17)}"
"""Key of the S3 server and of W&B (40 characters, like real ones), which must not appear anywhere."""

SHARED = Path(__file__).resolve().parents[2] / "shared"

BROWSER_MS = 900_000
"""Ends what hangs: a browser of low priority waits for minutes on a busy machine; Playwright gives up after 30 s."""

LANES = {
    "ray": {"ray_cluster", "open_cluster"},
    "server": {"store", "browser", "jupyter_home", "exported", "room", "mypy_folder", "resolve", "zoo"},
}
"""Marks, and the fixtures that give them to a test, directly or through another fixture."""


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that uses a Ray cluster (`ray`), or a server or a program that takes long to start (`server`)."""
    for item in items:
        for mark, fixtures in LANES.items():
            if fixtures & set(getattr(item, "fixturenames", ())):
                item.add_marker(mark)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium, as Debian has it, for one file: while Playwright runs, nothing else in this thread can use asyncio."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-headless-shell")
    if path is None:
        missing = "Expected chromium on the PATH; found none. On Debian run: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=BROWSER_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.RunningStore]:
    """The embedded S3 server, named by the environment variables of the AWS SDK."""
    folder = tmp_path_factory.mktemp("store")
    running = server.start(folder, 0)
    server.make_bucket(running)
    before = dict(os.environ)
    os.environ.update(server.environment(running))
    os.environ["AWS_SECRET_ACCESS_KEY"] = os.environ["WANDB_API_KEY"] = SECRET
    yield running
    os.environ.clear()
    os.environ.update(before)
    server.stop(folder)


@pytest.fixture(autouse=True)
def _storage_timeout() -> Iterator[None]:
    """Reset the storage timeout after each test."""
    yield
    set_storage_timeout(DEFAULT_STORAGE_TIMEOUT)


@pytest.fixture
def bucket_uri(store: server.RunningStore) -> S3Uri:  # noqa: ARG001
    """An empty prefix in the bucket."""
    return parse_uri("s3://nucleus") / f"t-{uuid.uuid4().hex[:10]}"


@pytest.fixture
def bucket(bucket_uri: S3Uri) -> Bucket:
    """The bucket at an empty prefix."""
    return Bucket(bucket_uri)


@pytest.fixture
def model_files(tmp_path: Path) -> Path:
    """A folder of files that can be published as a model."""
    return write_model(tmp_path / "model")


@pytest.fixture(scope="session")
def dozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen generated images in Kaggle's layout, 96 px."""
    folder = tmp_path_factory.mktemp("dozen")
    write_generated(folder, 12, side=96)
    return folder


@pytest.fixture(scope="session")
def cluster_line(store: server.RunningStore) -> Iterator[Proxy]:
    """The proxy between the cluster and the S3 server; a test may set its `decide`."""
    with proxied(store.port, stall_seconds=5.0, secret=SECRET.encode()) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def cluster_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XDG_CACHE_HOME of the cluster's workers."""
    return tmp_path_factory.mktemp("cluster-cache")


@pytest.fixture(scope="session")
def ray_cluster(cluster_line: Proxy, cluster_cache: Path) -> Iterator[str]:
    """The dashboard of a Ray cluster of two CPUs that asks for a token and reaches S3 through `cluster_line`."""
    import ray

    settings = {
        "AWS_ENDPOINT_URL_S3": cluster_line.endpoint,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where jobs find `python`
        "XDG_CACHE_HOME": str(cluster_cache),
    }
    with started_head(2, settings) as (address, dashboard):
        ray.init(address=address, log_to_driver=False, logging_level="error")
        yield dashboard
        ray.shutdown()


@pytest.fixture(scope="session")
def trained(
    ray_cluster: str,  # noqa: ARG001
    cluster_line: Proxy,
    dozen: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> "Trained":
    """One training run, from import to the pulled version."""
    from tests.whole_way import trained_with_least_rights

    return trained_with_least_rights(cluster_line, dozen, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The real images; the test is skipped without them."""
    path = SHARED / "data" / "dsb2018" / "stage1_train.zip"
    if not path.exists():
        pytest.skip("no DSB2018 images in shared/data/dsb2018")
    return path


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """Pretrained MobileNetV2 weights; the test is skipped without them."""
    path = SHARED / "weights" / "mobilenet_v2_1.0_imagenet_no_top.weights.h5"
    if not path.exists():
        pytest.skip("no MobileNetV2 weights in shared/weights")
    return path


def holding(folder: Path, mark: bytes) -> list[Path]:
    """The files below a folder, in archives too, that hold a text."""
    found = []
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # Ray's logs turn over
            continue
        if mark in data or (zipfile.is_zipfile(path) and any(mark in part for part in unpacked(path))):
            found.append(path)
    return found


def unpacked(path: Path) -> Iterable[bytes]:
    with zipfile.ZipFile(path) as archive:
        return [archive.read(name) for name in archive.namelist()]
