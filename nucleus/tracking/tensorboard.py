"""TensorBoard's event file, rewritten from the run's history at each checkpoint, and a profile of training steps.

As it is rewritten and not appended to, it has each epoch once, however often the run is interrupted. Steps are epochs,
from 0; pictures from before training are at step -1.
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
"""Name of its folder in a run's folder."""
EVENTS_FILE = f"{TENSORBOARD_FOLDER}/events.out.tfevents.0.nucleus"
"""Path of the event file in a run's folder."""

_VERSION = "brain.Event:2"
_COLOURS = 3
_PNG_SIZE, _PNG_SIZE_AT = struct.Struct(">II"), 16
"""Width and height are in the first chunk (https://www.w3.org/TR/png-3/#11IHDR); decoding takes 5 ms per picture."""
_GRAPH_SIDE = 128


def events_of(
    history: Iterable[Mapping[str, float]],
    pictures: Mapping[int, Mapping[str, bytes]] | None = None,
    graph: bytes | None = None,
) -> bytes:
    """Return the content of an event file.

    Args:
        history: Metrics of each epoch; each becomes a scalar of its name at the step `epoch`.
        pictures: PNG by epochs done, then tag; those after n epochs are at the step n - 1.
        graph: The network, as returned by `graph_of`.
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
    """Replace an event file as a whole, as TensorBoard may be reading it.

    Args:
        path: `<folder>/runs/<run>/` and `EVENTS_FILE`; missing folders are created.
        events: Content, as returned by `events_of`.
    """
    write_atomic(path, events)


def graph_of(model: Any) -> bytes:
    """Return the network for TensorBoard: a serialised GraphDef of one call, without weights.

    Args:
        model: A Keras model whose one input is a batch of images.
    """

    (given,) = model.inputs
    shape = (1, *(_GRAPH_SIDE if side is None else side for side in given.shape[1:]))
    called = tf.function(lambda images: model(images, training=False))
    graph = called.get_concrete_function(tf.TensorSpec(shape, given.dtype)).graph
    return bytes(graph.as_graph_def().SerializeToString())


WARM_UP_STEPS = 10
"""Steps before a profile begins: the graph is compiled in the first, and caches fill."""


class StepProfile:
    """A profile of some steps of a run's first epoch, driven by calls of `steps`.

    It begins after `WARM_UP_STEPS` steps and ends when `count` steps are recorded, or with the epoch, so that no
    validation is in it. Both numbers are rounded up to calls, as one call may report several steps. If an epoch has
    fewer than `WARM_UP_STEPS` steps, those of the next epochs count too; if each epoch is one call, a whole epoch is
    recorded, with the validation before it. A process that resumes at a later epoch records nothing.

    Args:
        count: Number of steps; 0 for no profile, which costs nothing.
        folder: Local folder of TensorBoard, in which `plugins/profile/<time>/<machine>.xplane.pb` is written.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self._asked = count
        self._folder = folder
        self._last: tuple[int, int] | None = None
        self._seen = 0
        self._recorded: int | None = None

    def steps(self, epoch: int, done: int, total: int) -> None:
        """Count the steps `done` of an epoch of `total`; begin or end the profile."""
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
        """End the profile if it is being recorded, as when the run ends or fails; no other begins."""
        if self._recorded is not None:
            self._recorded = None
            tf.profiler.experimental.stop()
        self._asked = 0

    @property
    def files(self) -> dict[str, Path]:
        """Files of a finished profile, by name below TensorBoard's folder."""
        if self._recorded is not None:
            return {}
        found = sorted(path for path in (self._folder / "plugins" / "profile").rglob("*") if path.is_file())
        return {path.relative_to(self._folder).as_posix(): path for path in found}

    def _start(self) -> None:

        self._folder.mkdir(parents=True, exist_ok=True)
        tf.profiler.experimental.start(str(self._folder))
        self._recorded = 0
