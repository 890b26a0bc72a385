"""`nucleus evaluate`: score a published model on a dataset."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

import job
import nucleus
from nucleus.cli.options import check_shared_model, engine_option, pulled_model, workers_option
from nucleus.cli.output import note, print_json, print_scores, print_table, warn
from nucleus.cli.progress_bars import show_progress
from nucleus.config.names import EngineChoice
from nucleus.surroundings import check_can_train
from nucleus.text import SPLIT_NAMES

if TYPE_CHECKING:
    from nucleus.data.dataset import Dataset
    from nucleus.predict.evaluation import Evaluation
    from nucleus.predict.model import PredictionOptions
    from nucleus.registry.versions import PulledModel

__all__ = ["evaluate"]

_IMAGE_SCORES = (("ap_50", "AP.5"), ("map", "mAP"), ("iou", "IoU"), ("dice", "Dice"), ("accuracy", "accuracy"))
_WORST = 12


@click.command()
@click.argument("model", metavar="NAME[@REF]")
@click.argument("dataset")
@click.option("--split", type=click.Choice([*SPLIT_NAMES, "all"]), default="test", show_default=True)
@click.option("--tta", is_flag=True, help="Average over flips and quarter turns: better, but eight times slower.")
@engine_option
@click.option("--gallery", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the twelve worst images.")
@workers_option("evaluate in this process")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, with the scores of each image.")
def evaluate(
    model: str,
    dataset: str,
    split: str,
    tta: bool,
    engine: EngineChoice,
    gallery: Path | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Score a model on a split of DATASET (s3://bucket/datasets/NAME[@VERSION], or NAME in the bucket).

    `nuclei` without a version is the model that comes along with the package.
    """
    if workers is not None:
        check_shared_model(model, "--workers")
        nucleus.lazy.need(*nucleus.lazy.TRAINING)
    opened = nucleus.data.open_dataset(nucleus.data.locate_dataset(dataset))
    pulled = pulled_model(model)
    splits = nucleus.predict.splits_named(split)
    options = nucleus.predict.PredictionOptions(turns=tta, engine=engine)
    if workers is None:
        found = nucleus.predict.evaluate(
            nucleus.predict.load_pulled(pulled, options),
            opened,
            splits,
            nucleus.data.ShardCache(),
            progress=show_progress,
            worst=_WORST,
        )
    else:
        found = _evaluate_on_cluster(model, pulled, opened, splits, options, workers)
    if gallery is not None:
        nucleus.storage.write_atomic(gallery, nucleus.data.encode_png(nucleus.pictures.draw_gallery(found.worst)))
    if not found.overall["all"]["nuclei_true"]:
        warn(f"no image of the split {split} has a nucleus, so the scores over its images are undefined")
    if as_json:
        images = [row.as_dict() for row in found.images]
        print_json(
            {
                "model": str(pulled),
                "dataset": str(opened),
                "split": split,
                "overall": found.overall,
                "images": images,
            }
        )
        return
    _print_images(found)
    print_scores({split: found.overall})


def _evaluate_on_cluster(
    model: str,
    pulled: "PulledModel",
    dataset: "Dataset",
    splits: tuple[str, ...],
    options: "PredictionOptions",
    workers: int,
) -> "Evaluation":
    check_can_train("--workers, which are those of a Ray cluster")
    plan = job.EvaluationPlan(
        registry=None if pulled.included else nucleus.registry.locate_model(model).bucket,
        model=pulled.reference,
        dataset=dataset,
        splits=splits,
        options=options,
        worst=_WORST,
    )
    verbose = click.get_current_context().find_root().params["debug"]
    with show_progress(f"evaluate {' '.join(splits)}") as advance:
        return job.evaluate_on_cluster(plan, workers=workers, verbose=verbose, advance=advance, waiting=note)


def _print_images(found: "Evaluation") -> None:
    print_table(
        ("image", "kind", *(title for _, title in _IMAGE_SCORES), "nuclei", "predicted"),
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
