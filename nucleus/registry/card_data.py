"""What a model card says of the data, and of what follows from them for the model's use."""

from nucleus.config.recipe import CardOptions
from nucleus.data.kinds import Kind
from nucleus.data.manifest import SPLITS, DatasetManifest, Sample
from nucleus.model.architecture import ModelConfig
from nucleus.registry.card_licenses import source_lines
from nucleus.registry.manifest import Origin
from nucleus.registry.markdown import bullet, paragraph, table

__all__ = ["data_lines", "knowledge_lines"]

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
