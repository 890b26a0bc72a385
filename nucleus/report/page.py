"""The report of a run: one page that needs nothing but itself, and PNGs for slides beside it."""

import base64
import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from nucleus.data.manifest import DatasetManifest
from nucleus.predict.colours import MISTAKE_COLOURS
from nucleus.report.commands import commands_to_repeat, commands_to_use, differing_settings, recipe_toml
from nucleus.report.curves import curve_panels, history_table
from nucleus.report.dataset_figures import SPLIT_NAMES, dataset_panels
from nucleus.report.dataset_tables import dataset_facts, left_out_tables, splits_table
from nucleus.report.drawing import Panel, save_slide, svg_of
from nucleus.report.network_figure import network_panel
from nucleus.report.pictures import Picture, PictureFolder, embedded
from nucleus.report.precision import precision_panels
from nucleus.report.published import published_systems, published_table
from nucleus.report.record import PICTURES, REPORT_PAGE, RunRecord
from nucleus.report.scores import all_scores_table, failure_table, scores_table
from nucleus.report.sheets import save_sheet
from nucleus.report.shots import Scene, example_scenes, tested_scenes, watched_scenes
from nucleus.report.summary import cost_of, scored_split, summarize
from nucleus.report.timing_figure import timing_panel
from nucleus.report.wording import date_of
from nucleus.storage.files import write_atomic

__all__ = ["MOST_BYTES", "render_page", "write_report"]

MOST_BYTES = 4_800_000
"""The page's size at most: pictures are encoded with less quality until it fits."""

_HERE = Path(__file__).parent


def write_report(folder: Path, record: RunRecord, dataset: DatasetManifest) -> Path:
    """Write the page, `report.html`, and beside it the PNGs for slides.

    Pictures that were not kept, or are damaged, are named as such in their places. The page loads nothing and runs
    nothing: a Content-Security-Policy forbids it, whatever the names and texts from the bucket hold.

    Args:
        folder: Holds `pictures/`, as `nucleus.report.record` says.
        record: Of the run.
        dataset: What it was trained on.

    Returns:
        The page's path.
    """
    report = _Report(folder, record, dataset)
    path = folder / REPORT_PAGE
    write_atomic(path, report.page())
    report.save_slides(folder)
    return path


def render_page(folder: Path, record: RunRecord, dataset: DatasetManifest) -> bytes:
    """The page alone, as `write_report` writes it; nothing is written."""
    return _Report(folder, record, dataset).page()


class _Report:
    """All that the page and the slides show."""

    def __init__(self, folder: Path, record: RunRecord, dataset: DatasetManifest) -> None:
        self.record = record
        self.dataset = dataset
        self.folder = PictureFolder(folder / PICTURES)
        self.split = scored_split(record)
        by_kind = record.metrics[self.split] if self.split else {}
        self.by_kind = by_kind
        self.panels: dict[str, list[Panel]] = {
            "curves": curve_panels(record.history, record.best_epoch),
            "precision": precision_panels(by_kind, SPLIT_NAMES.get(self.split or "", "")),
            "dataset": dataset_panels(dataset),
            "network": [network_panel(record.network)],
            "timing": [timing_panel(record.stages)] if record.stages else [],
        }
        self.scenes: dict[str, list[Scene]] = {
            "examples": example_scenes(record),
            "watched": watched_scenes(record),
            "best": tested_scenes(record, "best"),
            "worst": tested_scenes(record, "worst"),
        }

    def page(self) -> bytes:
        """The HTML, with pictures as good as its size allows."""
        render = partial(self._template().render, **self._content())
        sides = {shot.key: shot.side for scenes in self.scenes.values() for scene in scenes for shot in scene.shots}

        def fits(pictures: Mapping[str, Picture]) -> bool:
            return len(render(pictures=pictures).encode()) <= MOST_BYTES

        return render(pictures=embedded(self.folder, sides, fits)).encode()

    def save_slides(self, folder: Path) -> None:
        """Write the PNGs."""
        name = f"{self.record.model}, run {self.record.run}"
        for file, key, columns, title in (
            ("curves", "curves", 3, "Training"),
            ("ap", "precision", 2, "AP of nuclei over IoU thresholds"),
            ("dataset", "dataset", 3, f"Dataset {self.dataset.name}@{self.dataset.version}"),
            ("network", "network", 1, "The network"),
        ):
            if self.panels[key]:
                save_slide(folder / f"{file}.png", self.panels[key], columns, f"{title}: {name}")
        for file, key, across, title in (
            ("examples", "examples", 2, "Training images, their nuclei, and a crop of each after augmentation"),
            ("predictions", "watched", 1, "Validation images: predictions while the network learned"),
            ("best", "best", 3, "The best test images"),
            ("worst", "worst", 3, "The worst test images"),
        ):
            legend = key in {"best", "worst"}
            save_sheet(folder / f"{file}.png", self.folder, f"{title}: {name}", self.scenes[key], across, legend)

    def _template(self) -> Template:
        environment = Environment(
            loader=FileSystemLoader(_HERE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("page.html")

    def _content(self) -> Mapping[str, Any]:
        record, dataset = self.record, self.dataset
        style = (_HERE / "page.css").read_text()
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        return {
            "style": Markup(style),  # noqa: S704 # nosec B704 - our own file
            "style_sum": digest,
            "summary": summarize(record, dataset),
            "record": record,
            "dataset": dataset,
            "split": SPLIT_NAMES.get(self.split or ""),
            "scenes": self.scenes,
            "figures": {key: [(panel, _svg(panel)) for panel in panels] for key, panels in self.panels.items()},
            "colours": {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in MISTAKE_COLOURS.items()},
            "scores": scores_table(record.metrics),
            "all_scores": all_scores_table(record.metrics),
            "failures": failure_table(self.by_kind),
            "published": published_table(record.metrics.get("test", {})),
            "sources": sorted({(system.source, system.url) for system in published_systems()}),
            "history": history_table(record.history) if record.history else None,
            "trained_is_scored": any({"iou", "dice", "accuracy"} & set(entry) for entry in record.history),
            "dataset_facts": dataset_facts(record, dataset),
            "splits": splits_table(dataset),
            "left_out": left_out_tables(dataset),
            "cost": cost_of(record),
            "begun": date_of(record.begun),
            "use": commands_to_use(record),
            "repeat": commands_to_repeat(record, dataset),
            "differing": differing_settings(record),
            "recipe": recipe_toml(record),
        }


def _svg(panel: Panel) -> Markup:
    return Markup(svg_of(panel))  # noqa: S704 # nosec B704 - ElementTree has escaped its texts
