"""How graphs are opened: the settings that bytes and the machine's other processes depend on, in each library."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from student.bundle import BundleError, Student
from student.runtimes import onnx, openvino, session
from student.runtimes.manifest import OPENED_TWICE
from student.runtimes.runtime import CpuSharing
from tests import tiny

CUDA, CPU, TENSORRT = "CUDAExecutionProvider", "CPUExecutionProvider", "TensorrtExecutionProvider"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ONNX Runtime is asked for, on a machine that has everything."""
    found: list[Any] = []

    def inference(path: str, options: Any, providers: Any) -> Any:
        found.append((path, options, providers))
        names = [one if isinstance(one, str) else one[0] for one in providers]
        return SimpleNamespace(get_providers=lambda: names)

    monkeypatch.setattr(session.ort, "InferenceSession", inference)
    monkeypatch.setattr(session.ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    return found


def test_a_session_sleeps_between_its_work_and_computes_all_of_float32(opened: list[Any], tmp_path: Path) -> None:
    found = session.open_session(tmp_path / "a.onnx", 3)
    ((path, options, providers),) = opened
    assert path == str(tmp_path / "a.onnx") and found._device == "cuda"
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.execution_mode == session.ort.ExecutionMode.ORT_SEQUENTIAL
    assert options.graph_optimization_level == session.ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert providers == [(CUDA, {"use_tf32": "0"}), CPU]


def test_tensorrt_rounds_nothing_and_is_only_asked_for(opened: list[Any], tmp_path: Path) -> None:
    session.open_session(tmp_path / "a.onnx", 1, tensorrt=True)
    (name, settings), *rest = opened[0][2]
    assert name == TENSORRT and settings == dict.fromkeys(
        (f"trt_{kind}_enable" for kind in ("fp16", "bf16", "int8")), "0"
    )
    assert rest == [(CUDA, {"use_tf32": "0"}), CPU]


@pytest.mark.parametrize(
    ("there", "asked", "device"),
    [
        ([CPU], True, "cpu"),
        ([CUDA, CPU], False, "cuda"),
        ([TENSORRT, CPU], False, "cpu"),
        ([TENSORRT, CPU], True, "cuda"),
    ],
)
def test_arrays_lie_where_the_graph_runs(
    opened: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], asked: bool, device: str
) -> None:
    monkeypatch.setattr(session.ort, "get_available_providers", lambda: there)
    assert session.open_session(tmp_path / "a.onnx", 1, asked)._device == device


STUDENT = tiny.student({})


@pytest.mark.parametrize(
    ("crowded", "extra", "expected"),
    [
        (0, 0, [(4, None)]),
        (4, 0, [(4, None)]),
        (2, 0, [(4, 2)]),
        (2, -1, [(4, 2)]),
        (2, 1, [(2, None)]),  # too large to be held twice: its share, at any time
        (0, 1, [(4, None)]),
    ],
)
def test_a_student_of_up_to_a_limit_is_opened_once_for_all_cores_and_once_for_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crowded: int, extra: int, expected: list[Any]
) -> None:
    folder = tmp_path / "runtimes" / "onnx-fused-fp32"
    folder.mkdir(parents=True)
    for name, size in (("a.onnx", 600), ("b.onnx", 400 + extra)):
        (folder / name).write_bytes(bytes(size))
    monkeypatch.setattr(onnx, "OPENED_TWICE", 1000)
    found: list[Any] = []

    def made(bundle: Path, student: Student, threads: int, name: str, open_: Any, sharing: Any = None) -> Any:
        open_(Path("a"))
        return (bundle, student, threads, name, sharing)

    monkeypatch.setattr(onnx, "make_runtime", made)
    monkeypatch.setattr(onnx, "open_session", lambda path, threads, tensorrt: found.append((threads, None)))
    monkeypatch.setattr(onnx, "SharingSession", lambda path, threads, few, sharing: found.append((threads, few)))
    bundle, student, threads, name, sharing = onnx.onnx_runtime(tmp_path, STUDENT, 4, crowded_threads=crowded)  # type: ignore[misc]
    assert found == expected and (bundle, student, threads, name) == (tmp_path, STUDENT, expected[0][0], folder.name)
    assert isinstance(sharing, CpuSharing) == (expected[0][1] is not None)
    assert OPENED_TWICE == 256 * 2**20


