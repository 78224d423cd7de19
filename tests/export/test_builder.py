"""Engines are built by a process that may fail in any way: each is one sentence, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from export import builder, engine
from export.builder import build_engine
from export.engine import Order
from export.errors import ExportError
from export.graph import Signature, export_graph, save, shapes_of
from export.narrow import FLOAT32_STAGES, narrow
from export.quantise import quantise
from export.request import EngineOptions
from export.staged import staged_parts
from export.to_tensorrt import TensorRT, profiles
from student.families.find import family_of_student
from student.pipeline import open_pipeline
from student.tokens import PromptTokens
from tests.export.conftest import MAKERS, Compile
from tests.student.families import tiny

NEEDS_RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install tensorrt-rtx"
)
GIB = 2**30


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.transpose(1, 2)


class Modulated(nn.Module):
    """Products of tokens with weights, and of one vector, which is a Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back, self.scale = nn.Linear(4, 64), nn.Linear(64, 4), nn.Linear(4, 64)

    def forward(self, x: Tensor) -> Tensor:
        back: Tensor = self.back(nn.functional.gelu(self.wide(x)) * self.scale(x[:, 0])[:, None])
        return back


class Determinant(nn.Module):
    """ONNX has it, TensorRT has not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x)


def order(folder: Path, module: nn.Module) -> Order:
    signature = Signature("test", {"x": torch.zeros(2, 4, 4)}, ("y",))
    (folder / "graph.onnx").write_bytes(export_graph(module, signature, {}))
    return Order(
        library="tensorrt_rtx",
        onnx=str(folder / "graph.onnx"),
        plan=str(folder / "step.engine"),
        inputs={"x": ("batch", 4, 4)},
        profiles=profiles((1, 8)),
        workspace_bytes=GIB,
        level=1,
    )


class Config:
    """A builder's configuration that notes its flags; as the real one it allows TF32 from the start."""

    def __init__(self) -> None:
        self.flags, self.pool = {"TF32"}, dict[str, int]()

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.pool[pool] = size

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)


@pytest.mark.parametrize(
    ("precision", "stage", "tf32"),
    [
        ("bf16", "decoder", True),
        ("fp16", "decoder-96x64", True),
        ("fp8", "decoder", True),
        ("fp32", "decoder", False),
        ("bf16", "step", False),
        ("bf16", "text", False),
    ],
)
def test_only_a_decoder_beside_narrower_stages_may_round_its_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, stage: str, tf32: bool
) -> None:
    request: Any = SimpleNamespace(engine=EngineOptions(), precision=precision)
    asked = TensorRT("tensorrt_rtx")._order(request, stage, tmp_path / "a.onnx", tmp_path / "a.engine", {})
    names = SimpleNamespace(WORKSPACE="w", TF32="TF32")
    trt = SimpleNamespace(MemoryPoolType=names, BuilderFlag=names)
    monkeypatch.setattr(engine, "_monitor", lambda trt: None)
    config = engine._configure(trt, SimpleNamespace(create_builder_config=Config), asked)
    assert asked.tf32 is tf32 and config.flags == ({"TF32"} if tf32 else set())


def test_one_profile_for_each_batch_size_from_behind_the_one_before() -> None:
    assert profiles((8, 1, 2, 4)) == ((1, 1, 1), (2, 2, 2), (3, 4, 4), (5, 8, 8))
    assert profiles((1,)) == ((1, 1, 1),)


@NEEDS_RTX
def test_an_engine_is_built_without_a_gpu_and_says_how_it_goes(tmp_path: Path) -> None:
    said: list[str] = []
    last = build_engine(order(tmp_path, Product()), 4 * GIB, said.append, tmp_path)
    assert last["bytes"] == (tmp_path / "step.engine").stat().st_size > 1000 and last["layers"] > 0
    assert said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.onnx", "step.engine"]


