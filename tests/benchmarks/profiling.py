"""Times of TensorFlow's operations. It needs nothing of this project, so that other checkouts can use it too."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def times(work: Callable[[], Any]) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Picoseconds in TensorFlow's operations during some work: by their type, and by place and type."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    types: collections.Counter[str] = collections.Counter()
    places: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            work()
        (path,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            place, colon, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
            if colon and "/" in place:  # NAME:TYPE is an operation of the graph
                types[kind] += event.duration_ps
                places[f"{place.removeprefix('while/body/_1/')}:{kind}"] += event.duration_ps
    return types, places
