"""`nucleus data`: import, list, show and verify datasets."""

import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import job
import nucleus
from nucleus.cli.options import (
    FiniteRange,
    check_anonymous,
    json_option,
    number_or_word,
    single_writer_option,
    workers_option,
)
from nucleus.cli.output import note, print_facts, print_json, print_table, warn
from nucleus.cli.progress_bars import show_progress
from nucleus.errors import DataError, UsageError
from nucleus.surroundings import check_can_train
from nucleus.text import MISSING, NOT_STATED

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from nucleus.data.dataset import DamagedDataset, Dataset, DatasetLocation
    from nucleus.data.importing import Imported
    from nucleus.data.intake import SourceOptions
    from nucleus.data.origins import DataOrigin
    from nucleus.data.splits import SplitOptions
    from nucleus.data.spooling import Spread
    from nucleus.storage.uri import S3Uri

__all__ = ["data", "import_images"]

_FRACTION = FiniteRange(0, 1, min_open=True, max_open=True)
_LIST_COLUMNS = ("version", "created", "images", "nuclei", "licences", "added to")


@click.group()
def data() -> None:
    """Datasets in the bucket. URI is s3://bucket/datasets/NAME[@VERSION], or NAME[@VERSION] in NUCLEUS_BUCKET."""


def _place(_context: click.Context, _argument: click.Parameter, value: str) -> "Path | S3Uri":
    """Return the place of images: a URI, or a path at which something is."""
    place = nucleus.storage.uri_or_path(value)
    if isinstance(place, Path) and not place.exists():
        raise click.BadParameter(f"Path {value!r} does not exist.")
    return place


@data.command("import")
@click.argument("src", callback=_place)
@click.argument("uri", required=False)
@click.option(
    "--into",
    metavar="URI",
    help="Add to this dataset, NAME[@VERSION], instead of URI: a new version with its images, groups and splits, and "
    "those of SRC. New labels replace those of the same image.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of the splits.")
@click.option(
    "--val", type=_FRACTION, default=0.1, show_default=True, help="Fraction of the images of SRC for validation."
)
@click.option(
    "--test", type=_FRACTION, default=0.1, show_default=True, help="Fraction of the images of SRC for the test split."
)
@click.option(
    "--license",
    "license_",
    metavar="SPDX",
    help="Licence of the images and labels of SRC, an identifier of SPDX such as CC0-1.0. It is kept with them.",
)
@click.option("--source", metavar="TEXT", help="Where they are from and how to cite them: a line of text, or a URL.")
@click.option("--group-by", metavar="REGEX", help="Images in whose names this matches the same text stay in one split.")
@click.option("--labels", metavar="NAME", help="Of OME-Zarr, the label image, if there are several.")
@click.option(
    "--channel", metavar="N|NAME", callback=number_or_word, help="Of OME-Zarr, the channel: its number or its name."
)
@click.option("--z", metavar="best|N|all", callback=number_or_word, help="Of OME-Zarr, the depths to import, from 0.")
@click.option("--t", metavar="N|all", callback=number_or_word, help="Of OME-Zarr, the times to import, from 0.")
@click.option("--anonymous", is_flag=True, help="Read the images of a public bucket without credentials.")
@workers_option("none: this process reads the images")
@single_writer_option
@json_option
def import_(
    src: "Path | S3Uri",
    uri: str | None,
    into: str | None,
    seed: int,
    val: float,
    test: float,
    license_: str | None,
    source: str | None,
    group_by: str | None,
    labels: str | None,
    channel: int | str | None,
    z: int | str | None,
    t: int | str | None,
    anonymous: bool,
    workers: int | None,
    single_writer: bool,
    as_json: bool,
) -> None:
    """Import the images of SRC as a dataset version at URI: check, group, split and pack them.

    SRC is a folder or zip, here or in a bucket (s3://bucket/prefix, which is read in place), or OME-Zarr with labels.

    Layouts: <id>/images/*.png + <id>/masks/*.png (Kaggle); inputs/ or images/ + masks/ (binary), or images/ + labels/
    (integer labels), also under train/ and test/; a.png + a_masks.png in one folder (Cellpose); a.png + a.geojson or
    a.geojson.gz (QuPath); a.png + a.zip, a_RoiSet.zip or a.roi (ImageJ); images + a COCO file (.json) beside or above.

    With --workers, the images are read on a Ray cluster, from the bucket or a disk that all its machines share. If you
    repeat a command that was broken off, it goes on.
    """
    try:
        pattern = re.compile(group_by) if group_by else None
    except re.error as error:
        raise click.BadParameter(f"not a regular expression: {error}", param_hint="--group-by") from error
    location = _target(uri, into)
    zarr = nucleus.data.ZarrChoice(labels, channel, nucleus.data.PlaneOptions(z, t))
    reading = nucleus.data.SourceOptions(anonymous=anonymous, zarr=zarr)
    stated = nucleus.data.stated_origin(license_, source)
    options = nucleus.data.SplitOptions(seed=seed, val=val, test=test, group_by=pattern)
    imported = import_images(
        src,
        location,
        options,
        add=into is not None,
        stated=stated,
        reading=reading,
        workers=workers,
        single_writer=single_writer,
        verbose=click.get_current_context().find_root().params["debug"],
    )
    if as_json:
        more = {"created": imported.created, "warnings": imported.warnings, "read_before": imported.read_before}
        print_json({**_summary(imported.dataset), **more})
        return
    _print_counts(imported.dataset)
    print_facts(_import_facts(imported, (uri or into or "").partition("@")[0]))


