"""`checkpoint_overlap`: epochs with a checkpoint against epochs without, in one run on two Ray workers."""

import os
import statistics
import time

from job.train import RunOptions, train
from nucleus.config.settings import parse_recipe
from nucleus.training.callbacks import Callback
from tests.benchmarks.measure import RECIPE, generated_dataset, report, temporary_store
from tests.benchmarks.startup import encoder_weights

_EPOCHS = 15


class _Clock(Callback):
    """Notes when each epoch ended, without the time of its validation."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: list[tuple[bool, float]] = []
        self._after_checkpoint = False

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        """The checkpoint of a validated epoch is taken and uploaded after this event, in the next epoch's time."""
        now = time.perf_counter()
        taken = now - self.started - metrics.get("validation_seconds", 0.0)
        self.seconds.append((self._after_checkpoint, taken))
        self.started = now
        self._after_checkpoint = "val_map" in metrics


def checkpoint_overlap() -> None:
    """Every other epoch is validated and checkpointed."""
    clock = _Clock()
    with temporary_store() as root:
        generated_dataset(root, 260, side=192)
        os.environ["NUCLEUS_BUCKET"] = "s3://nucleus"
        content = {
            **RECIPE,
            "workers": 2,
            "cache_dir": str(root / "cache"),
            "network": {"weights": str(encoder_weights(root))},
            "optimizer": {"epochs": _EPOCHS, "validate_every": 2, "patience": 99},
        }
        train(parse_recipe(content, "bench"), RunOptions(own_cluster=True, folder=root / "runs"), clock)
    steady = clock.seconds[2:-1]  # the first epoch compiles and the last is validated besides
    with_one = [seconds for after, seconds in steady if after]
    without = [seconds for after, seconds in steady if not after]
    ratio = statistics.median(with_one) / statistics.median(without)
    report("checkpoint_overlap", ratio, with_s=statistics.median(with_one), without_s=statistics.median(without))
