"""Converts a float32 graph to float16 or bfloat16, except where that is known to go wrong.

TensorRT 11 takes every type from the graph. Inputs and outputs stay float32, and so does the loop over the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from export.graph import OPSET

FLOAT = ir.DataType.FLOAT
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}

SQUARES = ("Pow", "ReduceMean", "ReduceSum", "ReduceL2", "Sqrt", "Reciprocal")
# What is computed with nothing but such results is as large as they are: the eps that is added before a root.
ELEMENTWISE = frozenset(("Add", "Sub", "Mul", "Div", "Max", "Min", "Neg"))
_SQUARES = "a sum of squares overflows float16 for values from 256 on, and loses digits in bfloat16"
_EXPONENTIALS = "a sum of exponentials loses its small terms"
_ANGLES = "angles of positions and times reach the thousands, where a narrow type has no fractions"
FLOAT32_OPERATORS: Mapping[str, str] = {
    **dict.fromkeys(SQUARES, _SQUARES),
    **dict.fromkeys(
        ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"), _SQUARES
    ),
    **dict.fromkeys(("Softmax", "Exp", "Log"), _EXPONENTIALS),
    **dict.fromkeys(("Sin", "Cos"), _ANGLES),
    "CumSum": "a running sum loses its small terms",
}
NOT_IN_BF16: Mapping[str, str] = {
    "Resize": "TensorRT has none in bfloat16",
    "operators without a bfloat16 form": f"opset {OPSET} has none of Conv, Einsum and a few others",
}
FLOAT32_STAGES: Mapping[str, Mapping[str, str]] = {
    "fp16": {
        "text": "T5's residuals overflow float16 (65504)",
        "decoder": "an autoencoder's activations can overflow float16 (FLUX's and SDXL's are known to)",
    },
    "bf16": {"decoder": "bfloat16's eight bits of precision show as bands in smooth areas"},
}
# What only passes numbers on: its type is that of what it gets, so that no Cast is put around it.
PASSING = frozenset(("Shape", "Cast", "ConstantOfShape", "Range", "Size"))


def float32_reasons(precision: str) -> dict[str, str]:
    """What stays in float32 in this precision and why, for the manifest."""
    if precision not in TYPES:
        return {}
    stages = {f"the {stage} stage": reason for stage, reason in FLOAT32_STAGES[precision].items()}
    return {**float32_operators(precision), **stages}


def float32_operators(precision: str) -> Mapping[str, str]:
    """The operators that stay in float32, with the reason of each."""
    return {**FLOAT32_OPERATORS, **NOT_IN_BF16} if precision == "bf16" else FLOAT32_OPERATORS


def narrow(model: ir.Model, precision: str, keep: Iterable[str] | None = None, round_only: bool = False) -> ir.Model:
    """The graph in the narrow type, except for the operators of ``keep`` (``float32_operators``) and inputs of angles.

    With ``round_only`` each result is rounded to the narrow type and the computation goes on in float32, which shows
    the effect of rounding on a CPU. (ONNX Runtime has few float16 kernels for CPUs and removes the Casts around what it
    lacks, so a float16 graph that overflows on a GPU would pass.)
    """
    weights_to_float32(model.graph)
    _Narrowing(
        model.graph, precision, frozenset(float32_operators(precision) if keep is None else keep), round_only
    ).run()
    tidy = passes.RemoveUnusedNodesPass()(model).model
    return passes.TopologicalSortPass()(tidy).model


def weights_to_float32(graph: ir.Graph) -> None:
    """Undo ``export.graph._halve``: weights stored as float16 with a Cast become float32 again."""
    for node in list(graph):
        stored = node.inputs[0] if node.op_type == "Cast" else None
        if stored is None or not (node.name or "").startswith("widen.") or stored.const_value is None:
            continue
        full = node.outputs[0]
        name = str(full.name)
        value = _initializer(graph, name, stored.const_value.numpy().astype(np.float32), FLOAT)
        full.replace_all_uses_with(value)
        graph.remove(node, safe=True)
        full.name, value.name = f"{name}.was", name
        graph.initializers.pop(str(stored.name))
        graph.register_initializer(value)


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
    return ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(dtype),
        const_value=ir.tensor(array, dtype=dtype, name=name),
    )


@dataclass
class _Narrowing:
    """One pass over a graph in order; ``made`` holds values in the other type, so that none is cast twice."""

    graph: ir.Graph
    precision: str
    keep: frozenset[str]
    round_only: bool
    made: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)
    squares: set[ir.Node] = field(default_factory=set)

    def run(self) -> None:
        angles = _ancestors(self.graph, ("Sin", "Cos"))
        narrow_type = FLOAT if self.round_only else TYPES[self.precision]
        for node in list(self.graph):
            if node.op_type in PASSING:
                continue
            full = node.op_type in self.keep or node in angles or not _has_form(node.op_type, self.precision)
            full = full or self._is_among_squares(node)
            if full and node.op_type in (*SQUARES, *ELEMENTWISE):
                self.squares.add(node)
            for index, value in enumerate(node.inputs):
                if value is not None and _is_float(value):
                    node.replace_input_with(index, self._as(value, FLOAT if full else narrow_type, node, full))
            for out in node.outputs:
                if not full and out.dtype == FLOAT:
                    self._narrow_output(node, out, narrow_type)
        self._outputs_to_float32()

    def _is_among_squares(self, node: ir.Node) -> bool:
        if node.op_type not in ELEMENTWISE:
            return False
        givers = [value.producer() for value in node.inputs if value is not None and not value.is_initializer()]
        return bool(givers) and all(giver in self.squares for giver in givers)

    def _as(self, value: ir.Value, dtype: ir.DataType, user: ir.Node, full: bool) -> ir.Value:
        """The value in this type: a converted constant, or the result of a Cast before ``user``."""
        if value.is_initializer():
            return value if full else self._constant(value)
        if value.dtype == dtype:
            if self.round_only and not full and value.producer() is None:
                return self._rounded(value, user)
            return value
        if (value, dtype) not in self.made:
            cast = _cast(value, dtype, f"{value.name}.{dtype.name.lower()}")
            self._insert(cast, value)
            self.made[value, dtype] = cast.outputs[0]
        return self.made[value, dtype]

    def _insert(self, node: ir.Node, value: ir.Value) -> None:
        """Insert right after the value's producer, so that other users can share it."""
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)

    def _constant(self, value: ir.Value) -> ir.Value:
        key = (value, TYPES[self.precision])
        if key not in self.made:
            assert value.const_value is not None
            array = value.const_value.numpy()
            if self.precision == "fp16":
                array = array.clip(-65504, 65504)  # "minus infinity" of a mask stays a number
            short = array.astype(NUMPY[self.precision])
            dtype = FLOAT if self.round_only else TYPES[self.precision]
            new = short.astype(np.float32) if self.round_only else short
            self.made[key] = _initializer(self.graph, f"{value.name}.{self.precision}", new, dtype)
            self.graph.register_initializer(self.made[key])
        return self.made[key]

    def _rounded(self, value: ir.Value, user: ir.Node) -> ir.Value:
        key = (value, TYPES[self.precision])
        if key not in self.made:
            down = _cast(value, TYPES[self.precision], f"{value.name}.short")
            up = _cast(down.outputs[0], FLOAT, f"{value.name}.rounded")
            self._insert(down, value)
            self.graph.insert_after(down, up)
            self.made[key] = up.outputs[0]
        return self.made[key]

    def _narrow_output(self, node: ir.Node, out: ir.Value, dtype: ir.DataType) -> None:
        if not self.round_only:
            out.type = ir.TensorType(dtype)
            return
        users = list(out.uses())
        down = _cast(out, TYPES[self.precision], f"{out.name}.short")
        up = _cast(down.outputs[0], FLOAT, f"{out.name}.rounded")
        self.graph.insert_after(node, [down, up])
        for user, index in users:
            user.replace_input_with(index, up.outputs[0])
        for index, result in enumerate(self.graph.outputs):
            if result is out:
                name, out.name = out.name, f"{out.name}.full"
                up.outputs[0].name = name
                self.graph.outputs[index] = up.outputs[0]

    def _outputs_to_float32(self) -> None:
        for index, out in enumerate(self.graph.outputs):
            if out.dtype != TYPES[self.precision]:
                continue
            name = str(out.name)
            out.name = f"{name}.{self.precision}"
            cast = _cast(out, FLOAT, name)
            self.graph.append(cast)
            self.graph.outputs[index] = cast.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], num_outputs=1, name=f"cast.{name}")
    out = node.outputs[0]
    out.name, out.shape, out.type = name, value.shape, ir.TensorType(dtype)
    return node


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (FLOAT, *TYPES.values())


@functools.cache
def _has_form(op_type: str, precision: str) -> bool:
    wanted = f"tensor({TYPES[precision].name.lower()})"
    rows = onnx.defs.get_schema(op_type, OPSET).type_constraints
    return any(wanted in row.allowed_type_strs for row in rows if "tensor(float)" in row.allowed_type_strs)


def _ancestors(graph: ir.Graph, kinds: tuple[str, ...]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = [node for node in graph if node.op_type in kinds]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [producer for value in node.inputs if value is not None and (producer := value.producer())]
    return found
