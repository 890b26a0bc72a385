"""`nucleus predict` and `nucleus evaluate`: use a published model."""

from dataclasses import asdict
from pathlib import Path

import click

from nucleus.cli.options import json_option
from nucleus.errors import NucleusError

__all__ = ["evaluate", "predict"]

_IMAGE_SCORES = (("ap_50", "AP.5"), ("map", "mAP"), ("iou", "IoU"), ("dice", "Dice"), ("accuracy", "accuracy"))
_WORST = 12
_POSITIVE = click.FloatRange(0, min_open=True)


def model_folder(model: str) -> Path:
    """Folder of the model NAME[@REF], pulled into the cache; or `model` itself if it is a pulled folder."""
    from nucleus.config.names import Reference, parse_reference
    from nucleus.data.cache import default_cache_dir
    from nucleus.registry import versions
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import bucket_from_environment

    if (Path(model) / "manifest.json").is_file():
        return Path(model)
    reference = parse_reference(model, "model")
    bucket = Bucket(bucket_from_environment())
    bucket.check("models/")
    version = versions.resolve_version(bucket, reference)
    folder = default_cache_dir() / "models" / bucket.uri.bucket / bucket.uri.key / reference.name / f"{version:06d}"
    versions.pull(bucket, Reference(reference.name, str(version)), folder)
    return folder


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="NAME[@REF]", help="A model in the bucket, or a pulled folder.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--diameter", type=_POSITIVE, metavar="PX", help="Typical diameter of the nuclei, px: rescales.")
@click.option(
    "--pixel-size", type=_POSITIVE, metavar="UM", help="Side of a pixel in micrometres.  [default: the file's]"
)
@click.option("--channel", type=click.IntRange(0), metavar="N", help="Take one channel only, from 0.")
@click.option("--tta", is_flag=True, help="Average over flips and quarter turns: better, eight times slower.")
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier prediction.")
@json_option
def predict(
    inputs: tuple[Path, ...],
    model: str,
    out: Path,
    diameter: float | None,
    pixel_size: float | None,
    channel: int | None,
    tta: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Segment images (files or folders: PNG, TIFF, OME-TIFF, JPEG, BMP, WebP; any depth, any size).

    Writes for each <stem>.labels.tif (integer labels, 0 background) and <stem>.overlay.png, and one nuclei.csv (a row a
    nucleus) and images.csv (a row an image).
    """
    from nucleus.cli.output import print_json, print_table, show_progress, warn
    from nucleus.predict.inputs import check_outputs, find_inputs
    from nucleus.quiet import import_tensorflow

    files = find_inputs(inputs)
    if not overwrite:
        check_outputs(files, out)
    folder = model_folder(model)
    import_tensorflow()
    from nucleus.predict.images import predict_files
    from nucleus.predict.predictor import PredictionOptions, load_predictor, read_pulled

    manifest = read_pulled(folder)
    predictor = load_predictor(folder, PredictionOptions(diameter=diameter, pixel_size=pixel_size, turns=tta))
    with show_progress("segment images") as advance:
        found = predict_files(predictor, files, out, channel, advance)
    version = f"{manifest.model}@{manifest.version}"
    if as_json:
        print_json({"model": version, "out": str(out.absolute()), "nuclei": found.counts, "failures": found.failures})
    else:
        for message in found.failures.values():
            warn(message)
        print_table(("image", "nuclei"), list(found.counts.items()))
        click.echo(f"{sum(found.counts.values())} nuclei in {len(found.counts)} images by {version}: {out}")
    if found.failures:
        raise NucleusError(f"{len(found.failures)} of {len(files)} images could not be read: see above.")


@click.command()
@click.argument("model", metavar="NAME[@REF]")
@click.argument("dataset")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@click.option("--tta", is_flag=True, help="Average over flips and quarter turns: better, eight times slower.")
@click.option("--gallery", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the twelve worst images.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, with the scores of each image.")
def evaluate(model: str, dataset: str, split: str, tta: bool, gallery: Path | None, as_json: bool) -> None:
    """Score a model on a split of DATASET (s3://bucket/datasets/NAME[@VERSION], or NAME in the bucket)."""
    from nucleus.cli.output import print_json, print_scores, print_table, show_progress
    from nucleus.config.recipe import LossOptions
    from nucleus.data.cache import ShardCache, default_cache_dir
    from nucleus.data.datasets import locate_dataset, open_dataset
    from nucleus.quiet import import_tensorflow

    opened = open_dataset(locate_dataset(dataset))
    folder = model_folder(model)
    import_tensorflow()
    from nucleus.data.images import encode_png
    from nucleus.predict.evaluation import evaluate as evaluate_split
    from nucleus.predict.gallery import draw_gallery
    from nucleus.predict.predictor import PredictionOptions, load_predictor, read_pulled
    from nucleus.storage.files import write_atomic

    manifest = read_pulled(folder)
    predictor = load_predictor(folder, PredictionOptions(turns=tta))
    loss = LossOptions.model_validate(manifest.origin.recipe.get("loss", {}))
    with show_progress(f"evaluate {split}") as advance:
        found = evaluate_split(predictor, loss, opened, split, ShardCache(default_cache_dir()), advance, worst=_WORST)
    if gallery is not None:
        write_atomic(gallery, encode_png(draw_gallery(found.worst)))
    if as_json:
        version = f"{manifest.model}@{manifest.version}"
        images = [{**asdict(row), "ap_50": row.ap_50} for row in found.images]
        print_json(
            {
                "model": version,
                "dataset": str(opened),
                "split": split,
                "overall": found.overall,
                "images": images,
            }
        )
        return
    print_table(
        ("image", "kind", *(title for _, title in _IMAGE_SCORES), "nuclei", "found"),
        [
            (
                row.name,
                row.kind,
                *(f"{getattr(row, field):.4f}" for field, _ in _IMAGE_SCORES),
                row.nuclei_true,
                row.nuclei_predicted,
            )
            for row in found.images
        ],
    )
    print_scores({split: found.overall})
