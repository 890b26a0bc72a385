"""TensorBoard: the history of a run as one event file, written anew whenever the run is saved.

Written from the history and not epoch by epoch, it has each epoch once, however often the run was broken off. The step
of everything is the epoch, from 0; pictures from before training have -1.
"""

from __future__ import annotations

import struct
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nucleus.lazy import tf
from nucleus.storage.files import write_atomic

__all__ = ["EVENTS_FILE", "TENSORBOARD_FOLDER", "WARM_UP_STEPS", "StepProfile", "events_of", "graph_of", "write_events"]


TENSORBOARD_FOLDER = "tensorboard"
"""In a run's folder."""
EVENTS_FILE = f"{TENSORBOARD_FOLDER}/events.out.tfevents.0.nucleus"
"""Name of the file in a run's folder of the bucket."""

_VERSION = "brain.Event:2"
_COLOURS = 3
_PNG_SIZE, _PNG_SIZE_AT = struct.Struct(">II"), 16
"""Width and height stand in the first chunk (https://www.w3.org/TR/png-3/#11IHDR); to decode takes 5 ms a picture."""
_GRAPH_SIDE = 128


def events_of(
    history: Iterable[Mapping[str, float]],
    pictures: Mapping[int, Mapping[str, bytes]] | None = None,
    graph: bytes | None = None,
) -> bytes:
    """The content of an event file.

    Args:
        history: The metrics of each epoch; every one becomes a scalar of its name at the step `epoch`.
        pictures: Epochs done, then tag, then PNG; after n epochs is the step n - 1.
        graph: The network, as `graph_of` gives it.
    """

    now = time.time()
    summaries: defaultdict[int, Any] = defaultdict(tf.compat.v1.Summary)  # by step: one event holds many values
    for metrics in history:
        for name, value in metrics.items():
            if name != "epoch":
                summaries[int(metrics["epoch"])].value.add(tag=name, simple_value=value)
    for done, drawn in (pictures or {}).items():
        for tag, png in drawn.items():
            width, height = _PNG_SIZE.unpack_from(png, _PNG_SIZE_AT)
            image = {"width": width, "height": height, "colorspace": _COLOURS, "encoded_image_string": png}
            summaries[done - 1].value.add(tag=tag, image=image)
    events = [tf.compat.v1.Event(wall_time=now, file_version=_VERSION)]
    if graph is not None:
        events.append(tf.compat.v1.Event(wall_time=now, graph_def=graph))
    events += [tf.compat.v1.Event(wall_time=now, step=step, summary=summaries[step]) for step in sorted(summaries)]
    with tempfile.TemporaryDirectory(prefix="nucleus-tensorboard-") as folder:
        path = Path(folder) / "events"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for event in events:
                writer.write(event.SerializeToString())
        return path.read_bytes()


def write_events(path: Path, events: bytes) -> None:
    """Put an event file in place as a whole, for a TensorBoard that may be reading it.

    Args:
        path: `<folder>/runs/<run>/` and `EVENTS_FILE`; folders are made.
        events: What `events_of` gives.
    """
    write_atomic(path, events)


def graph_of(model: Any) -> bytes:
    """The network as TensorBoard draws it: a serialised GraphDef of one call, without the weights.

    Args:
        model: A Keras model of one input, images.
    """

    (given,) = model.inputs
    shape = (1, *(_GRAPH_SIDE if side is None else side for side in given.shape[1:]))
    called = tf.function(lambda images: model(images, training=False))
    graph = called.get_concrete_function(tf.TensorSpec(shape, given.dtype)).graph
    return bytes(graph.as_graph_def().SerializeToString())


WARM_UP_STEPS = 10
"""Steps before it: the graph is compiled in the first, and caches fill."""


class StepProfile:
    """Records so many steps of a run's first epoch, driven by the calls of `Callback.on_steps_end`.

    It begins after the first call by which ten steps were taken, and ends with the call by which as many as asked for
    were recorded, or with the epoch, so that no validation is in it: where a call is for several steps, these numbers
    are rounded up to calls. If an epoch is over before ten steps, the next ones count too; if each epoch is one call,
    a whole epoch is recorded, with the validation before it. A process that goes on with a later epoch records nothing.

    Args:
        count: How many steps; 0 for no profile, which costs nothing.
        folder: Local folder of TensorBoard, which gets `plugins/profile/<time>/<machine>.xplane.pb`.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self._asked = count
        self._folder = folder
        self._last: tuple[int, int] | None = None
        self._seen = 0
        self._recorded: int | None = None

    def steps(self, epoch: int, done: int, total: int) -> None:
        """So many steps of an epoch are done, of so many."""
        if not self._asked:
            return
        if self._last is None and epoch:
            self._asked = 0
            return
        taken = done - self._last[1] if self._last and self._last[0] == epoch else done
        self._last = (epoch, done)
        if self._recorded is not None:
            self._recorded += taken
            if self._recorded >= self._asked or done == total:
                self.stop()
            return
        self._seen += taken
        if self._seen >= WARM_UP_STEPS and (done < total or taken == total):
            self._start()

    def stop(self) -> None:
        """End the profile if it is under way, as when the run ends or fails; afterwards there is none."""
        if self._recorded is not None:
            self._recorded = None
            tf.profiler.experimental.stop()
        self._asked = 0

    @property
    def files(self) -> dict[str, Path]:
        """Name below TensorBoard's folder, and file, of what was recorded and is written."""
        if self._recorded is not None:
            return {}
        found = sorted(path for path in (self._folder / "plugins" / "profile").rglob("*") if path.is_file())
        return {path.relative_to(self._folder).as_posix(): path for path in found}

    def _start(self) -> None:

        self._folder.mkdir(parents=True, exist_ok=True)
        tf.profiler.experimental.start(str(self._folder))
        self._recorded = 0
