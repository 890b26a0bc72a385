"""Export of a network to Keras, TensorFlow or ONNX, with a JSON file that describes its input and output.

`model.onnx` of a published version is such an export. In half precision the kernels of the convolutions, which are
nearly all weights of a network, are kept as float16, in `model.onnx` and in the file for Keras; both compute in float32
with the same values.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nucleus.config.names import ExportFormat
from nucleus.config.recipe import STRIDE, Heads
from nucleus.errors import ModelError, UsageError
from nucleus.lazy import keras, need, tf
from nucleus.model.architecture import CONFIG_FILE, ONNX_FILE, ONNX_OPSET, WEIGHTS_FILE, ModelConfig, read_model_config
from nucleus.model.bioimageio import ModelFacts, write_package
from nucleus.model.unet import build_unet, load_weights
from nucleus.storage.files import write_atomic, writing

__all__ = ["check_export", "export_model", "write_half_weights", "write_onnx"]

_UPSCALE = "upscale"
_PACKED = {"compression": "gzip", "shuffle": True}
_LITTLE = 4096
"""Numbers in an array that is too small for packing to be worth its header."""
_ACTIVATIONS = {
    "border": "softmax over the three channels",
    "distance": "sigmoid of each channel",
    "both": "softmax over the first three channels, sigmoid of the last",
}


def export_model(folder: Path, kind: ExportFormat, dest: Path, facts: ModelFacts) -> Path:
    """Write a pulled model in another format, and its description to `<dest>.json`.

    The input is N x H x W x 3, float32, RGB from 0 to 255, normalized as described in the JSON file; H and W are
    multiples of 32. The output `logits` is N x H x W x channels, float32; ONNX has `values` besides, 0 to 1, the
    logits after their activation. A version with `model.onnx` is exported to ONNX by copying it, without TensorFlow.

    Args:
        folder: Folder of a pulled model.
        kind: `h5` and `keras` load with Keras 3, `savedmodel` (a folder) with TensorFlow, `onnx` with ONNX Runtime;
            `bioimageio` is a package of bioimage.io.
        dest: File or folder to write.
        facts: What is told about the model.

    Returns:
        The path of the JSON file.

    Raises:
        ModelError: The folder does not contain a model that this version can read.
        OutputError: There is no room for the files.
        UsageError: `dest` exists already.
    """
    usage = check_export(dest)
    about = {"model": facts.name, "version": facts.version, "license": facts.license, "data": facts.about_data}
    config = read_model_config((folder / CONFIG_FILE).read_bytes(), str(folder / CONFIG_FILE))
    with writing(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".nucleus-export-", dir=dest.parent) as temporary:
            beside = Path(temporary) / f"model.{kind}"
            if kind == "bioimageio":
                write_package(folder, config, facts, beside)
            elif kind == "onnx" and (folder / ONNX_FILE).exists():
                shutil.copyfile(folder / ONNX_FILE, beside)
            else:
                _WRITERS[kind](config, folder / WEIGHTS_FILE, beside)
            beside.rename(dest)
    write_atomic(usage, json.dumps({**about, "format": kind, **_usage(config)}, indent=1) + "\n")
    return usage


def check_export(dest: Path) -> Path:
    """Return the path of the JSON file beside an export, `<dest>.json`. Raises `UsageError` if either exists."""
    usage = dest.with_name(f"{dest.name}.json")
    for path in (dest, usage):
        if path.exists():
            raise UsageError(f"Expected nothing at {path}; it exists already. Remove it, or choose another path.")
    return usage


def _write_keras(config: ModelConfig, weights: Path, path: Path) -> None:
    """Write a file that contains only Keras's own layers, so that it loads without this package."""
    model = build_unet(config, keras.layers.UpSampling2D)
    load_weights(model, weights)
    with _without_warnings():
        model.save(path)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide Keras's warning that HDF5 files are a legacy format: another tool needs one, or nobody would ask for it."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _write_savedmodel(config: ModelConfig, weights: Path, path: Path) -> None:
    tf.saved_model.save(_servable(config, weights), str(path))


def _write_onnx(config: ModelConfig, weights: Path, path: Path) -> None:
    model = build_unet(config)
    load_weights(model, weights)
    write_onnx(model, config.heads, path)


