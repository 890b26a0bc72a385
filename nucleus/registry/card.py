"""Markdown that is also pleasant to read as it stands: wrapped paragraphs, tables whose columns are aligned."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence

from nucleus.config.encoders import ENCODERS, IMAGENET_TERMS, KNOWN_WEIGHTS, EncoderName
from nucleus.config.recipe import CardOptions, Recipe
from nucleus.data.dataset import SPLITS, DatasetManifest, Sample
from nucleus.data.images import Kind
from nucleus.metrics.nuclei import SIZES
from nucleus.metrics.scores import HEADLINES
from nucleus.model.architecture import ModelConfig
from nucleus.registry.manifest import EncoderWeightsOrigin, Origin

__all__ = [
    "FENCE",
    "bullet",
    "data_lines",
    "knowledge_lines",
    "license_lines",
    "limit_lines",
    "model_card",
    "not_stated",
    "paragraph",
    "source_lines",
    "stated_source",
    "table",
    "without_front_matter",
]


FENCE = "---"
"""The line before and after front matter."""

_WIDTH = 110
_HELD = "\0"


def paragraph(*sentences: str) -> list[str]:
    """Sentences as the lines of one paragraph."""
    return _wrapped(" ".join(sentences), _WIDTH)


def bullet(*sentences: str) -> list[str]:
    """Sentences as the lines of one item of a list."""
    lines = _wrapped(" ".join(sentences), _WIDTH - 2)
    return [f"{'  ' if number else '- '}{line}" for number, line in enumerate(lines)]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """A table; the columns after the first `text_columns` hold numbers and are aligned right."""
    widths = [max(3, *(len(cells[number]) for cells in (columns, *rows))) for number in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if number < text_columns else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if number < text_columns else f"{'-' * (width - 1)}:" for number, width in enumerate(widths)]
    return [line(columns), line(rule), *(line(cells) for cells in rows)]


def without_front_matter(text: str) -> str:
    """A document as people read it."""
    if not text.startswith(f"{FENCE}\n"):
        return text
    return text.partition(f"\n{FENCE}\n")[2].lstrip("\n")


def _wrapped(text: str, width: int) -> list[str]:
    """Lines; no percent sign begins one."""
    lines = textwrap.wrap(text.replace(" %", f"{_HELD}%"), width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_HELD, " ") for line in lines]


def not_stated(key: str) -> str:
    """What stands in the place of what the recipe does not say."""
    return f"not stated (set `card.{key}` in the recipe)"


def stated_source(card: CardOptions, dataset: DatasetManifest) -> str | None:
    """Whence the recipe says that the data are; None if it does not, or speaks of others."""
    return card.data_source if _is_about(card, dataset) else None


def source_lines(card: CardOptions, dataset: DatasetManifest) -> list[str]:
    """Source and licence of the data."""
    if not _is_about(card, dataset):
        return paragraph(
            "Source and licence: not stated (the recipe speaks of other images, those imported from "
            f"`{card.data_import}`: set `card.data_source`, `card.data_license` and `card.data_import` in it)."
        )
    return [
        *bullet(f"Source: {card.data_source or not_stated('data_source')}"),
        *bullet(f"Licence of the images and labels: {card.data_license or not_stated('data_license')}"),
    ]


def license_lines(
    card: CardOptions, dataset: DatasetManifest, encoder: EncoderName, weights: EncoderWeightsOrigin
) -> list[str]:
    """Licences of the model, the data and the encoder's weights."""
    data = card.data_license if _is_about(card, dataset) else None
    return [
        *bullet(f"This model's weights: {card.license or not_stated('license')}"),
        *bullet(f"The data: {data or 'not stated (see Data)'}"),
        *bullet(f"The weights that the encoder began with: {_weights_license(encoder, weights)}"),
        "",
        "Licences are repeated as they were stated; nobody has checked them. This is no legal advice.",
    ]


def _is_about(card: CardOptions, dataset: DatasetManifest) -> bool:
    """Whether what the recipe says of data is about this dataset."""
    source = dataset.source
    return card.data_import is None or card.data_import in {source, source.rpartition(".")[0]}