def test_the_form_that_serves_is_the_first_that_is_there(tmp_path: Path) -> None:
    assert onnx.compiled_form(tmp_path) == "onnx-fused-fp32"
    order = ("onnx-staged-fp16", "onnx-staged-int8", "onnx-fused-int8", "onnx-staged-fp32", "onnx-fused-fp32")
    for name in order:
        (tmp_path / "runtimes" / name).mkdir(parents=True)
        assert onnx.compiled_form(tmp_path) == name
    (tmp_path / "other" / "runtimes").mkdir(parents=True)
    (tmp_path / "other" / "runtimes" / "onnx-staged-fp16").touch()
    assert onnx.compiled_form(tmp_path / "other") == "onnx-fused-fp32"


class Port:
    """An output of a graph."""

    def get_names(self) -> set[str]:
        return {"y", "alias"}


class Core:
    """OpenVINO on a CPU with these types."""

    def __init__(self, *types: str) -> None:
        self.types, self.asked = types, list[Any]()

    def get_property(self, device: str, name: str) -> tuple[str, ...]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return self.types

    def read_model(self, path: Path) -> Path:
        return path

    def compile_model(self, model: Path, device: str, hints: dict[str, str]) -> Any:
        if model.name == "broken.onnx":
            raise RuntimeError("Check failed\n  in  a line")
        self.asked.append((model, device, hints))
        port = Port()
        infer = SimpleNamespace(infer=lambda feed: {port: np.asarray(list(feed.values())[0])})
        return SimpleNamespace(create_infer_request=lambda: infer, outputs=[port])


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "f32"), ("bf16", "bf16")])
def test_openvino_takes_its_threads_and_computes_in_the_type_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, kind: str
) -> None:
    core = Core("FP32", "BF16")
    monkeypatch.setattr(openvino, "core", lambda: core)
    found = openvino.opener(3, precision)(tmp_path / "a.onnx")
    assert core.asked == [
        (tmp_path / "a.onnx", "CPU", {
            "INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": "3", "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": "NO",
        }),
    ]  # fmt: skip
    given = np.ones((2, 3), np.float32).T
    first, second = found.run(["alias", "y"], {"x": given})
    np.testing.assert_array_equal(first, given)
    first[:] = 5
    assert second.max() == 1 and given.max() == 1, "outputs are copies, which the next call does not write over"


def test_openvino_says_what_it_cannot_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core("FP32")
    monkeypatch.setattr(openvino, "core", lambda: core)
    monkeypatch.setattr(openvino.importlib.metadata, "version", lambda name: "9.9")
    with pytest.raises(BundleError, match=f"^{tmp_path} computes in bfloat16, which this CPU does not support$"):
        openvino.open_openvino(tmp_path / "a.onnx", 1, "bf16")
    with pytest.raises(BundleError, match="broken.onnx does not open in openvino 9.9: Check failed in a line$"):
        openvino.open_openvino(tmp_path / "broken.onnx", 1, "fp32")


@pytest.mark.parametrize(
    ("there", "amx", "expected"),
    [
        (
            ["openvino-staged-fp32", "openvino-fused-bf16", "openvino-staged-bf16"],
            True,
            ("openvino-fused-bf16", "bf16"),
        ),
        (
            ["openvino-staged-fp32", "openvino-fused-bf16", "openvino-staged-bf16"],
            False,
            ("openvino-staged-fp32", "fp32"),
        ),
        (["openvino-staged-fp32", "openvino-fused-fp32"], True, ("openvino-fused-fp32", "fp32")),
        ([], False, ("openvino-staged-fp32", "fp32")),
    ],
)
def test_openvino_serves_the_faster_form_that_the_cpu_is_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], amx: bool, expected: tuple[str, str]
) -> None:
    for name in there:
        (tmp_path / "runtimes" / name).mkdir(parents=True)
    monkeypatch.setattr(openvino, "has_amx", lambda: amx)
    monkeypatch.setattr(openvino, "opener", lambda threads, precision: (threads, precision))
    monkeypatch.setattr(openvino, "make_runtime", lambda *given: given)
    assert openvino.openvino_runtime(tmp_path, STUDENT, 5) == (tmp_path, STUDENT, 5, expected[0], (5, expected[1]))


def test_by_its_name_bfloat16_is_served_without_amx_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtimes" / "openvino-staged-bf16").mkdir(parents=True)
    monkeypatch.setattr(openvino, "has_amx", lambda: False)
    monkeypatch.setattr(openvino, "opener", lambda threads, precision: (threads, precision))
    monkeypatch.setattr(openvino, "make_runtime", lambda *given: given)
    named: Any = openvino.openvino_runtime(tmp_path, STUDENT, 5, "openvino-staged-bf16")
    assert named[3:] == ("openvino-staged-bf16", (5, "bf16"))
    with pytest.raises(BundleError, match="openvino-staged-bf16 computes in bfloat16, and this CPU has no AMX$"):
        openvino.openvino_runtime(tmp_path, STUDENT, 5)