def write_half_weights(source: Path, dest: Path) -> None:
    """Write a copy of a `.weights.h5` file that has the kernels in half precision; Keras loads it as float32.

    Arrays of one dimension (biases, and the statistics of BatchNorm, whose range is wider) stay as they are.

    Raises:
        ModelError: A weight is too large for half precision.
    """
    import h5py  # noqa: PLC0415  comes with Keras

    def copy(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            values = item[()]
            with np.errstate(over="ignore"):  # which the next line finds
                halved = values.astype(np.float16) if values.ndim > 1 else values
            if not np.isfinite(halved).all():
                raise ModelError(
                    f"Expected weights up to 65,504 for half precision; found larger ones in {name}. Leave --half out."
                )
            written.create_dataset(name, data=halved, **(_PACKED if halved.size > _LITTLE else {}))
        else:
            written.require_group(name)
        written[name].attrs.update(item.attrs)

    with h5py.File(source) as read, h5py.File(dest, "w", libver="v110") as written:  # has smaller headers
        written.attrs.update(read.attrs)
        read.visititems(copy)


def write_onnx(model: keras.Model, heads: Heads, path: Path, *, half: bool = False) -> None:
    """Write a network as ONNX, so that ONNX Runtime computes it fast.

    The input `image` is N x H x W x 3, float32; the outputs are `logits` and `values` (0 to 1, after the activation).

    Args:
        model: A network of `build_unet`.
        heads: Its outputs.
        path: File to write.
        half: Whether to keep the kernels as float16, for a network whose kernels `write_half_weights` has rounded.
            They have the names of Keras's variables; ONNX Runtime turns them into float32 when it loads the file.
    """
    need("tf2onnx")
    import tf2onnx  # noqa: PLC0415  slow to import, and only this export needs it

    kernels = [variable for variable in model.variables if half and len(variable.shape) > 1]
    signature = [tf.TensorSpec((None, None, None, 3), tf.float32, name="image")]
    # As inputs, TensorFlow cannot merge them with BatchNorm, which would give numbers that float16 does not have.
    signature += [tf.TensorSpec(kernel.shape, tf.float16, name=kernel.path) for kernel in kernels]

    @tf.function(input_signature=signature)
    def network(image: tf.Tensor, *halves: tf.Tensor) -> dict[str, tf.Tensor]:
        rounded = [(kernel, tf.cast(given, tf.float32)) for kernel, given in zip(kernels, halves, strict=True)]
        with keras.StatelessScope(state_mapping=rounded):
            logits = model(image, training=False)
        return {"logits": tf.identity(logits, "logits"), "values": _values(logits, heads)}

    converted, _ = tf2onnx.convert.from_function(network, signature, opset=ONNX_OPSET)
    constants = {inside.name: value for value, inside in network.get_concrete_function().graph.captures}
    constants |= {kernel.path: tf.cast(kernel.value, tf.float16) for kernel in kernels}
    _fix_constants(converted.graph, constants)
    _upscale_by_constants(converted.graph)
    path.write_bytes(converted.SerializeToString())


def _values(logits: tf.Tensor, heads: Heads) -> tf.Tensor:
    """Return the activations; the softmax is written out, since ONNX Runtime's own takes a tenth of the whole time."""
    if heads == "distance":
        return tf.sigmoid(logits)
    classes = [logits[..., number : number + 1] for number in range(3)]
    highest = tf.maximum(tf.maximum(classes[0], classes[1]), classes[2])
    powers = [tf.exp(each - highest) for each in classes]
    total = powers[0] + powers[1] + powers[2]
    return tf.concat([each / total for each in powers] + ([tf.sigmoid(logits[..., 3:])] if heads == "both" else []), -1)


def _fix_constants(graph: Any, constants: dict[str, Any]) -> None:
    """Turn inputs of an ONNX graph that are the network's constants into weights.

    EfficientNet's statistics are such inputs, and kernels in half precision.
    """
    from onnx import numpy_helper  # noqa: PLC0415  only this export needs it

    for given in [each for each in graph.input if each.name in constants]:
        graph.initializer.append(numpy_helper.from_array(constants[given.name].numpy(), given.name))
        graph.input.remove(given)


def _upscale_by_constants(graph: Any) -> None:
    """Give each Resize of an ONNX graph the scale 2 in place of a size that is computed from the image's.

    With a computed size, ONNX Runtime cannot keep its fast layout (NCHWc) through the decoder.
    """
    from onnx import numpy_helper  # noqa: PLC0415  only this export needs it

    graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), _UPSCALE))
    for node in graph.node:
        if node.op_type == "Resize":
            node.input[:] = [node.input[0], "", _UPSCALE]
    used = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):  # each comes after those whose outputs it uses
        if used & set(node.output):
            used |= set(node.input)
            kept.append(node)
    weights = [each for each in graph.initializer if each.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)


_WRITERS: dict[str, Callable[[ModelConfig, Path, Path], None]] = {
    "h5": _write_keras,
    "keras": _write_keras,
    "savedmodel": _write_savedmodel,
    "onnx": _write_onnx,
}


def _servable(config: ModelConfig, weights: Path) -> Any:
    """Return a network as a `tf.Module`, a TensorFlow graph. The class is made here: it would import TensorFlow."""

    class Servable(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self._model = build_unet(config)
            load_weights(self._model, weights)
            self._variables = [variable.value for variable in self._model.variables]  # for `tf.saved_model.save`

        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.float32, name="image")])
        def __call__(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"logits": self._model(image, training=False)}

    return Servable()


def _usage(config: ModelConfig) -> dict[str, Any]:
    """Describe input, output and thresholds, so that others can use the network as this package does."""
    return {
        "input": {
            "layout": "N x H x W x 3, float32, RGB from 0 to 255",
            "multiple_of": STRIDE,
            "normalization": config.normalization.model_dump(),
            "tile": config.tile,
            "overlap": config.overlap,
            "nucleus_diameter": config.nucleus_diameter,
            "pixel_size": config.pixel_size,
        },
        "output": {
            "layout": "N x H x W x channels, float32, logits",
            "channels": list(config.channels),
            "activation": _ACTIVATIONS[config.heads],
        },
        "labels": {"heads": config.heads, **config.instances.model_dump()},
    }