def _weights_license(encoder: EncoderName, weights: EncoderWeightsOrigin) -> str:
    if weights.source == "none":
        return "none, it began at random"
    facts = ENCODERS[encoder]
    is_known = KNOWN_WEIGHTS.get(weights.sha256 or "") == encoder
    if facts.weights_license is None or not (is_known or weights.source == "imagenet"):
        return "unknown: they came from a file that was given; who gave it knows whence it is"
    doubt = "" if is_known else " (If somebody put another file in their place in the bucket, its own licence holds.)"
    return f"{facts.weights_license}; {facts.license_source}. {IMAGENET_TERMS}{doubt}"


_FEW_TRAINING_IMAGES = 20


def data_lines(origin: Origin, card: CardOptions, dataset: DatasetManifest) -> list[str]:
    """The dataset version: source, licence, images by split and kind, and what was left out."""
    rows = []
    for split in SPLITS:
        samples = dataset.split_samples(split)
        by_kind = {kind.value: [sample for sample in samples if sample.kind == kind] for kind in Kind}
        rows += [(split, kind, *_amounts(members)) for kind, members in {"all": samples, **by_kind}.items() if members]
    sides = [side for sample in dataset.samples for side in (sample.height, sample.width)]
    return [
        *bullet(f"Dataset: `{origin.dataset}`, imported from `{dataset.source}` on {dataset.created[:10]}"),
        *source_lines(card, dataset),
        "",
        *table(("split", "kind", "images", "nuclei"), rows, text_columns=2),
        "",
        *paragraph(
            "Kinds: dark-field, bright nuclei on dark ground (fluorescence); bright-field, grey on bright ground; "
            f"stain, colour on bright ground (H&E and others). Images are of {min(sides)} to {max(sides):,} px a side. "
            f"Not used: {len(dataset.duplicates)} exact duplicates of others, {len(dataset.left_out)} images that were "
            "damaged or had no usable labels. Tiles of one picture and near-duplicates, where they were recognised, "
            "are on one side of the split."
        ),
    ]


def knowledge_lines(config: ModelConfig, dataset: DatasetManifest) -> list[str]:
    """Limits that follow from the data, without any measurement."""
    trained = dataset.split_samples("train")
    counts = {kind.value: sum(sample.kind == kind for sample in trained) for kind in Kind}
    never = [kind for kind, count in counts.items() if not count]
    rare = [f"{kind} ({count})" for kind, count in counts.items() if 0 < count < _FEW_TRAINING_IMAGES]
    lines = []
    if never:
        lines += bullet(f"Never seen in training: {', '.join(never)} images. What it makes of them is not known.")
    if rare:
        lines += bullet(f"Seldom seen in training: {', '.join(rare)} images. Others of their kind may surprise it.")
    if config.nucleus_diameter is not None:
        lines += bullet(
            f"The nuclei it knows are about {config.nucleus_diameter:.0f} px across (median of the val split). If "
            "yours are of another size, `--diameter` rescales the images."
        )
    if config.pixel_size is None:
        lines += bullet("The pixel size of its images is not known: it goes by pixels, not by micrometres.")
    else:
        lines += bullet(
            f"Its images have pixels of {config.pixel_size:g} micrometres; others are rescaled if their file or "
            "`--pixel-size` says theirs."
        )
    return [
        *lines,
        *bullet("Flat images (2D) only: no stacks, no time series, and nothing is followed from image to image."),
        *bullet("Grey values are stretched image by image: it does not compare how bright images are."),
        *bullet("Its labels were drawn by others, and it repeats their habits, and their mistakes, in outlines."),
    ]


def _amounts(samples: list[Sample]) -> tuple[str, str]:
    return f"{len(samples):,}", f"{sum(sample.nuclei for sample in samples):,}"


Scores = Mapping[str, float]

_FEW_IMAGES = 5
"""Of a kind with fewer images nothing is concluded."""
_FEW_NUCLEI = 30
"""Nor of a size with fewer nuclei."""
_SIZE_TITLES = dict(zip(SIZES, ("under 12 px", "12 to 24 px", "24 to 48 px", "over 48 px"), strict=True))
_COUNTED = "nuclei_missed"
"""Runs of older versions of this package have no such metric, nor its like."""


