"""The report in a real browser, headless Chromium: it shows, loads nothing, and works by keyboard and screen reader."""

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from nucleus.report.page import write_report
from tests.conftest import BROWSER_MS
from tests.report_run import make_dataset, make_record, write_pictures

SCHEMES = ("light", "dark")
HACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every picture but one."""
    folder = tmp_path_factory.mktemp("report")
    record = make_record()
    write_pictures(folder, record)
    (folder / "pictures/test/best-1/mistakes.png").unlink()
    return write_report(folder, record, make_dataset())


class Opened:
    """A page that is open, with what the browser complained of and asked for."""

    def __init__(self, browser: Browser, path: Path, scheme: str = "light", width: int = 1280) -> None:
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,  # type: ignore[arg-type]
            reduced_motion="reduce",
        )
        self.page.set_default_timeout(BROWSER_MS)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.failures: dict[str, str | None] = {}
        self.page.on("requestfailed", lambda request: self.failures.update({request.url: request.failure}))
        self.page.goto(path.as_uri())
        self.url = path.as_uri()

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [320, 1280])
def test_it_shows_alone_without_complaint_and_fits_the_screen(
    browser: Browser, report: Path, scheme: str, width: int
) -> None:
    with Opened(browser, report, scheme, width) as opened:
        page = opened.page
        assert opened.complaints == []
        assert [url for url in opened.requests if not url.startswith("data:")] == [opened.url]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(sizes) == 4 * 3 + 6 * 2 + 3 * 23 - 1  # of 24 test images one of the worst has no mistakes
        assert min(sizes) > 0


def test_light_and_dark_differ_in_figures_too(browser: Browser, report: Path) -> None:
    seen = {}
    for scheme in SCHEMES:
        with Opened(browser, report, scheme) as opened:
            seen[scheme] = opened.page.evaluate(
                """() => {
                    const of = (query, name) => getComputedStyle(document.querySelector(query))[name];
                    const line = [...document.querySelectorAll('#curves svg path')]
                        .find(path => (path.getAttribute('stroke') || '').includes('series-1'));
                    return {ground: of('body', 'backgroundColor'), text: of('body', 'color'),
                            label: of('#curves svg text', 'fill'), line: getComputedStyle(line).stroke};
                }"""
            )
    assert seen["light"]["ground"] == "rgb(255, 255, 255)"
    for name in ("ground", "text", "label", "line"):
        assert seen["light"][name] != seen["dark"][name], name
    for colours in seen.values():
        assert colours["label"] == colours["text"]
        assert colours["line"].startswith("rgb")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [320, 1280])
def test_axe_finds_nothing_wrong(browser: Browser, report: Path, scheme: str, width: int) -> None:
    with Opened(browser, report, scheme, width) as opened:
        opened.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        found = Axe().run(opened.page)
    assert not [(each["impact"], each["id"], each["nodes"][0]["html"]) for each in found.response["violations"]]
    assert len(found.response["passes"]) > 20


def test_the_keyboard_reaches_everything(browser: Browser, report: Path) -> None:
    focused = "document.activeElement.textContent.trim() || document.activeElement.tagName"
    with Opened(browser, report) as opened:
        page = opened.page
        order = []
        for _ in range(14):
            page.keyboard.press("Tab")
            order.append(page.evaluate(focused))
        links = page.evaluate("[...document.querySelectorAll('nav a')].map(link => link.textContent)")
        assert order[0] == "Skip to the report"
        assert order[1 : 1 + len(links)] == links
        for _ in range(40):
            if page.evaluate("document.activeElement.tagName") == "SUMMARY":
                break
            page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.parentElement.open")


def test_the_links_lead_to_their_parts_and_the_skip_link_past_them(browser: Browser, report: Path) -> None:
    with Opened(browser, report) as opened:
        page = opened.page
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        for target in page.evaluate("[...document.querySelectorAll('nav a')].map(link => link.hash)"):
            page.click(f"nav a[href='{target}']")
            top = page.evaluate(f"document.querySelector('{target} h2').getBoundingClientRect().top")
            nav = page.evaluate("document.querySelector('nav').getBoundingClientRect().bottom")
            assert nav <= top <= 800, target  # on the screen, and not under the bar of links
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_on_paper_it_is_light_and_without_the_bar_of_links(browser: Browser, report: Path) -> None:
    with Opened(browser, report, "dark") as opened:
        opened.page.emulate_media(media="print", color_scheme="dark")
        assert opened.page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert len(opened.page.pdf(format="A4")) > 100_000


def test_names_from_the_bucket_do_nothing(browser: Browser, tmp_path: Path) -> None:
    content = make_record().model_dump(mode="json")
    for image in (*content["examples"], *content["watched"], *content["test_images"]):
        image["name"] = HACK
    content |= {"run": HACK, "model": HACK, "device": HACK, "stages": [{"name": HACK, "seconds": 1.0}]}
    path = write_report(tmp_path, make_record(**content), make_dataset(source=HACK))
    with Opened(browser, path) as opened:
        assert opened.page.evaluate("window.hacked") is None
        assert opened.complaints == []
        assert opened.page.text_content("h1") == f"{HACK}, version 3"


def test_the_policy_forbids_scripts_and_loading(browser: Browser, report: Path, tmp_path: Path) -> None:
    """Should an escape ever be forgotten."""
    text = report.read_text().replace("</main>", f"{HACK}<img src='https://example.com/pixel.png'></main>")
    (tmp_path / "report.html").write_text(text)
    with Opened(browser, tmp_path / "report.html") as opened:
        while not opened.failures or not opened.complaints:  # the browser tells them when it likes
            opened.page.wait_for_timeout(20)
        assert opened.page.evaluate("window.hacked") is None
        assert any("Content Security Policy" in complaint for complaint in opened.complaints)
        assert opened.failures["https://example.com/pixel.png"] == "csp"
