"""The report of a run: complete in itself, within its size, harmless whatever the bucket holds."""

import base64
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from nucleus.cli.serve import serve
from nucleus.config.settings import parse_recipe
from nucleus.data.dataset import Addition
from nucleus.data.images import encode_png
from nucleus.metrics.scores import HEADLINES, MISTAKES
from nucleus.pictures import MISTAKE_COLOURS
from nucleus.report.drawing import svg_of
from nucleus.report.figures import THRESHOLDS, curve_panels, timing_panel
from nucleus.report.page import (
    MOST_BYTES,
    commands_to_repeat,
    commands_to_serve,
    commands_to_use,
    differing_settings,
    recipe_toml,
    render_page,
    write_report,
)
from nucleus.report.page_pictures import PictureFolder
from nucleus.report.summary import restarts_of, workers_of
from nucleus.report.tables import has_published_images, published_table
from nucleus.runs.record import RunRecord, Stage
from tests.report_run import make_dataset, make_record, write_pictures

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' $x$ {{ 7*7 }}"

ADDED: dict[str, Any] = {
    "parent": "ab" * 6,
    "created": "2026-11-21T08:00:00+00:00",
    "layout": "labelled",
    "seed": 7,
    "replaced": 2,
    "known": 0,
}


class Page(HTMLParser):
    """What a test asks of a page: its elements with their attributes, and its text."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every picture."""
    folder = tmp_path_factory.mktemp("report")
    record = make_record()
    write_pictures(folder, record)
    return write_report(folder, record, make_dataset())


def test_the_page_holds_every_picture_and_is_the_only_file(written: Path) -> None:
    record, page = make_record(), Page(written.read_bytes())
    with_mistakes = len(record.test_images) - 1  # the first of the worst has none
    kept = 4 * len(record.examples) + sum(3 + len(image.epochs) for image in record.watched) + 3 * with_mistakes
    assert written.name == "report.html"
    assert len(page.all("img")) == kept
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert "not saved" not in page.text
    assert "left out: page full" not in page.text
    assert {path.name for path in written.parent.iterdir()} == {"report.html", "pictures"}


def test_the_page_says_what_there_is_to_say(written: Path) -> None:
    text = Page(written.read_bytes()).text
    for said in (
        "cells, version 3",
        "In 24 images that it had not seen in training, the model found 880 of 1,000 nuclei (88 %).",
        "Of the 950 nuclei that it outlined, 70 did not match a true one.",
        "40 images with 5,460 nuclei",
        "32 min 27 s",
        "0 GPU-seconds; 3,600 CPU-core-seconds",
        "mAP 0.35, AP.5 0.95; 20 nuclei, 19 predicted: 11 missed, 1 merged",
        "median 19.5 px (validation split)",
        "full 3 (the image) 16",
        "1/32 1,280 –",
        "background, body, border, distance",
        "from which a nucleus grows, from this probability 0.6",
        "nucleus predict IMAGES --model cells@3",
        "AWS_ENDPOINT_URL_S3",
        "the same pixels as one",
        "production moved from version 2",
    ):
        assert said in text, said


@pytest.mark.parametrize(
    ("source", "published"),
    [
        ("stage1_train.zip", True),
        ("s3://data/BBBC038v1/", True),
        ("/data/dsb2018", True),
        ("cells.zip", False),
        ("dsb2018/images", False),
        ("generated", False),
    ],
)
@pytest.mark.parametrize(("more", "same"), [([], True), (["dsb2018.zip"], True), (["dsb2018.zip", "ours"], False)])
def test_which_datasets_hold_the_published_images(source: str, published: bool, more: list[str], same: bool) -> None:
    dataset = make_dataset(source=source, additions=[Addition(source=name, added=10, **ADDED) for name in more])
    assert has_published_images(dataset) == (published and same)


def test_published_figures_stand_beside_the_same_images_only(written: Path, tmp_path: Path) -> None:
    same = Page(render_page(tmp_path, make_record(), make_dataset(source="stage1_train.zip"))).text
    other = Page(written.read_bytes()).text
    for said in ("StarDist (Lalit et al., MIDL 2021, Table 1)", "AP on dark-field images, and", "another split"):
        assert said in same, said
        assert said not in other, said
    assert "AP by kind of image" in other


