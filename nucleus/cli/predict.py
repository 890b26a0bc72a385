"""`nucleus predict`: use a published model on images."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import click

import job
import nucleus
from nucleus.cli.options import (
    FiniteRange,
    check_anonymous,
    check_shared_model,
    engine_option,
    json_option,
    number_or_word,
    pulled_model,
    single_writer_option,
    workers_option,
)
from nucleus.cli.output import note, print_facts, print_json, print_table, warn
from nucleus.cli.progress_bars import show_progress
from nucleus.config.names import DEFAULT_FORMATS, EngineChoice, FormatName, Reference
from nucleus.errors import NucleusError, UsageError
from nucleus.surroundings import check_can_train
from nucleus.text import plural

if TYPE_CHECKING:
    from job.inference import BucketPrediction
    from nucleus.data.stacks import PlaneOptions
    from nucleus.data.zarr_store import ZarrFolder
    from nucleus.predict.bucket_images import PredictionSettings
    from nucleus.predict.cells import Expansion
    from nucleus.predict.model import PredictionOptions
    from nucleus.predict.plates import Wells
    from nucleus.predict.zarr_results import IntoImage

__all__ = ["predict"]

_POSITIVE = FiniteRange(0, min_open=True)
_PIXEL = FiniteRange(1e-4, 1000)
"""The range of `nucleus.predict.PIXEL_SIZES`."""


@dataclass(frozen=True)
class _Choices:
    """Options that apply to both files and images in a bucket."""

    options: "PredictionOptions"
    channel: int | str | None
    z: int | str | None
    t: int | str | None
    series: int | str | None
    formats: tuple[str, ...]
    expand: str | None
    into_image: bool
    label_name: str | None
    overwrite: bool
    anonymous: bool
    single_writer: bool
    as_json: bool

    @property
    def planes(self) -> "PlaneOptions":
        """Which images and planes of files to take. Raises `UsageError`."""
        return nucleus.data.PlaneOptions(self.z, self.t, self.series)

    @property
    def expansion(self) -> "Expansion | None":
        """How far cells reach beyond their nuclei. Raises `UsageError`."""
        return nucleus.predict.parse_expansion(self.expand) if self.expand is not None else None

    @property
    def into(self) -> "IntoImage | None":
        """That labels are written into the OME-Zarr of their image. Raises `UsageError`."""
        if not self.into_image:
            if self.label_name is not None:
                raise UsageError("Expected --into-image with --label-name; found none. Add it, or leave out the name.")
            return None
        if "zarr" not in self.formats or self.anonymous:
            found = "--anonymous, which cannot write" if self.anonymous else f"formats {', '.join(self.formats)}"
            raise UsageError(f"Expected --format zarr and credentials for --into-image; found {found}.")
        name = nucleus.config.check_name(self.label_name or "nuclei", "label")
        return nucleus.predict.IntoImage(name, self.overwrite)


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "--model",
    metavar="NAME[@REF]",
    help="A model in the bucket, or a pulled folder.  [default: nuclei, the model that comes along]",
)
@click.option("--out", required=True, metavar="FOLDER", help="Destination: a folder, or s3://bucket/prefix.")
@click.option(
    "--diameter",
    type=_POSITIVE,
    metavar="PX",
    help="Typical diameter of the nuclei, px. It rescales the images.  [default: estimated from each image]",
)
@click.option(
    "--pixel-size", type=_PIXEL, metavar="UM", help="Side of a pixel in micrometres.  [default: from the file]"
)
@click.option(
    "--channel",
    metavar="N|NAME",
    callback=number_or_word,
    help="Segment this channel: its number, from 0, or its name in the file, such as DAPI.",
)
@click.option(
    "--z",
    metavar="max|mean|best|N|all",
    callback=number_or_word,
    help="Of a stack, segment a projection of its depths, the sharpest depth, the depth N (from 0), or each depth.",
)
@click.option(
    "--t",
    metavar="N|all",
    callback=number_or_word,
    help="Of a time series, segment the time N (from 0), or each time.",
)
@click.option(
    "--series",
    metavar="N|NAME|all",
    callback=number_or_word,
    help="Of a file of several images, segment one: its number, from 0, or its name.  [default: all]",
)
@click.option("--tta", is_flag=True, help="Average over flips and quarter turns: better, but eight times slower.")
@click.option(
    "--as-is", is_flag=True, help="Do not even haze and vignettes before the network looks.  [default: where clear]"
)
@click.option("--denoise", is_flag=True, help="Smooth images with strong noise before the network looks.")
@engine_option
@click.option(
    "--format",
    "formats",
    multiple=True,
    default=DEFAULT_FORMATS,
    type=click.Choice(get_args(FormatName)),
    help="Format of the results: labels (TIFF), zarr (OME-Zarr labels), geojson (QuPath), roi (ImageJ), coco, overlay "
    "(PNG); and of the tables: csv, parquet, h5ad (AnnData). Repeat it for several.  [default: labels, overlay, and "
    "the tables as csv, in a bucket as parquet]",
)
@click.option(
    "--expand",
    metavar="DISTANCE",
    help="Grow cells around the nuclei, by up to this distance: 5um, 8px.",
)
@click.option(
    "--into-image", is_flag=True, help="Write the labels of --format zarr into the OME-Zarr that the image is in."
)
@click.option("--label-name", metavar="NAME", help="Name of the labels of --into-image.  [default: nuclei]")
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier prediction.")
@click.option("--anonymous", is_flag=True, help="Read the images of a public bucket without credentials.")
@workers_option("one per GPU, or else per CPU")
@single_writer_option
@json_option
def predict(
    inputs: tuple[str, ...],
    model: str | None,
    out: str,
    workers: int | None,
    diameter: float | None,
    pixel_size: float | None,
    tta: bool,
    as_is: bool,
    denoise: bool,
    engine: EngineChoice,
    **choices: Any,
) -> None:
    """Segment images (files or folders: PNG, TIFF, OME-TIFF, LSM, OME-Zarr, JPEG, BMP, WebP, slides; of any size).

    Without --model it uses the model `nuclei`, which comes along with the package and needs no bucket and no network.

    Writes <stem>.labels.tif (integer labels, 0 background) and <stem>.overlay.png, or what --format says, for each
    image, and nuclei.csv (one row per nucleus) and images.csv (one row per image). Folders are read with all folders
    below them, and the results lie in the same folders below --out.

    A stack or a time series needs --z or --t. Each plane is an image of its own, with its index in the columns z and t
    and, where there are several, in the names of its results (<stem>.z03.t0.labels.tif); so is each image of a file
    that holds several (<stem>.s0.labels.tif), of which --series chooses one. Nuclei are not followed through depths or
    times: there is no 3-D segmentation.

    OME-Zarr (0.4 and 0.5) is an image, a well or a plate; its address may also be s3://bucket/name.zarr. The results of
    a plate's fields are named by row, column and field (plate/B/3/0.labels.tif), which are also columns of the tables.

    Images below s3://bucket/prefix are distributed over a Ray cluster; --out is then also a prefix, and the tables are
    nuclei.parquet and images.parquet, or of more than 10,000 images datasets in nuclei/ and images/. If you repeat the
    command, it skips the images that are done.
    """
    options = nucleus.predict.PredictionOptions(
        diameter=diameter, pixel_size=pixel_size, turns=tta, as_is=as_is, denoise=denoise, engine=engine
    )
    given = _Choices(options, **choices)
    _ = given.planes, given.expansion, given.into  # checked before anything is read
    in_bucket = [nucleus.storage.is_uri(text) for text in (*inputs, out)]
    check_anonymous(given.anonymous, in_bucket=any(in_bucket[:-1]))
    if not in_bucket[-1] and all(_is_here(text) for text in inputs):
        if workers is not None:
            raise UsageError("Expected images in a bucket for --workers; found files, which this process segments.")
        if given.single_writer:
            raise UsageError("Expected results in a bucket for --single-writer; found a folder. Leave it out.")
        _predict_files(inputs, model, Path(out), given)
        return
    if not all(in_bucket) or len(inputs) > 1:
        raise UsageError(
            "Expected one prefix s3://bucket/images and a prefix for --out, or files, folders and OME-Zarr "
            f"(s3://bucket/name.zarr) and a folder; found {' '.join(inputs)} and --out {out}."
        )
    _predict_bucket(inputs[0], model, out, workers, given)


def _is_here(text: str) -> bool:
    """Return whether this process segments an input itself: files, folders, and OME-Zarr wherever it is."""
    return not nucleus.storage.is_uri(text) or nucleus.data.in_zarr(text)


def _place(text: str, *, anonymous: bool) -> "Path | ZarrFolder":
    uri = nucleus.storage.uri_or_path(text)
    if isinstance(uri, Path):
        return uri
    bucket = nucleus.storage.Bucket(nucleus.storage.S3Uri(uri.bucket), anonymous=anonymous)
    return nucleus.data.bucket_zarr(bucket, uri.key)


def _predict_files(inputs: tuple[str, ...], model: str | None, out: Path, given: _Choices) -> None:
    started = time.monotonic()  # what takes longest for a few images is TensorFlow's import
    formats = nucleus.predict.check_formats(given.formats)
    found = nucleus.predict.find_inputs([_place(text, anonymous=given.anonymous) for text in inputs], given.series)
    for text in found.notes:
        note(text)
    with nucleus.storage.claimed_folder(out):
        planned = nucleus.predict.plan_images(found.images, given.planes)
        if not given.overwrite:
            outputs = (image.output for image in planned.images)
            nucleus.predict.check_outputs(dict.fromkeys([*found.images, *outputs]), out)
        pulled = pulled_model(model)
        segmenter = nucleus.predict.load_pulled(pulled, given.options)
        with show_progress("segment images") as advance:
            predicted = nucleus.predict.predict_files(
                segmenter, planned, out, given.channel, advance, formats, given.expansion, given.into
            )
    failures = {**found.unread, **predicted.failures}
    if given.as_json:
        _print_json(str(pulled), str(out.absolute()), predicted.counts, failures, predicted.warnings)
    else:
        _print(str(pulled), str(out), predicted.counts, failures, predicted.warnings, time.monotonic() - started)
        _print_plates(predicted.plates)
    _check(len(failures), len(predicted.counts) + len(failures))


def _predict_bucket(images: str, model: str | None, out: str, workers: int | None, given: _Choices) -> None:
    check_can_train("images in a bucket, which are predicted on Ray")
    if given.into is not None:
        raise UsageError(
            "Expected a folder for --out with --into-image; found a prefix, whose images are predicted on Ray. Predict "
            "each s3://bucket/name.zarr with a folder as --out, or leave out --into-image."
        )
    check_shared_model(model, "images in a bucket")
    nucleus.lazy.need(*nucleus.lazy.TRAINING)
    settings = _settings(images, model, out, given)
    started = time.monotonic()
    with show_progress("segment images") as advance:
        found = job.predict_bucket(
            settings,
            engine=given.options.engine,
            workers=workers,
            overwrite=given.overwrite,
            single_writer=given.single_writer,
            anonymous=given.anonymous,
            verbose=click.get_current_context().find_root().params["debug"],
            advance=advance,
            waiting=note,
        )
    for text in found.notes:
        note(text)
    if found.tables > 1:
        note(
            f"More than 10,000 images: the tables are {found.tables} files in nuclei/ and in images/ of {settings.out}."
        )
    if given.as_json:
        _print_bucket_json(settings, found)
    else:
        _print_bucket(settings, found, time.monotonic() - started)
        _print_plates(found.plates)
    _check(found.failed, found.images + found.failed)


def _settings(images: str, model: str | None, out: str, given: _Choices) -> "PredictionSettings":
    """Return the settings of a prediction in a bucket, with the version of the model."""
    version, registry = _version_for_workers(model)
    return nucleus.predict.PredictionSettings(
        images=str(nucleus.storage.parse_uri(images)),
        out=str(nucleus.storage.parse_uri(out)),
        model=str(version),
        registry=registry,
        **nucleus.predict.stored_options(given.options),
        channel=given.channel,
        formats=nucleus.predict.check_formats(given.formats),
        z=given.z,
        t=given.t,
        series=given.series,
        expand=str(given.expansion) if given.expansion else None,
    )


def _print_bucket_json(settings: "PredictionSettings", found: "BucketPrediction") -> None:
    more: dict[str, int] = {
        "images": found.images,
        "found": found.nuclei,
        "failed": found.failed,
        "warned": found.warned,
        "done_before": found.done_before,
        "tables": found.tables,
    }
    _print_json(settings.model, settings.out, found.counts, found.failures, found.warnings, **more)


def _print_bucket(settings: "PredictionSettings", found: "BucketPrediction", seconds: float) -> None:
    """Print what was predicted: each image of some thousands, or the numbers alone."""
    before = f"{found.done_before} (--overwrite predicts them again)"
    more = {"done before": before} if found.done_before else {}
    if found.counts is not None and found.failed == len(found.failures) and found.warned == len(found.warnings):
        _print(settings.model, settings.out, found.counts, found.failures, found.warnings, seconds, more)
        return
    for message in found.failures.values():
        warn(message)
    print_facts(
        {
            "images": found.images,
            "nuclei": found.nuclei,
            "failures": f"{found.failed}: the first {len(found.failures)} are above" if found.failed else 0,
            "warnings": f"{found.warned}: see the column warning of the tables of images",
            **more,
            "seconds": f"{seconds:.1f}",
            "model": settings.model,
            "results": settings.out,
        }
    )


def _version_for_workers(model: str | None) -> tuple[Reference, str | None]:
    """Return a version, and the bucket that each worker pulls it from; None if it is in each worker's package."""
    if nucleus.registry.is_included(model):
        return pulled_model(model).reference, None
    location = nucleus.registry.locate_model(model or "")
    reference, registry = location.reference, nucleus.storage.Bucket(location.bucket)
    registry.check(nucleus.registry.MODELS)
    return Reference(reference.name, str(nucleus.registry.resolve_version(registry, reference))), str(registry.uri)


