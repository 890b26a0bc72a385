"""The model card: what a person should know before using a published model.

Its parts are those of Mitchell et al. 2019 (https://arxiv.org/abs/1810.03993), its front matter that of Hugging Face's
model cards. It tells what origin, configuration and dataset manifest hold; what only a person can know comes from the
recipe's `card`.
"""

import json
import re
from collections.abc import Mapping

from nucleus.config.encoders import ENCODER_FACTS
from nucleus.config.recipe import CardOptions, Recipe
from nucleus.data.manifest import DatasetManifest
from nucleus.metrics.headlines import HEADLINES
from nucleus.model.architecture import ModelConfig
from nucleus.registry.card_data import data_lines, knowledge_lines
from nucleus.registry.card_licenses import license_lines, not_stated, stated_source
from nucleus.registry.card_limits import limit_lines
from nucleus.registry.manifest import Origin
from nucleus.registry.markdown import FENCE, bullet, paragraph, table

__all__ = ["model_card"]

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
        "from pathlib import Path",
        "from nucleus.data.images import decode_image",
        "from nucleus.predict.predictor import load_predictor",
        'image = decode_image(Path("image.png").read_bytes(), "image.png")',
        'labels = next(load_predictor(Path("model")).images([image])).labels',
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
        ENCODER_FACTS[config.encoder],
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
