"""Python API: `nucleus.load`, `evaluate`, `train`, `import_dataset`, `open_dataset` and `read_recipe`.

Progress is shown on stderr as in the commands: a bar on a terminal, otherwise one line at the end.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path

import job
from nucleus.cli.data import import_images
from nucleus.cli.options import pulled_model
from nucleus.cli.progress_bars import TrainingDisplay, show_progress
from nucleus.config.names import EngineChoice, check_name
from nucleus.config.recipe import Recipe
from nucleus.config.settings import read_recipe as read_recipe_file
from nucleus.config.settings import recipe_path
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, DatasetLocation, locate_dataset
from nucleus.data.dataset import open_dataset as open_located
from nucleus.data.intake import SourceOptions
from nucleus.data.origins import stated_origin
from nucleus.data.splits import SplitOptions
from nucleus.data.stacks import PlaneOptions
from nucleus.data.zarr_labels import ZarrChoice
from nucleus.errors import RunStoppedError, UsageError
from nucleus.predict.evaluation import Evaluation, splits_named
from nucleus.predict.evaluation import evaluate as evaluate_splits
from nucleus.predict.model import Model, PredictionOptions, load_pulled
from nucleus.predict.segmentation import Segmentation
from nucleus.registry.manifest import ModelManifest
from nucleus.registry.versions import INCLUDED
from nucleus.runs.plan import check_new_run
from nucleus.storage.uri import uri_or_path
from nucleus.surroundings import check_can_train

__all__ = [
    "Dataset",
    "Evaluation",
    "Model",
    "ModelManifest",
    "Recipe",
    "Segmentation",
    "evaluate",
    "import_dataset",
    "load",
    "open_dataset",
    "read_recipe",
    "train",
]


def load(
    model: str | Path | None = None,
    *,
    bucket: str | None = None,
    diameter: float | None = None,
    pixel_size: float | None = None,
    tta: bool = False,
    as_is: bool = False,
    denoise: bool = False,
    engine: EngineChoice = "auto",
) -> Model:
    """Load a model: by default, the one that comes along with this package.

    Args:
        model: "NAME" (its newest version), "NAME@7" or "NAME@production" in the bucket, or in another one as
            "s3://bucket/models/NAME@7", downloaded to the cache once and verified; or a folder that `nucleus models
            pull` made. None and "nuclei" mean the model that comes along, which needs no bucket and no network; a
            bucket's model of this name is "nuclei@7".
        bucket: URI of the bucket, "s3://..."; by default, the value of the environment variable NUCLEUS_BUCKET.
        diameter: Typical diameter of the nuclei in your images, px. The images are rescaled to the diameter that the
            model was trained on. By default, it is estimated from each image, and only images with smaller or larger
            nuclei than those of training are rescaled.
        pixel_size: Side of a pixel in your images, micrometres; by default, the value in the image file. The images are
            rescaled by it if the model knows the pixel size of its training images and `diameter` is not given.
        tta: Whether to average predictions over flips and quarter turns: better, but eight times slower.
        as_is: Whether the network sees haze and vignettes, which by default are evened where they are clear.
            Intensities are always measured in the image as it is.
        denoise: Whether images in which noise is strong are smoothed before the network looks. Not for images that may
            be empty: smoothed noise can look like nuclei.
        engine: What computes the network: "onnx" (ONNX Runtime) or "tensorflow"; by default, TensorFlow if it sees a
            GPU or the version has no `model.onnx`, else ONNX Runtime.

    Returns:
        The model; see `Model.segment`.

    Raises:
        ModelError: The model or version does not exist, or `diameter` is given and the model does not know the diameter
            of its training nuclei, or neither ONNX Runtime nor TensorFlow can compute it here.
        IntegrityError: A file of the model is damaged.
        UsageError: `model` is a path without a model, or `bucket` is given with the model that comes along.

    Examples:
        >>> nucleus.load()
        <Model nuclei@...>
        >>> model = nucleus.load("cells@production")
        >>> found = model.segment("image.png")
        >>> found
        <Segmentation of image.png: 80 x 96 px, ... nuclei>
        >>> found.labels.shape
        (96, 80)
        >>> list(found.table.columns[:5])
        ['image', 'z', 't', 'label', 'centroid_x']
        >>> found.overlay().shape
        (96, 80, 3)
    """
    if bucket is not None and model in {None, INCLUDED}:
        raise UsageError(
            f'Expected a model in {bucket}, such as "{INCLUDED}@latest"; found the model that comes along with the '
            "package. Name a version, or leave bucket out."
        )
    options = PredictionOptions(
        diameter=diameter, pixel_size=pixel_size, turns=tta, as_is=as_is, denoise=denoise, engine=engine
    )
    return load_pulled(pulled_model(None if model is None else str(model), bucket), options)


def evaluate(model: Model | str | Path, dataset: Dataset | str, split: str = "test") -> Evaluation:
    """Score a model on the images of a dataset.

    Args:
        model: A model from `nucleus.load`, or a name or folder as for `nucleus.load`.
        dataset: A dataset from `nucleus.open_dataset`, or a name as for `nucleus.open_dataset`.
        split: "train", "val", "test" or "all".

    Returns:
        A mapping from "all" and each kind of image to scores by name, with a table of the scores of each image. Scores
        of images of which none has a nucleus are undefined: None.

    Raises:
        DataError: The dataset does not exist, or the split has no images.
        UsageError: There is no such split.

    Examples:
        >>> dataset = nucleus.open_dataset("cells")
        >>> scores = nucleus.evaluate("cells@production", dataset, split="test")
        >>> sorted(scores)[0]
        'all'
        >>> 0 <= scores["all"]["map"] <= 1
        True
        >>> len(scores.table) == scores["all"]["images"]
        True
    """
    splits = splits_named(split)
    loaded = model if isinstance(model, Model) else load(model)
    opened = open_dataset(dataset) if isinstance(dataset, str) else dataset
    return evaluate_splits(loaded, opened, splits, ShardCache(), progress=show_progress)


def import_dataset(
    source: str | Path,
    name: str | None = None,
    *,
    into: str | None = None,
    seed: int = 0,
    val: float = 0.1,
    test: float = 0.1,
    group_by: str | None = None,
    license: str | None = None,  # noqa: A002  as the option is called
    origin: str | None = None,
    labels: str | None = None,
    channel: int | str | None = None,
    z: int | str | None = None,
    t: int | str | None = None,
    anonymous: bool = False,
    workers: int | None = None,
) -> Dataset:
    """Import images with their masks as a dataset version in the bucket, or add them to a dataset.

    Images are checked, grouped (images of the same place stay in one split), split and packed. The version is
    determined by the content, so importing the same images again changes nothing.

    Args:
        source: A folder or zip: `<id>/images/*.png` + `<id>/masks/*.png`, `inputs/` + `masks/`, or `images/` +
            `labels/`; or OME-Zarr with labels. Also "s3://bucket/prefix", which is read in place.
        name: Name of the dataset in the bucket of NUCLEUS_BUCKET, or "s3://bucket/datasets/NAME".
        into: Instead of `name`, the dataset to add to, "NAME[@VERSION]" or "s3://bucket/datasets/NAME[@VERSION]"; by
            default, to its latest version. Gives a new version with the old images, their groups and splits, and the
            new ones. New labels of an image that is there replace the old ones.
        seed: Seed of the random split of the new images.
        val: Fraction of the new images for validation.
        test: Fraction of the new images for testing.
        group_by: Regular expression; images whose names have the same match stay in one split.
        license: Licence of the images and labels, an identifier of SPDX such as "CC0-1.0"; kept with them, and in the
            card of models that are trained on them.
        origin: Where they are from and how to cite them: a line of text, or a URL.
        labels: Of OME-Zarr, the name of the label image, if there are several.
        channel: Of OME-Zarr, the channel: its number from 0, or its name.
        z: Of OME-Zarr, a depth from 0, "best" (the sharpest) or "all".
        t: Of OME-Zarr, a time from 0, or "all".
        anonymous: Whether to read the images of a public bucket without credentials.
        workers: Number of workers on the Ray cluster of RAY_ADDRESS or of this machine that read the images, from the
            bucket or a shared disk; the version is the same. By default, this process reads them.

    Returns:
        The dataset version.

    Raises:
        DataError: There are no usable images, or too few to split, or there is no dataset to add to.
        UsageError: `group_by` is not a regular expression, `license` is not one of SPDX, `name` has a version, both or
            none of `name` and `into` are given, or `anonymous` is given for files of this machine.

    Examples:
        >>> dataset = nucleus.import_dataset("folder", "cells")
        >>> len(dataset.manifest.samples)
        12
        >>> nucleus.import_dataset("folder", into="cells") == dataset  # nothing new
        True
    """
    try:
        pattern = re.compile(group_by) if group_by else None
    except re.error as error:
        raise UsageError(f"Expected a regular expression for group_by; found {group_by!r}: {error}.") from error
    imported = import_images(
        uri_or_path(source) if isinstance(source, str) else source,
        _target(name, into),
        SplitOptions(seed=seed, val=val, test=test, group_by=pattern),
        add=not name,
        stated=stated_origin(license, origin),
        reading=SourceOptions(anonymous=anonymous, zarr=ZarrChoice(labels, channel, PlaneOptions(z, t))),
        workers=workers,
    )
    return imported.dataset


def _target(name: str | None, into: str | None) -> DatasetLocation:
    """Return the place of an import: a dataset, or a version to add to."""
    target = name or into
    if target is None or (name and into):
        raise UsageError(
            'Expected a name, as nucleus.import_dataset(source, "cells"), or the dataset to add to, as into="cells"; '
            f"found {'both' if target else 'neither'}."
        )
    location = locate_dataset(target)
    if name and location.ref != "latest":
        raise UsageError(
            f"Expected the name of a dataset without a version; found {name!r}. The content determines the version."
        )
    return location


def open_dataset(name: str) -> Dataset:
    """Open a dataset version.

    Args:
        name: "NAME" (the version imported last) or "NAME@VERSION" in the bucket of NUCLEUS_BUCKET, or
            "s3://bucket/datasets/NAME[@VERSION]".

    Raises:
        DataError: The dataset or version does not exist.

    Examples:
        >>> dataset = nucleus.open_dataset("cells")
        >>> sorted({sample.split for sample in dataset.manifest.samples})
        ['test', 'train', 'val']
    """
    return open_located(locate_dataset(name))


def read_recipe(recipe: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A TOML file, or the name of a built-in recipe: "demo", "dsb2018-cpu", "dsb2018-long", "dsb2018-gpu",
            "nuclei".
        settings: Changes to the recipe, such as "optimizer.epochs=3".

    Raises:
        RecipeError: A key is unknown, or a value is not allowed.

    Examples:
        >>> recipe = nucleus.read_recipe("dsb2018-cpu", ["optimizer.epochs=3"])
        >>> recipe.optimizer.epochs
        3
    """
    return read_recipe_file(recipe_path(str(recipe)), settings)


