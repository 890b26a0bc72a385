"""Whether a published version becomes the one that the recipe's alias means."""

import tempfile
from pathlib import Path

from job.events import Listener
from job.plan import RunPlan
from nucleus.config.names import Reference
from nucleus.data.cache import ShardCache, default_cache_dir
from nucleus.data.datasets import locate_dataset, open_dataset
from nucleus.quiet import import_tensorflow
from nucleus.registry.gate import pass_gate
from nucleus.registry.manifest import ModelManifest
from nucleus.registry.versions import pull
from nucleus.storage.bucket import Bucket

__all__ = ["judge"]


def judge(bucket: Bucket, manifest: ModelManifest, plan: RunPlan, listener: Listener) -> None:
    """Let the gate decide, and say what it decided."""
    options = plan.recipe.gate
    if not options.enabled:
        return

    def rescore(incumbent: ModelManifest) -> float:
        listener.stage(f"Scoring version {incumbent.version} on the test split of {plan.dataset}")
        return _score_on_test(bucket, incumbent, plan, listener)

    decision = pass_gate(bucket, manifest, options.alias, options.metric, rescore)
    verb = "means" if decision.passed else "does not move to"
    listener.stage(f"{options.alias} {verb} version {manifest.version}: {decision.reason}")


def _score_on_test(bucket: Bucket, manifest: ModelManifest, plan: RunPlan, listener: Listener) -> float:
    """The recipe's metric of another version on this run's test split."""
    import_tensorflow()
    from nucleus.predict.evaluation import evaluate
    from nucleus.predict.predictor import load_predictor

    cache_dir = Path(plan.recipe.cache_dir) if plan.recipe.cache_dir else default_cache_dir()
    cache = ShardCache(cache_dir, plan.recipe.cache_limit_gib)
    dataset = open_dataset(locate_dataset(plan.dataset))
    with tempfile.TemporaryDirectory(prefix="nucleus-incumbent-") as temporary:
        folder = Path(temporary) / "model"
        with listener.watch(f"pull {manifest.model}@{manifest.version}", "bytes") as advance:
            pull(bucket, Reference(manifest.model, str(manifest.version)), folder, advance)
        predictor = load_predictor(folder)
        with listener.watch(f"evaluate {manifest.model}@{manifest.version}") as advance:
            found = evaluate(predictor, plan.recipe.loss, dataset, "test", cache, advance)
        return found.overall["all"][plan.recipe.gate.metric]
