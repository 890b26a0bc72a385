"""The page in headless Chromium: what a person does with it, what two do at once, and what a killed service leaves."""

import base64
import csv
import os
import re
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import APIResponse, Browser, BrowserContext, Page, Route

import nucleus
from nucleus.data.images import encode_png
from nucleus.data.intake import read_items, read_source
from nucleus.data.synthetic import generated_image
from nucleus.page.corrections import BucketPlace, CorrectionSet
from nucleus.progress import no_progress
from nucleus.storage.bucket import Bucket
from nucleus.storage.local_server import RunningStore
from nucleus.storage.uri import S3Uri
from tests.conftest import BROWSER_MS
from tests.faults.proxy import Fault, Request, proxied
from tests.page.conftest import RunningPage, published_run, running_page
from tests.zarr_files import write_image

_WIDE = {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def corrections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "Ada's corrections"


@pytest.fixture(scope="module")
def service(corrections: Path) -> Iterator[RunningPage]:
    environment = {name: value for name, value in os.environ.items() if name != "NUCLEUS_BUCKET"}
    with running_page("--corrections", str(corrections), environment=environment) as running:
        yield running


class Person:
    """Somebody with a browser of their own."""

    def __init__(self, browser: Browser, address: str, name: str = "Ada", **options: object) -> None:
        self.context: BrowserContext = browser.new_context(**{"viewport": _WIDE, "reduced_motion": "reduce", **options})  # type: ignore[arg-type]
        self.context.set_default_timeout(BROWSER_MS)
        self.name = name
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.address = address
        self.page.goto(address)
        self.page.wait_for_selector("body[data-ready]")

    def __enter__(self) -> "Person":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def drop(self, *images: Path) -> int:
        """Drop images on the page; return the count of the first when all are done."""
        make = """(files) => { const dropped = new DataTransfer();
            for (const [name, data] of files) {
                const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
                dropped.items.add(new File([bytes], name));
            } return dropped; }"""
        data = [[image.name, base64.b64encode(image.read_bytes()).decode()] for image in images]
        self.page.dispatch_event("#drop", "drop", {"dataTransfer": self.page.evaluate_handle(make, data)})
        for place in range(1, len(images) + 1):
            self.page.wait_for_selector(f"#images li:nth-child({place}) a")
        return int(self.page.text_content("#images li strong") or "")

    def open(self) -> None:
        """Open the image."""
        self.page.click("#images li a")
        self.page.wait_for_selector("#table tbody button")

    @property
    def pending(self) -> str:
        """What the page says of changes."""
        return self.page.text_content("#changes") or ""

    @property
    def count(self) -> int:
        return int(self.page.text_content("#count") or "")

    def choose(self, label: int) -> None:
        """Click a row of the table, so that the image shows its nucleus; then give the image the focus."""
        self.page.click("#tab-nuclei")
        self.page.click(f"#table button[data-label='{label}']")
        self.page.focus("#canvas")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def paint(self) -> None:
        """Paint a nucleus by keyboard, in the middle of what is seen."""
        self.press("b", "Space", "Space", "ArrowRight", "ArrowRight", "ArrowDown", "Space")

    def save(self, into: str) -> str:
        """Save the image; return what the page says."""
        self.page.click("#tab-save")
        self.page.fill("#set", into)
        self.page.fill("#who", self.name)
        self.page.click("#save-button")
        self.page.wait_for_selector("#saved:text-matches('^(Saved: |The |Expected)'), #conflict:not([hidden])")
        conflict = self.page.is_visible("#conflict")
        return (self.page.text_content("#conflict-text" if conflict else "#saved")) or ""


def test_keys_before_an_image_is_open(browser: Browser, service: RunningPage, page_image: Path) -> None:
    with Person(browser, service.address) as person:
        person.drop(page_image)
        held: list[Route] = []
        person.page.route("**/layers/found/outlines", lambda route: held.append(route))  # noqa: PLW0108  playwright marks it
        person.page.click("#images li a")
        person.page.wait_for_selector("#status:text-is('Opening …')")
        person.page.focus("#canvas")
        person.press("ArrowRight", "Space", "Space", "0", "+")
        person.page.mouse.wheel(0, -300)
        person.page.click("#canvas")
        while not held:
            person.page.wait_for_timeout(20)
        held[0].continue_()
        person.page.wait_for_selector("#table tbody button")
        assert person.complaints == []


def test_a_refused_token_is_told_and_asked_for_again(browser: Browser, service: RunningPage) -> None:
    def answered(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"detail": "Expected the token"})

    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(BROWSER_MS)
        page.route("**/page/api/session", answered)
        page.goto(service.address)
        page.wait_for_selector("#token")
        assert not page.is_visible("#token-refused")
        page.fill("#token", "wrong 中")  # no header takes that
        page.click("#token-form button")
        page.wait_for_selector("#token-refused:text-is('Expected the token')")
        page.fill("#token", " right ")
        page.click("#token-form button")
        page.wait_for_selector("body[data-ready]")


