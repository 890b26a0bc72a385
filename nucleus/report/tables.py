"""Tables of the report: scores, mistakes, the dataset, the network, and published scores."""

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath

from pydantic import BaseModel, ConfigDict

from nucleus.config.names import Kind
from nucleus.data.dataset import Addition, DatasetManifest, LeftOut
from nucleus.data.origins import licenses_text
from nucleus.data.samples import SPLITS
from nucleus.metrics.nuclei import SIZE_TITLES
from nucleus.metrics.scores import (
    MISTAKES,
    SCORE_COLUMNS,
    Metrics,
    Scores,
    amount,
    found_one_for_one,
    score_cell,
    score_cells,
)
from nucleus.report.drawing import Table
from nucleus.runs.record import NetworkFacts, RunRecord
from nucleus.text import KINDS, MISSING, SPLIT_NAMES, count, moment_text, percent, plural, score_text

__all__ = [
    "PublishedSystem",
    "all_scores_table",
    "dataset_facts",
    "failure_table",
    "has_published_images",
    "left_out_tables",
    "network_table",
    "published_systems",
    "published_table",
    "scores_table",
    "splits_table",
]

_ORDER = sorted(MISTAKES, key=lambda key: key == "nuclei_extra")
"""Keys of the mistakes, those of true nuclei first."""
_MOST_LEFT_OUT = 100
_PUBLISHED_SOURCES = ("bbbc038", "stage1_train", "dsb2018", "data-science-bowl-2018")
"""File and folder names of images of the Data Science Bowl 2018 start with one of these."""
_PUBLISHED_APS = ("ap_50", "ap_70", "ap_90")
_UP_TO_90 = ("ap_50", "ap_60", "ap_70", "ap_80", "ap_90")
"""The thresholds of the published means."""


def scores_table(metrics: Metrics) -> Table:
    """Return the headline scores by split and kind of image, the test split first."""
    ordered = dict(sorted(metrics.items(), key=lambda item: item[0] != "test"))
    rows = [
        (SPLIT_NAMES.get(split, split), KINDS.get(kind, kind), *cells)
        for split, kind, *cells in score_cells(ordered, digits=3)
    ]
    return Table("Scores, mean over images", SCORE_COLUMNS, rows, words=frozenset({1}))


def all_scores_table(metrics: Metrics) -> Table:
    """Return every metric over all images of each split."""
    splits = list(metrics)
    overall = {split: metrics[split].get("all", {}) for split in splits}
    keys = list(dict.fromkeys(key for scores in overall.values() for key in scores))
    rows = [(key, *(_value(overall[split], key) for split in splits)) for key in keys]
    columns = ("metric", *(SPLIT_NAMES.get(split, split) for split in splits))
    return Table("Every metric, over all images of a split", columns, rows)


def _value(scores: Scores, key: str) -> str:
    value = scores.get(key)
    return count(value) if value is not None and value.is_integer() and value > 1 else score_cell(scores, key)


def failure_table(by_kind: Mapping[str, Scores]) -> Table | None:
    """Return mistakes by kind of image and the share of nuclei found by diameter; None if neither was counted."""
    counted = {kind: scores for kind, scores in by_kind.items() if found_one_for_one(scores) is not None}
    sizes = {
        f"recall_50_{size}": title
        for size, title in SIZE_TITLES.items()
        if any(f"recall_50_{size}" in scores for scores in by_kind.values())
    }
    if not counted and not sizes:
        return None
    rows = [
        (
            KINDS.get(kind, kind),
            *(_mistake_cells(scores) if kind in counted else [MISSING] * (2 + len(_ORDER))),
            *(percent(amount(scores, key), 1, digits=0) if key in scores else MISSING for key in sizes),
        )
        for kind, scores in by_kind.items()
    ]
    columns = (
        "kind",
        "nuclei",
        "found one for one",
        *(MISTAKES[key] for key in _ORDER),
        *(f"found, {title}" for title in sizes.values()),
    )
    return Table("Mistakes by kind of image, and nuclei found by diameter", columns, rows)


def _mistake_cells(scores: Scores) -> list[str]:
    """Return the cells of a row: true nuclei, and how many were found, missed, merged, split and extra.

    Each number has its share of the true nuclei, that of the extra ones its share of the predicted nuclei.
    """
    total = amount(scores, "nuclei_true")
    found = found_one_for_one(scores) or 0.0
    wrong = [
        _with_share(scores.get(key), (scores.get("nuclei_predicted") or 0) if key == "nuclei_extra" else total)
        for key in _ORDER
    ]
    return [count(total), _with_share(found, total), *wrong]


def _with_share(number: float | None, total: float) -> str:
    if number is None:
        return MISSING
    return f"{count(number)} ({percent(number, total, digits=0)})" if total else count(number)


def dataset_facts(record: RunRecord, dataset: DatasetManifest) -> list[tuple[str, str]]:
    """Return facts about the dataset as pairs of term and text."""
    diameter = record.nucleus_diameter
    nuclei = dataset.samples.nuclei
    return [
        ("Dataset", record.dataset),
        ("Imported from", f"{dataset.source} (layout {dataset.layout}, seed {dataset.seed})"),
        *(("Added", _addition(item)) for item in dataset.additions),
        ("Licences", licenses_text(dataset.data_sources)),
        ("Imported on (UTC)", moment_text(dataset.created)),
        ("Images", f"{count(len(dataset.samples))}, with {plural(nuclei, 'nucleus', 'nuclei')}"),
        ("Diameter of nuclei", "not known" if diameter is None else f"median {diameter:.1f} px (validation split)"),
        ("Removed duplicates", plural(len(dataset.duplicates), "image")),
        ("Left out", plural(len(dataset.left_out), "image")),
    ]


