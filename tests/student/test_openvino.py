"""OpenVINO on the same graphs: as near as its precision allows, and bfloat16 only where it is meant to serve."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from export import run as command
from student.bundle import BundleError, read_student
from student.runtimes import openvino
from student.runtimes.load import load
from tests import tiny
from tests.service.support import REPOSITORY

pytest.importorskip("openvino", reason="openvino is not installed: pip install fewstep[openvino]")
SEEDS = list(range(len(tiny.PROMPTS)))


@pytest.fixture(scope="module")
def both(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused graphs of the tiny student for OpenVINO in both precisions; they are not traced again."""
    if "BF16" not in openvino.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU does not compute in bfloat16")
    copy = Path(shutil.copytree(compiled, tmp_path_factory.mktemp("openvino") / "tiny"))
    for precision in ("fp32", "bf16"):
        command.run(student=copy, to="openvino", form="fused", precision=precision)
    return copy


SIGNALLED = """
import gc, os, signal, sys, threading
from pathlib import Path
from student.runtimes.openvino import open_openvino

sessions = [open_openvino(Path(sys.argv[1]), 1, "fp32")]
closing = threading.Thread(target=lambda: (sessions.clear(), gc.collect()))
closing.start()
closing.join()
signal.signal(signal.SIGTERM, lambda *_: print("drains", flush=True))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_process_still_hears_signals_after_another_thread_has_closed_a_graph(tmp_path: Path) -> None:
    """A worker whose model was replaced is to drain when it is told to end, and not to crash."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "doubled", [x], [y])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "doubled.onnx")
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path / "doubled.onnx")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "drains\n"), done.stderr


def test_both_draw_what_onnx_runtime_draws(both: Path) -> None:
    wanted = load(both, "onnx").draw(tiny.PROMPTS, SEEDS, 4)
    exact = load(both, "openvino-fused-fp32").draw(tiny.PROMPTS, SEEDS, 4)
    np.testing.assert_allclose(exact, wanted, atol=1e-4)
    short = load(both, "openvino-fused-bf16").draw(tiny.PROMPTS, SEEDS, 4)
    assert 1e-3 < np.abs(short - wanted).max() and np.square(short - wanted).mean() < 1e-3


def test_graphs_are_those_of_onnx(both: Path) -> None:
    for name in ("2-steps.onnx", "4-steps.onnx"):
        same = {(both / "runtimes" / folder / name).read_bytes() for folder in
                ("onnx-fused-fp32", "openvino-fused-fp32", "openvino-fused-bf16")}  # fmt: skip
        assert len(same) == 1


def test_bfloat16_serves_unasked_only_with_amx(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "has_amx", lambda: True)
    assert load(both).name == load(both, "openvino").name == "openvino-fused-bf16"
    monkeypatch.setattr(openvino, "has_amx", lambda: False)
    assert load(both).name == load(both, "openvino").name == "openvino-fused-fp32"
    shutil.rmtree(both / "runtimes" / "openvino-fused-fp32")
    with pytest.raises(BundleError, match="openvino-fused-bf16 computes in bfloat16, and this CPU has no AMX"):
        load(both, "openvino")
    assert load(both).name == "onnx-fused-fp32"


def test_a_list_names_what_may_serve_and_nothing_else_does(compiled: Path, tmp_path: Path) -> None:
    assert load(compiled, "openvino,onnx").name == "onnx-fused-fp32"
    with pytest.raises(BundleError, match="no runtime can serve .*: openvino: .*; onnx-staged-int8: .*has no runtime"):
        load(compiled, "openvino,onnx-staged-int8")


def test_one_beyond_its_floor_is_refused(both: Path) -> None:
    path = both / "runtimes" / "openvino-fused-bf16" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["parity"]["4"]["least_psnr_db"] == 30.0 < manifest["parity"]["4"]["psnr_db"]
    manifest["parity"]["4"]["psnr_db"] = 29.0
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="has a PSNR of 29.0 dB at 4 steps: accepted is 30.0 or more"):
        load(both, "openvino-fused-bf16")
    assert read_student(both).id == "tiny"


def test_an_output_has_its_own_name_where_openvino_knows_others_for_it_too(tmp_path: Path) -> None:
    """OpenVINO drops an Identity before an output, and may then name the output after what went in (FLUX's prompts)."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Relu", ["x"], ["hidden"]),
        helper.make_node("Identity", ["hidden"], ["tokens"]),
        helper.make_node("Neg", ["tokens"], ["pooled"]),
    ]
    values = [helper.make_tensor_value_info(name, kind, [2]) for name in ("x", "tokens", "pooled")]
    model = helper.make_model(
        helper.make_graph(nodes, "text", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "text.onnx")
    session = openvino.open_openvino(tmp_path / "text.onnx", 1, "fp32")
    pooled, tokens = session.run(["pooled", "tokens"], {"x": np.array([-1.0, 2.0], np.float32)})
    np.testing.assert_array_equal(tokens, [0.0, 2.0])
    np.testing.assert_array_equal(pooled, [0.0, -2.0])