def test_the_published_means_are_those_of_the_paper() -> None:
    """Of AP at .5, .6, ..., .9; a run's own is made alike."""
    table = published_table({"dark-field": {f"ap_{threshold}": threshold / 100 for threshold in THRESHOLDS}})
    means = {row[0].partition(" (Lalit")[0]: row[-2] for row in table.rows}
    assert (
        means.items()
        >= {
            "this run": "0.700",
            "3-class U-Net": "0.584",
            "Cellpose, public nuclei model": "0.650",
            "Cellpose, trained on DSB2018": "0.696",
            "Mask R-CNN": "0.593",
            "StarDist": "0.584",
            "PatchPerPix": "0.693",
            "Neven et al.": "0.692",
            "EmbedSeg, 8 × TTA": "0.704",
        }.items()
    )


def test_images_without_mistakes_are_not_among_the_worst(tmp_path: Path) -> None:
    images = [image.model_dump() for image in make_record().test_images if image.name in {"best-0", "worst-0"}]
    text = Page(render_page(tmp_path, make_record(test_images=images), make_dataset())).text
    assert "best-0" in text
    assert "worst-0" not in text
    assert "No other test images with mistakes" in text


def test_restarts_are_told_with_what_they_cost(tmp_path: Path) -> None:
    attempts = [
        {"driver": "a", "epochs_done": 0},
        {"driver": "a", "epochs_done": 0, "lost": 20.0},
        {"driver": "a", "epochs_done": 3, "lost": 51.0},
        {"driver": "b", "epochs_done": 4, "lost": 3849.0},
    ]
    record = make_record(attempts=attempts)
    assert restarts_of(record) == [
        "in the first epoch: 20.0 s from the last checkpoint to the next step",
        "after 3 epochs: 51.0 s from the last checkpoint to the next step",
        "after 4 epochs, the run was resumed: 1 h 4 min from the last checkpoint to the next step, pauses included",
    ]
    text = Page(render_page(tmp_path, record, make_dataset())).text
    assert text.count("after 3 epochs: 51.0 s from the last checkpoint") == 2  # at the top, and beside the cost
    assert "Restarts" not in Page(render_page(tmp_path, make_record(attempts=attempts[:1]), make_dataset())).text


def opening(page: Page) -> list[str]:
    """The addresses of the links into the page; each opens beside the report."""
    links = [link for link in page.all("a") if (link["href"] or "").startswith("http://127.0.0.1:")]
    assert all((link["target"], link["rel"]) == ("_blank", "noopener noreferrer") for link in links)
    assert len({link["aria-label"] for link in links}) == len(links)
    return [link["href"] or "" for link in links]


def test_each_image_opens_in_the_page(written: Path) -> None:
    """By its key below the bucket's prefix, which is below the report's folder here too."""
    record, found = make_record(), opening(Page(written.read_bytes()))
    with_mistakes = len(record.test_images) - 1
    assert len(found) == with_mistakes + len(record.watched) + len(record.examples)
    (port,) = [option.default for option in serve.params if option.name == "port"]
    start = f"http://127.0.0.1:{port}/#/bucket/runs/{record.run}/report/"
    assert all((written.parent / address.removeprefix(start)).is_file() for address in found)
    assert f"{start}pictures/test/best-0/image.png" in found
    assert commands_to_serve(record).splitlines() == [
        "export NUCLEUS_BUCKET=s3://nucleus",
        "nucleus serve --model cells@3",
    ]
    unpublished = make_record(version=None, endpoint="http://127.0.0.1:9000", bucket="s3://nucleus/mine")
    assert commands_to_serve(unpublished).splitlines() == [
        "export AWS_ENDPOINT_URL_S3=http://127.0.0.1:9000",
        "export NUCLEUS_BUCKET=s3://nucleus/mine",
        "nucleus serve",
    ]


def test_any_name_is_one_key_of_the_page(tmp_path: Path) -> None:
    images = [{**make_record().test_images[0].model_dump(), "name": f"50 % #1 ?a&b {EVIL}"}]
    record = make_record(run="a b#c", test_images=images, watched=[], examples=[])
    (address,) = opening(Page(render_page(tmp_path, record, make_dataset())))
    key = address.removeprefix("http://127.0.0.1:8000/#/bucket/")
    assert re.fullmatch(r"[\w./%~-]+", key)
    assert unquote(key) == f"runs/a b#c/report/pictures/test/{images[0]['name']}/image.png"


