"""What a run has left and what to type next, once it is over."""

import importlib.util
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from nucleus.errors import StorageError

if TYPE_CHECKING:
    from job.plan import RunPlan
    from nucleus.registry.manifest import ModelManifest
    from nucleus.storage.bucket import Bucket

__all__ = ["print_published", "short_path"]

_WANDB = "https://wandb.ai"


def print_published(
    manifest: "ModelManifest",
    runs: Path,
    bucket_uri: str | None = None,
    more: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """The scores of a version, then one table of where everything is and what to type next.

    Args:
        manifest: The version that a run has published.
        runs: Folder that keeps on this machine, in `<run>/`, what runs have left for people.
        bucket_uri: The recipe's bucket; without it the environment's.
        more: Rows for what the command has made besides the run.
    """
    from nucleus.cli.output import print_facts, print_scores
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import bucket_from_environment

    bucket = Bucket(bucket_from_environment(bucket_uri))
    print_scores(manifest.origin.metrics)
    rows = _places(manifest, bucket, runs / manifest.origin.run)
    print_facts({**rows, **more, **_commands(manifest)}, ("what", "where"))


def _places(manifest: "ModelManifest", bucket: "Bucket", folder: Path) -> dict[str, object]:
    """Where what the run has left is: a row each."""
    from job.plan import load_plan
    from nucleus.registry.manifest import version_prefix
    from nucleus.report.record import REPORT_FOLDER, REPORT_PAGE

    plan = load_plan(bucket, manifest.origin.run)
    version = f"{manifest.model}@{manifest.version}"
    return {
        "published": f"{version} at {bucket.uri / version_prefix(manifest.model, manifest.version)}",
        **_alias(manifest, bucket, plan),
        "run": str(bucket.uri / "runs" / plan.run),
        "report": short_path(folder / REPORT_FOLDER / REPORT_PAGE),
        "TensorBoard": _tensorboard(bucket, plan.run, folder),
        "W&B": _wandb(manifest, plan),
    }


def _commands(manifest: "ModelManifest") -> dict[str, str]:
    """What to type next."""
    version = f"{manifest.model}@{manifest.version}"
    rows = {"predict": f"nucleus predict IMAGES --model {version} --out results/"}
    if manifest.version > 1:
        rows["compare"] = f"nucleus models compare {manifest.model}@{manifest.version - 1} {version}"
    return rows


def _alias(manifest: "ModelManifest", bucket: "Bucket", plan: "RunPlan") -> dict[str, str]:
    """What became of the recipe's alias."""
    from nucleus.registry.gate import read_decision

    gate = plan.recipe.gate
    if not gate.enabled:
        return {gate.alias: "not asked to move: gate.enabled = false"}
    decision = read_decision(bucket, manifest.model, manifest.version)
    if decision is None:
        return {
            gate.alias: f"not judged; move it: nucleus models alias {manifest.model}@{manifest.version} {gate.alias}"
        }
    verb = "means" if decision.passed else "does not move to"
    return {decision.alias: f"{verb} version {decision.version}: {decision.reason}"}


def _tensorboard(bucket: "Bucket", run: str, folder: Path) -> str:
    """How to look at the run's curves, whose file is brought here."""
    from nucleus.tracking.tensorboard import EVENTS_FILE

    key = f"runs/{run}/{EVENTS_FILE}"
    try:
        bucket.download(key, folder / EVENTS_FILE)
    except (StorageError, OSError) as error:  # the version is published all the same
        return f"{bucket.uri / key} (not brought here: {error})"
    missing = "" if importlib.util.find_spec("tensorboard") else "  (pip install tensorboard)"
    return f"tensorboard --logdir {shlex.quote(str(short_path((folder / EVENTS_FILE).parent)))}{missing}"


def _wandb(manifest: "ModelManifest", plan: "RunPlan") -> str:
    """Where the run is in W&B, or how to send there what was kept offline."""
    from nucleus.tracking.offline_runs import offline_files

    if plan.wandb_mode == "disabled":
        return "off"
    if plan.wandb_mode == "online":
        project, _, run = (manifest.origin.wandb_run or plan.run).rpartition("/")
        return f"{os.environ.get('WANDB_BASE_URL', _WANDB).rstrip('/')}/{project}/runs/{run}"
    here = offline_files(Path(plan.wandb_dir), plan.run)
    if here:
        return "wandb sync " + " ".join(shlex.quote(str(short_path(file.parent))) for file in here)
    return f"nucleus runs show {plan.run} --out DIR; wandb sync DIR/wandb/offline-run-*"


def short_path(path: Path) -> Path:
    """A path as seen from here, if it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
