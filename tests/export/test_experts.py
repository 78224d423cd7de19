"""Wan 2.2 14B compiled: a step graph for each of its two experts, chosen by sigma; all runtimes draw as torch does."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import run as command
from export.compile import _Compilation
from export.errors import ExportError, NoOnnxForm
from export.preflight import boundary_of, estimates
from export.verify import FP32, prove
from student.bundle import read_student
from student.families.find import family_of_student
from student.files import write_student
from student.noise import noise
from student.pipeline import open_pipeline, reproduce
from student.runtimes.experts import stages_of, step_stage
from student.runtimes.load import load
from student.runtimes.manifest import read_manifest
from student.runtimes.onnx import STAGED_FP32
from student.runtimes.session import open_session
from student.runtimes.stages import StagedGraphs
from tests.export.conftest import Compile
from tests.student.families import tiny

PROMPTS, SEEDS = ["a red heart", "", "ring"], [7, 2**32 - 1, 3]
BOUNDARY = 0.875
LOW = (0.8, 0.4)


@pytest.fixture(scope="module")
def compiled(compile_family: Compile) -> Path:
    """Steps 3 and 2, of which the first is the expert's for high noise and the others are the other's."""
    return compile_family("wan_14b")


def test_a_sigma_belongs_to_the_expert_that_the_family_calls(compiled: Path) -> None:
    """At the boundary and the float32 numbers next to it, too, and for sigmas that no float32 is equal to."""
    model = family_of_student(open_pipeline(compiled), read_student(compiled))
    called: list[str] = []
    for stage, expert in (("step", model.transformer), ("step_2", model.transformer_2)):
        expert.register_forward_pre_hook(lambda *_, stage=stage: called.append(stage))
    x = torch.from_numpy(noise([1], model.latent_shape(32, 32)))
    with torch.no_grad():
        condition = model.encode(["a"])
    near = np.float32(BOUNDARY)
    edge = [float(near), float(np.nextafter(near, np.float32(0))), float(np.nextafter(near, np.float32(1)))]
    sigmas = [1.0, 0.1, *edge, BOUNDARY - 1e-9, BOUNDARY - 1e-7, 8 / 9, 7 / 9]
    with torch.no_grad():
        for sigma in sigmas:
            model.velocity(x, sigma, condition)
    assert [step_stage(sigma, model.boundary) for sigma in sigmas] == called
    assert Counter(called) == {"step": 5, "step_2": 4}
    assert step_stage(0.1, None) == "step"


def test_each_step_graph_has_the_weights_of_its_own_expert(compiled: Path) -> None:
    student = read_student(compiled)
    manifest = read_manifest(compiled / "runtimes" / STAGED_FP32)
    assert manifest.boundary == BOUNDARY == boundary_of(compiled) and not manifest.in_torch
    assert list(manifest.stages) == ["text", "step", "step_2", "decoder"]
    assert manifest.stages["step"].sha256 != manifest.stages["step_2"].sha256
    rows = {row.stage: row.parameters for row in estimates(compiled, student, "staged", "fp32")}
    assert list(rows) == ["text", "step", "step_2", "decoder"] and rows["step"] == rows["step_2"] > 0


def _graphs(bundle: Path, files: dict[str, str]) -> StagedGraphs:
    folder = bundle / "runtimes" / STAGED_FP32
    paths = {stage: folder / name for stage, name in files.items()}
    return StagedGraphs(bundle, read_student(bundle), paths, lambda path: open_session(path, 1), boundary=BOUNDARY)


def test_exchanged_experts_fail_the_proof(compiled: Path) -> None:
    right = {stage: f"{stage}.onnx" for stage in ("text", "step", "step_2", "decoder")}
    student, pipe = read_student(compiled), open_pipeline(compiled)
    parity, errors = prove(_graphs(compiled, right), pipe, student, FP32)
    assert set(parity) == {3, 2} and len(errors["step"].per_step) == 1 and len(errors["step_2"].per_step) == 2
    swapped = {**right, "step": "step_2.onnx", "step_2": "step.onnx"}
    with pytest.raises(ExportError, match=r"differ from torch by .*; the stage 'step' drifted from step 1 on"):
        prove(_graphs(compiled, swapped), pipe, student, FP32)
    with pytest.raises(ExportError, match=r"the stage 'step_2' drifted from step 2 on"):
        prove(_graphs(compiled, {**right, "step_2": "step.onnx"}), pipe, student, FP32)


@pytest.mark.parametrize(
    ("sigmas", "step"),
    [({1: (1.0,), 2: (1.0, 0.9)}, "step"), ({2: LOW, 1: LOW[:1]}, "step_2")],
    ids=["high", "low"],
)
def test_steps_on_one_side_of_the_boundary_need_one_graph(
    tmp_path: Path, sigmas: dict[int, tuple[float, ...]], step: str
) -> None:
    bundle = tmp_path / "tiny"
    student = tiny.build(bundle, tiny.wan_14b(seed=8), steps=(2,), height_px=32)
    student = write_student(bundle, replace(student, steps=tuple(sigmas), sigmas=sigmas))
    (bundle / "calibration.txt").write_text("a heart\na ring\n")
    command.run(student=bundle, to="onnx")
    folder = bundle / "runtimes" / STAGED_FP32
    assert set(read_manifest(folder).stages) == {"text", step, "decoder"} == set(stages_of(student, BOUNDARY))
    assert sorted(path.stem for path in folder.glob("*.onnx")) == sorted(("text", step, "decoder"))
    images = load(bundle, "onnx").draw(PROMPTS[:1], SEEDS[:1], 2)
    np.testing.assert_allclose(images, reproduce(open_pipeline(bundle), student, PROMPTS[:1], SEEDS[:1], 2), atol=1e-4)


def test_an_expert_without_an_onnx_form_stays_in_torch_alone(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(compiled, tmp_path / "copy"))
    shutil.rmtree(bundle / "runtimes")
    right = _Compilation._graph

    def without_step_2(self: Any, name: str, *rest: Any) -> Any:
        if name == "step_2":
            raise NoOnnxForm("step_2 has no ONNX form: the operator prims.digamma")
        return right(self, name, *rest)

    monkeypatch.setattr(_Compilation, "_graph", without_step_2)
    command.run(student=bundle, to="onnx")
    manifest = read_manifest(bundle / "runtimes" / STAGED_FP32)
    assert list(manifest.in_torch) == ["step_2"] and set(manifest.stages) == {"text", "step", "decoder"}
    theirs = load(compiled, "onnx").draw(PROMPTS, SEEDS, 3)
    np.testing.assert_allclose(load(bundle, "onnx").draw(PROMPTS, SEEDS, 3), theirs, atol=1e-4)


def test_both_experts_are_quantised_with_their_own_inputs(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import compile as module

    fed: dict[str, set[float]] = {}
    right = module.quantise

    def watched(graph: Path, target: Path, feeds: Any, precision: str) -> Any:
        known = list(feeds)
        fed[target.stem] = {round(float(sigma), 3) for feed in known for sigma in feed["sigma"]}
        return right(graph, target, known, precision)

    monkeypatch.setattr(module, "quantise", watched)
    bundle = Path(shutil.copytree(compiled, tmp_path / "copy"))
    command.run(student=bundle, to="onnx", precision="int8")
    assert fed == {"step": {1.0}, "step_2": {0.857, 0.6, 0.75}}
    manifest = read_manifest(bundle / "runtimes" / "onnx-staged-int8")
    assert {"step", "step_2"} <= set(manifest.stages) and manifest.boundary == BOUNDARY
    assert all(1e-4 < manifest.stage_errors[step].relative < 0.1 for step in ("step", "step_2"))


def test_openvino_draws_with_both(compiled: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install fewstep[openvino]")
    bundle = Path(shutil.copytree(compiled, tmp_path / "copy"))
    command.run(student=bundle, to="openvino", precision="fp32")
    theirs = load(compiled, "onnx").draw(PROMPTS, SEEDS, 3)
    ours = load(bundle, "openvino-staged-fp32").draw(PROMPTS, SEEDS, 3)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
