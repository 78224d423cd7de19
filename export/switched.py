"""One graph of which a run says what is in eight bits, so that the layers to leave out are found with few openings.

A graph of a large model takes minutes to write and to open; each question to these two is only a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.calibrate import Seen
from export.qdq import activation_scale, constant, in_eight, layers, node_of, weight_in_eight

EIGHT, CUT = "eight", "cut"  # inputs: for each layer whether it is in eight bits; the index of the cut


def switched(model: ir.Model, seen: Mapping[str, Seen], precision: str, cuts: Sequence[float]) -> ir.Model:
    """The graph with a switch for each layer (``EIGHT``) and one for the cut of their inputs (``CUT``).

    What it computes is what ``quantised`` computes with the same layers and the same cut.
    """
    graph, made = model.graph, dict[ir.Value, ir.Value]()
    found = layers(graph)
    eight = _input(graph, EIGHT, ir.DataType.BOOL, (len(found),))
    cut = _input(graph, CUT, ir.DataType.INT64, ())
    for index, node in enumerate(found.values()):
        value, weight = _operands(node)
        if value not in made:
            scales = [activation_scale(seen[f"{value.name}"], precision, each) for each in cuts]
            made[value] = in_eight(graph, value, scales, precision, cut)
        number = constant(graph, f"{weight.name}.number", np.asarray(index, np.int64))
        on = node_of("Gather", [eight, number], f"{weight.name}.on", ir.DataType.BOOL, ir.Shape([]))
        graph.insert_before(node, on)
        for position, short in enumerate((made[value], weight_in_eight(graph, node, weight, precision))):
            float_value = value if position == 0 else weight
            name = f"{weight.name}.operand.{position}"
            either = node_of("Where", [on.outputs[0], short, float_value], name, weight.dtype, float_value.shape)
            graph.insert_before(node, either)
            node.replace_input_with(position, either.outputs[0])
    return model


def switches(names: Iterable[str], left_out: Iterable[str]) -> NDArray[np.bool_]:
    """The input ``EIGHT`` with which these layers keep their float weights."""
    kept = set(left_out)
    return np.array([name not in kept for name in names])


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    value, weight = node.inputs
    assert value is not None and weight is not None
    return value, weight


def _input(graph: ir.Graph, name: str, kind: ir.DataType, shape: Sequence[int]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
    graph.inputs.append(value)
    return value
