"""`nucleus evaluate`: score a published model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nucleus.cli.options import is_pulled, model_folder, workers_option
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
    from nucleus.cli.output import print_json, print_scores
    from nucleus.config.recipe import LossOptions
    from nucleus.data.dataset import locate_dataset, open_dataset
    from nucleus.lazy import import_tensorflow

    if workers is not None and is_pulled(model):
        raise UsageError(f"Expected NAME[@REF], which every worker can pull, for --workers; found {model}.")
    opened = open_dataset(locate_dataset(dataset))
    folder = model_folder(model)
    import_tensorflow()
    from nucleus.data.images import encode_png
    from nucleus.pictures import draw_gallery
    from nucleus.predict.model import read_pulled
    from nucleus.storage.files import write_atomic

    manifest = read_pulled(folder)
    loss = LossOptions.model_validate(manifest.origin.recipe.get("loss", {}))
    splits = tuple(name for name in _SPLITS if split in {name, "all"})
    if workers is None:
        found = _evaluate_here(folder, loss, opened, splits, tta=tta)
    else:
        found = _evaluate_spread(manifest, loss, opened, splits, workers, tta=tta)
    if gallery is not None:
        write_atomic(gallery, encode_png(draw_gallery(found.worst)))
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
    from nucleus.cli.progress_bars import show_progress
    from nucleus.data.cache import ShardCache, default_cache_dir
    from nucleus.predict.evaluation import evaluate as evaluate_split
    from nucleus.predict.evaluation import joined
    from nucleus.predict.model import PredictionOptions, load_predictor

    predictor = load_predictor(folder, PredictionOptions(turns=tta))
    cache = ShardCache(default_cache_dir())
    parts = []
    for split in splits:
        with show_progress(f"evaluate {split}") as advance:
            parts.append(evaluate_split(predictor, loss, dataset, split, cache, advance, worst=_WORST))
    return joined(parts, _WORST)


def _evaluate_spread(
    manifest: "ModelManifest",
    loss: "LossOptions",
    dataset: "Dataset",
    splits: tuple[str, ...],
    workers: int,
    *,
    tta: bool,
) -> "Evaluation":
    from job.inference import EvaluationPlan, evaluate_spread
    from nucleus.cli.output import note
    from nucleus.cli.progress_bars import show_progress
    from nucleus.config.names import Reference
    from nucleus.predict.model import PredictionOptions
    from nucleus.storage.uri import bucket_from_environment

    plan = EvaluationPlan(
        registry=bucket_from_environment(),
        model=Reference(manifest.model, str(manifest.version)),
        loss=loss,
        dataset=dataset,
        splits=splits,
        options=PredictionOptions(turns=tta),
        worst=_WORST,
    )
    verbose = click.get_current_context().find_root().params["debug"]
    with show_progress(f"evaluate {' '.join(splits)}") as advance:
        return evaluate_spread(plan, workers=workers, verbose=verbose, advance=advance, waiting=note)


def _print_images(found: "Evaluation") -> None:
    from nucleus.cli.output import print_table

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
