"""Engines that compute a network's values on tiles, TensorFlow and ONNX Runtime, and the choice between them.

ONNX Runtime needs no TensorFlow, and less than half of its time on CPUs (docs/performance.md). TensorFlow is used where
it sees a GPU, for versions without `model.onnx`, and for networks in training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

from nucleus.config.names import EngineChoice
from nucleus.config.recipe import Heads
from nucleus.errors import ModelError
from nucleus.lazy import missing_packages, pip_install, tf
from nucleus.model.architecture import ONNX_FILE, WEIGHTS_FILE, ModelConfig, activations
from nucleus.model.unet import build_unet, load_weights
from nucleus.surroundings import installed_versions
from nucleus.text import plural

__all__ = [
    "Engine",
    "EngineDecision",
    "KerasEngine",
    "OnnxEngine",
    "decide_engine",
    "load_engine",
    "thread_count",
]

_DEVICES = Path("/dev")
_NVIDIA = ("nvidia[0-9]*", "dxg")
"""Device files of NVIDIA GPUs: on Linux, and on Linux in Windows."""
_HIDING = "CUDA_VISIBLE_DEVICES"
_CGROUP = Path("/sys/fs/cgroup")
_THREADS = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
_PACKAGES = {"onnx": ("ONNX Runtime", "onnxruntime"), "tensorflow": ("TensorFlow", "tensorflow")}
_INPUT, _OUTPUT = "image", "values"


class Engine(Protocol):
    """A network that is ready to compute."""

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the values of each channel, 0 to 1, N x H x W x channels.

        Args:
            tiles: N x H x W x 3, normalised, H and W multiples of 32.
        """


