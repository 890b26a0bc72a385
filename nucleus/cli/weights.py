"""`nucleus weights`: encoder weights in the bucket."""

from pathlib import Path

import click

from nucleus.cli.options import json_option
from nucleus.config.encoders import ENCODER_NAMES, EncoderName

__all__ = ["weights"]


@click.group()
def weights() -> None:
    """Encoder weights in the bucket, for clusters without internet."""


@weights.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--encoder",
    type=click.Choice(ENCODER_NAMES),
    default=ENCODER_NAMES[0],
    show_default=True,
    help="The network that they belong to.",
)
def add(file: Path, encoder: EncoderName) -> None:
    """Check FILE (without top, .weights.h5 or .h5) and put it where network.weights = "imagenet" finds it."""
    from nucleus.cli.progress import show_progress
    from nucleus.quiet import import_tensorflow
    from nucleus.registry.encoder_weights import add_weights
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import bucket_from_environment

    bucket = Bucket(bucket_from_environment())
    bucket.check("weights/")
    import_tensorflow()
    with show_progress("upload weights", "bytes") as advance:
        added = add_weights(file, encoder, bucket, advance)
    click.echo(str(added.uri))


@weights.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the weights in the bucket."""
    from nucleus.cli.output import print_json, print_table
    from nucleus.registry.encoder_weights import list_weights
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import bucket_from_environment

    bucket = Bucket(bucket_from_environment())
    found = list_weights(bucket)
    rows = [
        (item.key.split("/")[1], str(bucket.uri / item.key), item.size, item.modified.isoformat()) for item in found
    ]
    if as_json:
        print_json([dict(zip(("encoder", "uri", "size", "modified"), row, strict=True)) for row in rows])
    else:
        print_table(("encoder", "uri", "bytes", "modified"), rows)
