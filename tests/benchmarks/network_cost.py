"""What a network costs on paper: floating-point operations, and bytes that go to and from memory.

They are counted in TensorFlow's graph of the function that is asked for, so a training step has what its gradients need
and nothing for a frozen encoder. Only operations that no compiler can fuse away count: convolutions with their
gradients, joins, and changes of resolution. Each reads its inputs and writes its output once; all else (BatchNorm,
activations, padding, sums, the optimizer) is taken as free. So the limits that follow are upper bounds of a rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from nucleus.lazy import tf

__all__ = ["Cost", "cost_of"]

_CONVOLUTIONS = {"Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"}
_DEPTHWISE = {
    "DepthwiseConv2dNative",
    "DepthwiseConv2dNativeBackpropInput",
    "DepthwiseConv2dNativeBackpropFilter",
}
_MOVES = {"ConcatV2", "Slice", "ResizeBilinear", "ResizeBilinearGrad", "ResizeNearestNeighbor"}


@dataclass(frozen=True)
class Cost:
    """Work of a function.

    Attributes:
        flop: Floating-point operations; a multiplication and an addition are two.
        bytes: Bytes read and written.
    """

    flop: float
    bytes: float

    def limit(self, bandwidth: float, rate: float) -> float:
        """Return how often a second the work can be done, by bandwidth (bytes/s) and arithmetic (FLOP/s)."""
        return 1 / max(self.bytes / bandwidth, self.flop / rate)


def cost_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Cost:
    """Return the cost of a function of float32 tensors of these shapes. All shapes within must be static."""
    graph = tf.function(function).get_concrete_function(*(tf.TensorSpec(shape, tf.float32) for shape in shapes)).graph
    flop = size = 0.0
    for operation in _operations(graph.outputs):
        flop += _flop(operation)
        if operation.type in _CONVOLUTIONS | _DEPTHWISE | _MOVES:
            size += sum(map(_bytes, (*operation.inputs, *operation.outputs)))
    return Cost(flop, size)


def _operations(outputs: Sequence[Any]) -> Iterator[Any]:
    """Yield the operations that outputs depend on: TensorFlow runs no others, such as gradients that nobody uses."""
    waiting, seen = [tensor.op for tensor in outputs], set[str]()
    while waiting:
        operation = waiting.pop()
        if operation.name not in seen:
            seen.add(operation.name)
            yield operation
            waiting += [tensor.op for tensor in operation.inputs]


def _bytes(tensor: Any) -> float:
    return float(prod(tensor.shape)) * tensor.dtype.size


def _flop(operation: Any) -> float:
    """Return the operations of a convolution or of one of its gradients, which are as many."""
    if operation.type not in _CONVOLUTIONS | _DEPTHWISE:
        return 0.0
    backwards = "Backprop" in operation.type
    written = operation.inputs[2] if backwards else operation.outputs[0]
    filters = operation.outputs[0] if operation.type.endswith("Filter") else operation.inputs[1]
    height, width, channels, _ = filters.shape
    taps = height * width * (channels if operation.type in _CONVOLUTIONS else 1)
    return 2.0 * float(prod(written.shape)) * taps