def import_images(
    src: "Path | S3Uri",
    target: "DatasetLocation",
    options: "SplitOptions",
    *,
    add: bool,
    stated: "DataOrigin",
    reading: "SourceOptions",
    workers: int | None = None,
    single_writer: bool = False,
    verbose: bool = False,
) -> "Imported":
    """Import images with bars of progress, and warn of what is left out or unlikely.

    Args:
        src: Folder or zip, or URI of a prefix or zip.
        target: The dataset; with `add`, its version to add to.
        options: Options of the splits.
        add: Whether to add the images to a version, which gives a new one.
        stated: What is stated about the images and labels.
        reading: Options of how the source is read.
        workers: Number of workers on a Ray cluster that read the images; None for this process.
        single_writer: Whether nobody else writes at the same time, so that a server may lack conditional writes.
        verbose: Whether to show Ray's logs.

    Raises:
        UsageError: Requests for files are to be anonymous, or images cannot be read by workers here.
        NucleusError: As `nucleus.data.import_dataset` and `nucleus.data.add_to_dataset`.
    """
    check_anonymous(reading.anonymous, in_bucket=not isinstance(src, Path))
    shared: dict[str, Any] = {"stated": stated, "reading": reading, "single_writer": single_writer}
    with (
        _spread(workers, verbose=verbose) as spread,
        show_progress("read images") as advance,
        show_progress("upload shards", "bytes") as upload,
    ):
        if not add:
            imported = nucleus.data.import_dataset(src, target.uri, options, advance, upload, spread=spread, **shared)
        else:
            cache = nucleus.data.ShardCache()
            with show_progress("copy images") as copied:
                imported = nucleus.data.add_to_dataset(
                    src, target, options, cache, advance, copied, upload, spread=spread, **shared
                )
    for item in imported.left_out:
        warn(f"left out {item.title}: {item.reason}")
    for text in imported.warnings:
        warn(text)
    return imported


def _spread(workers: int | None, *, verbose: bool) -> "AbstractContextManager[Spread | None]":
    """Provide what spreads an import over a Ray cluster; None without workers."""
    if workers is None:
        return nullcontext()
    if workers < 1:
        raise UsageError(f"Expected at least one worker; found {workers}. Leave it out for an import by this process.")
    check_can_train("an import with workers, which read images on Ray")
    return job.spread_on_cluster(workers=workers, waiting=note, verbose=verbose)


