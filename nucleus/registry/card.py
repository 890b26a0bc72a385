"""Model card of a published model: use, scores, limits, data and licences, as Markdown from `card.md.j2`."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from nucleus.config.encoders import ENCODERS, IMAGENET_TERMS, KNOWN_WEIGHTS, EncoderName
from nucleus.config.names import Kind
from nucleus.config.recipe import Recipe
from nucleus.data.dataset import DatasetManifest
from nucleus.data.origins import described_sources, licenses_text
from nucleus.data.samples import SPLITS, Samples
from nucleus.metrics.nuclei import SIZE_TITLES
from nucleus.metrics.scores import (
    HEADLINES,
    SCORE_COLUMNS,
    Metrics,
    Scores,
    amount,
    found_one_for_one,
    score_cells,
)
from nucleus.model.architecture import ModelConfig
from nucleus.registry.manifest import EncoderWeightsOrigin, Origin, before_and_after
from nucleus.registry.versions import INCLUDED
from nucleus.text import MISSING, NOT_STATED, count, percent, plural

__all__ = ["model_card", "without_front_matter"]

_FENCE = "---"
"""Line before and after the front matter."""
_WIDTH = 110
_HELD = "\0"
_NOT_WRAPPED = (_FENCE, "#", "|", "```")
_HUB_LICENSE = re.compile(r"[a-z0-9.-]+")
"""Identifier of a licence on Hugging Face."""
_HEADS = {
    "border": "background, body and border of nuclei",
    "distance": "nucleus or not, and the distance to its edge",
    "both": "background, body and border of nuclei, and the distance to the edge",
}
_FEW_TRAINING_IMAGES = 20
_FEW_IMAGES = 5
"""Kinds with fewer test images are not compared."""
_FEW_NUCLEI = 30
"""Sizes with fewer nuclei are not compared."""


def model_card(
    name: str,
    origin: Origin,
    config: ModelConfig,
    dataset: DatasetManifest,
    history: Sequence[Mapping[str, float]] = (),
    *,
    half: bool = False,
) -> str:
    """Return the card as Markdown that also reads well as plain text, with YAML front matter for Hugging Face.

    Args:
        name: Name of the model.
        origin: Run, recipe and metrics of the model.
        config: Configuration of the network, as in `model.json`.
        dataset: Manifest of the dataset version that the model was trained on.
        history: Metrics of each epoch, which have its duration.
        half: Whether these are its files in half precision; those of the model `nuclei` come along with the package.
    """
    recipe = Recipe.model_validate_json(json.dumps(origin.recipe))
    tested = origin.metrics.get("test", {}).get("all", {})
    sources = described_sources(dataset.data_sources, recipe.card)
    every = origin.model_copy(update={"data": sources}).all_data
    known = _HUB_LICENSE.fullmatch((recipe.card.license or "").lower())
    text = _template().render(
        name=name,
        latest=f"{name}@latest" if name == INCLUDED else name,
        included=half and name == INCLUDED,
        half=half,
        minutes=sum(epoch.get("seconds", 0.0) + epoch.get("validation_seconds", 0.0) for epoch in history) / 60,
        workers=round(max((epoch.get("workers", 0) for epoch in history), default=0)),
        origin=origin,
        weights=origin.encoder_weights,
        config=config,
        dataset=dataset,
        recipe=recipe,
        card=recipe.card,
        hub_license=known and known[0],
        tested=_defined_headlines(tested) if tested.get("images") else [],
        score_table=_table(SCORE_COLUMNS, score_cells(origin.metrics, digits=3), text_columns=2),
        changes=before_and_after(origin, "map"),
        limits=_limits(origin.metrics),
        sources=sources,
        data_licenses=licenses_text(every),
        data_origins="; ".join(dict.fromkeys(source.origin for source in every if source.origin)),
        encoder=ENCODERS[config.encoder],
        encoder_training=_encoder_training(recipe),
        heads=_HEADS[config.heads],
        weights_license=_weights_license(config.encoder, origin.encoder_weights),
        **_data_facts(dataset),
    )
    return _wrapped(text)


def _defined_headlines(scores: Scores) -> list[tuple[str, str, float]]:
    """Return key, title and value of the main scores that are defined."""
    return [(key, title, value) for key, title in HEADLINES if (value := scores.get(key)) is not None]


def without_front_matter(text: str) -> str:
    """Return the card without its YAML front matter."""
    if not text.startswith(f"{_FENCE}\n"):
        return text
    return text.partition(f"\n{_FENCE}\n")[2].lstrip("\n")


def _template() -> Template:
    environment = Environment(  # noqa: S701 # nosec B701 - Markdown, not HTML
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = json.dumps  # JSON is valid YAML
    environment.globals |= {
        "count": count,
        "not_stated": _not_stated,
        "percent": percent,
        "plural": plural,
    }
    return environment.get_template("card.md.j2")


def _wrapped(markdown: str) -> str:
    """Wrap paragraphs and list items of Markdown; front matter, headings, tables and code stay as they are."""
    blocks = re.split(r"\n\n+", markdown.strip("\n"))
    wrapped = (block if block.startswith(_NOT_WRAPPED) else _wrapped_block(block) for block in blocks)
    return "\n\n".join(wrapped) + "\n"


def _wrapped_block(block: str) -> str:
    """Wrap a paragraph or a list so that no line begins with a percent sign."""
    lines: list[str] = []
    for item in re.split(r"\n(?=- )", block):
        text = " ".join(item.split()).replace(" %", f"{_HELD}%")
        indent = "  " if text.startswith("- ") else ""
        lines += textwrap.wrap(text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace(_HELD, " ")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return a Markdown table: `text_columns` columns aligned left, then columns of numbers aligned right."""
    widths = [max(3, *(len(cells[number]) for cells in (columns, *rows))) for number in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if number < text_columns else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if number < text_columns else f"{'-' * (width - 1)}:" for number, width in enumerate(widths)]
    return "\n".join([line(columns), line(rule), *(line(cells) for cells in rows)])