def _addition(item: Addition) -> str:
    what = f"{plural(item.added, 'image')} of {item.source}"
    if item.replaced:
        what += f", labels of {count(item.replaced)} replaced"
    return f"{what}, to version {item.parent} (layout {item.layout}, seed {item.seed})"


def splits_table(dataset: DatasetManifest) -> Table:
    """Return counts of images, groups, nuclei, pixels and shards by split."""
    rows = []
    for split in SPLITS:
        samples, shards = dataset.split_samples(split), dataset.split_shards(split)
        rows.append(
            (
                SPLIT_NAMES[split],
                count(len(samples)),
                count(len(set(samples.column("group").tolist()))),
                *map(count, samples.kinds.values()),
                count(samples.nuclei),
                f"{int(samples.column('height') @ samples.column('width')) / 1e6:,.1f}",
                count(len(shards)),
                f"{sum(shard.size for shard in shards) / 1e6:,.1f}",
            )
        )
    kinds = (KINDS[kind] for kind in Kind)
    columns = ("split", "images", "groups", *kinds, "nuclei", "megapixels", "shards", "MB in the bucket")
    return Table("The splits", columns, rows)


def left_out_tables(dataset: DatasetManifest) -> list[Table]:
    """Return tables of the source images that are not in the dataset."""
    lists = (("Removed duplicates", dataset.duplicates), ("Images left out", dataset.left_out))
    return [_left_out(caption, items) for caption, items in lists if items]


def _left_out(caption: str, items: Sequence[LeftOut]) -> Table:
    if len(items) > _MOST_LEFT_OUT:
        caption += f" (the first {_MOST_LEFT_OUT} of {count(len(items))})"
    rows = [(item.title, item.reason) for item in items[:_MOST_LEFT_OUT]]
    return Table(caption, ("image", "reason"), rows, words=frozenset({1}))


def network_table(network: NetworkFacts) -> Table:
    """Return the channels of encoder and decoder, from full resolution down."""
    lowest = len(network.skips)
    rows = []
    for level in range(lowest + 1):
        place = lowest - 1 - level
        rows.append(
            (
                f"1/{2**level}" if level else "full",
                count(network.skips[level - 1]) if level else "3 (the image)",
                count(network.decoder[place]) if 0 <= place < len(network.decoder) else MISSING,
            )
        )
    return Table("Channels by resolution", ("resolution", "encoder", "decoder"), rows)


class PublishedSystem(BaseModel):
    """Scores that a paper reports.

    Attributes:
        name: Name of the system.
        source: Authors, journal and year of the paper.
        url: Address of the paper.
        images: Description of the images.
        kind: Kind of image on which it can be compared, or `all`.
        ap: AP by IoU threshold in hundredths.
        map: Mean of AP over the thresholds 0.50, 0.55, ..., 0.95.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: str
    url: str
    images: str
    kind: str
    ap: dict[str, float] = {}
    map: float | None = None

    @property
    def scores(self) -> dict[str, float | None]:
        """The scores by the names that those of a run have."""
        return {**{f"ap_{threshold}": value for threshold, value in self.ap.items()}, "map": self.map}


@cache
def published_systems() -> tuple[PublishedSystem, ...]:
    """Return the systems of `published.toml`."""
    content = tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))
    return tuple(PublishedSystem.model_validate(system) for system in content["systems"])


def has_published_images(dataset: DatasetManifest) -> bool:
    """Return whether all images are from the Data Science Bowl 2018, judging by the names of their sources."""
    sources = [dataset.source, *(item.source for item in dataset.additions)]
    names = [PurePath(source.replace("\\", "/")).name.lower() for source in sources]
    return all(name.startswith(_PUBLISHED_SOURCES) for name in names)


def published_table(ours: Mapping[str, Scores]) -> Table:
    """Return the test scores of this run by kind of image, above the published ones."""
    rows = [
        (
            "this run",
            f"{KINDS[kind]}, {plural(ours[kind].get('images') or 0, 'test image')}",
            *(score_cell(ours[kind], key, digits=3) for key in _PUBLISHED_APS),
            score_text(_mean_to_90(ours[kind]), digits=3),
            score_cell(ours[kind], "map", digits=3),
        )
        for kind in ("dark-field", "all")
        if kind in ours
    ]
    rows += [
        (
            f"{system.name} ({system.source})",
            system.images,
            *(score_text(system.scores.get(key), digits=3) for key in _PUBLISHED_APS),
            score_text(_mean_to_90(system.scores), digits=3),
            score_text(system.map, digits=3),
        )
        for system in published_systems()
    ]
    columns = ("system", "images", "AP.5", "AP.7", "AP.9", "mean of AP .5, .6, ..., .9", "mAP (.50 to .95)")
    return Table("AP of this run and of published systems", columns, rows, words=frozenset({1}))


def _mean_to_90(scores: Scores) -> float | None:
    known = [value for key in _UP_TO_90 if (value := scores.get(key)) is not None]
    return sum(known) / len(known) if len(known) == len(_UP_TO_90) else None