def limit_lines(metrics: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    """Markdown on where a model fails, from its metrics by split, kind of image and name."""
    split = next((name for name in ("test", "val") if metrics.get(name, {}).get("all", {}).get("images")), None)
    if split is None:
        return ["Not measured: there were no images to test the model on."]
    found = {kind: scores for kind, scores in metrics[split].items() if scores["images"]}
    if _COUNTED not in found["all"]:
        return ["Not measured: the version of this package that trained the model did not count mistakes."]
    seen = "which training did not use" if split == "test" else "by which weights and thresholds were also chosen"
    few = [kind for kind, scores in found.items() if kind != "all" and scores["images"] < _FEW_IMAGES]
    none = [kind.value for kind in Kind if kind.value not in found]
    total = found["all"]["images"]
    return [
        *paragraph(
            f"Measured on {_count(total, 'image')} of the {split} split, {seen}. A nucleus is found if its predicted "
            "outline and the true one share at least half of the area that they cover together (IoU 0.5); one whose "
            "outline is further off counts as missed, and what was drawn in its place as extra."
        ),
        *([f"**{_count(total, 'image')}: too few to tell.**"] if total < _FEW_IMAGES else []),
        "",
        *paragraph(*_overall(found["all"]), *_weakest(found, few)),
        "",
        *_mistakes_table(found),
        "",
        *paragraph(
            "Found one for one, missed, merged and in pieces: of the true nuclei; extra: of the predicted ones. "
            "Merged: in one with a neighbour; in pieces: one nucleus as several. Count off by: nuclei, mean over "
            "images.",
            *([f"Too few images to tell (under {_FEW_IMAGES}): {', '.join(few)}."] if few else []),
            *([f"No images to tell by: {', '.join(none)}."] if none else []),
        ),
        "",
        *_by_size(found),
    ]


def _overall(scores: Scores) -> list[str]:
    """The mistakes, in sentences."""
    total = scores["nuclei_true"]
    if not total:
        return ["These images hold no nuclei."]
    sentences = [
        f"Of {_count(total, 'true nucleus', 'true nuclei')}, {_percent(_found(scores), total)} were found one for one, "
        f"{_percent(scores['nuclei_missed'], total)} were missed, {_percent(scores['nuclei_merged'], total)} came out "
        f"merged with a neighbour and {_percent(scores['nuclei_split'], total)} in pieces."
    ]
    if scores["nuclei_predicted"]:
        extra = _percent(scores["nuclei_extra"], scores["nuclei_predicted"])
        sentences.append(f"Of those that the model reports, {extra} are extra: no true nucleus matches them.")
    sentences.append(f"The count of an image is off by {scores['count_error']:.1f} nuclei on average.")
    if scores["ap_50"]:
        sentences.append(
            f"Outlines are less sure than counts: AP falls from {scores['ap_50']:.2f} at IoU 0.5 to "
            f"{scores['ap_70']:.2f} at 0.7 and {scores['ap_90']:.2f} at 0.9."
        )
    return sentences


def _weakest(found: Mapping[str, Scores], few: Sequence[str]) -> list[str]:
    """Which kind of image the model does worst on, of those with enough images."""
    scores = {kind: scores["map"] for kind, scores in found.items() if kind not in {"all", *few}}
    if len(scores) < 2:
        return []
    worst, best = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
    return [f"It is weakest on **{worst}** images: mAP {scores[worst]:.2f}, against {scores[best]:.2f} on {best} ones."]


def _mistakes_table(found: Mapping[str, Scores]) -> list[str]:
    rows = []
    for kind, scores in found.items():
        total = scores["nuclei_true"]
        shares = [_percent(count, total) for count in (_found(scores), *_wrong(scores))]
        extra = _percent(scores["nuclei_extra"], scores["nuclei_predicted"])
        rows.append((kind, f"{scores['images']:.0f}", f"{total:,.0f}", *shares, extra, f"{scores['count_error']:.1f}"))
    titles = ("images", "true nuclei", "found one for one", "missed", "merged", "in pieces", "extra", "count off by")
    return table(("kind", *titles), rows)


def _by_size(found: Mapping[str, Scores]) -> list[str]:
    """Which share of the true nuclei is found, by their size."""
    overall = found["all"]
    enough = {
        title: overall[f"recall_50_{size}"]
        for size, title in _SIZE_TITLES.items()
        if overall[f"nuclei_true_{size}"] >= _FEW_NUCLEI
    }
    sentences = ["By size (diameter of the circle of the same area):"]
    if len(enough) > 1:
        worst, best = min(enough, key=enough.__getitem__), max(enough, key=enough.__getitem__)
        sentences = [
            f"By size (diameter of the circle of the same area), nuclei of {worst} are found least often: "
            f"{100 * enough[worst]:.1f} %, against {100 * enough[best]:.1f} % of those of {best}."
        ]
    rows = [(title, *(_recall(scores, size) for scores in found.values())) for size, title in _SIZE_TITLES.items()]
    return [
        *paragraph(*sentences),
        "",
        *table(("diameter", *found), rows),
        "",
        *paragraph(
            "Found (matched at IoU 0.5, also where it is merged or in pieces), of how many; where there are fewer than "
            f"{_FEW_NUCLEI}, little can be said."
        ),
    ]


def _recall(scores: Scores, size: str) -> str:
    count = scores[f"nuclei_true_{size}"]
    return f"{100 * scores[f'recall_50_{size}']:.1f} % of {count:,.0f}" if count else "none there"


def _wrong(scores: Scores) -> list[float]:
    """True nuclei missed, merged and split; each counts once."""
    return [scores[f"nuclei_{name}"] for name in ("missed", "merged", "split")]


def _found(scores: Scores) -> float:
    """True nuclei found one for one."""
    return scores["nuclei_true"] - sum(_wrong(scores))


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none there"


def _count(number: float, one: str, many: str | None = None) -> str:
    return f"{number:,.0f} {one if number == 1 else many or f'{one}s'}"


_HEADS = {
    "border": "background, body and border of nuclei",
    "distance": "nucleus or not, and the distance to its edge",
    "both": "background, body and border of nuclei, and the distance to the edge",
}
_HUB_LICENSE = re.compile(r"[a-z0-9.-]+")
"""What an identifier of a licence looks like to Hugging Face."""


def model_card(name: str, origin: Origin, config: ModelConfig, dataset: DatasetManifest) -> str:
    """The card as Markdown, with YAML front matter.

    Args:
        name: The model's.
        origin: Where it comes from, with its metrics.
        config: Its `model.json`.
        dataset: The manifest of the dataset version that it was trained on.
    """
    recipe = Recipe.model_validate_json(json.dumps(origin.recipe))
    sections = {
        "What it is for": _purpose_lines(),
        "How to use it": _use_lines(name),
        "Metrics": _metric_lines(origin.metrics),
        "Where it fails": limit_lines(origin.metrics),
        "Limits that follow from its data": knowledge_lines(config, dataset),
        "Data": data_lines(origin, recipe.card, dataset),
        "How it was made": _making_lines(origin, recipe, config),
        "Licences": license_lines(recipe.card, dataset, config.encoder, origin.encoder_weights),
        "Citation and contact": _citation_lines(name, origin, recipe.card, dataset),
    }
    lines = [f"# {name}", "", "Finds cell nuclei in microscope images and outlines each by itself."]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section]
    return _front_matter(name, origin, recipe.card, dataset) + "\n".join(lines) + "\n"


