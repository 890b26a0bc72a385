"""TensorBoard: the history of a run as one event file, written anew whenever the run is saved.

Written from the history and not epoch by epoch, it has each epoch once, however often the run was broken off.
"""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

__all__ = ["EVENTS_FILE", "events_of"]

EVENTS_FILE = "tensorboard/events.out.tfevents.0.nucleus"
"""Name of the file in a run's folder of the bucket."""


def events_of(history: Iterable[Mapping[str, float]]) -> bytes:
    """The content of an event file with every metric of every epoch; `epoch` is the step."""
    with tempfile.TemporaryDirectory(prefix="nucleus-tensorboard-") as folder:
        with SummaryWriter(folder, flush_secs=3600) as writer:
            for metrics in history:
                for name, value in metrics.items():
                    if name != "epoch":
                        writer.add_scalar(name, value, int(metrics["epoch"]))
        (path,) = Path(folder).iterdir()
        return path.read_bytes()