def train(
    recipe: Recipe | str | Path | None = None,
    settings: Sequence[str] = (),
    *,
    run: str | None = None,
    resume: str | None = None,
    out: str | Path | None = None,
) -> ModelManifest:
    """Train a model with a recipe and publish it.

    Uses the Ray cluster of RAY_ADDRESS or of this machine, or starts one for the run.

    Args:
        recipe: A recipe from `nucleus.read_recipe`, or a file or name as for `nucleus.read_recipe`. Not needed with
            `resume`; if it is given, it must be that of the run.
        settings: Changes to the recipe, such as "optimizer.epochs=3".
        run: Name of the run; by default, the name of the model and the time.
        resume: Name of a run to continue from its last checkpoint, with the recipe that it started with.
        out: Folder for the report and TensorBoard events, in `<out>/<run>/`; by default, `runs`.

    Returns:
        Manifest of the published version; `str(version)` is "NAME@7", an argument for `nucleus.load`.

    Raises:
        NucleusError: Training is impossible or failed; problems that can be detected early are raised before it starts.
        KeyboardInterrupt: Ctrl-C. The first one saves a checkpoint before, the second one ends the run at once.

    Examples:
        >>> version = nucleus.train("recipe.toml")
        >>> version
        <ModelManifest cells@2: run cells-... on s3://...cells@...; test map ..., iou ...>
        >>> model = nucleus.load(str(version))
        >>> sorted(version.origin.metrics)
        ['test', 'val']
    """
    check_can_train("nucleus.train")
    if resume and run:
        raise UsageError("Expected resume alone: a resumed run keeps its name; found run.")
    if settings and recipe is None:
        raise UsageError("Expected resume alone: a resumed run keeps its recipe; found settings.")
    if recipe is None and not resume:
        raise UsageError('Expected a recipe, as nucleus.train("recipe.toml"), or resume="RUN"; found neither.')
    for name in filter(None, (run, resume)):
        check_name(name, "run")
    if isinstance(recipe, Recipe) and settings:
        raise UsageError("Expected settings with the file or name of a recipe; found a `Recipe`.")
    content = read_recipe(recipe, settings) if isinstance(recipe, str | Path) else recipe
    options = job.RunOptions(run=run, folder=None if out is None else Path(out))
    if run and content:
        check_new_run(options.bucket(content.bucket), run, f'nucleus.train(resume="{run}")')
    try:
        with TrainingDisplay() as display:
            if resume:
                return job.resume(resume, content.bucket if content else None, options, display, content)
            assert content is not None
            return job.train(content, options, display)
    except RunStoppedError as error:
        if error.signal == signal.SIGINT:
            raise KeyboardInterrupt(str(error)) from error
        raise