def _front_matter(name: str, origin: Origin, card: CardOptions, dataset: DatasetManifest) -> str:
    """YAML; what may hold any character is quoted as in JSON, which YAML reads."""
    lines = ["library_name: nucleus", "pipeline_tag: image-segmentation"]
    lines.append("tags: [microscopy, cell-nuclei, instance-segmentation, u-net]")
    if card.license is not None:
        known = _HUB_LICENSE.fullmatch(card.license.lower())
        lines.append(f"license: {known[0]}" if known else "license: other")
        if not known:
            lines.append(f"license_name: {json.dumps(card.license)}")
    scores = origin.metrics.get("test", {}).get("all", {})
    if scores.get("images"):
        data = json.dumps({"name": dataset.name, "type": dataset.name, "revision": dataset.version, "split": "test"})
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:", "  - task: {type: image-segmentation}"]
        lines += [f"    dataset: {data}", "    metrics:"]
        lines += [f"    - {{type: {key}, name: {title}, value: {scores[key]:.4f}}}" for key, title in HEADLINES]
    return "\n".join([FENCE, *lines, FENCE]) + "\n\n"


def _purpose_lines() -> list[str]:
    return [
        *paragraph("For counting and measuring nuclei in research, in images like those of its data (below)."),
        "",
        *paragraph(
            "Not for diagnosis or any decision about a patient; not for whole cells or other parts of them, for "
            "stacks or time series, or for kinds of images that are not in the tables below. Before you trust its "
            "numbers, look at the overlays of some of your own images and count a few by hand."
        ),
    ]


