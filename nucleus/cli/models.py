"""`nucleus models` and `nucleus weights`: model versions, their aliases, and encoder weights in the bucket."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

import job
import nucleus
from nucleus.cli.compare import compare_models
from nucleus.cli.options import FiniteRange, json_option, project_bucket, pulled_model, single_writer_option
from nucleus.cli.output import note, print_json, print_markdown, print_table, warn
from nucleus.cli.progress_bars import show_progress
from nucleus.config.encoders import ENCODER_NAMES, EncoderName
from nucleus.config.names import ExportFormat
from nucleus.errors import IntegrityError, ModelError, UsageError

if TYPE_CHECKING:
    from nucleus.config.names import Reference
    from nucleus.registry.manifest import ModelManifest
    from nucleus.registry.versions import PulledModel
    from nucleus.storage.bucket import Bucket

__all__ = ["models", "weights"]


_COLUMNS = ("created", "val_map", "dataset", "run")


@click.group()
def models() -> None:
    """Model versions in the bucket NUCLEUS_BUCKET. REF is a version number, `latest` or an alias."""


models.add_command(compare_models)


def _bucket(single_writer: bool = False) -> "Bucket":
    return project_bucket(nucleus.registry.MODELS, single_writer=single_writer)


def _columns_of(manifest: "ModelManifest") -> dict[str, Any]:
    """Return the columns of a version in the list."""
    origin = manifest.origin
    score = origin.metrics["val"]["all"]["map"]
    score = None if score is None else round(score, 4)
    return dict(zip(_COLUMNS, (manifest.created[:19], score, origin.dataset, origin.run), strict=True))


@models.command("list")
@click.argument("name", required=False)
@json_option
def list_models_command(name: str | None, as_json: bool) -> None:
    """List the models, the one that comes along first, or the versions of the model NAME."""
    rows = _models() if name is None else _versions(name)
    if as_json:
        print_json(rows)
    else:
        columns = list(rows[0]) if rows else ["model", "latest"]
        print_table(columns, [[", ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows])


def _models() -> list[dict[str, Any]]:
    """Return the model that comes along and, if a bucket is set, the models in it."""
    included = nucleus.registry.read_included().reference
    rows: list[dict[str, Any]] = [{"model": included.name, "latest": included.ref, "from": "package"}]
    if not os.environ.get(nucleus.storage.BUCKET_VARIABLE):
        note(f"{nucleus.storage.BUCKET_VARIABLE} is not set, so no models of a bucket are listed")
        return rows
    bucket = _bucket()
    return rows + [
        {"model": model, "latest": nucleus.registry.list_versions(bucket, model)[-1], "from": "bucket"}
        for model in nucleus.registry.list_models(bucket)
    ]


def _versions(name: str) -> list[dict[str, Any]]:
    """Return the versions of a model in the bucket; before them the one that comes along, if the name is its own."""
    rows: list[dict[str, Any]] = []
    if nucleus.registry.is_included(name):
        included = nucleus.registry.read_included()
        rows = [{"version": included.reference.ref, **_columns_of(included.manifest), "aliases": []}]
        if not os.environ.get(nucleus.storage.BUCKET_VARIABLE):
            return rows
    bucket = _bucket()
    if not rows:
        nucleus.registry.resolve_version(bucket, nucleus.config.Reference(name))  # raises an error if there is none
    aliases = nucleus.registry.list_aliases(bucket, name, warn)
    for version in nucleus.registry.list_versions(bucket, name):
        pointing = sorted(alias for alias, value in aliases.items() if value.version == version)
        try:
            manifest = nucleus.registry.read_version(bucket, name, version)
        except (ModelError, IntegrityError) as error:
            warn(str(error))
            rows.append({"version": version, **dict.fromkeys(_COLUMNS, "damaged"), "aliases": pointing})
        else:
            rows.append({"version": version, **_columns_of(manifest), "aliases": pointing})
    return rows


@models.command()
@click.argument("model")
@json_option
def show(model: str, as_json: bool) -> None:
    """Show the card of a version; with --json, its manifest. MODEL is NAME[@REF]; `nuclei` comes along."""
    if nucleus.registry.is_included(model):
        _show_included(pulled_model(model), as_json)
        return
    bucket = _bucket()
    reference = nucleus.config.parse_reference(model, "model")
    manifest = nucleus.registry.read_version(
        bucket, reference.name, nucleus.registry.resolve_version(bucket, reference)
    )
    decision = nucleus.registry.read_decision(bucket, manifest.model, manifest.version)
    if as_json:
        print_json({**manifest.model_dump(mode="json"), "gate": decision and decision.model_dump(mode="json")})
        return
    prefix = nucleus.registry.version_prefix(manifest.model, manifest.version)
    print_markdown(nucleus.registry.without_front_matter(bucket.get(f"{prefix}/{nucleus.model.CARD_FILE}").decode()))
    click.echo(f"version {manifest.version}, {manifest.created[:19]}, {bucket.uri / prefix}")
    if decision is not None:
        click.echo(str(decision))


def _show_included(pulled: "PulledModel", as_json: bool) -> None:
    if as_json:
        print_json({**pulled.manifest.model_dump(mode="json"), "gate": None})
        return
    card = (pulled.folder / nucleus.model.CARD_FILE).read_text(encoding="utf-8")
    print_markdown(nucleus.registry.without_front_matter(card))
    click.echo(f"{pulled}, {pulled.manifest.created[:19]}, comes along in {pulled.folder}")


@models.command()
@click.argument("model")
@click.argument("dest", type=click.Path(path_type=Path), required=False)
@click.option(
    "--half",
    is_flag=True,
    help="Keep the weights in half precision: half the size, computed as before. Scores it again on its dataset.",
)
@json_option
def pull(model: str, dest: Path | None, half: bool, as_json: bool) -> None:
    """Download the version MODEL, which is NAME[@REF], to the folder DEST, and verify the SHA-256 of every file.

    Without DEST the folder is ./NAME-VERSION, such as ./cells-3.
    """
    if nucleus.registry.is_included(model):
        raise UsageError(
            f"Expected NAME@REF of a version in the bucket, such as {nucleus.registry.INCLUDED}@latest; found {model}, "
            f"which is here: {pulled_model(model).folder}. Copy that folder, or name a version."
        )
    if half:
        nucleus.lazy.need(*nucleus.lazy.TRAINING)
    bucket = _bucket()
    reference = nucleus.config.parse_reference(model, "model")
    version = nucleus.registry.resolve_version(bucket, reference)
    exact = nucleus.config.Reference(reference.name, str(version))
    folder = dest or Path(f"{reference.name}-{version}")
    manifest = (_pull_half if half else _pull)(bucket, exact, folder)
    if as_json:
        print_json({"model": manifest.model, "version": manifest.version, "folder": str(folder.absolute())})
    else:
        click.echo(f"{manifest.model}@{manifest.version} in {folder}")


def _pull(bucket: "Bucket", version: "Reference", folder: Path) -> "ModelManifest":
    with show_progress(f"download {version}", "bytes") as advance:
        return nucleus.registry.pull(bucket, version, folder, advance)


def _pull_half(bucket: "Bucket", version: "Reference", folder: Path) -> "ModelManifest":
    with show_progress(f"download {version}", "bytes") as advance:
        pulled = nucleus.registry.pull_cached(bucket, version, advance)
    return job.write_half(pulled, folder, show_progress)


@models.command()
@click.argument("model")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    required=True,
    type=click.Choice(get_args(ExportFormat)),
    help="Format of DEST.",
)
@json_option
def export(model: str, dest: Path, kind: ExportFormat, as_json: bool) -> None:
    """Export the version MODEL, which is NAME[@REF], to DEST for use without this package.

    h5 and keras load with Keras 3, savedmodel (a folder) with TensorFlow, onnx with ONNX Runtime; bioimageio is a
    package for bioimage.io (a zip file). DEST.json describes the input, the output and their processing.
    """
    nucleus.model.check_export(dest)  # before the download, and before TensorFlow is imported
    pulled = pulled_model(model)
    manifest = pulled.manifest
    about = {"model": manifest.model, "version": manifest.version}
    card = manifest.origin.recipe.get("card", {})
    facts = nucleus.model.ModelFacts(
        manifest.model, manifest.version, card.get("license") or "", manifest.origin.all_data
    )
    usage = nucleus.model.export_model(pulled.folder, kind, dest, facts)
    if as_json:
        print_json({**about, "format": kind, "path": str(dest.absolute()), "usage": str(usage.absolute())})
    else:
        click.echo(f"{pulled} in {dest}; how to use it: {usage}")


@models.command()
@click.argument("model")
@click.argument("alias")
@single_writer_option
def alias(model: str, alias: str, single_writer: bool) -> None:
    """Point ALIAS to the version MODEL, which is NAME[@REF]."""
    bucket = _bucket(single_writer)
    reference = nucleus.config.parse_reference(model, "model")
    moved = nucleus.registry.move_alias(
        bucket, reference.name, alias, nucleus.registry.resolve_version(bucket, reference)
    )
    click.echo(f"{reference.name}@{alias} is version {moved.version} (before: {moved.previous or 'none'})")


@models.command()
@click.argument("name")
@click.argument("alias")
@single_writer_option
def rollback(name: str, alias: str, single_writer: bool) -> None:
    """Point ALIAS of the model NAME back to the older version that it pointed to before its last move."""
    moved = nucleus.registry.rollback_alias(_bucket(single_writer), name, alias)
    click.echo(f"{name}@{alias} is version {moved.version} (before: {moved.previous})")


@models.command()
@click.argument("name", required=False)
@click.option("--remove", is_flag=True, help="Remove the leftovers instead of only listing them.")
@click.option(
    "--older-than",
    "hours",
    type=FiniteRange(0),
    default=24.0,
    show_default=True,
    metavar="HOURS",
    help="Keep anything that changed within this time, because its publication may still be in progress.",
)
@single_writer_option
@json_option
def clean(name: str | None, remove: bool, hours: float, single_writer: bool, as_json: bool) -> None:
    """List the incomplete versions that interrupted publications left behind, of the model NAME or of all models.

    With --remove, delete them.
    """
    bucket = _bucket(single_writer)
    before = datetime.now(UTC) - timedelta(hours=hours)
    rows = []
    for model in [name] if name else bucket.folders(nucleus.registry.MODELS):
        for leftover in nucleus.registry.leftovers(bucket, model):
            state = "leftover" if leftover.modified <= before else "recent"
            if remove and state == "leftover" and nucleus.registry.remove_leftover(bucket, model, leftover.version):
                state = "removed"
            rows.append(
                {
                    "model": model,
                    "version": leftover.version,
                    "objects": leftover.objects,
                    "bytes": leftover.size,
                    "modified": leftover.modified.isoformat()[:19],
                    "state": state,
                }
            )
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("no leftovers")
        return
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    if not remove and any(row["state"] == "leftover" for row in rows):
        click.echo(f"to remove them: nucleus models clean {name or ''} --remove".replace("  ", " "), err=True)


@click.group()
def weights() -> None:
    """Encoder weights in the bucket, for clusters without internet access."""


@weights.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--encoder",
    type=click.Choice(ENCODER_NAMES),
    default=ENCODER_NAMES[0],
    show_default=True,
    help="Encoder of the weights.",
)
@single_writer_option
def add(file: Path, encoder: EncoderName, single_writer: bool) -> None:
    """Check FILE (.weights.h5 or .h5, without the top) and add it to the bucket for network.weights = "imagenet"."""
    bucket = project_bucket(nucleus.registry.WEIGHTS, single_writer=single_writer)
    with show_progress("upload weights", "bytes") as advance:
        added = nucleus.registry.add_weights(file, encoder, bucket, advance)
    click.echo(str(added.uri))


@weights.command("list")
@json_option
def list_weights_command(as_json: bool) -> None:
    """List the encoder weights in the bucket."""
    bucket = nucleus.storage.Bucket(nucleus.storage.bucket_from_environment())
    found = nucleus.registry.list_weights(bucket)
    rows = [
        (item.key.split("/")[1], str(bucket.uri / item.key), item.size, item.modified.isoformat()) for item in found
    ]
    if as_json:
        print_json([dict(zip(("encoder", "uri", "size", "modified"), row, strict=True)) for row in rows])
    else:
        print_table(("encoder", "uri", "bytes", "modified"), rows)
