"""Products in eight bits: QuantizeLinear and DequantizeLinear around them, with scales fixed in advance.

Fixed scales keep an image independent of the rest of its batch, unlike scales computed from each batch. Weights have a
scale for each output channel, activations a single one. A product's result is not rounded, but the next one's input is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.calibrate import Seen

E4M3_MOST = 448.0  # the largest number of E4M3 (FN: no infinities)
LEAST_SCALE = 2.0**-40  # of a channel of nothing but zeros
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Scale:
    """``quantised = round(value / scale) + zero``."""

    scale: float
    zero: int = 0


def layers(graph: ir.Graph) -> dict[str, ir.Node]:
    """The products of a tensor with a weight, by the weight's name, in the graph's order."""
    found: dict[str, ir.Node] = {}
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2:
            found[f"{weight.name}"] = node
    return found


def activation_scale(seen: Seen, precision: str, cut: float = 0.0) -> Scale:
    """The scale for the values seen, without ``cut`` per cent on each side; in fp8 the largest becomes E4M3's."""
    low, high = seen.bounds(cut)
    if precision == "fp8":
        return Scale(_short(max(high, -low, LEAST_SCALE) / E4M3_MOST))
    scale = float(np.float32(max((high - low) / 255, LEAST_SCALE)))
    return Scale(scale, int(np.clip(round(-low / scale), 0, 255)))


def quantised(
    model: ir.Model, seen: Mapping[str, Seen], precision: str, keep: Collection[str] = (), cut: float = 0.0
) -> ir.Model:
    """Quantise the model in place, except the layers of ``keep``; ``seen`` is by the name of each product's input."""
    graph, made = model.graph, dict[ir.Value, ir.Value]()
    for name, node in layers(graph).items():
        value, weight = node.inputs
        if name in keep or value is None or weight is None:
            continue
        if value not in made:
            made[value] = _around(graph, value, activation_scale(seen[f"{value.name}"], precision, cut), precision)
        node.replace_input_with(0, made[value])
        node.replace_input_with(1, _weight(graph, node, weight, precision))
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    return model


def _short(scale: float) -> float:
    """The scale rounded to bfloat16: in such a graph it is one, and rounding it later would shift every number."""
    return float(np.asarray(scale, ml_dtypes.bfloat16))


def _around(graph: ir.Graph, value: ir.Value, scale: Scale, precision: str) -> ir.Value:
    """The value quantised and dequantised, right after its producer."""
    zero = np.asarray(scale.zero, np.uint8) if precision == "int8" else np.zeros((), FP8)
    pair = [
        _constant(graph, f"{value.name}.eight.scale", np.asarray(scale.scale, np.float32)),
        _constant(graph, f"{value.name}.eight.zero", zero),
    ]
    down = _node("QuantizeLinear", [value, *pair], f"{value.name}.eight", pair[1].dtype, value.shape)
    up = _node("DequantizeLinear", [down.outputs[0], *pair], f"{value.name}.eight.back", value.dtype, value.shape)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [down, up])
    else:
        graph.insert_after(producer, [down, up])
    return up.outputs[0]


def _weight(graph: ir.Graph, node: ir.Node, weight: ir.Value, precision: str) -> ir.Value:
    """The weight stored in eight bits, and dequantised before the product."""
    assert weight.const_value is not None
    full = weight.const_value.numpy().astype(np.float32)
    most = np.abs(full).max(axis=0)
    if precision == "int8":
        scale = np.maximum(most / 127, LEAST_SCALE).astype(np.float32)
        short = np.clip(np.rint(full / scale), -127, 127).astype(np.int8)
    else:
        scale = np.maximum(most / E4M3_MOST, LEAST_SCALE).astype(ml_dtypes.bfloat16).astype(np.float32)
        short = np.clip(full / scale, -E4M3_MOST, E4M3_MOST).astype(FP8)
    parts = [
        _constant(graph, f"{weight.name}.{precision}", short),
        _constant(graph, f"{weight.name}.scale", scale),
        _constant(graph, f"{weight.name}.zero", np.zeros(scale.shape, short.dtype)),
    ]
    up = _node("DequantizeLinear", parts, f"{weight.name}.eight.back", weight.dtype, weight.shape)
    up.attributes["axis"] = ir.AttrInt64("axis", 1)
    graph.insert_before(node, up)
    return up.outputs[0]


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _node(kind: str, inputs: list[ir.Value], name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Node:
    node = ir.Node("", kind, inputs, num_outputs=1, name=f"{kind}.{name}")
    out = node.outputs[0]
    assert dtype is not None
    out.name, out.shape, out.type = name, shape, ir.TensorType(dtype)
    return node
