"""Report of a run: one self-contained HTML page, with commands to use the model and repeat the run."""

import base64
import hashlib
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tomli_w
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from nucleus.config.settings import parse_recipe
from nucleus.data.dataset import Addition, DatasetManifest
from nucleus.data.origins import DataOrigin
from nucleus.errors import RecipeError
from nucleus.pictures import MISTAKE_COLOURS
from nucleus.report.drawing import Panel, svg_of
from nucleus.report.figures import curve_panels, dataset_panels, history_table, precision_panels, timing_panel
from nucleus.report.page_pictures import (
    LONGEST_SIDE,
    EncodedPicture,
    PictureFolder,
    PictureGroup,
    embedded,
    example_groups,
    tested_groups,
    watched_groups,
)
from nucleus.report.summary import cost_of, restarts_of, scored_split, summarize, workers_of
from nucleus.report.tables import (
    all_scores_table,
    dataset_facts,
    failure_table,
    has_published_images,
    left_out_tables,
    network_table,
    published_systems,
    published_table,
    scores_table,
    splits_table,
)
from nucleus.runs.plan import RUNS
from nucleus.runs.record import PICTURES, REPORT_FOLDER, REPORT_PAGE, RunRecord
from nucleus.storage.files import write_atomic
from nucleus.text import SPLIT_NAMES, moment_text

__all__ = [
    "MOST_BYTES",
    "address_in_page",
    "commands_to_repeat",
    "commands_to_serve",
    "commands_to_use",
    "differing_settings",
    "recipe_toml",
    "render_page",
    "write_report",
]

MOST_BYTES = 4_800_000
"""Size limit of the page; pictures that do not fit are left out."""
_RECIPE_FILE = "recipe.toml"
_FOLDER = "FOLDER"
"""Stands for the folder with the imported images, which is not recorded."""
_HERE = Path(__file__).parent
_STATIC = resources.files("nucleus.page") / "static"
"""The page in the browser, whose colours, fonts and icon the report has."""
_SERVICE = "http://127.0.0.1:8000"
"""Where `nucleus serve` listens by default."""
_THRESHOLDS = {
    "mask_threshold": "A pixel belongs to a nucleus from this probability",
    "seed_threshold": "It is the inside of one, from which a nucleus grows, from this probability",
    "min_seed_area": "Smallest inside that begins a nucleus, px",
    "min_area": "Smallest nucleus, px",
    "min_score": "Lowest mean probability in a nucleus",
}
"""Titles of the settings in `nucleus.model.architecture.InstanceSettings`, in the order of their use."""


def commands_to_use(record: RunRecord) -> str:
    """Return the commands that pull the model and segment images with it."""
    model = _model(record)
    return "\n".join(
        [
            _bucket(record),
            f"nucleus models pull {model} model/",
            f"nucleus predict IMAGES --model {model} --out results/",
        ]
    )


def commands_to_serve(record: RunRecord) -> str:
    """Return the commands that start the service whose page opens the pictures of the run."""
    model = "" if record.version is None else f" --model {_model(record)}"
    return f"{_bucket(record)}\nnucleus serve{model}"


def address_in_page(record: RunRecord, key: str) -> str:
    """Return the address at which the page opens a picture of the run, if a service runs on this machine.

    Args:
        record: Record of the run.
        key: Path of the picture below `pictures/`, without suffix.
    """
    return f"{_SERVICE}/#/bucket/{quote(f'{RUNS}{record.run}/{REPORT_FOLDER}/{PICTURES}/{key}.png')}"


def commands_to_repeat(record: RunRecord, dataset: DatasetManifest) -> str:
    """Return the commands that fetch the code, import the data, train with the same recipe and score the result."""
    name = record.dataset.rpartition("@")[0].rpartition("/")[2] or dataset.name
    lines = [f"git clone {_word(record.repository)} nucleus && cd nucleus"] if record.repository else []
    if record.commit is not None:
        lines.append(f"git checkout {_word(record.commit.removesuffix('-dirty'))}")
    lines += [
        _bucket(record),
        f"nucleus data import {_FOLDER}/{_word(dataset.source)} {_word(name)} --seed {dataset.seed}"
        f"{_stated(dataset.stated)}",
        *(_command_to_add(name, item) for item in dataset.additions),
        f"nucleus train {_RECIPE_FILE}",
        f"nucleus evaluate {_model(record)} {_word(record.dataset)} --split test --gallery worst.png",
    ]
    return "\n".join(lines)


def _command_to_add(name: str, item: Addition) -> str:
    into = _word(f"{name}@{item.parent}")
    return f"nucleus data import {_FOLDER}/{_word(item.source)} --into {into} --seed {item.seed}{_stated(item.stated)}"


def _stated(stated: DataOrigin) -> str:
    """Return the options of an import that state where its images are from."""
    given = {"license": stated.license, "source": stated.origin}
    return "".join(f" --{name} {_word(text)}" for name, text in given.items() if text is not None)


def recipe_toml(record: RunRecord) -> str:
    """Return the whole recipe as TOML, with the dataset version that the run used."""
    return tomli_w.dumps(_without_none({**record.recipe, "dataset": record.dataset}))