def test_the_looks_are_those_of_the_page(written: Path) -> None:
    """One file has the colours and fonts; the page loads it before its own, the report contains it."""
    static = resources.files("nucleus.page") / "static"
    looks = (static / "looks.css").read_text()
    (style,) = re.findall(r"<style>(.*?)</style>", written.read_text(), re.DOTALL)
    assert style.startswith(looks)
    sheets = [
        link["href"] for link in Page((static / "index.html").read_bytes()).all("link") if link["rel"] == "stylesheet"
    ]
    assert sheets == ["/static/page/looks.css", "/static/page/page.css"]
    defined = set(re.findall(r"(--[\w-]+):", looks))
    used = set(re.findall(r"var\((--[\w-]+)", (static / "page.css").read_text()))
    assert used <= defined | set(re.findall(r"(--[\w-]+):", (static / "page.css").read_text()))
    assert not defined & set(re.findall(r"(--[\w-]+):", (static / "page.css").read_text()))


def test_epochs_are_whole_numbers_on_one_axis() -> None:
    """Also where only the last one was validated."""
    limits = set()
    for panel in curve_panels(make_record().history, best_epoch=2):
        axes = Figure().subplots()
        panel.draw(axes)
        low, high = axes.get_xlim()
        shown = [place for place in axes.get_xticks() if low <= place <= high]
        assert shown == [1, 2], panel.title
        limits.add((low, high))
    assert len(limits) == 1


def test_a_run_can_be_repeated_from_what_the_page_says(tmp_path: Path) -> None:
    where = {"endpoint": "http://127.0.0.1:9000", "repository": "https://git.example/nucleus.git"}
    record, dataset = make_record(**where), make_dataset()
    first, *_, second, third, _, _, _ = commands_to_repeat(record, dataset).splitlines()
    assert first == "git clone https://git.example/nucleus.git nucleus && cd nucleus"
    assert (second, third) == ("export AWS_ENDPOINT_URL_S3=http://127.0.0.1:9000", "export NUCLEUS_BUCKET=s3://nucleus")
    assert commands_to_use(record).startswith(f"{second}\n{third}\n")
    text = Page(render_page(tmp_path, record, dataset)).text
    assert "at http://127.0.0.1:9000" in text
    assert "address was not recorded" in Page(render_page(tmp_path, make_record(), dataset)).text


def test_what_was_added_to_the_dataset_is_told_and_can_be_repeated(tmp_path: Path) -> None:
    addition = Addition(source="more.zip", added=10, **ADDED)
    record, dataset = make_record(), make_dataset(additions=[addition])
    (line,) = [line for line in commands_to_repeat(record, dataset).splitlines() if "--into" in line]
    assert line.endswith(f"more.zip --into cells@{'ab' * 6} --seed 7")
    text = Page(render_page(tmp_path, record, dataset)).text
    assert f"10 images of more.zip, labels of 2 replaced, to version {'ab' * 6}" in text


def test_workers_that_came_and_went_are_told() -> None:
    entry = {"loss": 1.0}
    history = [{**entry, "epoch": float(epoch), "workers": float(n)} for epoch, n in enumerate((3, 3, 2, 3), 1)]
    assert workers_of(make_record(history=history)).endswith("changed from 3 to 2 in epoch 3, from 2 to 3 in epoch 4")
    del history[1]["workers"]
    assert workers_of(make_record(history=history)).endswith("changed from 3 to 2 in epoch 3, from 2 to 3 in epoch 4")
    assert workers_of(make_record(history=history[:1])) == "2 workers, each on one core of a CPU"


def test_nothing_is_loaded_and_nothing_runs(written: Path) -> None:
    page = Page(written.read_bytes())
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "base", "form", "image", "foreignobject"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "style" not in attributes, tag
        for name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
            value = attributes.get(name)
            if value and tag != "a":
                assert value.startswith(("data:", "#")), (tag, value)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    style = re.findall(r"<style>(.*?)</style>", written.read_text(), re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]


def test_ids_are_unique_and_links_and_labels_lead_somewhere(written: Path) -> None:
    page = Page(written.read_bytes())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("href", "xlink:href", "aria-labelledby", "aria-describedby"):
            for value in (attributes.get(name) or "").split():
                if name.startswith("aria") or value.startswith("#"):
                    assert value.removeprefix("#") in ids, value
        for value in attributes.values():
            for reference in re.findall(r"url\(#([^)]+)\)", value or ""):
                assert reference in ids, reference