class KerasEngine:
    """TensorFlow. The network may be in training: each call uses its current weights.

    Args:
        network: A network of `build_unet`, or the function of one from `nucleus.model.fast_network`.
        heads: Outputs of the network.
    """

    def __init__(self, network: Callable[[tf.Tensor], tf.Tensor], heads: Heads) -> None:
        # One graph for all shapes: tracing one per shape takes seconds.
        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8)])
        def values(tiles: tf.Tensor) -> tf.Tensor:
            return activations(network(tf.cast(tiles, tf.float32)), heads)

        self._values = values

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the values of tiles; see `Engine`."""
        return np.asarray(self._values(tiles).numpy(), np.float32)


class OnnxEngine:
    """ONNX Runtime, on the CPUs that `thread_count` allows.

    Args:
        path: A `model.onnx` of this package whose SHA-256 is verified.
        config: Configuration of the network.

    Raises:
        ModelError: The file is damaged, belongs to another network, or refers to other files or to operators that are
            not ONNX's own.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        import onnxruntime  # noqa: PLC0415  a tenth of a second, and only prediction needs it

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_count()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # its errors are raised
        # Threads that spin between operators take the time of others, even of this process between its images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            content = path.read_bytes()
            _check_content(content, "model")
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no common class for its errors
            raise ModelError(
                f"Expected a network in {path}; it cannot be used: {error}. Use another version."
            ) from error
        self._check_channels(path, config)

    def _check_channels(self, path: Path, config: ModelConfig) -> None:
        inputs = {each.name: each.shape[3:] for each in self._session.get_inputs()}
        outputs = {each.name: each.shape[3:] for each in self._session.get_outputs()}
        if inputs != {_INPUT: [3]} or outputs.get(_OUTPUT) != [len(config.channels)]:
            raise ModelError(
                f"Expected a network from {_INPUT!r} with 3 channels to {_OUTPUT!r} with {len(config.channels)} in "
                f"{path}; found one from {inputs} to {outputs}. Use another version."
            )

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the values of tiles; see `Engine`."""
        (values,) = self._session.run([_OUTPUT], {_INPUT: tiles.astype(np.float32)})
        return np.asarray(values, np.float32)


def thread_count() -> int:
    """Return the number of threads for ONNX Runtime.

    TF_NUM_INTRAOP_THREADS, which limits TensorFlow too, or else OMP_NUM_THREADS; by default, the CPUs that this process
    may use, also by the limit of its container.
    """
    for name in _THREADS:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value):
            return int(value)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, _container_cpus() or cpus)


def _container_cpus() -> int | None:
    """Return the CPU time that a container may use, in whole CPUs; None without a limit.

    More threads than that would be stopped again and again (Linux's `cpu.max`; with cgroups v1, `cpu.cfs_quota_us`).
    """
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((_CGROUP / name).read_text(encoding="utf-8") for name in files).split()
        except (OSError, ValueError):
            continue
        if quota.isdecimal() and period.isdecimal() and int(period):
            return max(1, -(-int(quota) // int(period)))
    return None


@dataclass(frozen=True)
class EngineDecision:
    """The engine for a model, and why.

    Attributes:
        engine: `onnx` or `tensorflow`.
        reason: The reason, as the end of a sentence.
    """

    engine: Literal["onnx", "tensorflow"]
    reason: str

    def __str__(self) -> str:
        title, package = _PACKAGES[self.engine]
        found = installed_versions().get(package, "")
        threads = f" on {plural(thread_count(), 'thread')}" if self.engine == "onnx" else ""
        return f"{title} {found}{threads}, because {self.reason}"


def decide_engine(choice: EngineChoice = "auto", *, has_onnx: bool = True) -> EngineDecision:
    """Decide which engine computes a model on this machine.

    TensorFlow is imported only if it is installed and the machine has an NVIDIA device that is not hidden.

    Args:
        choice: The engine that the user wants.
        has_onnx: Whether the model has `model.onnx`.

    Raises:
        ModelError: The model or this machine does not have what the engine needs.
    """
    installed = not missing_packages(["tensorflow"])
    if choice == "tensorflow" and not installed:
        command = pip_install(extras=["train"])
        raise ModelError(f"Expected TensorFlow for --engine tensorflow; it is not installed. Run: {command}")
    if choice == "onnx" and not has_onnx:
        raise ModelError(
            f"Expected a version with {ONNX_FILE} for --engine onnx; an earlier release of this package published this "
            "one without. Leave --engine out, or publish a newer version."
        )
    if not has_onnx and not installed:
        raise ModelError(
            f"Expected a version with {ONNX_FILE}, as TensorFlow is not installed; an earlier release of this package "
            f"published this one without. Run: {pip_install(extras=['train'])}, or publish a newer version."
        )
    if choice != "auto":
        return EngineDecision(choice, f"--engine {choice} chose it")
    if not has_onnx:
        return EngineDecision("tensorflow", f"the version has no {ONNX_FILE}")
    if not installed:
        return EngineDecision("onnx", "TensorFlow is not installed")
    return _by_device()


def _by_device() -> EngineDecision:
    hidden = os.environ.get(_HIDING) in {"", "-1"}
    if hidden or not any(any(_DEVICES.glob(pattern)) for pattern in _NVIDIA):
        return EngineDecision("onnx", "there is no GPU" if not hidden else f"{_HIDING} hides all GPUs")
    if tf.config.get_visible_devices("GPU"):
        return EngineDecision("tensorflow", "it sees a GPU")
    return EngineDecision("onnx", "TensorFlow sees no GPU")


def load_engine(
    folder: Path, config: ModelConfig, choice: EngineChoice = "auto", *, has_onnx: bool
) -> KerasEngine | OnnxEngine:
    """Load the network of a verified folder into the engine that `decide_engine` chooses.

    TensorFlow then computes in full float32 in this process: its own default on NVIDIA GPUs is TensorFloat-32, which
    would find other values than a CPU does.

    Args:
        folder: Folder of a pulled model whose files match their SHA-256.
        config: Configuration of the network.
        choice: The engine that the user wants.
        has_onnx: Whether `model.onnx` is one of the verified files.

    Raises:
        ModelError: The engine is not available, or the network's file does not fit.
    """
    if decide_engine(choice, has_onnx=has_onnx).engine == "onnx":
        return OnnxEngine(folder / ONNX_FILE, config)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    model = build_unet(config)
    load_weights(model, folder / WEIGHTS_FILE)
    return KerasEngine(model, config.heads)


_PARTS: dict[str, dict[int, str]] = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor"},
}
"""Fields of ONNX's messages (onnx.proto) that hold the messages that are looked at."""
_REFUSED: dict[str, dict[int, str]] = {
    "model": {20: "training information", 25: "functions"},
    "graph": {15: "sparse weights"},
    "node": {7: "an operator that is not ONNX's own"},
    "attribute": {6: "a graph in an operator", 11: "graphs in an operator", 22: "sparse weights", 23: "sparse weights"},
    "tensor": {13: "weights in another file", 14: "weights in another file"},
}
"""Fields that must be absent or empty: `model.onnx` of this package has none of them."""


def _check_content(message: bytes, kind: str) -> None:
    """Raise `ValueError` if a message of `model.onnx` has, at any depth, what could read files or run other code."""
    for number, value in _fields(message):
        if number in _REFUSED.get(kind, {}) and (value if isinstance(value, int) else len(value)):
            raise ValueError(f"it has {_REFUSED[kind][number]}")
        inside = _PARTS.get(kind, {}).get(number)
        if inside is not None and not isinstance(value, int):
            _check_content(value, inside)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a Protocol Buffers message. Raises `DecodeError` if it is damaged."""
    empty = Empty()  # to which every field is unknown
    empty.MergeFromString(message)
    for field in UnknownFieldSet(empty):
        yield field.field_number, field.data
