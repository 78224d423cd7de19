"""A student in three graphs: the whole pipeline and each stage against torch, for each family that can be compiled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import typer

from export import run as command
from export.staged import staged_parts
from student.bundle import BundleError, Student, read_student
from student.families.find import family_of_student
from student.noise import noise
from student.pipeline import open_pipeline, reproduce
from student.runtimes.load import load
from student.runtimes.onnx import STAGED_FP32, onnx_runtime
from student.runtimes.openvino import open_openvino
from student.runtimes.runtime import StepwiseRuntime
from student.runtimes.session import open_session
from student.runtimes.stages import text_outputs
from student.tokens import PromptTokens
from tests.export.conftest import MAKERS, Compile
from tests.student.families import tiny

PROMPTS, SEEDS = [*tiny.PROMPTS, "star", "ring of a star"], [0, 1, 2, 3, 2**32 - 1]


@pytest.fixture(scope="module", params=list(MAKERS))
def staged(request: pytest.FixtureRequest, compile_family: Compile) -> Path:
    """A student compiled from its seed. Not to be written to."""
    return compile_family(request.param)


def sessions(bundle: Path, library: str) -> dict[str, Any]:
    """The graphs in ONNX Runtime or in OpenVINO."""
    opened = {"onnx": lambda path: open_session(path, 1), "openvino": lambda path: open_openvino(path, 1, "fp32")}
    return {path.stem: opened[library](path) for path in (bundle / "runtimes" / STAGED_FP32).glob("*.onnx")}


def test_diffusers_draws_the_same_pictures_at_every_step_count(staged: Path) -> None:
    student = read_student(staged)
    runtime = onnx_runtime(staged, student, threads=1)
    pipe = open_pipeline(staged)
    for steps in student.steps:
        images = runtime.draw(PROMPTS, SEEDS, steps)
        frames = () if student.image.frames is None else (1,)
        assert images.shape == (5, *frames, 3, 64, 32) and images.std() > 0.02
        np.testing.assert_allclose(images, reproduce(pipe, student, PROMPTS, SEEDS, steps), atol=1e-4)


@pytest.mark.parametrize("library", ["onnx", "openvino"])
def test_each_stage_is_that_of_torch(staged: Path, library: str) -> None:
    pytest.importorskip("onnxruntime" if library == "onnx" else library)
    student = read_student(staged)
    model = family_of_student(open_pipeline(staged), student)
    stages, x = sessions(staged, library), torch.from_numpy(noise(SEEDS, student.latents.shape))
    with torch.no_grad():
        condition = model.encode(PROMPTS)
        sigma_B = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.01])
        v, images = model.velocity(x, sigma_B, condition), model.decode(x)
    tokens = PromptTokens(staged, student.max_tokens, student.family)
    ids = dict(zip(tokens.names, tokens.encode(PROMPTS), strict=True))
    names = text_outputs(student.family)
    text = dict(zip(names, stages["text"].run(names, ids), strict=True))
    np.testing.assert_allclose(text["tokens"], condition.tokens_BLE, atol=1e-5)
    if condition.pooled_BP is not None:
        np.testing.assert_allclose(text["pooled"], condition.pooled_BP, atol=1e-5)
    high_B = sigma_B.numpy() >= (model.boundary or 0)
    for step, rows_B in (("step", high_B), ("step_2", ~high_B)):
        feed = {"latents": x.numpy(), "sigma": sigma_B.numpy(), **text}
        if rows_B.any():
            found = stages[step].run(["velocity"], {name: array[rows_B] for name, array in feed.items()})[0]
            np.testing.assert_allclose(found, v[torch.from_numpy(rows_B)], atol=1e-4)
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
def test_two_exports_are_equal_to_the_byte(staged: Path, tmp_path: Path) -> None:
    student = read_student(staged)
    tokens = PromptTokens(staged, student.max_tokens, student.family)
    for stage, part in staged_parts(family_of_student(open_pipeline(staged), student), student, tokens).items():
        part.export(tmp_path / f"{stage}.onnx")
        first = staged / "runtimes" / STAGED_FP32 / f"{stage}.onnx"
        assert first.read_bytes() == (tmp_path / f"{stage}.onnx").read_bytes()


def test_the_loader_takes_it_and_the_manifest_tells_its_shapes(staged: Path) -> None:
    assert load(staged).name == STAGED_FP32
    student = read_student(staged)
    manifest = json.loads((staged / "runtimes" / STAGED_FP32 / "manifest.json").read_text("utf-8"))
    steps = {"step", "step_2"} if "boundary" in manifest else {"step"}
    assert manifest["form"] == "staged" and set(manifest["stages"]) == {"text", "decoder"} | steps
    assert all(manifest["stages"][step]["inputs"]["latents"] == ["batch", *student.latents.shape] for step in steps)
    assert manifest["stages"]["decoder"]["outputs"]["images"][-3:] == [3, 64, 32]
    assert all(0 < value < 1e-3 for parity in manifest["parity"].values() for value in parity["max_abs"].values())
    assert all(parity["psnr_db"] > 80 for parity in manifest["parity"].values())
    errors = manifest["stage_errors"]
    assert set(errors) == {"text", "decoder"} | steps and sum(len(errors[step]["per_step"]) for step in steps) == 3
    assert all(0 < row["relative"] < 1e-5 for row in errors.values())


def test_torch_serves_the_same_pictures(staged: Path) -> None:
    student = read_student(staged)
    ours = load(staged, "torch").draw(PROMPTS, SEEDS, 3)
    np.testing.assert_allclose(ours, onnx_runtime(staged, student, 1).draw(PROMPTS, SEEDS, 3), atol=1e-4)


def test_steps_can_be_watched_and_stopped(staged: Path) -> None:
    """A preview is what the network predicts there; a preview of the last step but one of one step is the picture."""
    runtime = onnx_runtime(staged, read_student(staged), 1)
    assert isinstance(runtime, StepwiseRuntime)
    seen: list[tuple[int, np.ndarray]] = []
    watched = runtime.draw_watched(PROMPTS, SEEDS, 3, lambda step, preview: seen.append((step, preview([4, 1]))))
    np.testing.assert_array_equal(watched, runtime.draw(PROMPTS, SEEDS, 3))
    assert [step for step, _ in seen] == [0, 1]
    model = family_of_student(open_pipeline(staged), runtime.student)
    sigma = runtime.student.sigmas[3][0]
    x = torch.from_numpy(noise(SEEDS, runtime.student.latents.shape))
    with torch.no_grad():
        predicted = model.decode(x - sigma * model.velocity(x, sigma, model.encode(PROMPTS)))
    np.testing.assert_allclose(seen[0][1], predicted[[4, 1]], atol=1e-4)

    def stop(step: int, preview: object) -> None:
        raise InterruptedError(step)

    with pytest.raises(InterruptedError, match="0"):
        runtime.draw_watched(PROMPTS, SEEDS, 3, stop)


def test_one_by_one_through_the_stages_gives_the_same_pictures(staged: Path) -> None:
    runtime = onnx_runtime(staged, read_student(staged), 1)
    alone = np.concatenate([runtime.draw([p], [s], 2) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    runtime._graphs.together = (1,)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(runtime.draw(PROMPTS, SEEDS, 2), alone)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of SD3 that a test may break."""
    bundle = tmp_path_factory.mktemp("broken") / "tiny"
    tiny.build(bundle, tiny.sd3())
    return bundle