def test_a_person_corrects_an_image(
    browser: Browser, service: RunningPage, page_image: Path, corrections: Path, tmp_path: Path
) -> None:
    with Person(browser, service.address) as person:
        page = person.page
        found = nucleus.load().segment(page_image)
        assert person.drop(page_image) == found.count > 3
        person.open()
        zoom = page.text_content("#scale")
        page.hover("#canvas")
        page.mouse.wheel(0, -300)
        page.wait_for_selector(f"#scale:not(:text-is('{zoom}'))")

        person.choose(2)
        assert "Nucleus 2" in (page.text_content("#status") or "")
        person.press("Delete")
        assert person.count == found.count - 1
        person.press("0")
        person.paint()
        painted = page.text_content("#status") or ""
        assert painted.startswith(("Painted nucleus", "Added to nucleus"))
        person.press("Escape", "v", "n", "e", "Control+z", "Control+Shift+z")
        after = person.count
        page.click("#tab-save")
        pending = page.text_content("#changes")
        assert "Not saved yet: 1 removed" in (pending or "")

        page.reload()
        page.wait_for_selector("#changes:text-matches('Not saved yet')", state="attached")
        assert (person.count, page.text_content("#changes")) == (after, pending)
        assert person.save("first").startswith("Saved: revision 1 by Ada")
        assert page.text_content("#changes") == "No changes that are not saved."
        page.reload()
        page.wait_for_selector("#table tbody button", state="attached")
        assert person.count == after

        page.click("#tab-teach")
        shown = page.text_content("#teach code") or ""
        assert shlex.split(shown)[:5] == ["nucleus", "data", "import", str(corrections / "first"), "cells"]

        page.click("#tab-download")
        with page.expect_download() as download:
            page.click("#download-csv")
        rows = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
        assert download.value.suggested_filename == "cells one.nuclei.csv"
        assert len(rows) == after
        assert all(float(row["score"]) >= 0 for row in rows)
        assert person.complaints == []
        assert {url.split("/")[2] for url in person.asked if not url.startswith("blob:")} == {service.address[7:]}

    (tmp_path / "spool").mkdir()
    imported = read_source(corrections / "first", partial(read_items, tmp_path / "spool"), no_progress)
    assert [(image.masks.nuclei, image.shape) for image in imported.images] == [(after, (192, 256))]
    assert imported.left_out == []


def test_two_people_correct_one_image(browser: Browser, service: RunningPage, page_image: Path) -> None:
    with Person(browser, service.address, "Ada") as ada, Person(browser, service.address, "Bob") as bob:
        for person, label in ((ada, 1), (bob, 2)):
            count = person.drop(page_image)
            person.open()
            person.choose(label)
            person.press("Delete")
        assert ada.save("both").startswith("Saved: revision 1 by Ada")
        assert "Ada saved revision 1" in bob.save("both")
        bob.page.click("#look")
        bob.page.wait_for_selector("#status:text-matches('Dashed')")
        bob.page.click("#merge-theirs")
        bob.page.wait_for_selector("#saved:text-matches('^Opened revision 1 by Ada')")
        assert bob.count == count - 2
        assert bob.save("both").startswith("Saved: revision 2 by Bob")


_KEPT = """() => new Promise((done) => { indexedDB.open("nucleus-page").onsuccess = ({ target: { result } }) => {
    const asked = result.transaction("drafts").objectStore("drafts").getAll();
    asked.onsuccess = () => { result.close(); done(asked.result.some(({ edits }) => edits.length)); }; }; })"""


