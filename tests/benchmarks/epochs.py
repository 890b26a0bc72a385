"""`epochs`: the same images, recipe and seed trained at an earlier commit and now; losses and scores side by side.

Run as a file by each side in a process of its own, with that side's `nucleus` first on the path. What the earlier
commit needs besides today's environment (8eae0ed: obstore) must be on NUCLEUS_BENCH_EARLIER_PATH.
"""

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

PACKAGES = "NUCLEUS_BENCH_EARLIER_PATH"
_IMAGES = int(os.environ.get("IMAGES", "60"))
_EPOCHS = int(os.environ.get("EPOCHS", "3"))
_SEEDS = tuple(map(int, os.environ.get("SEEDS", "1").split(",")))
# As `dsb2018-cpu`, but warmed up and with a trained encoder within the few epochs, none of which is left out.
_CHANGES: dict[str, dict[str, Any]] = {
    "network": {"unfreeze_epoch": 2},
    "optimizer": {
        "epochs": _EPOCHS,
        "patience": _EPOCHS,
        "validate_every": 1,
        "warmup_steps": 4,
        "steps_per_execution": 2,
    },
    "tracking": {"wandb": "disabled"},
}
_SHOWN = {"loss": 4, "iou": 4, "val_loss": 4, "val_iou": 4, "val_map": 4, "train_cpu_s": 1, "validation_cpu_s": 1}
"""Metrics of an epoch, and their digits."""


def epochs() -> None:
    """Three epochs (`EPOCHS`) with validations, one worker of two cores, the encoder trained from the third on.

    With `IMAGES` as many of DSB2018 (60), with `SEEDS=1,2,3` a training for each seed; for each epoch, a list of what
    each has. The ratio is the processor's time of the earlier commit's epochs, validations included, over that of now.
    """
    from tests.benchmarks.ingest_cost import ZIP, part_of_dsb2018
    from tests.benchmarks.measure import EARLIER, earlier_checkout, report, temporary_store
    from tests.benchmarks.step_rate import ROOT, WEIGHTS

    with temporary_store() as root, earlier_checkout() as checkout:
        if checkout is None or not _has_packages(checkout) or not ZIP.exists():
            needs = f"{EARLIER}, obstore==0.12.1 for it in {PACKAGES} (uv pip install --target DIR), and {ZIP.name}"
            report("epochs", float("nan"), left_out=f"it needs {needs}")
            return
        part_of_dsb2018(root / "images", _IMAGES)
        sides = {"earlier": checkout, "now": ROOT}
        found = {name: [_child(path, name, root, WEIGHTS, seed) for seed in _SEEDS] for name, path in sides.items()}
    cpu = {
        name: sum(epoch["train_cpu_s"] + epoch["validation_cpu_s"] for history in histories for epoch in history)
        for name, histories in found.items()
    }
    shown = {
        f"{name}_{metric}": [[round(one[metric], digits) for one in epoch] for epoch in zip(*histories, strict=True)]
        for metric, digits in _SHOWN.items()
        for name, histories in found.items()
    }
    report("epochs", cpu["earlier"] / cpu["now"], images=_IMAGES, seeds=_SEEDS, **shown)


def _has_packages(checkout: Path) -> bool:
    """Whether the earlier commit finds its packages."""
    command = [sys.executable, "-c", "import obstore"]
    return (
        subprocess.run(command, env=_environment(checkout, "earlier"), capture_output=True, check=False).returncode == 0
    )


def _environment(checkout: Path, side: str) -> dict[str, str]:
    more = os.environ.get(PACKAGES) if side == "earlier" else None
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(checkout), more)))}
    environment.pop("TF_ENABLE_ONEDNN_OPTS", None)  # this process may have set it; each side decides by itself
    return environment


