"""Look, correct, teach: a person in a browser, a Ray cluster that trains, and the new version beside the old one.

What is taught is the model that comes along, for a few small steps, so what it then finds is not asserted.
"""

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

import nucleus
from nucleus.data.dataset import locate_dataset, open_dataset
from nucleus.runs.plan import load_plan
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri
from tests.docs.blocks import ROOT
from tests.docs.test_blocks import WITH_THE_PAGE, follow
from tests.faults.proxy import Fault, Proxy, Request
from tests.page.conftest import running_page
from tests.page.test_in_browser import Person

pytestmark = pytest.mark.filterwarnings("default")

RECIPE = """\
model = "{dataset}"
dataset = "{dataset}"
workers = 1
max_failures = 0
cache_dir = "CACHE"

[network]
start = "{model}"

[input]
crop = 64
batch_size = 4

[optimizer]
epochs = 2
steps_per_epoch = 2
validate_every = 1
warmup_steps = 1

[tracking]
wandb = "disabled"
"""


def real_crops(archive: Path, folder: Path, count: int) -> list[Path]:
    """Write the middles of real images that have some nuclei, 128 x 128 px."""
    folder.mkdir()
    model, written = nucleus.load(), []
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in sorted(opened.namelist()) if re.search(r"/images/[^/]+\.png$", name)]
        for name in names:
            image = Image.open(io.BytesIO(opened.read(name))).convert("RGB")
            left, top = image.width // 2 - 64, image.height // 2 - 64
            crop = image.crop((left, top, left + 128, top + 128))
            if model.segment(np.asarray(crop)).count >= 5:
                written.append(folder / f"well {len(written)}.png")
                crop.save(written[-1])
            if len(written) == count:
                break
    return written


def unpublished(request: Request) -> Fault | None:
    """Refuse what publishes a version for now: the page looks every few seconds, and the run is quick."""
    return Fault.SLOW_DOWN if request.method == "PUT" and "/models/cells/" in request.path else None


@pytest.mark.timeout(3000)  # a run, and a dozen commands
def test_look_correct_teach(
    browser: Browser,
    ray_cluster: str,
    cluster_line: Proxy,
    bucket_uri: S3Uri,
    real_images: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "notes").mkdir()
    images = real_crops(real_images, tmp_path / "wells", 5)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("CACHE", str(tmp_path / "cache")))
    environment = {
        **os.environ,
        "NUCLEUS_BUCKET": str(bucket_uri),
        "RAY_ADDRESS": ray_cluster,
        "AWS_ENDPOINT_URL_S3": cluster_line.endpoint,
    }
    with (
        running_page("--recipe", str(recipe), environment=environment) as service,
        Person(browser, service.address) as person,
    ):
        page = person.page
        count = person.drop(*images)
        person.open()
        assert person.count == count == nucleus.load().segment(images[0]).count
        zoom = page.text_content("#scale")
        page.hover("#canvas")
        page.mouse.wheel(0, -200)
        page.wait_for_selector(f"#scale:not(:text-is('{zoom}'))")
        for label in (1, 2):
            person.choose(label)
            person.press("Delete")
        person.press("0")
        person.paint()
        corrected = person.count
        assert person.save("wells").startswith("Saved: revision 1 by Ada")
        page.reload()
        page.wait_for_selector("#table tbody button", state="attached")
        assert person.count == corrected
        for _ in images[1:]:
            page.click("#following")
            page.wait_for_selector("#changes:text-is('No changes that are not saved.')", state="attached")
            assert person.save("wells").startswith("Saved: revision 1 by Ada")

        page.click("#tab-teach")
        cluster_line.decide = unpublished
        page.click("#teach-start")
        page.wait_for_selector("#teach-state:text-matches('cells has 5 images')")
        page.wait_for_selector("#run-state:text-matches('^Trains: [12] of 2')")
        cluster_line.decide = lambda _: None
        assert page.get_attribute("#curve", "aria-label") != ""
        page.wait_for_selector("#run-state:text-matches('^Published as cells@1, after 2 epochs')")
        page.wait_for_selector("#run-gate:text-matches('^production (moved|did not move) to version 1')")
        page.click("#compare")
        page.wait_for_selector("#comparison-text li >> nth=1")
        said = [page.locator("#comparison-text li").nth(number).text_content() or "" for number in range(2)]
        assert re.fullmatch(r"nuclei@\w+ found \d+ nuclei, cells@1 finds \d+\.", said[0])
        assert re.fullmatch(r"\d+ (is|are) the same, \d+ (is|are) no longer found, \d+ (is|are) new\.", said[1])
        page.click("input[value=after]")

        run = page.text_content("#run-name") or ""
        bucket = Bucket(bucket_uri)
        pictures: list[str] = []
        while not pictures:  # the report is written after the version is published
            page.wait_for_timeout(200)
            written = [each.key for each in bucket.objects(f"runs/{run}/report/pictures")]
            pictures = [key for key in written if key.endswith("/image.png")]
        page.goto(f"{service.address}/#/bucket/{pictures[0]}")
        page.wait_for_selector("#image-name:text-is('image.png')")
        page.wait_for_selector("#changes:text-is('No changes that are not saved.')", state="attached")
        assert person.complaints == []

    changes = {"NUCLEUS_BUCKET": str(bucket_uri), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    follow(*WITH_THE_PAGE, tmp_path, ROOT, changes, tmp_path / "notes")
    assert len(list((tmp_path / "results").glob("*.labels.tif"))) == 5

    plan = load_plan(bucket, run)
    assert plan.start is not None
    assert plan.start.version == str(nucleus.load())
    manifest = open_dataset(locate_dataset(plan.dataset)).manifest
    assert sum(sample.nuclei == corrected for sample in manifest.samples) >= 1
    assert len(manifest.samples) == 5
