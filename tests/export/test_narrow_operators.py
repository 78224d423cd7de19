"""Which operators stay in float32, one by one, and what becomes of constants, inputs and sums of squares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.graph import OPSET, save
from export.narrow import FLOAT32_OPERATORS, float32_operators, float32_reasons, narrow

SHAPE = [2, 4, 6]
AXIS = {"axis": np.array(1, np.int64)}
ONES = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
# Operator: constants after its input, settings.
FULL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Pow": ({"two": np.float32(2)}, {}), "ReduceMean": ({}, {}), "ReduceSum": ({}, {}), "ReduceL2": ({}, {}),
    "Sqrt": ({}, {}), "Reciprocal": ({}, {}), "Softmax": ({}, {}), "Exp": ({}, {}), "Log": ({}, {}), "Sin": ({}, {}),
    "Cos": ({}, {}), "CumSum": (AXIS, {}), "LayerNormalization": ({"scale": np.ones(6, np.float32)}, {}),
    "InstanceNormalization": (ONES, {}),
}  # fmt: skip
NARROW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "MatMul": ({"w": np.ones((6, 6), np.float32)}, {}), "Relu": ({}, {}), "Tanh": ({}, {}), "Sigmoid": ({}, {}),
    "Neg": ({}, {}), "Transpose": ({}, {"perm": [0, 1, 2]}),
}  # fmt: skip


def model(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], shapes: dict[str, list[int]] | None = None
) -> ir.Model:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "xy")
    names = sorted({name for node in nodes for name in node.output} - {"y"})
    known = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (shapes or {}).get(name, SHAPE)) for name in names]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], stored, value_info=known)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10))


def around(operator: str, constants: dict[str, Any], settings: dict[str, Any]) -> ir.Model:
    """The operator between two products with a constant, which are narrow in any case."""
    shape = {"b": [1, 1, 1]} if operator in ("ReduceMean", "ReduceSum", "ReduceL2") else {}
    return model(
        [
            helper.make_node("Mul", ["x", "c"], ["a"]),
            helper.make_node(operator, ["a", *constants], ["b"], **settings),
            helper.make_node("Mul", ["b", "a"], ["y"]),
        ],
        {"c": np.float32(1.5), **constants},
        shape,
    )


def kinds(found: ir.Model, operator: str) -> tuple[ir.DataType | None, ir.DataType | None]:
    """The types of an operator's first input and of its result."""
    (node,) = (node for node in found.graph if node.op_type == operator)
    (value, *_), (out,) = node.inputs, node.outputs
    return (value.dtype if value else None), out.dtype


@pytest.mark.parametrize("operator", [*FULL, *NARROW])
@pytest.mark.parametrize(("precision", "kind"), [("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)])
def test_an_operator_is_computed_in_its_own_type(
    tmp_path: Path, precision: str, kind: ir.DataType, operator: str
) -> None:
    constants, settings = (FULL | NARROW)[operator]
    found = narrow(around(operator, constants, settings), precision)
    save(found, tmp_path / "checked.onnx")
    expected = ir.DataType.FLOAT if operator in FULL else kind
    assert kinds(found, operator) == (expected, expected)
    products = [node for node in found.graph if node.op_type == "Mul"]
    before = ir.DataType.FLOAT if operator in ("Sin", "Cos") else kind  # an angle is one from its beginning on
    assert [node.outputs[0].dtype for node in products] == [before, kind]
    assert found.graph.inputs[0].dtype == found.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_every_operator_that_stays_has_its_reason_in_each_precision() -> None:
    normalisations = {"GroupNormalization", "RMSNormalization"}  # the exporter writes neither at this opset
    assert set(FLOAT32_OPERATORS) == set(FULL) | normalisations
    assert set(float32_operators("fp16")) == set(FLOAT32_OPERATORS)
    more = set(float32_operators("bf16")) - set(FLOAT32_OPERATORS)
    assert "Resize" in more and set(float32_reasons("bf16")) == set(FLOAT32_OPERATORS) | more | {"the decoder stage"}
    assert set(float32_reasons("fp16")) == set(FLOAT32_OPERATORS) | {"the text stage", "the decoder stage"}


@pytest.mark.parametrize(("precision", "kind"), [("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.FLOAT)])
def test_a_resize_is_narrow_only_where_there_is_one(precision: str, kind: ir.DataType) -> None:
    constants = {"roi": np.zeros(0, np.float32), "scales": np.ones(3, np.float32)}
    found = narrow(around("Resize", constants, {"mode": "nearest"}), precision)
    assert kinds(found, "Resize")[1] == kind


def test_minus_infinity_of_a_mask_stays_a_number() -> None:
    mask = np.full(SHAPE, np.finfo(np.float32).min, np.float32)
    mask[0] = 7e4
    found = narrow(model([helper.make_node("Add", ["x", "mask"], ["y"])], {"mask": mask}), "fp16")
    (stored,) = (value.const_value.numpy() for value in found.graph.initializers.values() if value.const_value)
    assert stored.dtype == np.float16 and set(np.unique(stored)) == {-65504.0, 65504.0}


def squares(second: str) -> ir.Model:
    """x^2 plus something, under a root."""
    return model(
        [
            helper.make_node("Mul", ["x", "c"], ["a"]),
            helper.make_node("Pow", ["a", "two"], ["s"]),
            helper.make_node("Neg", ["s"], ["n"]),
            helper.make_node("Add", ["s", second], ["t"]),
            helper.make_node("Sqrt", ["t"], ["y"]),
        ],
        {"c": np.float32(1.5), "two": np.float32(2), "eps": np.float32(1e-6)},
    )


@pytest.mark.parametrize(("second", "full"), [("eps", True), ("n", True), ("a", False)])
def test_a_sum_is_among_squares_only_if_all_that_it_adds_is(second: str, full: bool) -> None:
    expected = ir.DataType.FLOAT if full else ir.DataType.FLOAT16
    assert kinds(narrow(squares(second), "fp16"), "Add")[1] == expected


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_on_a_cpu_inputs_constants_and_results_are_rounded_each(tmp_path: Path, precision: str, dtype: Any) -> None:
    """The answer key is the same product by hand in numpy, in float32 between the roundings."""
    weight = np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)
    one = model(
        [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Add", ["a", "c"], ["y"])],
        {"w": weight, "c": np.float32(1 / 3)},
    )
    save(narrow(one, precision, round_only=True), tmp_path / "g.onnx")
    x = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    (found,) = ort.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"]).run(["y"], {"x": x})

    def rounded(values: Any) -> Any:
        return np.asarray(values, np.float32).astype(dtype).astype(np.float32)

    expected = rounded(rounded(rounded(x) @ rounded(weight)) + rounded(1 / 3))
    wrong = np.abs(found - expected) > 0
    assert wrong.mean() < 0.05, "but for a sum's order"
    assert not np.array_equal(found, x @ weight + np.float32(1 / 3))