def test_changes_in_two_tabs_are_not_lost_without_a_word(
    browser: Browser, service: RunningPage, page_image: Path
) -> None:
    """The browser keeps those of the tab that changed the image last, which says so."""
    with Person(browser, service.address) as person:
        person.drop(page_image)
        person.open()
        second = person.context.new_page()
        second.goto(person.page.url)
        second.wait_for_selector("#table tbody button")  # so it has read what the browser keeps
        for page, label in ((person.page, 1), (second, 2)):
            page.click(f"#table button[data-label='{label}']")
            page.focus("#canvas")
            page.keyboard.press("Delete")
            page.wait_for_function(_KEPT)
        second.wait_for_selector("#status:text-matches('in another tab too')")
        assert "another tab" not in (person.page.text_content("#status") or "")


@dataclass
class Held:
    """Answers of the service that do not reach the page until they are let go."""

    page: Page
    pattern: str
    waiting: list[tuple[Route, APIResponse]] = field(default_factory=list)

    def __enter__(self) -> "Held":
        self.page.route(self.pattern, self._hold)
        return self

    def _hold(self, route: Route) -> None:
        self.waiting.append((route, route.fetch()))

    def wait(self) -> None:
        """Wait until there is an answer."""
        while not self.waiting:
            self.page.wait_for_timeout(20)

    def __exit__(self, *_: object) -> None:
        self.wait()
        for route, answer in self.waiting:
            route.fulfill(response=answer)
        self.page.unroute(self.pattern)


def test_a_change_while_the_image_switches_stays_with_its_image(
    browser: Browser, service: RunningPage, page_image: Path, tmp_path: Path
) -> None:
    other = tmp_path / "cells two.png"
    other.write_bytes(encode_png(generated_image(1, 192, 256)[0]))
    with Person(browser, service.address) as person:
        page = person.page
        person.drop(page_image, other)
        person.open()
        first = person.count
        with Held(page, "**/measure"):  # the measurement of a nucleus of the first image comes when the second is open
            person.choose(1)
            person.press("Delete", "0")
            person.paint()
            painted = person.count
            with Held(page, "**/layers/found/outlines"):
                page.click("#following")
                page.wait_for_selector("#status:text-is('Opening …')")
                page.focus("#canvas")
                person.press("Delete", "b", "Space", "Space", "n", "Delete", "Control+z")
                page.mouse.click(500, 400)
                page.click("#delete")
            page.wait_for_selector("#table tbody button")
            second = person.count
        assert person.pending == "No changes that are not saved."

        with Held(page, "**/corrections/switch"):  # the answer to a save comes when another image is open
            page.click("#previous")
            page.wait_for_selector("#changes:text-matches('Not saved yet')", state="attached")
            assert (person.count, person.pending) == (
                painted,
                f"Not saved yet: 1 removed, {painted - first + 1} added.",
            )
            page.click("#tab-save")
            page.fill("#set", "switch")
            page.fill("#who", "Ada")
            page.click("#save-button")
            page.focus("#canvas")
            person.press("Escape", "n", "Delete")  # while it is saved
            page.click("#following")
            page.wait_for_selector("#image-name:text-is('cells two.png')")  # so the table is its own
            page.wait_for_selector("#table tbody button", state="attached")
        page.wait_for_selector("#status:text-matches('cells one.png: Saved: revision 1')")
        assert (person.count, person.pending) == (second, "No changes that are not saved.")
        page.click("#previous")
        page.wait_for_selector("#saved:text-matches('^Saved: revision 1')")
        assert (person.count, person.pending) == (painted - 1, "Not saved yet: 1 removed.")

        with Held(page, "**/layers/found/outlines"):  # the answer comes while the other image is opened
            with Held(page, "**/corrections/switch"):
                page.click("#save-button")
                page.click("#following")
                page.wait_for_selector("#status:text-is('Opening …')")
            page.wait_for_selector("#status:text-matches('cells one.png: Saved: revision 2')")
        page.wait_for_selector("#table tbody button", state="attached")
        assert "cells one.png: Saved: revision 2" in (page.text_content("#status") or "")
        assert person.complaints == []