def _child(checkout: Path, side: str, root: Path, weights: Path, seed: int) -> list[dict[str, float]]:
    """The history of a training."""
    done = subprocess.run(
        [sys.executable, __file__, side, str(root), str(weights), str(seed)],
        cwd=root,
        env=_environment(checkout, side),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    history: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    scores = ", ".join(f"{epoch['val_map']:.4f}" for epoch in history)
    print(f"{side}, seed {seed}: validation mAP {scores}", file=sys.stderr, flush=True)  # one may take a quarter hour
    return history


def _recipe(parse: Callable[[dict[str, Any], str], Any], seed: int) -> Any:
    import nucleus

    (package,) = nucleus.__path__
    content = tomllib.loads((Path(package).parent / "job" / "recipes" / "dsb2018-cpu.toml").read_text())
    changed = {name: {**content.get(name, {}), **values} for name, values in _CHANGES.items()}
    return parse({**content, **changed, "workers": 1, "cpus_per_worker": 2, "seed": seed}, "bench")


def _limit_threads(tf: Any) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(2)
    tf.config.threading.set_inter_op_parallelism_threads(2)


def _now(root: Path, weights: Path, seed: int) -> tuple[type, tuple[Any, ...]]:
    """The class of a run, and its arguments."""
    from nucleus.config.settings import parse_recipe
    from nucleus.data.cache import ShardCache
    from nucleus.data.importing import SplitOptions, import_dataset
    from nucleus.lazy import tf
    from nucleus.storage.uri import parse_uri
    from nucleus.training.callbacks import Callback, Signals
    from nucleus.training.distributed import Workers
    from nucleus.training.trainer import TrainingInput, TrainingRun

    _limit_threads(tf)
    dataset = import_dataset(root / "images", parse_uri("s3://nucleus/now/dsb2018"), SplitOptions()).dataset
    given = TrainingInput(dataset, ShardCache(root / "cache-now"), weights)
    best = root / "now.weights.h5"
    return TrainingRun, (_recipe(parse_recipe, seed), given, Workers(), Callback(), Signals(), best)


def _earlier(root: Path, weights: Path, seed: int) -> tuple[type, tuple[Any, ...]]:
    """The same at commit 8eae0ed."""
    import tensorflow as tf
    from nucleus.training.demand import Demand  # type: ignore[import-not-found]
    from nucleus.training.run import TrainingInput, TrainingRun  # type: ignore[import-not-found]

    from nucleus.config.recipe import parse_recipe  # type: ignore[attr-defined]
    from nucleus.data.cache import ShardCache
    from nucleus.data.importing import SplitOptions, import_dataset
    from nucleus.storage.uri import parse_uri
    from nucleus.training.distributed import Workers

    _limit_threads(tf)
    dataset = import_dataset(root / "images", parse_uri("s3://nucleus/earlier/dsb2018"), SplitOptions()).dataset
    given = TrainingInput(dataset, ShardCache(root / "cache-earlier"), weights)
    reporter = Mock(**{"attention.return_value": False, "demand.return_value": Demand.GO_ON})
    return TrainingRun, (_recipe(parse_recipe, seed), given, Workers(), reporter, root / "earlier.weights.h5")


def _main(side: str, root: Path, weights: Path, seed: int) -> None:
    kind, arguments = (_now if side == "now" else _earlier)(root, weights, seed)

    class Run(kind):  # type: ignore[misc, valid-type]
        """A run that ends after its epochs, and notes the processor's time."""

        def _train_epoch(self, batches: Any) -> Any:
            started = time.process_time()
            try:
                return super()._train_epoch(batches)
            finally:
                self.trained = time.process_time() - started

        def _epoch(self, batches: Any, watch: Any) -> Any:  # noqa: ARG002
            started = time.process_time()
            goes_on = super()._epoch(batches, None)  # without pictures
            self.progress.history[-1] |= {
                "train_cpu_s": self.trained,
                "validation_cpu_s": time.process_time() - started - self.trained,
            }
            return goes_on

        def _finish(self, watch: Any) -> Any:  # noqa: ARG002
            print(json.dumps(self.progress.history), flush=True)
            sys.exit()

    Run(*arguments).execute(None)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
