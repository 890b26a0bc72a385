"""Packages of the BioImage Model Zoo (bioimage.io, model specification 0.5): one zip file with ONNX weights.

The description is YAML, of which JSON is a part. What it cannot say stands in its README: labels from the network's
values, and the robust normalization, in whose place are the two percentiles.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from nucleus.config.encoders import ENCODERS
from nucleus.config.recipe import STRIDE
from nucleus.data.origins import DataSource
from nucleus.data.synthetic import generated_image
from nucleus.errors import ModelError
from nucleus.model.architecture import ONNX_FILE, ONNX_OPSET, ModelConfig

__all__ = ["ModelFacts", "write_package"]

_FORMAT = "0.5.4"
_SIDE = 256
_SMALLEST = 4 * STRIDE
_EPSILON = 1e-6


@dataclass(frozen=True)
class ModelFacts:
    """What a package says about a model besides its network.

    Attributes:
        name: Name of the model.
        version: Its version.
        license: SPDX identifier of its licence; empty if unknown.
        data: The sources of its training images with their licences; empty if unknown.
    """

    name: str
    version: int
    license: str
    data: Sequence[DataSource] = ()

    @property
    def about_data(self) -> list[dict[str, Any]]:
        """The sources of its training images, as JSON has them."""
        return [source.model_dump() for source in self.data]


def write_package(folder: Path, config: ModelConfig, facts: ModelFacts, path: Path) -> None:
    """Write the package of a pulled model.

    Args:
        folder: Folder of the model.
        config: Its configuration.
        facts: What else is known about it.
        path: The zip file.

    Raises:
        ModelError: The version has no ONNX file or no licence.
    """
    if not (folder / ONNX_FILE).exists():
        raise ModelError(
            f"Expected {ONNX_FILE} in {folder}, as versions have since 0.3.0; found none. Train and publish the model "
            "again."
        )
    if not facts.license:
        raise ModelError(
            f"Expected a licence of {facts.name}, which bioimage.io requires; found none. Set card.license in the "
            "recipe and publish again."
        )
    image = generated_image(0, _SIDE, _SIDE)[0][np.newaxis].astype(np.float32)
    outputs = _outputs(folder / ONNX_FILE, _normalized(image, config))
    files = {
        "weights.onnx": (folder / ONNX_FILE).read_bytes(),
        "README.md": _readme(config, facts).encode(),
        "image.npy": _npy(image),
        **{f"{name}.npy": _npy(values) for name, values in outputs.items()},
    }
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    description = _description(config, facts, list(outputs), sums)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rdf.yaml", json.dumps(description, indent=1, ensure_ascii=False))
        for name, data in files.items():
            archive.writestr(name, data)


def _normalized(image: NDArray[np.float32], config: ModelConfig) -> NDArray[np.float32]:
    """Normalize as the description says: two percentiles over all pixels and channels, clipped."""
    options = config.normalization
    if options.method == "none":
        return image
    low, high = np.percentile(image, [options.low, options.high])
    return np.asarray(np.clip((image - low) / (high - low + _EPSILON) * 255, 0, 255), np.float32)


def _outputs(onnx: Path, image: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    found = session.run(names, {session.get_inputs()[0].name: image})
    return dict(zip(names, (np.asarray(values, np.float32) for values in found), strict=True))


def _npy(values: NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def _description(config: ModelConfig, facts: ModelFacts, outputs: list[str], sums: dict[str, str]) -> dict[str, Any]:
    return {
        "type": "model",
        "format_version": _FORMAT,
        "name": f"{facts.name} nuclei segmentation".replace("_", "-"),
        "version": str(facts.version),
        "description": "U-Net that finds cell nuclei in microscope images: their pixels, borders and distances.",
        "authors": [{"name": "the nucleus project"}],
        "cite": [{"text": "U-Net: Ronneberger et al. 2015", "doi": "10.1007/978-3-319-24574-4_28"}],
        "license": facts.license,
        "tags": ["nuclei", "segmentation", "unet", "2d", "fluorescence", "histology"],
        "documentation": "README.md",
        **_data(facts),
        "inputs": [_input(config, sums["image.npy"])],
        "outputs": [_output(name, config, sums[f"{name}.npy"]) for name in outputs],
        "weights": {"onnx": {"source": "weights.onnx", "sha256": sums["weights.onnx"], "opset_version": ONNX_OPSET}},
    }


def _data(facts: ModelFacts) -> dict[str, Any]:
    """Return the licences of the data: the format has a key for a data set of bioimage.io alone, and leaves us this."""
    return {"config": {"nucleus": {"data": facts.about_data}}} if facts.data else {}


def _input(config: ModelConfig, sha256: str) -> dict[str, Any]:
    options = config.normalization
    stretch = [
        {
            "id": "scale_range",
            "kwargs": {
                "axes": ["x", "y", "channel"],
                "min_percentile": options.low,
                "max_percentile": options.high,
                "eps": _EPSILON,
            },
        },
        {"id": "scale_linear", "kwargs": {"gain": 255.0, "offset": 0.0}},
        {"id": "clip", "kwargs": {"min": 0.0, "max": 255.0}},
    ]
    return {
        "id": "image",
        "description": "RGB, 0 to 255; a grey image has three equal channels.",
        "axes": _axes(config, lambda _: {"min": _SMALLEST, "step": STRIDE}, ["red", "green", "blue"]),
        "data": {"type": "float32", "range": [0.0, 255.0]},
        "test_tensor": {"source": "image.npy", "sha256": sha256},
        "preprocessing": [] if options.method == "none" else stretch,
    }


def _output(name: str, config: ModelConfig, sha256: str) -> dict[str, Any]:
    what = "Probabilities and distance, 0 to 1." if name == "values" else "The same before softmax and sigmoid."
    return {
        "id": name,
        "description": what,
        "axes": _axes(config, lambda axis: {"tensor_id": "image", "axis_id": axis}, config.channels),
        "data": {"type": "float32"},
        "test_tensor": {"source": f"{name}.npy", "sha256": sha256},
    }


def _axes(config: ModelConfig, size: Callable[[str], dict[str, Any]], channels: Sequence[str]) -> list[dict[str, Any]]:
    """Return batch, y, x and channel; `size` gives the size of a spatial axis by its name."""
    unit = {"unit": "micrometer", "scale": config.pixel_size} if config.pixel_size else {}
    spatial = ({"type": "space", "id": axis, "size": size(axis), **unit} for axis in ("y", "x"))
    return [{"type": "batch"}, *spatial, {"type": "channel", "channel_names": list(channels)}]


def _readme(config: ModelConfig, facts: ModelFacts) -> str:
    encoder = ENCODERS[config.encoder]
    about = json.dumps({"heads": config.heads, **config.instances.model_dump()})
    size = f"Nuclei of about {config.nucleus_diameter:g} px across fit best.\n\n" if config.nucleus_diameter else ""
    lines = "".join(f"- {source}\n" for source in facts.data)
    data = f"## Training data\n\n{lines}\n" if lines else ""
    return (
        f"# {facts.name} {facts.version}\n\n"
        f"A U-Net with the encoder {encoder.title} ({encoder.paper}), published by the package `nucleus`.\n\n"
        f"{size}"
        "`values` has per pixel the channels "
        f"{', '.join(config.channels)}. Nuclei are the connected components of the pixels in nuclei, divided by a "
        f"watershed from seeds in their middles; thresholds: `{about}`.\n\n"
        "The package normalizes images more carefully than the two percentiles here: it tells nuclei from noise and "
        "debris, and rescales images whose nuclei are far from the size in training.\n\n"
        f"{data}## Validation\n\nSee the scores in the card of this version (`nucleus models show`).\n"
    )