def _target(uri: str | None, into: str | None) -> "DatasetLocation":
    """Return the place of an import: a dataset, or a version to add to."""
    given = into if uri is None else uri
    if given is None:
        raise click.UsageError("Missing argument 'URI', the name of a dataset; or add to one with --into.")
    if uri is not None and into is not None:
        raise click.UsageError(f"URI ({uri}) imports a dataset, --into ({into}) adds to one; give one of them")
    location = nucleus.data.locate_dataset(given)
    if into is None and location.ref != "latest":
        raise click.BadParameter(f"the version follows from the images; leave out @{location.ref}", param_hint="URI")
    return location


def _import_facts(imported: "Imported", uri: str) -> dict[str, object]:
    manifest, addition = imported.dataset.manifest, imported.addition
    facts: dict[str, object] = {"imported" if imported.created else "already there": imported.dataset}
    if addition is not None:
        facts |= {
            "added to": addition.parent,
            "images added": addition.added,
            "labels replaced": addition.replaced,
            "images already there": addition.known,
        }
    if imported.read_before:
        facts["read before"] = f"{imported.read_before}, by an import that was broken off"
    return facts | {
        "images": len(manifest.samples),
        "nuclei": manifest.samples.nuclei,
        "left out": f"{len(imported.left_out)}: see above" if imported.left_out else 0,
        "duplicates removed": len(imported.duplicates),
        "licences": nucleus.data.licenses_text(manifest.data_sources),
        "look": f"nucleus data show {uri} --out examples.png",
        "train": f"nucleus train RECIPE --set dataset={uri}",
    }


@data.command("list")
@click.argument("uri", required=False)
@json_option
@click.pass_context
def list_(ctx: click.Context, uri: str | None, as_json: bool) -> None:
    """List the versions of a dataset; without URI, the latest version of every dataset in NUCLEUS_BUCKET.

    A version whose manifest cannot be read is listed as damaged; the exit status is then 1.
    """
    damaged: list[DamagedDataset] = []
    if uri is None:
        datasets = nucleus.data.list_datasets(nucleus.storage.bucket_from_environment(), damaged.append)
    else:
        location = nucleus.data.locate_dataset(uri)
        datasets = nucleus.data.list_versions(location.uri, damaged.append)
        if not datasets and not damaged:
            raise DataError(
                f"Expected a dataset at {location.uri}; none was imported there. To see all datasets, run: nucleus "
                "data list"
            )
    for item in damaged:
        warn(item.problem)
    if as_json:
        print_json([*map(_summary, datasets), *map(_damaged_summary, damaged)])
    else:
        rows = sorted([*map(_row, datasets), *map(_damaged_row, damaged)], key=lambda row: str(row[0]))
        first = 0 if uri is None else 1  # the name, which is the same for all versions of a dataset
        print_table(("dataset", *_LIST_COLUMNS)[first:], [row[first:] for row in rows])
    if damaged:
        ctx.exit(1)


@data.command()
@click.argument("uri")
@click.option("--out", type=click.Path(path_type=Path), help="Write a picture of example images to this PNG file.")
@json_option
def show(uri: str, out: Path | None, as_json: bool) -> None:
    """Show the numbers of images and nuclei per split; with --out, draw examples."""
    dataset = nucleus.data.open_dataset(nucleus.data.locate_dataset(uri))
    if as_json:
        print_json(_summary(dataset))
    else:
        click.echo(str(dataset))
        _print_counts(dataset)
        _print_sources(dataset)
    if out is not None:
        nucleus.storage.write_atomic(
            out,
            nucleus.data.encode_png(nucleus.pictures.example_sheet(dataset, nucleus.data.ShardCache())),
        )
        note(f"examples: {out}")