def test_a_wrong_timestep_is_caught_and_nothing_is_written(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from student.families.sd3 import SD3

    right = SD3._predict
    monkeypatch.setattr(SD3, "_predict", lambda self, x, sigma_B, condition: right(self, x, sigma_B * 0.9, condition))
    with pytest.raises(typer.Exit):
        command.run(student=copy, to="onnx")
    said = capsys.readouterr().err
    assert "the images of 3 steps differ from torch by" in said and "each stage alone agrees with torch" in said
    assert "nothing was written" in said and not (copy / "runtimes" / STAGED_FP32).exists()


def test_a_student_with_guidance_is_refused(copy: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(copy, tmp_path / "guided"))
    data = json.loads((bundle / "student.json").read_text("utf-8")) | {"baked": {"guidance_scale": 4.5}}
    (bundle / "student.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="baked.guidance_scale is 4.5: accepted for the family sd3 is 1, no guidance"):
        load(bundle, "torch")


def test_an_unknown_form_is_one_sentence(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        command.run(student=copy, to="onnx", form="folded")
    assert capsys.readouterr().err == "export: form is 'folded': accepted are staged, fused\n"


def test_ids_are_those_of_the_pipeline(staged: Path) -> None:
    student: Student = read_student(staged)
    model = family_of_student(open_pipeline(staged), student)
    tokens = PromptTokens(staged, student.max_tokens, student.family)
    for ours, theirs in zip(tokens.encode(PROMPTS), model.tokenise(PROMPTS), strict=True):
        np.testing.assert_array_equal(ours, theirs)
