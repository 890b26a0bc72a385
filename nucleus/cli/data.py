"""`nucleus data`: import, list, show and verify datasets."""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import nucleus
from nucleus.cli.options import json_option
from nucleus.cli.output import note, print_facts, print_json, print_table, warn
from nucleus.cli.progress_bars import show_progress

if TYPE_CHECKING:
    from nucleus.data.dataset import Dataset

__all__ = ["data"]


@click.group()
def data() -> None:
    """Datasets in the bucket. URI is s3://bucket/datasets/NAME[@VERSION], or NAME[@VERSION] in NUCLEUS_BUCKET."""


@data.command("import")
@click.argument("src", type=click.Path(exists=True, path_type=Path))
@click.argument("uri")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Decides the splits.")
@click.option("--val", default=0.1, show_default=True, help="Fraction for validation.")
@click.option("--test", default=0.1, show_default=True, help="Fraction for test.")
@click.option("--group-by", metavar="REGEX", help="Images whose names give the same match stay on one side.")
@json_option
def import_(src: Path, uri: str, seed: int, val: float, test: float, group_by: str | None, as_json: bool) -> None:
    """Check, group, split and pack the images of SRC (a folder or zip) into a dataset version at URI.

    Layouts: <id>/images/*.png + <id>/masks/*.png (Kaggle); inputs/ + masks/, also under train/ and test/;
    images/ + labels/ with integer labels.
    """
    try:
        pattern = re.compile(group_by) if group_by else None
    except re.error as error:
        raise click.BadParameter(f"not a regular expression: {error}", param_hint="--group-by") from error
    location = nucleus.data.locate_dataset(uri)
    if location.ref != "latest":
        raise click.BadParameter(f"the content gives the version; leave out @{location.ref}", param_hint="URI")
    options = nucleus.data.SplitOptions(seed=seed, val=val, test=test, group_by=pattern)
    with show_progress("read images") as advance, show_progress("upload shards", "bytes") as upload:
        imported = nucleus.data.import_dataset(src, location.uri, options, advance, upload)
    manifest = imported.dataset.manifest
    for item in manifest.left_out:
        warn(f"left out {item.title}: {item.reason}")
    if as_json:
        print_json({**_summary(imported.dataset), "created": imported.created})
        return
    _print_counts(imported.dataset)
    print_facts(
        {
            "imported" if imported.created else "already there": imported.dataset,
            "images": len(manifest.samples),
            "nuclei": sum(sample.nuclei for sample in manifest.samples),
            "left out": f"{len(manifest.left_out)}: see above" if manifest.left_out else 0,
            "duplicates removed": len(manifest.duplicates),
            "look": f"nucleus data show {uri} --out examples.png",
            "train": f"nucleus train RECIPE --set dataset={uri}",
        }
    )


@data.command("list")
@click.argument("uri")
@json_option
def list_(uri: str, as_json: bool) -> None:
    """List the versions of a dataset."""
    datasets = nucleus.data.list_versions(nucleus.data.locate_dataset(uri).uri)
    if as_json:
        print_json([_summary(dataset) for dataset in datasets])
        return
    rows = [
        (
            d.manifest.version,
            d.manifest.created[:19],
            len(d.manifest.samples),
            sum(s.nuclei for s in d.manifest.samples),
        )
        for d in datasets
    ]
    print_table(("version", "created", "images", "nuclei"), rows)


@data.command()
@click.argument("uri")
@click.option("--out", type=click.Path(path_type=Path), help="Write a picture of examples to this PNG.")
@json_option
def show(uri: str, out: Path | None, as_json: bool) -> None:
    """Show counts, and a picture of examples."""
    dataset = nucleus.data.open_dataset(nucleus.data.locate_dataset(uri))
    if as_json:
        print_json(_summary(dataset))
    else:
        click.echo(str(dataset))
        _print_counts(dataset)
    if out is not None:
        nucleus.storage.write_atomic(
            out,
            nucleus.data.encode_png(
                nucleus.pictures.example_sheet(dataset, nucleus.data.ShardCache(nucleus.data.default_cache_dir()))
            ),
        )
        note(f"examples: {out}")


@data.command()
@click.argument("uri")
@json_option
@click.pass_context
def verify(ctx: click.Context, uri: str, as_json: bool) -> None:
    """Read every shard and compare its SHA-256 with the manifest; exit status 1 if any is wrong."""
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


def _summary(dataset: "Dataset") -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        "uri": str(dataset.uri),
        "name": manifest.name,
        "version": manifest.version,
        "created": manifest.created,
        "layout": manifest.layout,
        "images": len(manifest.samples),
        "nuclei": sum(sample.nuclei for sample in manifest.samples),
        "groups": len({sample.group for sample in manifest.samples}),
        "shards": len(manifest.shards),
        "duplicates": [item.model_dump() for item in manifest.duplicates],
        "left_out": [item.model_dump() for item in manifest.left_out],
        "splits": {split: _split_summary(dataset, split) for split in ("train", "val", "test")},
    }


def _split_summary(dataset: "Dataset", split: str) -> dict[str, Any]:
    samples = dataset.manifest.split_samples(split)
    kinds = Counter(sample.kind.value for sample in samples)
    return {
        "images": len(samples),
        "nuclei": sum(s.nuclei for s in samples),
        "kinds": dict(sorted(kinds.items())),
    }


def _print_counts(dataset: "Dataset") -> None:
    rows = []
    for split, counts in _summary(dataset)["splits"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts["kinds"].items())
        rows.append((split, counts["images"], counts["nuclei"], kinds))
    print_table(("split", "images", "nuclei", "kinds"), rows)
