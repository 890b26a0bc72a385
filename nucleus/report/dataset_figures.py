"""Figures of a dataset: its images by split and kind, their sizes, and how many nuclei they have."""

from collections import Counter
from typing import Any

from nucleus.data.kinds import Kind
from nucleus.data.manifest import SPLITS, DatasetManifest
from nucleus.report.drawing import GRID, SERIES, Panel
from nucleus.report.tables import Table, thinned
from nucleus.report.wording import KINDS, count, plural

__all__ = ["SPLIT_NAMES", "dataset_panels"]

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
_BINS = (0, 1, 11, 31, 101)
"""The fewest nuclei of each group of images."""
_HATCHES = {Kind.DARK_FIELD: "", Kind.BRIGHT_FIELD: "///", Kind.STAIN: "..."}


def dataset_panels(dataset: DatasetManifest) -> list[Panel]:
    """The three figures."""
    return [_images(dataset), _nuclei(dataset), _sizes(dataset)]


def _images(dataset: DatasetManifest) -> Panel:
    counts = {
        kind: [sum(sample.kind == kind for sample in dataset.split_samples(split)) for split in SPLITS] for kind in Kind
    }
    names = [SPLIT_NAMES[split] for split in SPLITS]

    def draw(axes: Any) -> None:
        _stack(axes, names, counts)
        axes.set_ylabel("images")

    totals = [sum(counts[kind][i] for kind in Kind) for i in range(len(SPLITS))]
    said = ", ".join(f"{name} {count(total)}" for name, total in zip(names, totals, strict=True))
    rows = [(name, *(count(counts[kind][i]) for kind in Kind), count(totals[i])) for i, name in enumerate(names)]
    table = Table("Images by split and kind", ("split", *(KINDS[kind] for kind in Kind), "all"), rows)
    return Panel("data-images", "Images by split and kind", f"Images by split: {said}.", draw, table, (4.2, 2.7))


def _nuclei(dataset: DatasetManifest) -> Panel:
    names = [_bin_name(i) for i in range(len(_BINS))]
    counts = {kind: [0] * len(_BINS) for kind in Kind}
    for sample in dataset.samples:
        counts[sample.kind][_bin_of(sample.nuclei)] += 1

    def draw(axes: Any) -> None:
        _stack(axes, names, counts)
        axes.set(xlabel="nuclei in an image", ylabel="images")

    nuclei = sorted(sample.nuclei for sample in dataset.samples) or [0]
    description = (
        f"How many nuclei an image has: from {count(nuclei[0])} to {count(nuclei[-1])}, "
        f"in the middle image {count(nuclei[len(nuclei) // 2])}."
    )
    rows = [(name, *(count(counts[kind][i]) for kind in Kind)) for i, name in enumerate(names)]
    table = Table("Images by number of nuclei", ("nuclei", *(KINDS[kind] for kind in Kind)), rows)
    return Panel("data-nuclei", "Nuclei in an image", description, draw, table, (4.2, 2.7))


def _sizes(dataset: DatasetManifest) -> Panel:
    sizes = Counter((sample.width, sample.height) for sample in dataset.samples)

    def draw(axes: Any) -> None:
        for (width, height), number in sizes.items():
            axes.plot(width, height, "o", color=SERIES[0], markersize=4 + 2 * number**0.4, markerfacecolor="none",
                      markeredgewidth=1.5)  # fmt: skip
        axes.set(xlabel="width, px", ylabel="height, px")
        axes.set_xlim(0, 1.12 * max((width for width, _ in sizes), default=1))
        axes.set_ylim(0, 1.15 * max((height for _, height in sizes), default=1))

    ordered = sizes.most_common()
    common = "; ".join(f"{plural(number, 'image')} of {w} × {h} px" for (w, h), number in ordered[:3])
    rows = [(f"{width} × {height}", count(number)) for (width, height), number in ordered]
    table = Table("Images by size, width × height in px", ("size", "images"), thinned(rows, 60))
    description = f"{plural(len(sizes), 'size')}; larger circles are more images. Most often: {common}."
    return Panel("data-sizes", "Sizes of images", description, draw, table, (4.2, 2.7))


def _stack(axes: Any, names: list[str], counts: dict[Kind, list[int]]) -> None:
    """Bars of kinds, one on the other; told apart by colour and by hatching."""
    below = [0] * len(names)
    for number, (kind, values) in enumerate(counts.items()):
        if any(values):
            axes.bar(names, values, bottom=below, label=KINDS[kind], facecolor=SERIES[number], edgecolor="#ffffff",
                     hatch=_HATCHES[kind], width=0.7)  # fmt: skip
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.set_ylim(0, 1.7 * max([*below, 1]))
    for place, total in enumerate(below):
        axes.annotate(count(total), (place, total), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=9)
    axes.grid(visible=False, axis="x")
    axes.grid(visible=True, axis="y", color=GRID)
    axes.tick_params(axis="x", labelsize=9)
    if any(below):
        axes.legend(loc="upper right", borderaxespad=0)


def _bin_of(nuclei: int) -> int:
    return max(i for i, fewest in enumerate(_BINS) if nuclei >= fewest)


def _bin_name(place: int) -> str:
    if place == len(_BINS) - 1:
        return f"{_BINS[place]}+"
    last = _BINS[place + 1] - 1
    return f"{last}" if last == _BINS[place] else f"{_BINS[place]}–{last}"
