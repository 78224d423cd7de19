"""From float32 to narrower types: what becomes narrow, what stays float32, and the numbers that rounding makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from export.graph import Signature, export_graph, save
from export.narrow import FLOAT32_OPERATORS, float32_reasons, narrow, weights_to_float32


class Normed(nn.Module):
    """A product, a root mean square of it (which leaves float16 from 256 on), angles, and a mask of -inf."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64).half().float()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.linear(x) * 1000
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        mask = torch.where(torch.arange(64) < 40, 0.0, torch.finfo(torch.float32).min)
        return (y + mask).softmax(-1) + torch.sin(t[:, None] * 1000.0 * torch.arange(64))


@pytest.fixture(scope="module")
def graph() -> bytes:
    inputs = {"x": torch.zeros(2, 64), "t": torch.ones(2)}
    return export_graph(Normed(), Signature("normed", inputs, ("y",)), {"student": "tiny 1"})


def feed() -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    return {"x": chance.standard_normal((3, 64), dtype=np.float32), "t": np.array([1, 0.73, 0.01], np.float32)}


def run(model: ir.Model, path: Path) -> np.ndarray:
    save(model, path)
    out: np.ndarray = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(["y"], feed())[0]
    return out


def load(graph: bytes) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(graph))


@pytest.fixture(scope="module")
def reference(graph: bytes) -> np.ndarray:
    out: np.ndarray = ort.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(["y"], feed())[0]
    return out


def test_weights_come_out_of_their_cast_unchanged(graph: bytes, reference: np.ndarray, tmp_path: Path) -> None:
    model = load(graph)
    weights_to_float32(model.graph)
    types = {value.name: value.dtype for value in model.graph.initializers.values()}
    assert types["linear.weight"] == ir.DataType.FLOAT
    assert not any((node.name or "").startswith("widen.") for node in model.graph)
    np.testing.assert_array_equal(run(model, tmp_path / "float32.onnx"), reference)


@pytest.mark.parametrize(("precision", "most"), [("fp16", 5e-3), ("bf16", 4e-2)])
def test_the_numbers_are_near_and_finite(
    graph: bytes, reference: np.ndarray, tmp_path: Path, precision: str, most: float
) -> None:
    ours = run(narrow(load(graph), precision, round_only=True), tmp_path / "short.onnx")
    assert 0 < np.abs(ours - reference).max() < most


def test_without_the_float32_operators_the_squares_overflow(graph: bytes, tmp_path: Path) -> None:
    kept = set(FLOAT32_OPERATORS) - {"Pow", "ReduceMean"}
    ours = run(narrow(load(graph), "fp16", keep=kept, round_only=True), tmp_path / "short.onnx")
    right = run(narrow(load(graph), "fp16", round_only=True), tmp_path / "right.onnx")
    assert np.abs(ours - right).max() > 0.01  # the mean of squares is infinite, and what is divided by it is 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_narrow_and_what_is_wide(graph: bytes, tmp_path: Path, precision: str) -> None:
    save(narrow(load(graph), precision), tmp_path / "short.onnx")  # the checker accepts it
    model = ir.load(tmp_path / "short.onnx")
    short = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    by_kind = {node.op_type: node for node in model.graph}
    assert by_kind["Gemm"].outputs[0].dtype == short and by_kind["Gemm"].inputs[1].dtype == short
    (rooted,) = (value.producer() for value in by_kind["Sqrt"].inputs)
    assert rooted.op_type == "Add" and rooted.outputs[0].dtype == ir.DataType.FLOAT  # the eps is added reference
    for kind in ("Pow", "ReduceMean", "Softmax", "Sin"):
        assert by_kind[kind].outputs[0].dtype == ir.DataType.FLOAT, kind
    (angle,) = (value.producer() for value in by_kind["Sin"].inputs)
    assert angle.outputs[0].dtype == ir.DataType.FLOAT  # and all that leads to it
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.dtype == ir.DataType.FLOAT
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_two_conversions_are_equal_to_the_byte(graph: bytes, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(narrow(load(graph), "bf16"), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_exception_has_a_reason() -> None:
    for precision in ("fp16", "bf16"):
        assert all(len(reason) > 20 for reason in float32_reasons(precision).values())
    assert float32_reasons("fp32") == {}