def test_what_is_saved_just_now_is_no_conflict(browser: Browser, service: RunningPage, page_image: Path) -> None:
    """The question what is saved, asked when the set was named, is answered while the save goes on."""
    with Person(browser, service.address) as person:
        page = person.page
        person.drop(page_image)
        person.open()
        asked: list[Route] = []
        page.route(
            "**/corrections/slow",
            lambda route: route.continue_() if route.request.method == "POST" else asked.append(route),
        )
        with Held(page, "**/outlines") as outlines:  # of what was saved
            page.click("#tab-save")
            page.fill("#set", "slow")
            page.fill("#who", "Ada")
            while not asked:
                page.wait_for_timeout(20)
            page.click("#save-button")
            outlines.wait()
            request = asked[0].request
            with page.expect_response(lambda found: found.request == request) as answer:
                asked[0].continue_()
            assert answer.value.json()["saved"]["revision"] == 1
        page.wait_for_selector("#saved:text-matches('^Saved: revision 1')")
        assert not page.is_visible("#conflict")
        assert person.complaints == []


def test_what_is_passed_over_is_said(browser: Browser, service: RunningPage, tmp_path: Path) -> None:
    folder = tmp_path / "dropped"
    write_image(folder / "a.ome.zarr", generated_image(0, 192, 256)[0][..., 0], 2, axes="yx")
    for name in (".DS_Store", "notes.txt", ".hidden/b.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "c.png").write_bytes(b"no image")
    with Person(browser, service.address) as person:
        person.page.set_input_files("#folder", folder)
        person.page.wait_for_selector("#images li a")
        said = person.page.text_content("#notice") or ""
        assert "1 file is no image by its name and was left out: dropped/notes.txt." in said
        assert "2 hidden files were left out" in said
        person.page.wait_for_selector("#images li:has-text('Expected')")
        assert int(person.page.text_content("#images li:has(a) strong") or "") > 3
        person.open()
        assert person.complaints == []


@pytest.mark.parametrize("name", ["page.css/", "../routes.py", f"{'a' * 3000}.css", "js"])
def test_what_is_no_file_of_the_page(service: RunningPage, name: str) -> None:
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{service.address}/static/page/{name}")


def test_sessions_do_not_see_each_other(browser: Browser, service: RunningPage, page_image: Path) -> None:
    with Person(browser, service.address) as ada, Person(browser, service.address) as bob:
        ada.drop(page_image)
        mine = ada.page.get_attribute("#images li a", "href")
        ask = "(path) => fetch(path).then((answer) => answer.status)"
        path = f"/page/api/images/{(mine or '').rpartition('/')[2]}"
        assert ada.page.evaluate(ask, path) == 200
        assert bob.page.evaluate(ask, path) == 400
        assert bob.page.evaluate("() => fetch('/page/api/images').then((answer) => answer.json())") == []


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 320)])
def test_axe_finds_nothing_and_it_fits(
    browser: Browser, service: RunningPage, page_image: Path, scheme: str, width: int
) -> None:
    with Person(browser, service.address, color_scheme=scheme, viewport={"width": width, "height": 700}) as person:
        page = person.page

        def check(where: str) -> None:
            found = Axe().run(page)
            wrong = [(each["id"], each["nodes"][0]["html"][:200]) for each in found.response["violations"]]
            assert not wrong, where
            assert page.evaluate("document.documentElement.scrollWidth") <= width, where

        person.drop(page_image)
        check("images")
        person.open()
        for tab in ("nuclei", "view", "save", "teach", "download"):
            page.click(f"#tab-{tab}")
            check(tab)
        page.click("#help")
        check("keys")


def test_a_run_and_its_version_beside_the_old_one(
    browser: Browser, bucket: Bucket, page_image: Path, tmp_path: Path
) -> None:
    published_run(bucket, "cells-run", tmp_path / "model", min_area=250)
    bucket.put("wells/cells one.png", page_image)
    with (
        running_page(environment={**os.environ, "NUCLEUS_BUCKET": str(bucket.uri)}) as running,
        Person(browser, running.address) as person,
    ):
        page = person.page
        page.goto(f"{running.address}/#/bucket/wells/cells%20one.png")  # as a link of a report
        page.wait_for_selector("#table tbody button")
        assert page.url.startswith(f"{running.address}/#/image/")
        before = person.count
        person.choose(1)
        person.press("Delete")
        assert person.save("first").startswith("Saved: revision 1")
        page.click("#tab-teach")
        page.wait_for_selector("#run-state:text-is('Published as cells@1, after 80 epochs.')")
        assert "epoch 80: loss 0.712, validation mAP 0.607" in (page.get_attribute("#curve", "aria-label") or "")
        assert (page.text_content("#run-gate") or "").startswith("production moved to version 1")
        assert page.text_content("#follow-command") == "nucleus serve --model cells@production"
        assert not page.is_visible("#teach-start")  # no cluster is configured
        page.click("#compare")
        page.wait_for_selector("#difference")
        lines = page.locator("#comparison-text li").all_text_contents()
        found = [int(number) for number in re.findall(r"(?<![\w@.])\d+(?![\w@])", " ".join(lines))]
        old, new, same, gone, fresh, saved, saved_before, saved_after = found
        assert (old, saved, saved_before) == (before, before - 1, before - 1)
        assert same + gone == old
        assert same + fresh == new >= saved_after
        assert 0 < gone < before
        page.click("#difference")
        assert page.text_content("#status") == f"Difference 1 of {gone + fresh}: no longer found"
        for shown in ("before", "after", "both"):
            page.check(f"input[value={shown}]")
        assert not Axe().run(page).response["violations"]
        page.goto(f"{running.address}/#/bucket/wells/none.png")
        page.wait_for_selector("#notice:text-matches('wells/none.png')")
        assert [each for each in person.complaints if "404" not in each] == []