def test_headings_are_in_order_and_pictures_have_words(written: Path) -> None:
    page = Page(written.read_bytes())
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    alts = [image["alt"] or "" for image in page.all("img")]
    assert all(len(alt) > 20 for alt in alts)
    assert len(set(alts)) == len(alts)
    assert "The test image worst-3, dark-field (fluorescence), with its nuclei outlined" in "\n".join(alts)
    assert any("3 missed, 1 merged; mAP 0.75" in alt for alt in alts)
    for table in page.all("th"):
        assert table["scope"] in {"col", "row"}
    assert len(page.all("caption")) == len(page.all("table"))


@pytest.mark.parametrize(("side", "count"), [(256, 12), (48, 4)])
def test_outlines_of_one_pixel_keep_their_colours(tmp_path: Path, side: int, count: int) -> None:
    """JPEG at half the colour resolution would grey them."""
    record = make_record(test_images=[image.model_dump() for image in make_record().test_images[:count]])
    write_pictures(tmp_path, record, side=side)
    image = np.full((side, side, 3), 20, np.uint8)
    for place, colour in enumerate(MISTAKE_COLOURS.values()):
        image[8 * place + 4, :] = colour
    (tmp_path / f"pictures/test/{record.test_images[0].name}/mistakes.png").write_bytes(encode_png(image))
    page = Page(render_page(tmp_path, record, make_dataset()))
    source = next(
        image["src"]
        for image in page.all("img")
        if "best-0" in (image["alt"] or "") and "colour per result" in (image["alt"] or "")
    )
    data = np.frombuffer(base64.b64decode((source or "").partition(",")[2]), np.uint8)
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(int)
    for place, colour in enumerate(MISTAKE_COLOURS.values()):
        line = decoded[8 * place + 4].mean(axis=0)
        assert np.abs(line - colour).max() < 60, (colour, line)


def test_pictures_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    """Noise cannot be compressed: no picture takes more room."""
    record = make_record()
    write_pictures(tmp_path, record, noise=True, side=640)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.png")) > 10 * MOST_BYTES
    content = render_page(tmp_path, record, make_dataset())
    page = Page(content)
    assert MOST_BYTES / 2 < len(content) <= MOST_BYTES  # as many as there is room for
    assert "not saved" not in page.text
    left_out = page.text.count("left out: page full")
    assert left_out > 0
    assert len(page.all("img")) + left_out == 4 * 3 + 6 * 2 + 3 * 23
    assert "worst-1" in (page.all("img")[0]["alt"] or "")  # the most important are shown


def test_a_long_history_is_thinned(tmp_path: Path) -> None:
    entry = {"loss": 1.0, "learning_rate": 1e-3, "images_per_second": 9.0}
    history = [{"epoch": float(epoch), **entry} for epoch in range(1, 20001)]
    page = render_page(tmp_path, make_record(history=history, best_epoch=20000), make_dataset())
    assert len(page) < MOST_BYTES
    assert "Metrics by epoch (200 of 20,000 epochs)" in Page(page).text


def test_names_from_the_bucket_are_only_text(tmp_path: Path) -> None:
    content = make_record().model_dump(mode="json")
    for image in (*content["examples"], *content["watched"], *content["test_images"]):
        image["name"] = EVIL
    texts = (
        "run",
        "group",
        "bucket",
        "gate",
        "begun",
        "ended",
        "device",
        "commit",
        "dataset",
        "wandb_run",
        "code_version",
    )
    evil = {
        **dict.fromkeys((*texts, "model"), EVIL),
        "thresholds": {EVIL: 0.5},
        "versions": {EVIL: EVIL},
        "stages": [Stage(name=EVIL, seconds=1)],
        "recipe": {EVIL: EVIL, "model": EVIL, "none": None},
        "encoder_weights": {"source": EVIL, "sha256": None},
        "network": {**content["network"], "encoder": EVIL, "outputs": [EVIL]},
        "metrics": {EVIL: {EVIL: {EVIL: 0.5}, "all": {"images": 3.0}}, **content["metrics"]},
    }
    record = RunRecord.model_validate({**content, **evil})
    left_out = [{"title": EVIL, "reason": EVIL}]
    dataset = make_dataset(name=EVIL, source=EVIL, layout=EVIL, created=EVIL, duplicates=left_out, left_out=left_out)
    path = write_report(tmp_path, record, dataset)
    test_nothing_is_loaded_and_nothing_runs(path)
    page = Page(path.read_bytes())
    assert page.text.count("<script>alert(1)</script>") > 30
    assert not [image for image in page.all("img") if image.get("src") == "x"]
    assert "49" not in re.findall(r"onerror=alert\(2\)>\S* \S* (\S+)", page.text)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html"}