@NEEDS_RTX
def test_a_graph_in_fp8_builds(tmp_path: Path) -> None:
    """For the GPUs that have it; tensorrt_rtx leaves the others out, and says so where none is left."""
    wide, target = tmp_path / "graph.onnx", tmp_path / "fp8.onnx"
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of which each layer bears eight bits
        one = order(tmp_path, Modulated())
    quantise(wide, tmp_path / "eight.onnx", [{"x": np.ones((2, 4, 4), np.float32)}], "fp8")
    save(narrow(ir.load(tmp_path / "eight.onnx"), "bf16"), target)
    kinds = {value.dtype for node in ir.load(target).graph for value in node.outputs}
    assert {ir.DataType.FLOAT8E4M3FN, ir.DataType.BFLOAT16} <= kinds
    assert "Gemm" in {node.op_type for node in ir.load(wide).graph}
    eight = [value for value in ir.load(target).graph.initializers.values() if value.dtype == ir.DataType.FLOAT8E4M3FN]
    assert sum(len(value.shape or ()) == 2 for value in eight) == 3
    assert build_engine(replace(one, onnx=str(target)), 4 * GIB, lambda text: None, tmp_path)["bytes"] > 1000


@NEEDS_RTX
def test_an_operator_that_it_does_not_take_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"tensorrt_rtx cannot read graph.onnx: the operator Det "):
        build_engine(order(tmp_path, Determinant()), 4 * GIB, lambda text: None, tmp_path)
    assert not (tmp_path / "step.engine").exists()


@NEEDS_RTX
def test_a_build_that_takes_too_much_memory_is_ended(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"building step needs more than 0.0 GiB of memory: allow more with"):
        build_engine(order(tmp_path, Product()), 10 * 2**20, lambda text: None, tmp_path)
    assert not (tmp_path / "step.engine").exists()


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    absent = replace(order(tmp_path, Product()), library="tensorrt_of_another_planet")
    with pytest.raises(ExportError, match="No module named 'tensorrt_of_another_planet'"):
        build_engine(absent, 4 * GIB, lambda text: None, tmp_path)


def test_a_process_that_dies_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho gone wrong >&2\nkill -SEGV $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(builder.sys, "executable", str(script))
    with pytest.raises(ExportError, match="the process that built step died with status -11: gone wrong"):
        build_engine(order(tmp_path, Product()), 4 * GIB, lambda text: None, tmp_path)


def test_an_interrupted_build_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho $$ > " + str(tmp_path / "pid") + '\necho \'{"phase": "waiting"}\'\nexec sleep 60\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(builder.sys, "executable", str(script))

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(order(tmp_path, Product()), 4 * GIB, interrupt, tmp_path)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert threading.active_count() < 10


@NEEDS_RTX
@pytest.mark.parametrize("family", [name for name in MAKERS if name != "sd3 without T5"])
def test_every_graph_of_every_family_builds(compile_family: Compile, tmp_path: Path, family: str) -> None:
    """What "TensorRT-compatible" means here: each stage in bfloat16, as a GPU would get it, is parsed and built."""
    folder = compile_family(family) / "runtimes" / "onnx-staged-fp32"
    for stage in ("text", "step", *(["step_2"] if family == "wan_14b" else []), "decoder"):
        check_builds(folder / f"{stage}.onnx", stage, tmp_path)


@NEEDS_RTX
@pytest.mark.parametrize("make", [tiny.wan, tiny.wan_5b], ids=["wan", "wan_5b"])
def test_the_graphs_of_a_video_of_several_frames_build(tmp_path: Path, make: Callable[[], Any]) -> None:
    student = tiny.build(tmp_path / "tiny", make(), frames=5)
    model = family_of_student(open_pipeline(tmp_path / "tiny"), student)
    parts = staged_parts(model, student, PromptTokens(tmp_path / "tiny", student.max_tokens, student.family))
    for stage in ("step", "decoder"):
        parts[stage].export(tmp_path / f"{stage}.whole.onnx")
        assert shapes_of(tmp_path / f"{stage}.whole.onnx")[0]["latents"][2] == 2  # latent frames
        check_builds(tmp_path / f"{stage}.whole.onnx", stage, tmp_path)


def check_builds(graph: Path, stage: str, folder: Path) -> None:
    """The stage in bfloat16 is parsed and built."""
    target = folder / f"{stage}.onnx"
    keep = None if stage not in FLOAT32_STAGES["bf16"] else {node.op_type for node in ir.load(graph).graph}
    save(narrow(ir.load(graph), "bf16", keep=keep), target)
    one = Order("tensorrt_rtx", str(target), str(folder / f"{stage}.engine"), shapes_of(target)[0],
                profiles((4,)), GIB, level=1)  # fmt: skip
    assert build_engine(one, 4 * GIB, lambda text: None, folder)["bytes"] > 1000