def test_a_run_that_has_just_begun_is_asked_for_again_soon(
    browser: Browser, service: RunningPage, page_image: Path
) -> None:
    """Its plan is there before its state is."""
    state = {"stage": "begun", "set": "first", "dataset": "cells", "run": "cells-1", "message": "cells has 5 images."}
    run = {"run": "cells-1", "message": None, "begun": "2026-11-28T11:00:00+00:00", "done": 0, "epochs": 2}
    run |= {"monitor": "val_map", "curve": [], "best": None, "version": None, "gate": None}
    words = iter(["unknown", "running"])
    with Person(browser, service.address) as person:
        page = person.page
        page.clock.install(time=0)
        page.route("**/page/api/teach", lambda r: r.fulfill(json={"available": True, "bucket": True, "state": state}))
        page.route("**/page/api/runs/cells-1", lambda r: r.fulfill(json={"run": run | {"state": next(words)}}))
        person.drop(page_image)
        person.open()
        page.clock.pause_at(86_400_000)  # a day later: from now on the test's clock counts
        page.click("#tab-teach")
        page.wait_for_selector("#run-state:text-matches('^Its state is not known')")
        page.clock.run_for(4000)
        page.wait_for_selector("#run-state:text-matches('^Starts')")


def test_a_service_that_is_killed_while_it_saves_leaves_nothing_half_written(
    browser: Browser, store: RunningStore, bucket_uri: S3Uri, page_image: Path
) -> None:
    saving = threading.Event()

    def stall_labels(request: Request) -> Fault | None:
        if request.method == "PUT" and "/labels/" in request.path:
            saving.set()
            return Fault.STALL
        return None

    place = BucketPlace(Bucket(bucket_uri / "corrections"))
    with proxied(store.port, stall_seconds=60.0) as proxy:
        environment = {**os.environ, "NUCLEUS_BUCKET": str(bucket_uri), "AWS_ENDPOINT_URL_S3": proxy.endpoint}
        with running_page(environment=environment) as running, Person(browser, running.address) as person:
            person.drop(page_image)
            person.open()
            person.choose(1)
            person.press("Delete")
            proxy.decide = stall_labels
            person.page.click("#tab-save")
            person.page.fill("#set", "first")
            person.page.fill("#who", "Ada")
            person.page.click("#save-button")
            assert saving.wait(BROWSER_MS / 1000)
            running.process.kill()
            person.page.wait_for_selector("#saved:text-matches('does not answer')")
            assert not list(Bucket(bucket_uri).objects("corrections/first/labels"))

            port = running.address.rpartition(":")[2]
            proxy.decide = lambda _: None
            with running_page("--port", port, environment=environment):
                person.page.goto(f"{running.address}/#/")
                person.page.reload()
                person.page.wait_for_selector("body[data-ready]")
                count = person.drop(page_image)
                person.open()
                assert person.count == count - 1  # the browser kept the change
                assert person.save("first").startswith("Saved: revision 1 by Ada")
    (stem,) = [each.key.rpartition("/")[2][:-4] for each in Bucket(bucket_uri).objects("corrections/first/labels")]
    saved = CorrectionSet(place, "first").find(stem)
    assert saved is not None
    assert saved.revision.nuclei == count - 1
