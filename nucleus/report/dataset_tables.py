"""What the page says of the dataset in words and tables."""

from collections.abc import Sequence

from nucleus.data.kinds import Kind
from nucleus.data.manifest import SPLITS, DatasetManifest, LeftOut
from nucleus.report.dataset_figures import SPLIT_NAMES
from nucleus.report.record import RunRecord
from nucleus.report.tables import Table
from nucleus.report.wording import KINDS, count, date_of, plural

__all__ = ["dataset_facts", "left_out_tables", "splits_table"]

_MOST_LEFT_OUT = 100


def dataset_facts(record: RunRecord, dataset: DatasetManifest) -> list[tuple[str, str]]:
    """Term and text."""
    diameter = record.nucleus_diameter
    return [
        ("Dataset", record.dataset),
        ("Made from", f"{dataset.source} (layout {dataset.layout}, seed {dataset.seed})"),
        ("Imported", date_of(dataset.created)),
        (
            "Images",
            f"{count(len(dataset.samples))}, with {count(sum(sample.nuclei for sample in dataset.samples))} nuclei",
        ),
        (
            "Diameter of nuclei",
            "not known" if diameter is None else f"{diameter:.1f} px in the middle (validation split)",
        ),
        ("Removed duplicates", plural(len(dataset.duplicates), "image")),
        ("Left out", plural(len(dataset.left_out), "image")),
    ]


def splits_table(dataset: DatasetManifest) -> Table:
    """Counts by split."""
    rows = []
    for split in SPLITS:
        samples, shards = dataset.split_samples(split), dataset.split_shards(split)
        rows.append(
            (
                SPLIT_NAMES[split],
                count(len(samples)),
                count(len({sample.group for sample in samples})),
                *(count(sum(sample.kind == kind for sample in samples)) for kind in Kind),
                count(sum(sample.nuclei for sample in samples)),
                f"{sum(sample.height * sample.width for sample in samples) / 1e6:,.1f}",
                count(len(shards)),
                f"{sum(shard.size for shard in shards) / 1e6:,.1f}",
            )
        )
    kinds = (KINDS[kind] for kind in Kind)
    columns = ("split", "images", "groups", *kinds, "nuclei", "megapixels", "shards", "MB in the bucket")
    return Table("The splits", columns, rows)


def left_out_tables(dataset: DatasetManifest) -> list[Table]:
    """Images of the source that are not in the dataset."""
    lists = (("Duplicates that were removed", dataset.duplicates), ("Images that were left out", dataset.left_out))
    return [_left_out(caption, items) for caption, items in lists if items]


def _left_out(caption: str, items: Sequence[LeftOut]) -> Table:
    if len(items) > _MOST_LEFT_OUT:
        caption += f" (the first {_MOST_LEFT_OUT} of {count(len(items))})"
    rows = [(item.title, item.reason) for item in items[:_MOST_LEFT_OUT]]
    return Table(caption, ("image", "reason"), rows, words=frozenset({1}))
