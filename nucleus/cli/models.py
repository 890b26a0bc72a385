"""`nucleus models`: list, show, pull and alias model versions."""

from pathlib import Path
from typing import Any

import click

__all__ = ["models"]

_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


@click.group()
def models() -> None:
    """Versioned models in the bucket NUCLEUS_BUCKET. REF is a version number, `latest` or an alias."""


def _bucket() -> Any:
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import bucket_from_environment

    bucket = Bucket(bucket_from_environment())
    bucket.check()
    return bucket


@models.command("list")
@click.argument("name", required=False)
@_JSON
def list_(name: str | None, as_json: bool) -> None:
    """List the models, or the versions of one."""
    from nucleus.cli.output import print_json, print_table
    from nucleus.registry.aliases import list_aliases
    from nucleus.registry.versions import list_models, list_versions, read_version

    bucket = _bucket()
    if name is None:
        rows = [{"model": model, "latest": list_versions(bucket, model)[-1]} for model in list_models(bucket)]
    else:
        aliases = list_aliases(bucket, name)
        rows = []
        for version in list_versions(bucket, name):
            manifest = read_version(bucket, name, version)
            rows.append(
                {
                    "version": version,
                    "created": manifest.created[:19],
                    "val_map": round(manifest.origin.metrics["val"]["all"]["map"], 4),
                    "dataset": manifest.origin.dataset,
                    "run": manifest.origin.run,
                    "aliases": sorted(alias for alias, value in aliases.items() if value.version == version),
                }
            )
    if as_json:
        print_json(rows)
    else:
        columns = list(rows[0]) if rows else ["model", "latest"]
        print_table(columns, [[", ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows])


@models.command()
@click.argument("model")
@_JSON
def show(model: str, as_json: bool) -> None:
    """Show a version's manifest: MODEL is NAME[@REF]."""
    from nucleus.cli.output import print_json
    from nucleus.config.names import parse_reference
    from nucleus.registry.gate import read_decision
    from nucleus.registry.versions import read_version, resolve_version, version_prefix

    bucket = _bucket()
    reference = parse_reference(model, "model")
    manifest = read_version(bucket, reference.name, resolve_version(bucket, reference))
    decision = read_decision(bucket, manifest.model, manifest.version)
    if as_json:
        print_json({**manifest.model_dump(mode="json"), "gate": decision and decision.model_dump(mode="json")})
        return
    prefix = version_prefix(manifest.model, manifest.version)
    click.echo(bucket.get(f"{prefix}/card.md").decode())
    click.echo(f"version {manifest.version}, {manifest.created[:19]}, {bucket.uri / prefix}")
    if decision is not None:
        verb = "moved" if decision.passed else "did not move"
        click.echo(f"{decision.alias} {verb} to it: {decision.reason}")


@models.command()
@click.argument("model")
@click.argument("dest", type=click.Path(path_type=Path), required=False)
@_JSON
def pull(model: str, dest: Path | None, as_json: bool) -> None:
    """Download NAME[@REF] into DEST, every file's SHA-256 verified.  [default: ./NAME-VERSION]"""
    from nucleus.cli.output import print_json
    from nucleus.config.names import Reference, parse_reference
    from nucleus.registry import versions

    bucket = _bucket()
    reference = parse_reference(model, "model")
    version = versions.resolve_version(bucket, reference)
    folder = dest or Path(f"{reference.name}-{version:06d}")
    manifest = versions.pull(bucket, Reference(reference.name, str(version)), folder)
    if as_json:
        print_json({"model": manifest.model, "version": manifest.version, "folder": str(folder.absolute())})
    else:
        click.echo(f"{manifest.model}@{manifest.version} in {folder}")


@models.command()
@click.argument("model")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--format", "kind", required=True, type=click.Choice(["h5", "keras", "savedmodel", "onnx"]))
@_JSON
def export(model: str, dest: Path, kind: Any, as_json: bool) -> None:
    """Write NAME[@REF] to DEST for use without this package, and DEST.json, which says how to use it.

    h5 and keras load with Keras 3, savedmodel (a folder) with TensorFlow, onnx with ONNX Runtime.
    """
    from nucleus.cli.output import print_json
    from nucleus.cli.predict import model_folder
    from nucleus.cli.quiet import import_tensorflow

    folder = model_folder(model)
    import_tensorflow()
    from nucleus.model.export import export_model
    from nucleus.predict.predictor import read_pulled

    manifest = read_pulled(folder)
    about = {"model": manifest.model, "version": manifest.version}
    usage = export_model(folder, kind, dest, about)
    if as_json:
        print_json({**about, "format": kind, "path": str(dest.absolute()), "usage": str(usage.absolute())})
    else:
        click.echo(f"{manifest.model}@{manifest.version} in {dest}; how to use it: {usage}")


@models.command()
@click.argument("model")
@click.argument("alias")
def alias(model: str, alias: str) -> None:
    """Let ALIAS mean the version MODEL, which is NAME[@REF]."""
    from nucleus.config.names import parse_reference
    from nucleus.registry.aliases import move_alias
    from nucleus.registry.versions import resolve_version

    bucket = _bucket()
    reference = parse_reference(model, "model")
    moved = move_alias(bucket, reference.name, alias, resolve_version(bucket, reference))
    click.echo(f"{reference.name}@{alias} is version {moved.version} (before: {moved.previous or 'none'})")


@models.command()
@click.argument("name")
@click.argument("alias")
def rollback(name: str, alias: str) -> None:
    """Let ALIAS of the model NAME mean what it meant before."""
    from nucleus.registry.aliases import rollback_alias

    moved = rollback_alias(_bucket(), name, alias)
    click.echo(f"{name}@{alias} is version {moved.version} (before: {moved.previous})")