def test_a_name_does_not_reach_files_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    for path in (tmp_path / "secret", folder / "secret"):
        path.mkdir(parents=True)
        (path / "image.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8)))
    (folder / "pictures/examples/a").mkdir(parents=True)
    pictures = PictureFolder(folder / "pictures")
    for name in ("../../secret", "../../../secret", f"{tmp_path}/secret", "a/../../../secret", "\0", "a" * 999):
        assert pictures.read(f"examples/{name}/image") is None
    (folder / "pictures/examples/a/image.png").write_bytes((tmp_path / "secret/image.png").read_bytes())
    assert pictures.read("examples/a/image") is not None


def test_missing_and_damaged_pictures_are_named(tmp_path: Path) -> None:
    record = make_record()
    write_pictures(tmp_path, record)
    (tmp_path / "pictures/examples/train-0/image.png").unlink()
    damaged = tmp_path / "pictures/watched/val-0/truth.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    (tmp_path / "pictures/test/best-0/mistakes.png").write_bytes(b"")
    page = Page(render_page(tmp_path, record, make_dataset()))
    assert page.text.count("not saved") == 3


@pytest.mark.parametrize(
    ("record", "dataset", "said"),
    [
        (
            {
                "version": None,
                "gate": None,
                "metrics": {"val": make_record().metrics["val"], "test": {"all": {"images": 0.0}}},
                "test_images": [],
                "history": make_record().history[:1],
                "best_epoch": 1,
                "encoder_weights": {"source": "none", "sha256": None},
            },
            {"counts": {"train": 40, "val": 6, "test": 0}},
            [
                "cells, run cells-20261123-080000",
                "Not published",
                "Result on the validation split",
                "This dataset has no test split",
                "No test images were saved",
                "On the training split, only the loss was measured",
                "without pretrained encoder weights",
            ],
        ),
        (
            {
                "metrics": {},
                "history": [],
                "examples": [],
                "watched": [],
                "stages": [],
                "commit": "57296d8-dirty",
                "begun": "yesterday",
                "nucleus_diameter": None,
                "gpus_per_worker": 1,
            },
            {"counts": {"train": 1, "val": 0, "test": 1}, "duplicates": [], "left_out": []},
            [
                "scored on no images",
                "The test split was not scored",
                "No epoch was completed",
                "No predictions were saved during training",
                "Times were not recorded",
                "uncommitted changes",
                "Duration not known",
                "3,600 GPU-seconds (1.00 GPU-hours)",
                "Diameter of nuclei not known",
                "The validation split is empty",
                "AP was not measured in this run",
            ],
        ),
    ],
)
def test_what_a_run_lacks_is_said(
    tmp_path: Path, record: dict[str, object], dataset: dict[str, object], said: list[str]
) -> None:
    text = Page(render_page(tmp_path, make_record(**record), make_dataset(**dataset))).text
    for part in said:
        assert part in text, part


def test_undefined_scores_are_said(tmp_path: Path) -> None:
    scores = make_record().metrics["test"]["all"]
    counts = {"nuclei_true": 0.0, "nuclei_predicted": 7.0, **dict.fromkeys(MISTAKES, 0.0), "nuclei_extra": 7.0}
    empty = {**dict.fromkeys(scores), "loss": 0.5, "images": 24.0, **counts}
    metrics = {"val": make_record().metrics["val"], "test": {"all": empty, "stain": empty}}
    text = Page(render_page(tmp_path, make_record(metrics=metrics), make_dataset(source="stage1_train.zip"))).text
    assert "there is no nucleus, so the scores are undefined. The model outlined 7 nuclei there." in text
    assert "No test image has a nucleus: the quality of the model on new images is unknown." in text
    assert "test all kinds 24 " + " ".join(["undefined"] * len(HEADLINES)) in text
    assert "None" not in text


def test_few_test_images_are_a_warning(tmp_path: Path) -> None:
    metrics = {"test": {"all": {**make_record().metrics["test"]["all"], "images": 4.0}}}
    assert "Few test images (4)" in Page(render_page(tmp_path, make_record(metrics=metrics), make_dataset())).text


def test_mistakes_add_up_where_the_metrics_have_them(tmp_path: Path) -> None:
    record = make_record()
    assert "Where it fails" not in Page(render_page(tmp_path, record, make_dataset())).text
    mistakes = {"nuclei_missed": 80.0, "nuclei_merged": 20.0, "nuclei_split": 30.0, "nuclei_extra": 19.0}
    more = {**mistakes, "recall_50_12_to_24px": 0.91}
    metrics = {"test": {"all": {**record.metrics["test"]["all"], **more}, "stain": record.metrics["test"]["stain"]}}
    text = Page(render_page(tmp_path, make_record(metrics=metrics), make_dataset())).text
    assert "kind nuclei found one for one missed merged split extra found, 12 to 24 px" in text
    assert "all kinds 1,000 870 (87 %) 80 (8 %) 20 (2 %) 30 (3 %) 19 (2 %) 91 %" in text
    assert "stain (H&E and others) – – – – – – –" in text
    assert (
        "found 870 of 1,000 nuclei (87 %) one for one; it missed 80, merged 20 with a neighbour and split 30." in text
    )
    assert "Of the 950 nuclei that it outlined, 19 are extra" in text


def test_training_scores_are_drawn_if_there_are_any(tmp_path: Path) -> None:
    history = [{**entry, "iou": 0.4, "dice": 0.5, "accuracy": 0.9} for entry in make_record().history]
    text = Page(render_page(tmp_path, make_record(history=history), make_dataset())).text
    assert "IoU of the mask by epoch: training from 0.400 at epoch 1 to 0.400 at epoch 2; validation from 0.850" in text
    assert "only the loss was measured" not in text


def test_the_recipe_can_be_read_again() -> None:
    recipe = {
        "model": "cells",
        "dataset": "cells",
        "workers": 2,
        "network": {"heads": "border"},
        "optimizer": {"epochs": 7},
    }
    parsed = parse_recipe({**recipe, "dataset": make_record().dataset}, "the test")
    record = make_record(recipe=parse_recipe(recipe, "the test").model_dump(mode="json"))
    assert parse_recipe(tomllib.loads(recipe_toml(record)), "the report") == parsed
    short = tomllib.loads(differing_settings(record))
    assert short == {**recipe, "dataset": record.dataset}


def test_commands_quote_what_they_are_given() -> None:
    record = make_record(model="cells; rm -rf ~", bucket="s3://x$(id)", commit="abc`id`-dirty")
    lines = commands_to_repeat(record, make_dataset(source="my cells.zip")).splitlines()
    assert lines == [
        "git checkout 'abc`id`'",
        "export NUCLEUS_BUCKET='s3://x$(id)'",
        "nucleus data import FOLDER/'my cells.zip' cells --seed 3",
        "nucleus train recipe.toml",
        "nucleus evaluate 'cells; rm -rf ~@3' s3://nucleus/datasets/cells@0123456789ab --split test "
        "--gallery worst.png",
    ]


def test_the_report_needs_neither_tensorflow_nor_ray() -> None:
    heavy = "{'tensorflow', 'ray', 'keras', 'matplotlib'}"
    code = f"import sys, nucleus.report.page; sys.exit(','.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_cost_of_a_validation_is_shown() -> None:
    history = [{"seconds": 10.0}, {"seconds": 30.0, "validation_seconds": 4.0}]
    stages = [Stage(name="train", seconds=40.0), Stage(name="validate", seconds=4.0)]
    shown = timing_panel(stages, history).table
    assert shown is not None
    name, _, share = shown.rows[-1]
    assert name == "one validation, mean of 1"
    assert share.startswith("20.0 %")
    assert len(timing_panel(stages, history[:1]).table.rows) == len(shown.rows) - 1


@pytest.mark.parametrize("text", ["$\\frac$", "a\x00b\x1bc\nd", "ΔΩ é", "x" * 500])
def test_figures_take_any_text(text: str) -> None:
    for panel in (timing_panel([Stage(name=text, seconds=1.0)]), timing_panel([Stage(name=f"a {text}", seconds=1.0)])):
        drawn = ElementTree.fromstring(svg_of(panel))
        words = [element.text or "" for element in drawn.iter() if element.tag.endswith("}text")]
        assert any(word.removeprefix("a ").startswith(text[0]) for word in words)
        assert max(len(word) for word in words) < 60