def differing_settings(record: RunRecord) -> str:
    """Return the settings of the recipe that differ from the defaults, as TOML."""
    recipe = {**record.recipe, "dataset": record.dataset}
    required = {"model": record.recipe.get("model", record.model), "dataset": record.dataset}
    try:
        defaults = parse_recipe(required, "the report").model_dump(mode="json")
    except RecipeError:  # the recipe is from another version of this package: return all of it
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
    """Return the value without None, because TOML has no null."""
    if isinstance(value, Mapping):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value if item is not None]
    return value


def _bucket(record: RunRecord) -> str:
    lines = [f"export NUCLEUS_BUCKET={_word(record.bucket)}"]
    if record.endpoint is not None:
        lines.insert(0, f"export AWS_ENDPOINT_URL_S3={_word(record.endpoint)}")
    return "\n".join(lines)


def _model(record: RunRecord) -> str:
    return _word(record.model if record.version is None else f"{record.model}@{record.version}")


def _word(text: str) -> str:
    """Return the text quoted for a shell."""
    return shlex.quote(text)


def write_report(folder: Path, record: RunRecord, dataset: DatasetManifest) -> Path:
    """Write the page, `report.html`.

    The page marks pictures that are missing or damaged. Its Content-Security-Policy forbids it to load or run anything,
    whatever names and texts the bucket contains.

    Args:
        folder: Folder that contains `pictures/`, as described in `nucleus.runs.record`.
        record: Record of the run.
        dataset: Dataset that the run used.

    Returns:
        Path of the page.
    """
    path = folder / REPORT_PAGE
    write_atomic(path, render_page(folder, record, dataset))
    return path


def render_page(folder: Path, record: RunRecord, dataset: DatasetManifest) -> bytes:
    """Return the page that `write_report` writes."""
    content = _content(record, dataset)
    template = _template()
    keys = [item.key for groups in content["groups"].values() for group in groups for item in group.pictures]
    without_bytes = dict.fromkeys(keys, EncodedPicture("", 999, 999))
    room = MOST_BYTES - len(template.render(**content, pictures=without_bytes).encode())
    pictures = embedded(PictureFolder(folder / PICTURES), keys, room)
    return template.render(**content, pictures=pictures).encode()


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _content(record: RunRecord, dataset: DatasetManifest) -> dict[str, Any]:
    """Return the values of the template, except the encoded pictures."""
    split = scored_split(record)
    by_kind = record.metrics[split] if split else {}
    published = has_published_images(dataset)
    panels = {
        "curves": curve_panels(record.history, record.best_epoch),
        "precision": precision_panels(by_kind, SPLIT_NAMES.get(split or "", ""), published=published),
        "dataset": dataset_panels(dataset),
        "timing": [timing_panel(record.stages, record.history)] if record.stages else [],
    }
    style = (_STATIC / "looks.css").read_text(encoding="utf-8") + (_HERE / "page.css").read_text(encoding="utf-8")
    icon = (_STATIC / "icon.svg").read_text(encoding="utf-8")
    groups = _groups(record)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return {
        "style": Markup(style),  # noqa: S704 # nosec B704 - a file of this package
        "style_sum": digest,
        "summary": summarize(record, dataset),
        "record": record,
        "dataset": dataset,
        "split": SPLIT_NAMES.get(split or ""),
        "icon": Markup(icon.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)),  # noqa: S704 # nosec B704 - a file of this package
        "icon_base64": base64.b64encode(icon.encode()).decode(),
        "groups": groups,
        "addresses": {group.key: address_in_page(record, group.key) for part in groups.values() for group in part},
        "longest": LONGEST_SIDE,
        "serve": commands_to_serve(record),
        "figures": {key: [(panel, _svg(panel)) for panel in shown] for key, shown in panels.items()},
        "colours": {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in MISTAKE_COLOURS.items()},
        "scores": scores_table(record.metrics),
        "all_scores": all_scores_table(record.metrics),
        "failures": failure_table(by_kind),
        "published": published_table(record.metrics.get("test", {})) if published else None,
        "sources": sorted({(system.source, system.url) for system in published_systems()}),
        "history": history_table(record.history) if record.history else None,
        "trained_is_scored": any({"iou", "dice", "accuracy"} & set(entry) for entry in record.history),
        "dataset_facts": dataset_facts(record, dataset),
        "splits": splits_table(dataset),
        "left_out": left_out_tables(dataset),
        "network": network_table(record.network),
        "thresholds": _thresholds(record.thresholds),
        "restarts": restarts_of(record),
        "cost": cost_of(record),
        "workers": workers_of(record),
        "started": moment_text(record.begun),
        "use": commands_to_use(record),
        "repeat": commands_to_repeat(record, dataset),
        "differing": differing_settings(record),
        "recipe": recipe_toml(record),
    }


def _thresholds(stored: Mapping[str, float]) -> dict[str, float]:
    """Return the settings with which labels are made by their titles; unknown ones have their own names."""
    ordered = [*(name for name in _THRESHOLDS if name in stored), *(name for name in stored if name not in _THRESHOLDS)]
    return {_THRESHOLDS.get(name, name): stored[name] for name in ordered}


def _groups(record: RunRecord) -> dict[str, list[PictureGroup]]:
    """Return the images whose pictures the page shows, the most important first."""
    return {
        "worst": tested_groups(record, "worst"),
        "best": tested_groups(record, "best"),
        "watched": watched_groups(record),
        "examples": example_groups(record),
    }


def _svg(panel: Panel) -> Markup:
    return Markup(svg_of(panel))  # noqa: S704 # nosec B704 - ElementTree escapes text
