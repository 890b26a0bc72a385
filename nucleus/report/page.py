"""What to type to repeat a run and to use its model."""

import base64
import hashlib
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from nucleus.config.settings import parse_recipe
from nucleus.data.dataset import DatasetManifest
from nucleus.errors import RecipeError
from nucleus.pictures import MISTAKE_COLOURS
from nucleus.report.drawing import Panel, save_slide, svg_of
from nucleus.report.figures import (
    curve_panels,
    dataset_panels,
    history_table,
    network_panel,
    precision_panels,
    timing_panel,
)
from nucleus.report.page_pictures import (
    Picture,
    PictureFolder,
    Scene,
    embedded,
    example_scenes,
    save_sheet,
    tested_scenes,
    watched_scenes,
)
from nucleus.report.summary import cost_of, scored_split, summarize
from nucleus.report.tables import (
    all_scores_table,
    dataset_facts,
    failure_table,
    left_out_tables,
    published_systems,
    published_table,
    scores_table,
    splits_table,
)
from nucleus.runs.record import PICTURES, REPORT_PAGE, RunRecord
from nucleus.storage.files import write_atomic
from nucleus.text import SPLIT_NAMES, date_of

__all__ = [
    "MOST_BYTES",
    "commands_to_repeat",
    "commands_to_use",
    "differing_settings",
    "recipe_toml",
    "render_page",
    "write_report",
]


_RECIPE_FILE = "recipe.toml"


def commands_to_use(record: RunRecord) -> str:
    """How to fetch the model and to find nuclei with it."""
    model = _model(record)
    return "\n".join(
        [
            *_bucket(record),
            f"nucleus models pull {model} model/",
            f"nucleus predict IMAGES --model {model} --out results/",
        ]
    )


def commands_to_repeat(record: RunRecord, dataset: DatasetManifest) -> str:
    """How to import the same data, train by the same recipe and score the result."""
    name = record.dataset.rpartition("@")[0].rpartition("/")[2] or dataset.name
    lines = [] if record.commit is None else [f"git checkout {_word(record.commit.removesuffix('-dirty'))}"]
    lines += [
        *_bucket(record),
        f"nucleus data import {_word(dataset.source)} {_word(name)} --seed {dataset.seed}",
        f"nucleus train {_RECIPE_FILE}",
    ]
    lines.append(f"nucleus evaluate {_model(record)} {_word(record.dataset)} --split test --gallery worst.png")
    return "\n".join(lines)


def recipe_toml(record: RunRecord) -> str:
    """The whole recipe, on the dataset version that was trained on."""
    return tomli_w.dumps(_without_none({**record.recipe, "dataset": record.dataset}))


def differing_settings(record: RunRecord) -> str:
    """The recipe's keys whose values are not the defaults, as TOML."""
    recipe = {**record.recipe, "dataset": record.dataset}
    required = {"model": record.recipe.get("model", record.model), "dataset": record.dataset}
    try:
        defaults = parse_recipe(required, "the report").model_dump(mode="json")
    except RecipeError:  # of another version of this package: all of it
        return recipe_toml(record)
    return tomli_w.dumps(_without_none({**required, **_difference(recipe, defaults)}))


def _difference(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    differing: dict[str, Any] = {}
    for key, value in given.items():
        before = usual.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if part := _difference(value, before):
                differing[key] = part
        elif value != before:
            differing[key] = value
    return differing


def _without_none(value: Any) -> Any:
    """TOML has no null: a key without a value is left out."""
    if isinstance(value, Mapping):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value if item is not None]
    return value


def _bucket(record: RunRecord) -> list[str]:
    return [f"export NUCLEUS_BUCKET={_word(record.bucket)}"]


def _model(record: RunRecord) -> str:
    return _word(record.model if record.version is None else f"{record.model}@{record.version}")


def _word(text: str) -> str:
    """The text as one word of a shell, whatever it holds."""
    return shlex.quote(text)


MOST_BYTES = 4_800_000
"""The page's size at most: pictures are encoded with less quality until it fits."""

_HERE = Path(__file__).parent


def write_report(folder: Path, record: RunRecord, dataset: DatasetManifest) -> Path:
    """Write the page, `report.html`, and beside it the PNGs for slides.

    Pictures that were not kept, or are damaged, are named as such in their places. The page loads nothing and runs
    nothing: a Content-Security-Policy forbids it, whatever the names and texts from the bucket hold.

    Args:
        folder: Holds `pictures/`, as `nucleus.runs.record` says.
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