@data.command()
@click.argument("uri")
@json_option
@click.pass_context
def verify(ctx: click.Context, uri: str, as_json: bool) -> None:
    """Compare the SHA-256 of every shard with the manifest; the exit status is 1 if any differs."""
    dataset = nucleus.data.open_dataset(nucleus.data.locate_dataset(uri))
    with show_progress("verify shards", "bytes") as advance:
        problems = nucleus.data.verify_dataset(dataset, advance)
    if as_json:
        print_json({"dataset": str(dataset), "shards": len(dataset.manifest.shards), "problems": problems})
    else:
        for problem in problems:
            warn(problem)
        click.echo(f"{dataset}: {len(problems)} of {len(dataset.manifest.shards)} shards are wrong")
    if problems:
        ctx.exit(1)


def _row(dataset: "Dataset") -> tuple[object, ...]:
    """A dataset version in the list: name, and the cells of `_LIST_COLUMNS`."""
    manifest = dataset.manifest
    nuclei = manifest.samples.nuclei
    images = len(manifest.samples)
    licenses = dict.fromkeys(source.license or MISSING for source in manifest.data_sources)
    facts = manifest.name, manifest.version, manifest.created[:19], images, nuclei
    return *facts, ", ".join(licenses), manifest.parent or MISSING


def _damaged_row(damaged: "DamagedDataset") -> tuple[object, ...]:
    return damaged.uri.name, damaged.version, "damaged", MISSING, MISSING, MISSING, MISSING


def _damaged_summary(damaged: "DamagedDataset") -> dict[str, Any]:
    return {
        "uri": str(damaged.uri),
        "name": damaged.uri.name,
        "version": damaged.version,
        "damaged": damaged.problem,
    }


def _summary(dataset: "Dataset") -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        "uri": str(dataset.uri),
        "name": manifest.name,
        "version": manifest.version,
        "created": manifest.created,
        "source": manifest.source,
        "layout": manifest.layout,
        "sources": [item.model_dump() for item in manifest.data_sources],
        "parent": manifest.parent,
        "additions": [item.model_dump() for item in manifest.additions],
        "images": len(manifest.samples),
        "nuclei": manifest.samples.nuclei,
        "groups": len(set(manifest.samples.column("group").tolist())),
        "shards": len(manifest.shards),
        "duplicates": [item.model_dump() for item in manifest.duplicates],
        "left_out": [item.model_dump() for item in manifest.left_out],
        "splits": {split: _split_summary(dataset, split) for split in nucleus.data.SPLITS},
    }


def _split_summary(dataset: "Dataset", split: str) -> dict[str, Any]:
    samples = dataset.manifest.split_samples(split)
    kinds = Counter(samples.texts("kind"))
    return {
        "images": len(samples),
        "nuclei": samples.nuclei,
        "kinds": dict(sorted(kinds.items())),
    }


def _print_sources(dataset: "Dataset") -> None:
    """Print the sources with their licences; and what was added to what was imported, if anything was."""
    manifest = dataset.manifest
    print_table(
        ("source", "images", "labels of others", "licence", "origin"),
        [
            (each.name, each.images, each.labels, each.license or NOT_STATED, each.origin or NOT_STATED)
            for each in manifest.data_sources
        ],
    )
    if manifest.additions:
        rows = [(item.source, item.created[:19], item.parent, item.added, item.replaced) for item in manifest.additions]
        whole = len(manifest.samples) - sum(item.added for item in manifest.additions)
        first = (manifest.source, MISSING, MISSING, whole, MISSING)
        click.echo()
        print_table(("source", "created", "added to", "images", "labels replaced"), [first, *rows])


def _print_counts(dataset: "Dataset") -> None:
    rows = []
    for split, counts in _summary(dataset)["splits"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts["kinds"].items())
        rows.append((split, counts["images"], counts["nuclei"], kinds))
    print_table(("split", "images", "nuclei", "kinds"), rows)
