"""The recipe on modules small enough to know the answer."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from export.errors import ExportError
from export.graph import OPSET, Signature, export_graph, save, trace


class Guarded(nn.Module):
    """0 / (0 + eps): torch says 0, and a graph that has lost the eps says NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x + 1e-15)


class Repeated(nn.Module):
    """One linear map applied four times, as the steps of a sampler apply one network."""

    def __init__(self, width: int = 64, half: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(width, width)
        if half:
            self.half().float()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(self.linear(x))
        return x


def run(data: bytes, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run(["y"], {"x": x})[0]
    return out


def export(module: nn.Module, width: int = 64) -> bytes:
    return export_graph(module, Signature("test", {"x": torch.zeros(2, width)}, ("y",)), {"student": "tiny 1"})


def test_a_tiny_eps_survives() -> None:
    assert run(export(Guarded()), np.zeros((3, 64), np.float32)).tolist() == np.zeros((3, 64)).tolist()


@pytest.mark.parametrize("half", [False, True])
def test_same_numbers_and_one_copy_of_the_weights(half: bool) -> None:
    module = Repeated(half=half)
    data = export(module)
    x = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
    np.testing.assert_allclose(run(data, x), module(torch.from_numpy(x)).detach().numpy(), atol=1e-6)
    model = onnx.load_from_string(data)
    weights = [i for i in model.graph.initializer if np.prod(i.dims) == 64 * 64]
    assert [w.data_type for w in weights] == [onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT]
    assert len(data) < (2 if half else 4) * 64 * 64 + 6000


def test_weights_in_half_are_the_same_numbers() -> None:
    """Stored as float16 or as float32, the graph computes the very same bits."""
    module = Repeated(half=True)
    x = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
    short = export(module)
    model = onnx.load_from_string(short)
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    for cast in casts:
        (stored,) = [i for i in model.graph.initializer if i.name == cast.input[0]]
        wide = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(stored).astype(np.float32), cast.output[0])
        model.graph.initializer.append(wide)
        model.graph.node.remove(cast)
    assert len(casts) == 1
    np.testing.assert_array_equal(run(model.SerializeToString(), x), run(short, x))


def test_names_shapes_and_metadata_are_for_people() -> None:
    model = onnx.load_from_string(export(Repeated()))
    (x,), (y,) = model.graph.input, model.graph.output
    for value, name in ((x, "x"), (y, "y")):
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert (value.name, dims) == (name, ["batch", 64])
    assert "linear.weight" in {i.name for i in model.graph.initializer}
    assert {p.key: p.value for p in model.metadata_props} == {"student": "tiny 1"}
    assert (model.producer_name, model.graph.name, model.opset_import[0].version) == ("fewstep", "test", OPSET)
    onnx.checker.check_model(model, full_check=True)


def test_what_is_constant_is_folded() -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.arange(64, dtype=torch.float32).sin() * 2
            return x + table + table.flip(0)

    nodes = Counter(node.op_type for node in onnx.load_from_string(export(Table())).graph.node)
    assert nodes == {"Add": 2}


EXPORT_FUSED = """
import pathlib, sys
from export.fused import fused_part
from student.bundle import read_student
from student.files import sha256
from student.pipeline import open_pipeline
from student.tokens import PromptTokens
bundle = pathlib.Path(sys.argv[1])
student = read_student(bundle)
path = pathlib.Path(sys.argv[2])
fused_part(open_pipeline(bundle), student, PromptTokens(bundle, student.max_tokens), 2).export(path)
print(sha256(path))
"""


def test_the_same_student_gives_the_same_bytes_and_no_path_of_this_machine(compiled: Path, tmp_path: Path) -> None:
    """Another process, with another order of its sets and dictionaries' hashes."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_FUSED, str(compiled), str(tmp_path / "again.onnx")],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    from student.files import sha256

    graph = compiled / "runtimes" / "onnx-fused-fp32" / "2-steps.onnx"
    assert done.stdout.strip() == sha256(graph)
    data = graph.read_bytes()
    for sign in (str(Path(__file__).parents[2]), str(Path.home()), sys.prefix, ".py", "site-packages", str(compiled)):
        assert sign.encode() not in data


class Eigen(nn.Module):
    """A product that ONNX has, then one that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.spectrum = Spectrum()

    def forward(self, x: Tensor) -> Tensor:
        return self.spectrum(self.inner(x))


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x.view(-1, 2, 2)).real


def test_an_operator_without_an_onnx_form_is_named_with_its_module() -> None:
    with pytest.raises(ExportError, match=r"test has no ONNX form: the operator aten\.linalg_eig\S* in .*spectrum"):
        export(Eigen(), width=4)


def test_weights_beyond_the_limit_lie_beside_the_graph(tmp_path: Path) -> None:
    module, path = Repeated(), tmp_path / "big.onnx"
    signature = Signature("test", {"x": torch.zeros(2, 64)}, ("y",))
    save(trace(module, signature, {}), path, limit_bytes=1000)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert path.stat().st_size < 6000 < 64 * 64 * 4 <= (tmp_path / "big.onnx.data").stat().st_size
    x = np.ones((3, 64), np.float32)
    ours = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]
    np.testing.assert_array_equal(ours, run(export(module), x))
