"""Products in eight bits: QuantizeLinear and DequantizeLinear around them, with scales fixed in advance.

Fixed scales keep an image independent of the rest of its batch, unlike scales computed from each batch. Weights have a
scale for each output channel, activations a single one. A product's result is not rounded, but the next one's input is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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


def gemms_to_products(graph: ir.Graph) -> None:
    """Write each Gemm of a tensor and a weight as MatMul and Add: one form for all products, and the one in which ONNX
    Runtime has a kernel in eight bits for a bias that is not quantised."""
    for node in list(graph):
        if node.op_type != "Gemm" or not _is_product(node):
            continue
        value, weight, *bias = node.inputs
        assert weight is not None
        out = node.outputs[0]
        product = node_of(
            "MatMul", [value, _oriented(graph, node, weight)], f"{out.name}.product", out.dtype, out.shape
        )
        made = [product]
        if bias:
            made.append(node_of("Add", [product.outputs[0], *bias], f"{out.name}.sum", out.dtype, out.shape))
        graph.insert_before(node, made)
        out.replace_all_uses_with(made[-1].outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        out.name, made[-1].outputs[0].name = f"{out.name}.gemm", out.name
    drop_unused(graph)


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
            made[value] = in_eight(graph, value, [activation_scale(seen[f"{value.name}"], precision, cut)], precision)
        node.replace_input_with(0, made[value])
        node.replace_input_with(1, weight_in_eight(graph, node, weight, precision))
    drop_unused(graph)
    return model


def drop_unused(graph: ir.Graph) -> None:
    """Remove the weights that nothing reads any more."""
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)


def _is_product(node: ir.Node) -> bool:
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    weight = node.inputs[1]
    plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA", 0)
    return plain and weight is not None and weight.is_initializer()


def _oriented(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> ir.Value:
    """A Gemm's weight as MatMul takes it: inputs x outputs."""
    transposed = node.attributes.get("transB")
    if transposed is None or not transposed.value:
        return weight
    name = f"{weight.name}.T"
    if name in graph.initializers:
        return graph.initializers[name]
    assert weight.const_value is not None
    return constant(graph, name, np.ascontiguousarray(weight.const_value.numpy().T))


def _short(scale: float) -> float:
    """The scale rounded to bfloat16: in such a graph it is one, and rounding it later would shift every number."""
    return float(np.asarray(scale, ml_dtypes.bfloat16))


def in_eight(
    graph: ir.Graph, value: ir.Value, scales: Sequence[Scale], precision: str, chosen: ir.Value | None = None
) -> ir.Value:
    """The value quantised and dequantised, right after its producer; of several scales, with the one at ``chosen``."""
    name, pair, made = f"{value.name}.eight", list[ir.Value](), list[ir.Node]()
    zero_type = np.dtype(np.uint8) if precision == "int8" else FP8
    arrays = (
        np.array([row.scale for row in scales], np.float32),
        np.array([row.zero for row in scales]).astype(zero_type),
    )
    for part, array in zip(("scale", "zero"), arrays, strict=True):
        several = (
            chosen is not None and array.dtype != FP8
        )  # whose zero is 0 at any scale; and no Gather takes the type
        pair.append(constant(graph, f"{name}.{part}", array if several else array[0]))
        if several:
            made.append(node_of("Gather", [pair[-1], chosen], f"{name}.{part}.chosen", pair[-1].dtype, ir.Shape([])))
            pair[-1] = made[-1].outputs[0]
    down = node_of("QuantizeLinear", [value, *pair], name, pair[1].dtype, value.shape)
    up = node_of("DequantizeLinear", [down.outputs[0], *pair], f"{name}.back", value.dtype, value.shape)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [*made, down, up])
    else:
        graph.insert_after(producer, [*made, down, up])
    return up.outputs[0]


def weight_in_eight(graph: ir.Graph, node: ir.Node, weight: ir.Value, precision: str) -> ir.Value:
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
        constant(graph, f"{weight.name}.{precision}", short),
        constant(graph, f"{weight.name}.scale", scale),
        constant(graph, f"{weight.name}.zero", np.zeros(scale.shape, short.dtype)),
    ]
    up = node_of("DequantizeLinear", parts, f"{weight.name}.eight.back", weight.dtype, weight.shape)
    up.attributes["axis"] = ir.AttrInt64("axis", 1)
    graph.insert_before(node, up)
    return up.outputs[0]


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def node_of(
    kind: str, inputs: Sequence[ir.Value | None], name: str, dtype: ir.DataType | None, shape: ir.Shape | None
) -> ir.Node:
    node = ir.Node("", kind, inputs, num_outputs=1, name=f"{kind}.{name}")
    out = node.outputs[0]
    assert dtype is not None
    out.name, out.shape, out.type = name, shape, ir.TensorType(dtype)
    return node
