"""TensorBoard's event file, rewritten from the run's history at each checkpoint, and a profile of training steps.

Because the file is rewritten and not appended to, it has each epoch once, even if the run was interrupted. Steps are
epochs, from 1; pictures from before training are at step 0. So a run that began before 0.3.0, when epochs counted from
0, is counted from 1 throughout once it is resumed.
"""

from __future__ import annotations

import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nucleus.lazy import tf
from nucleus.storage.files import temporary_folder, write_atomic

__all__ = ["EVENTS_FILE", "TENSORBOARD_FOLDER", "WARM_UP_STEPS", "StepProfile", "events_of", "graph_of", "write_events"]


TENSORBOARD_FOLDER = "tensorboard"
"""Folder of TensorBoard in a run's folder."""
EVENTS_FILE = f"{TENSORBOARD_FOLDER}/events.out.tfevents.0.nucleus"
"""Path of the event file in a run's folder."""
WARM_UP_STEPS = 10
"""Steps before a profile begins, in which the graph is compiled and caches are filled."""

_VERSION = "brain.Event:2"
_COLOURS = 3
_PNG_SIZE, _PNG_SIZE_AT = struct.Struct(">II"), 16
"""Width and height are in the first chunk (https://www.w3.org/TR/png-3/#11IHDR); decoding takes 5 ms per picture."""
_GRAPH_SIDE = 128
"""Side of the image for which the graph is traced if the network takes any size, px."""


def events_of(
    history: Iterable[Mapping[str, float]],
    pictures: Mapping[int, Mapping[str, bytes]] | None = None,
    graph: bytes | None = None,
) -> bytes:
    """Return the content of an event file.

    Args:
        history: Metrics of each epoch; each becomes a scalar of its name at step `epoch`.
        pictures: PNGs by number of finished epochs, then tag; those after n epochs are at step n.
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
            summaries[done].value.add(tag=tag, image=image)
    events = [tf.compat.v1.Event(wall_time=now, file_version=_VERSION)]
    if graph is not None:
        events.append(tf.compat.v1.Event(wall_time=now, graph_def=graph))
    events += [tf.compat.v1.Event(wall_time=now, step=step, summary=summaries[step]) for step in sorted(summaries)]
    with temporary_folder("tensorboard") as folder:
        path = folder / "events"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for event in events:
                writer.write(event.SerializeToString())
        return path.read_bytes()


def write_events(path: Path, events: bytes) -> None:
    """Replace an event file atomically, because TensorBoard may be reading it.

    Args:
        path: `<folder>/runs/<run>/` and `EVENTS_FILE`; missing folders are created.
        events: Content of the file, as returned by `events_of`.
    """
    write_atomic(path, events)


def graph_of(model: Any) -> bytes:
    """Return the graph of a network for TensorBoard: a serialised GraphDef of one call, without weights.

    Args:
        model: A Keras model with one input, a batch of images.
    """
    (given,) = model.inputs
    shape = (1, *(_GRAPH_SIDE if side is None else side for side in given.shape[1:]))
    called = tf.function(lambda images: model(images, training=False))
    graph = called.get_concrete_function(tf.TensorSpec(shape, given.dtype)).graph
    return bytes(graph.as_graph_def().SerializeToString())


class StepProfile:
    """A profile of a few steps of a run's first epoch, driven by calls of `steps`.

    The profile begins after `WARM_UP_STEPS` steps. It ends after `count` more steps or with the epoch, to exclude the
    validation. Both numbers are rounded up to whole calls, because one call may report several steps. If an epoch has
    fewer than `WARM_UP_STEPS` steps, those of the next epochs count too; if each epoch is one call, a whole epoch is
    recorded, with the validation before it. A process that resumes at a later epoch records nothing.

    Args:
        count: Number of steps to record; 0 for no profile.
        folder: Local folder of TensorBoard; the profile is `plugins/profile/<time>/<machine>.xplane.pb` in it.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self._asked = count
        self._folder = folder
        self._last: tuple[int, int] | None = None
        self._seen = 0
        self._recorded: int | None = None

    def steps(self, epoch: int, done: int, total: int) -> None:
        """Record that `done` of an epoch's `total` steps are done; begin or end the profile if it is time."""
        if not self._asked:
            return
        if self._last is None and epoch > 1:
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
        """End a profile that is being recorded, and begin no other; also called when the run ends or fails."""
        if self._recorded is not None:
            self._recorded = None
            tf.profiler.experimental.stop()
        self._asked = 0

    @property
    def files(self) -> dict[str, Path]:
        """Files of a finished profile, by path below TensorBoard's folder; empty while it is being recorded."""
        if self._recorded is not None:
            return {}
        found = sorted(path for path in (self._folder / "plugins" / "profile").rglob("*") if path.is_file())
        return {path.relative_to(self._folder).as_posix(): path for path in found}

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        tf.profiler.experimental.start(str(self._folder))
        self._recorded = 0