def _print_json(
    model: str,
    out: str,
    counts: Mapping[str, int] | None,
    failures: Mapping[str, str],
    warnings: Mapping[str, str],
    **more: int,
) -> None:
    found = {"model": model, "out": out, "nuclei": counts, "failures": failures, "warnings": warnings}
    print_json({**found, **more})


def _print(
    model: str,
    out: str,
    counts: Mapping[str, int],
    failures: Mapping[str, str],
    warnings: Mapping[str, str],
    seconds: float,
    more: Mapping[str, object] = MappingProxyType({}),
) -> None:
    for message in failures.values():
        warn(message)
    if warnings:
        print_table(
            ("image", "nuclei", "warning"), [(name, found, warnings.get(name, "")) for name, found in counts.items()]
        )
    else:
        print_table(("image", "nuclei"), list(counts.items()))
    print_facts(
        {
            "images": len(counts),
            "nuclei": sum(counts.values()),
            "failures": f"{len(failures)}: see above" if failures else 0,
            **({"warnings": f"{plural(len(warnings), 'image')} to look at: see above"} if warnings else {}),
            **more,
            "seconds": f"{seconds:.1f}",
            "model": model,
            "results": out,
        }
    )


def _print_plates(plates: "Mapping[str, Wells]") -> None:
    for plate, wells in plates.items():
        click.echo(f"\n{nucleus.predict.plate_text(plate, wells)}")


def _check(failed: int, images: int) -> None:
    if failed:
        raise NucleusError(f"{failed} of {images} images could not be read: see above.")