def _use_lines(name: str) -> list[str]:
    return [
        *paragraph(
            f"Pull it from the bucket (`NUCLEUS_BUCKET`) into a folder `model`; `{name}` means its latest version, "
            f"`{name}@VERSION` one for good:"
        ),
        "",
        "```sh",
        f"nucleus models pull {name} model",
        "nucleus predict image.png --model model --out results    # labels, overlay, tables",
        "```",
        "",
        *paragraph(
            "In Python; `labels` is an array of the image's height and width, 0 for background and 1, 2, ... for "
            "nuclei:"
        ),
        "",
        "```python",
        "import nucleus",
        'found = nucleus.load("model").segment("image.png")',
        "labels = found.labels",
        "table = found.table",
        "overlay = found.overlay()",
        "```",
    ]


def _metric_lines(metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    rows = [
        (split, kind, f"{scores['images']:.0f}", *(f"{scores[key]:.3f}" for key, _ in HEADLINES))
        for split, by_kind in metrics.items()
        for kind, scores in by_kind.items()
        if scores["images"]
    ]
    return [
        *table(("split", "kind", "images", *(title for _, title in HEADLINES)), rows, text_columns=2),
        "",
        *paragraph(
            "Means over images. AP.5, AP.7, AP.9: found / (found + missed + extra) nuclei at IoU 0.5, 0.7, 0.9; "
            "mAP: the mean over IoU 0.50, 0.55, ..., 0.95. IoU, Dice and accuracy are of the pixels, nucleus or "
            "not. The val split chose the weights and the thresholds; the run made no choice by the test split."
        ),
    ]


def _making_lines(origin: Origin, recipe: Recipe, config: ModelConfig) -> list[str]:
    encoder, weights, options, settings = (
        ENCODERS[config.encoder],
        origin.encoder_weights,
        recipe.optimizer,
        config.instances,
    )
    begin = "random weights" if weights.source == "none" else f"`{weights.source}` weights (SHA-256 `{weights.sha256}`)"
    wandb = f", W&B `{origin.wandb_run}`" if origin.wandb_run else ""
    return [
        *bullet(
            "Network: U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597), decoder of "
            f"{', '.join(map(str, config.decoder_channels))} channels"
        ),
        *bullet(f"Encoder: {encoder.title} ({encoder.paper}), begun with {begin}, {_encoder_training(recipe)}"),
        *bullet(f"Heads `{config.heads}`: {_HEADS[config.heads]}; nuclei grow by watershed from seeds inside them"),
        *bullet(
            f"Thresholds, tuned on the val split: mask {settings.mask_threshold:g}, seeds {settings.seed_threshold:g}, "
            f"least score {settings.min_score:g}, least area {settings.min_area} px"
        ),
        *bullet(
            f"Training: at most {options.epochs} epochs, {recipe.input.batch_size} crops of {recipe.input.crop} px a "
            f"step, AdamW, learning rate {options.learning_rate:g} to {options.final_learning_rate:g}, "
            f"{options.precision}, seed {recipe.seed}"
        ),
        *bullet(f"Run `{origin.run}` with nucleus {origin.code_version}{wandb}; `manifest.json` has the whole recipe"),
    ]


def _encoder_training(recipe: Recipe) -> str:
    start = recipe.network.encoder_trained_from
    if start is None:
        return "not trained further"
    return f"trained from epoch {start + 1} on" if start else "trained from the start"


def _citation_lines(name: str, origin: Origin, card: CardOptions, dataset: DatasetManifest) -> list[str]:
    source = stated_source(card, dataset)
    return [
        *bullet(
            f"To cite: model `{name}`, run `{origin.run}`, trained on `{dataset.name}@{dataset.version}` with nucleus "
            f"{origin.code_version}." + (f" Data: {source}." if source else "")
        ),
        *bullet(f"Contact: {card.contact or not_stated('contact')}"),
    ]
