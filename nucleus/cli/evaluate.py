"""`nucleus evaluate`: score a published model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

import job
import nucleus
from nucleus.cli.options import is_pulled, model_folder, workers_option
from nucleus.cli.output import note, print_json, print_scores, print_table
from nucleus.cli.progress_bars import show_progress
from nucleus.errors import UsageError

if TYPE_CHECKING:
    from nucleus.config.recipe import LossOptions
    from nucleus.data.dataset import Dataset
    from nucleus.predict.evaluation import Evaluation
    from nucleus.registry.manifest import ModelManifest

__all__ = ["evaluate"]

_IMAGE_SCORES = (("ap_50", "AP.5"), ("map", "mAP"), ("iou", "IoU"), ("dice", "Dice"), ("accuracy", "accuracy"))
_WORST = 12
_SPLITS = ("train", "val", "test")


@click.command()
@click.argument("model", metavar="NAME[@REF]")
@click.argument("dataset")
@click.option("--split", type=click.Choice([*_SPLITS, "all"]), default="test", show_default=True)
@click.option("--tta", is_flag=True, help="Average over flips and quarter turns: better, eight times slower.")
@click.option("--gallery", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the twelve worst images.")
@workers_option("this process does all")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, with the scores of each image.")
def evaluate(
    model: str, dataset: str, split: str, tta: bool, gallery: Path | None, workers: int | None, as_json: bool
) -> None:
    """Score a model on a split of DATASET (s3://bucket/datasets/NAME[@VERSION], or NAME in the bucket)."""

    if workers is not None and is_pulled(model):
        raise UsageError(f"Expected NAME[@REF], which every worker can pull, for --workers; found {model}.")
    opened = nucleus.data.open_dataset(nucleus.data.locate_dataset(dataset))
    folder = model_folder(model)

    manifest = nucleus.predict.read_pulled(folder)
    loss = nucleus.config.LossOptions.model_validate(manifest.origin.recipe.get("loss", {}))
    splits = tuple(name for name in _SPLITS if split in {name, "all"})
    if workers is None:
        found = _evaluate_here(folder, loss, opened, splits, tta=tta)
    else:
        found = _evaluate_spread(manifest, loss, opened, splits, workers, tta=tta)
    if gallery is not None:
        nucleus.storage.write_atomic(gallery, nucleus.data.encode_png(nucleus.pictures.draw_gallery(found.worst)))
    if as_json:
        version = f"{manifest.model}@{manifest.version}"
        images = [{**asdict(row), "ap_50": row.ap_50} for row in found.images]
        print_json(
            {"model": version, "dataset": str(opened), "split": split, "overall": found.overall, "images": images}
        )
        return
    _print_images(found)
    print_scores({split: found.overall})


def _evaluate_here(
    folder: Path, loss: "LossOptions", dataset: "Dataset", splits: tuple[str, ...], *, tta: bool
) -> "Evaluation":

    predictor = nucleus.predict.load_predictor(folder, nucleus.predict.PredictionOptions(turns=tta))
    cache = nucleus.data.ShardCache(nucleus.data.default_cache_dir())
    parts = []
    for split in splits:
        with show_progress(f"evaluate {split}") as advance:
            parts.append(nucleus.predict.evaluate(predictor, loss, dataset, split, cache, advance, worst=_WORST))
    return nucleus.predict.joined(parts, _WORST)


def _evaluate_spread(
    manifest: "ModelManifest",
    loss: "LossOptions",
    dataset: "Dataset",
    splits: tuple[str, ...],
    workers: int,
    *,
    tta: bool,
) -> "Evaluation":

    plan = job.EvaluationPlan(
        registry=nucleus.storage.bucket_from_environment(),
        model=nucleus.config.Reference(manifest.model, str(manifest.version)),
        loss=loss,
        dataset=dataset,
        splits=splits,
        options=nucleus.predict.PredictionOptions(turns=tta),
        worst=_WORST,
    )
    verbose = click.get_current_context().find_root().params["debug"]
    with show_progress(f"evaluate {' '.join(splits)}") as advance:
        return job.evaluate_spread(plan, workers=workers, verbose=verbose, advance=advance, waiting=note)


def _print_images(found: "Evaluation") -> None:

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