def _not_stated(key: str) -> str:
    return f"{NOT_STATED} (set `card.{key}` in the recipe)"


def _weights_license(encoder: EncoderName, weights: EncoderWeightsOrigin) -> str:
    if weights.source == "none":
        return "none, the weights were random"
    facts = ENCODERS[encoder]
    is_known = KNOWN_WEIGHTS.get(weights.sha256 or "") == encoder
    if facts.weights_license is None or not (is_known or weights.source == "imagenet"):
        return "unknown: the weights came from a user-supplied file; ask whoever supplied it"
    doubt = "" if is_known else " (If somebody replaced the file in the bucket, the licence of that file applies.)"
    return f"{facts.weights_license}; {facts.license_source}. {IMAGENET_TERMS}{doubt}"


def _encoder_training(recipe: Recipe) -> str:
    start = recipe.network.encoder_trained_from
    if start is None:
        return "not trained further"
    return f"trained from epoch {start + 1} on" if start else "trained from the start"


def _data_facts(dataset: DatasetManifest) -> dict[str, Any]:
    """Return images by split and kind, kinds that are rare or absent in training, and the range of image sizes."""
    rows = []
    for split in SPLITS:
        samples = dataset.split_samples(split)
        by_kind = {kind.value: samples.where("kind", kind.value) for kind in Kind}
        rows += [(split, kind, *_amounts(members)) for kind, members in {"all": samples, **by_kind}.items() if members]
    trained = dataset.split_samples("train").kinds
    sides = [dataset.samples.column(name) for name in ("height", "width")]
    return {
        "data_table": _table(("split", "kind", "images", "nuclei"), rows, text_columns=2),
        "unseen_kinds": [kind.value for kind, number in trained.items() if not number],
        "rare_kinds": [
            f"{kind.value} ({number})" for kind, number in trained.items() if 0 < number < _FEW_TRAINING_IMAGES
        ],
        "shortest_side": int(min(each.min() for each in sides)),
        "longest_side": int(max(each.max() for each in sides)),
    }


def _amounts(samples: Samples) -> tuple[str, str]:
    return count(len(samples)), count(samples.nuclei)


def _limits(metrics: Metrics) -> dict[str, Any] | None:
    """Return facts about the mistakes on the test split, or else the val split; None if neither has images."""
    split = next((name for name in ("test", "val") if metrics.get(name, {}).get("all", {}).get("images")), None)
    if split is None:
        return None
    by_kind = {kind: scores for kind, scores in metrics[split].items() if scores["images"]}
    overall = by_kind["all"]
    found = found_one_for_one(overall)
    if found is None:
        return {"counted": False}
    few = [kind for kind, scores in by_kind.items() if kind != "all" and amount(scores, "images") < _FEW_IMAGES]
    compared = {
        kind: value
        for kind, scores in by_kind.items()
        if kind not in {"all", *few} and (value := scores["map"]) is not None
    }
    sizes = {
        title: amount(overall, f"recall_50_{size}")
        for size, title in SIZE_TITLES.items()
        if amount(overall, f"nuclei_true_{size}") >= _FEW_NUCLEI
    }
    return {
        "counted": True,
        "split": split,
        "all": overall,
        "found": found,
        "few_images": _FEW_IMAGES,
        "few_nuclei": _FEW_NUCLEI,
        "few_kinds": few,
        "missing_kinds": [kind.value for kind in Kind if kind.value not in by_kind],
        "kinds": _lowest_and_highest(compared),
        "mistakes": _mistakes_table(by_kind),
        "sizes": _lowest_and_highest(sizes),
        "by_size": _size_table(by_kind),
    }


def _lowest_and_highest(scores: Mapping[str, float]) -> tuple[tuple[str, float], tuple[str, float]] | None:
    """Return the lowest and the highest of two or more scores, with their names; None for fewer."""
    if len(scores) < 2:
        return None
    return min(scores.items(), key=lambda item: item[1]), max(scores.items(), key=lambda item: item[1])


def _mistakes_table(by_kind: Mapping[str, Scores]) -> str:
    rows = []
    for kind, scores in by_kind.items():
        total = amount(scores, "nuclei_true")
        numbers = (
            found_one_for_one(scores) or 0.0,
            *(amount(scores, f"nuclei_{name}") for name in ("missed", "merged", "split")),
        )
        shares = [percent(number, total) for number in numbers]
        extra = percent(amount(scores, "nuclei_extra"), amount(scores, "nuclei_predicted"))
        off_by = f"{amount(scores, 'count_error'):.1f}"
        rows.append((kind, count(amount(scores, "images")), count(total), *shares, extra, off_by))
    titles = ("images", "true nuclei", "found one for one", "missed", "merged", "split", "extra", "count off by")
    return _table(("kind", *titles), rows)


def _size_table(by_kind: Mapping[str, Scores]) -> str:
    """Return the share of true nuclei found, by size and kind of image."""
    rows = [(title, *(_recall(scores, size) for scores in by_kind.values())) for size, title in SIZE_TITLES.items()]
    return _table(("diameter", *by_kind), rows)


def _recall(scores: Scores, size: str) -> str:
    number = amount(scores, f"nuclei_true_{size}")
    return f"{percent(amount(scores, f'recall_50_{size}'), 1)} of {count(number)}" if number else MISSING
