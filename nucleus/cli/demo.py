"""`nucleus demo`: from images to predictions in one go; each step calls the code of the command for it."""

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

import job
import nucleus
from nucleus.cli.options import training_command
from nucleus.cli.output import note, print_table, warn
from nucleus.cli.progress_bars import TrainingDisplay, show_progress
from nucleus.cli.training import print_published, short_path
from nucleus.errors import JobError, NucleusError, RecipeError
from nucleus.storage import local_server

if TYPE_CHECKING:
    from nucleus.config.recipe import Recipe
    from nucleus.data.dataset import Dataset
    from nucleus.registry.manifest import ModelManifest

__all__ = ["demo"]

_GENERATED_IMAGES = 96


@click.command()
@click.argument("src", type=click.Path(exists=True, path_type=Path), required=False)
@click.option(
    "--workdir",
    type=click.Path(path_type=Path),
    default=Path("demo-run"),
    show_default=True,
    help="Folder for everything that the demo writes.",
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of encoder weights to add to the bucket first.",
)
@click.option("--recipe", help="Path or name of the recipe.  [default: demo; with SRC, dsb2018-cpu]")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key of the recipe.")
@click.pass_context
@training_command
def demo(
    ctx: click.Context,
    src: Path | None,
    workdir: Path,
    weights: Path | None,
    recipe: str | None,
    settings: tuple[str, ...],
) -> None:
    """Import images, train on two Ray workers, publish, pull and predict, with the embedded S3 server.

    SRC is a zip or folder of annotated images; without it, images are generated.
    """
    nucleus.lazy.need("ministack", *nucleus.lazy.TRAINING)
    workdir = workdir.absolute()
    chosen = recipe or ("dsb2018-cpu" if src else "demo")
    content = nucleus.config.read_recipe(
        nucleus.config.recipe_path(chosen), (f'cache_dir="{workdir / "cache"}"', *settings)
    )
    if content.bucket is not None:
        raise RecipeError(
            "Expected a recipe without the key bucket; the demo uses the bucket of its own server. Remove the key."
        )
    _Demo(content, workdir, verbose=bool(ctx.find_root().params.get("debug"))).run(src, weights)


@dataclass
class _Demo:
    recipe: "Recipe"
    workdir: Path
    verbose: bool
    stages: list[tuple[str, float]] = field(default_factory=list)

    def run(self, src: Path | None, weights: Path | None) -> None:
        with self._store():
            dataset = self._import(src)
            changes: dict[str, object] = {"dataset": str(dataset)}
            if weights is not None:
                uri = self._add_weights(weights)
                changes["network"] = self.recipe.network.model_copy(update={"weights": uri})
            manifest = self._train(self.recipe.model_copy(update=changes))
            folder = self._pull(manifest)
            nuclei, images = self._predict(dataset, folder)
            self._print_times(manifest, f"{nuclei} nuclei in {images} images that the model has not seen in training")
            print_published(manifest, self.workdir / nucleus.runs.RUNS, more=self._places(manifest))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        note(f"== {name}")
        started = time.monotonic()
        yield
        self.stages.append((name, time.monotonic() - started))

    @contextmanager
    def _store(self) -> Iterator[None]:
        """Run the embedded server during the demo, and set the environment variables that name it."""
        was_running = local_server.status(self.workdir / "store") is not None
        try:
            with self._stage("start the S3 server"):
                store = local_server.start(self.workdir / "store", 0)
                local_server.make_bucket(store)
                os.environ.update(local_server.environment(store))
                os.environ.setdefault("WANDB_DIR", str(self.workdir))
            yield
        finally:
            if not was_running:
                local_server.stop(self.workdir / "store")

    def _import(self, src: Path | None) -> "Dataset":
        if src is None:
            src = self.workdir / "images"
            with self._stage("generate images"):
                nucleus.data.write_generated(src, _GENERATED_IMAGES)
        uri = nucleus.data.locate_dataset(self.recipe.dataset).uri
        with (
            self._stage("import"),
            show_progress("read images") as advance,
            show_progress("upload shards", "bytes") as upload,
        ):
            imported = nucleus.data.import_dataset(src, uri, nucleus.data.SplitOptions(), advance, upload)
        for item in imported.dataset.manifest.left_out:
            warn(f"left out {item.title}: {item.reason}")
        note(f"{len(imported.dataset.manifest.samples)} images in {imported.dataset}")
        return imported.dataset

    def _add_weights(self, weights: Path) -> str:
        with self._stage("add encoder weights"), show_progress("upload weights", "bytes") as advance:
            added = nucleus.registry.add_weights(
                weights,
                self.recipe.network.encoder,
                nucleus.storage.Bucket(nucleus.storage.bucket_from_environment()),
                advance,
            )
        return str(added.uri)

    def _train(self, recipe: "Recipe") -> "ModelManifest":
        options = job.RunOptions(
            weights_optional=True, own_cluster=True, verbose=self.verbose, folder=self.workdir / nucleus.runs.RUNS
        )
        try:
            with self._stage("train and publish"), TrainingDisplay() as display:
                return job.train(recipe, options, display)
        except JobError:
            note(f"The run's bucket is in {self.workdir / 'store'}. To use it again, first run: {self._start_store()}")
            raise

    def _pull(self, manifest: "ModelManifest") -> Path:
        folder = self.workdir / "model" / f"{manifest.version:06d}"
        with self._stage("pull"), show_progress(f"download {manifest.model}", "bytes") as advance:
            nucleus.registry.pull(
                nucleus.storage.Bucket(nucleus.storage.bucket_from_environment()),
                nucleus.config.Reference(manifest.model, "latest"),
                folder,
                advance,
            )
        return folder

    def _predict(self, dataset: "Dataset", folder: Path) -> tuple[int, int]:
        """Write the images of the test split to files, which is how users have images, and segment them."""
        with self._stage("predict"), show_progress("segment images") as advance:
            files = []
            for sample in nucleus.data.images_of_split(
                dataset, "test", nucleus.data.ShardCache(self.workdir / "cache")
            ):
                files.append(self.workdir / "unseen" / folder.name / f"{sample.name}.png")
                nucleus.storage.write_atomic(files[-1], nucleus.data.encode_png(sample.image))
            found = nucleus.predict.predict_files(
                nucleus.predict.load_model_folder(folder),
                files,
                self.workdir / "predictions" / folder.name,
                advance=advance,
            )
        if found.failures:
            raise NucleusError("; ".join(found.failures.values()))
        return sum(found.counts.values()), len(found.counts)

    def _print_times(self, manifest: "ModelManifest", found: str) -> None:
        if manifest.origin.encoder_weights.source == "none":
            warn("trained WITHOUT pretrained encoder weights; for better results, add them with --weights FILE")
        print_table(("stage", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in self.stages])
        click.echo(found)

    def _places(self, manifest: "ModelManifest") -> dict[str, object]:
        """Return the places of the demo's outputs other than the run."""
        version, here = f"{manifest.version:06d}", short_path(self.workdir)
        return {
            "predictions": here / "predictions" / version,
            "model": here / "model" / version,
            "bucket": here / "store",
            "use it again": self._start_store(),
        }

    def _start_store(self) -> str:
        """Return the command that starts the demo's server again."""
        return f'eval "$(nucleus store start --dir {shlex.quote(str(short_path(self.workdir) / "store"))})"'
