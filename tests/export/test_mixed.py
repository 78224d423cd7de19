"""A stage that the exporter does not take stays in torch; what draws is the same, and the reason is named."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from export import run as command
from student.bundle import BundleError, read_student
from student.families import stages
from student.pipeline import open_pipeline, reproduce
from student.runtimes.load import load
from student.runtimes.manifest import read_manifest
from tests.student.families import tiny

FOLDER = "onnx-staged-fp32"
REASON = r"the operator prims\.digamma"  # torch has it and ONNX has not


def unexportable(module: type) -> Callable[..., Any]:
    """A forward that adds nothing, by an operator that has no ONNX form."""
    right = module.forward

    @functools.wraps(right)
    def forward(self: Any, *inputs: torch.Tensor) -> Any:
        answer = right(self, *inputs)
        first = answer[0] if isinstance(answer, tuple) else answer
        same = first + torch.special.digamma(first.abs() + 1.0) * 0.0
        return (same, *answer[1:]) if isinstance(answer, tuple) else same

    return forward


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of FLUX whose decoder has no ONNX form."""
    bundle = tmp_path_factory.mktemp("mixed") / "tiny"
    tiny.build(bundle, tiny.flux(seed=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Decoder, "forward", unexportable(stages.Decoder))
        command.run(student=bundle, to="onnx")
    return bundle


def test_the_manifest_names_the_operator_and_only_the_others_are_files(mixed: Path) -> None:
    manifest = read_manifest(mixed / "runtimes" / FOLDER)
    assert list(manifest.in_torch) == ["decoder"] and set(manifest.stages) == {"text", "step"}
    assert "tiny-flux-decoder has no ONNX form: the operator prims.digamma" in manifest.in_torch["decoder"]
    files = sorted(path.name for path in (mixed / "runtimes" / FOLDER).iterdir())
    assert files == ["manifest.json", "step.onnx", "text.onnx"]
    assert manifest.stage_errors.keys() == {"text", "step", "decoder"}


def test_it_draws_what_diffusers_draws_and_shows_its_steps(mixed: Path) -> None:
    student, runtime = read_student(mixed), load(mixed, "onnx")
    prompts, seeds = ["a red heart", "ring"], [7, 11]
    images = runtime.draw(prompts, seeds, 3)
    np.testing.assert_allclose(images, reproduce(open_pipeline(mixed), student, prompts, seeds, 3), atol=1e-4)
    np.testing.assert_array_equal(images[:1], runtime.draw(prompts[:1], seeds[:1], 3))
    shown: list[int] = []
    runtime.draw_watched(prompts, seeds, 3, lambda step, preview: shown.append(len(preview([1]))))  # type: ignore[attr-defined]
    assert shown == [1, 1]


def test_without_torch_or_with_other_weights_it_is_refused(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(mixed, tmp_path / "copy"))
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"other")
    with pytest.raises(BundleError, match="has changed since student.json was written"):
        load(copy, "onnx")
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else there(name))
    with pytest.raises(BundleError, match=rf"runs a stage in torch, and torch is not installed: decoder .*{REASON}"):
        load(mixed, "onnx")


def test_where_nothing_can_be_compiled_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.build(tmp_path / "tiny", tiny.flux(seed=6))
    for module in (stages.Text, stages.Step, stages.Decoder):
        monkeypatch.setattr(module, "forward", unexportable(module))
    with pytest.raises(typer.Exit):
        command.run(student=tmp_path / "tiny", to="onnx")
    said = capsys.readouterr().err
    assert said.startswith(
        "export: nothing can be compiled: tiny-flux-text has no ONNX form: the operator prims.digamma"
    )
    assert said.count("\n") == 1 and not list((tmp_path / "tiny" / "runtimes").glob("[!.]*"))


def test_the_same_module_breaks_the_proof_if_torch_draws_otherwise(mixed: Path, tmp_path: Path) -> None:
    """The stage in torch is proven like the others: a manifest of another student's is refused."""
    copy = Path(shutil.copytree(mixed, tmp_path / "copy"))
    path = copy / "runtimes" / FOLDER / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"source_sha256": "0"}))
    with pytest.raises(BundleError, match="was made from another student"):
        load(copy, "onnx")
