"""What a model card says of source and licences: what was stated, by whom, and what is not known."""

from nucleus.config.encoders import ENCODER_FACTS, IMAGENET_TERMS, KNOWN_WEIGHTS, EncoderName
from nucleus.config.recipe import CardOptions
from nucleus.data.manifest import DatasetManifest
from nucleus.registry.manifest import EncoderWeightsOrigin
from nucleus.registry.markdown import bullet, paragraph

__all__ = ["license_lines", "not_stated", "source_lines", "stated_source"]


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
    facts = ENCODER_FACTS[encoder]
    is_known = KNOWN_WEIGHTS.get(weights.sha256 or "") == encoder
    if facts.weights_license is None or not (is_known or weights.source == "imagenet"):
        return "unknown: they came from a file that was given; who gave it knows whence it is"
    doubt = "" if is_known else " (If somebody put another file in their place in the bucket, its own licence holds.)"
    return f"{facts.weights_license}; {facts.stated_by}. {IMAGENET_TERMS}{doubt}"
