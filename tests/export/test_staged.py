"""A student in three graphs: the whole pipeline and each stage against torch, for each family that can be compiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import typer

from export import run as command
from export import to_onnx
from export.errors import ExportError
from export.staged import export_stages
from student.bundle import BundleError, Student, read_student
from student.families.find import family_of_student
from student.noise import noise
from student.pipeline import open_pipeline, reproduce
from student.runtimes.load import load
from student.runtimes.onnx import STAGED_FP32, OnnxRuntime
from student.runtimes.session import open_session
from student.tokens import PromptTokens
from tests.student.families import tiny

PROMPTS, SEEDS = [*tiny.PROMPTS, "star", "ring of a star"], [0, 1, 2, 3, 2**32 - 1]
MAKERS: dict[str, Callable[[], Any]] = {
    "flux": lambda: tiny.flux(guidance_embeds=True),
    "sd3": tiny.sd3,
    "sd3 without T5": lambda: tiny.sd3(with_t5=False, dual=False),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def staged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student made and compiled on the spot. Not to be written to."""
    bundle = tmp_path_factory.mktemp("staged") / "tiny"
    tiny.build(bundle, MAKERS[request.param]())
    command.run(student=bundle, to="onnx", form="staged")
    return bundle


def sessions(bundle: Path) -> dict[str, Any]:
    return {path.stem: open_session(path, 1) for path in (bundle / "runtimes" / STAGED_FP32).glob("*.onnx")}


def test_diffusers_draws_the_same_pictures_at_every_step_count(staged: Path) -> None:
    student = read_student(staged)
    runtime = OnnxRuntime(staged, student, threads=1)
    pipe = open_pipeline(staged)
    for steps in student.steps:
        images = runtime.draw(PROMPTS, SEEDS, steps)
        assert images.shape == (5, 3, 64, 32) and images.std() > 0.05
        np.testing.assert_allclose(images, reproduce(pipe, student, PROMPTS, SEEDS, steps), atol=1e-4)


def test_each_stage_is_that_of_torch(staged: Path) -> None:
    student = read_student(staged)
    model = family_of_student(open_pipeline(staged), student)
    stages, x = sessions(staged), torch.from_numpy(noise(SEEDS, student.latents.shape))
    with torch.no_grad():
        condition = model.encode(PROMPTS)
        sigma_B = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.01])
        v, images = model.velocity(x, sigma_B, condition), model.decode(x)
    tokens = PromptTokens(staged, student.max_tokens, student.family)
    ids = dict(zip(tokens.names, tokens.encode(PROMPTS), strict=True))
    text = dict(zip(("tokens", "pooled"), stages["text"].run(["tokens", "pooled"], ids), strict=True))
    assert condition.pooled_BP is not None
    np.testing.assert_allclose(text["tokens"], condition.tokens_BLE, atol=1e-5)
    np.testing.assert_allclose(text["pooled"], condition.pooled_BP, atol=1e-5)
    feed = {"latents": x.numpy(), "sigma": sigma_B.numpy(), **text}
    np.testing.assert_allclose(stages["step"].run(["velocity"], feed)[0], v, atol=1e-4)
    np.testing.assert_allclose(stages["decoder"].run(["images"], {"latents": x.numpy()})[0], images, atol=1e-5)


def test_graphs_are_whole_and_say_whose_they_are(staged: Path) -> None:
    student = read_student(staged)
    for path in (staged / "runtimes" / STAGED_FP32).glob("*.onnx"):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        metadata = {prop.key: prop.value for prop in model.metadata_props}
        assert metadata == {
            "student": f"{student.id} 1",
            "source_sha256": student.fingerprint(),
            "stage": path.stem,
        }
        assert not any(node.op_type.startswith("Sequence") for node in model.graph.node)  # TensorRT has none of them


@pytest.mark.parametrize("staged", ["sd3"], indirect=True)
def test_two_exports_are_equal_to_the_byte(staged: Path) -> None:
    student = read_student(staged)
    tokens = PromptTokens(staged, student.max_tokens, student.family)
    again = export_stages(family_of_student(open_pipeline(staged), student), student, tokens)
    for path in (staged / "runtimes" / STAGED_FP32).glob("*.onnx"):
        assert path.read_bytes() == again[path.stem]


def test_the_loader_takes_it_and_the_manifest_tells_its_shapes(staged: Path) -> None:
    assert load(staged).name == STAGED_FP32
    manifest = json.loads((staged / "runtimes" / STAGED_FP32 / "manifest.json").read_text("utf-8"))
    assert manifest["form"] == "staged" and set(manifest["stages"]) == {"text", "step", "decoder"}
    assert manifest["stages"]["step"]["inputs"]["latents"] == ["batch", 4, 8, 4]
    assert manifest["stages"]["decoder"]["outputs"] == {"images": ["batch", 3, 64, 32]}
    assert all(0 < value < 1e-4 for parity in manifest["parity"].values() for value in parity["max_abs"].values())


def test_torch_serves_the_same_pictures(staged: Path) -> None:
    student = read_student(staged)
    ours = load(staged, "torch").draw(PROMPTS, SEEDS, 3)
    np.testing.assert_allclose(ours, OnnxRuntime(staged, student, 1).draw(PROMPTS, SEEDS, 3), atol=1e-4)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of SD3 that a test may break."""
    bundle = tmp_path_factory.mktemp("broken") / "tiny"
    tiny.build(bundle, tiny.sd3())
    return bundle


def test_a_wrong_timestep_is_caught_and_nothing_is_written(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from student.families.sd3 import SD3

    right = SD3._predict
    monkeypatch.setattr(SD3, "_predict", lambda self, x, sigma_B, condition: right(self, x, sigma_B * 0.9, condition))
    with pytest.raises(ExportError, match="the images of 3 steps differ from torch by .* nothing was written"):
        to_onnx.export_student(copy, read_student(copy), threads=1, form="staged")
    assert not (copy / "runtimes" / STAGED_FP32).exists()


def test_a_student_with_guidance_is_refused(copy: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(copy, tmp_path / "guided"))
    data = json.loads((bundle / "student.json").read_text("utf-8")) | {"baked": {"guidance_scale": 4.5}}
    (bundle / "student.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="baked.guidance_scale is 4.5: a student of sd3 draws without guidance"):
        load(bundle, "torch")


def test_an_unknown_form_is_one_sentence(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        command.run(student=copy, to="onnx", form="folded")
    assert capsys.readouterr().err == "export: form is 'folded': accepted is fused, staged\n"


def test_ids_are_those_of_the_pipeline(staged: Path) -> None:
    student: Student = read_student(staged)
    model = family_of_student(open_pipeline(staged), student)
    tokens = PromptTokens(staged, student.max_tokens, student.family)
    for ours, theirs in zip(tokens.encode(PROMPTS), model.tokenise(PROMPTS), strict=True):
        np.testing.assert_array_equal(ours, theirs)
