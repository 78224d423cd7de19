"""Other sizes: each a bucket with graphs of its own, proven as the student's own size is, drawn and refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from export import run as command
from service.errors import InvalidRequest
from service.http.admission import check
from service.http.schema import GenerateRequest
from student.bundle import BundleError, Student, read_student
from student.families.find import family_of_student
from student.noise import noise
from student.pipeline import open_pipeline
from student.runtimes.buckets import in_buckets, sizes_of
from student.runtimes.load import load
from student.runtimes.manifest import check_runtime, read_manifest
from student.runtimes.runtime import SizedRuntime
from student.runtimes.sizes import own_size, read_size, size_name
from student.sampler import denoise
from tests.student.families import tiny

PROMPTS, SEEDS = ["a red heart", "ring", ""], [7, 11, 2**32 - 1]


BY_SIZE = {**tiny.FLUX_DYNAMIC, "base_image_seq_len": 8, "max_image_seq_len": 16}  # from 64x32 to 64x64


def flux_by_size(seed: int) -> Any:
    """FLUX with a shift that depends much on the size, even at these."""
    return tiny.flux(seed=seed, scheduler=FlowMatchEulerDiscreteScheduler(**BY_SIZE))


def sigmas_of_diffusers(student: Student, size: tuple[int, int]) -> list[float]:
    """The two sigmas of the published scheduler at this size; an image token is 16x16 pixels."""
    if student.family == "sd3":
        return list(student.sigmas[2])
    scheduler = FlowMatchEulerDiscreteScheduler(**BY_SIZE)
    tokens = size[0] * size[1] // 16**2
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=calculate_shift(tokens, 8, 16, 0.5, 1.15))
    return [float(sigma) for sigma in scheduler.sigmas[:-1]]


@pytest.fixture(scope="module", params=["flux", "sd3"])
def sized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 32x64 pixels (width by height), compiled for 64x32 and 64x64 too."""
    bundle = tmp_path_factory.mktemp("sized") / "tiny"
    make: Any = {"flux": flux_by_size, "sd3": lambda seed: tiny.sd3(with_t5=False, dual=False, seed=seed)}
    tiny.build(bundle, make[request.param](seed=31), steps=(2,))
    command.run(student=bundle, to="onnx", size=["64x32", "32x64", "64x64"])
    return bundle


def test_names() -> None:
    assert size_name((256, 320)) == "320x256" and read_size("320x256") == (256, 320)
    for wrong in ("320", "0x64", "axb", "64x64 "):
        with pytest.raises(ValueError, match="accepted is WIDTHxHEIGHT in pixels"):
            read_size(wrong)


def test_every_size_is_drawn_as_torch_draws_it(sized: Path) -> None:
    student, runtime, in_torch = read_student(sized), load(sized, "onnx"), load(sized, "torch")
    assert (
        isinstance(in_torch, SizedRuntime)
        and isinstance(runtime, SizedRuntime)
        and runtime.sizes == ((64, 32), (32, 64), (64, 64))
    )
    manifest = read_manifest(sized / "runtimes" / "onnx-staged-fp32")
    assert list(manifest.buckets) == ["64x32", "64x64"] and set(manifest.buckets["64x32"]) == {2}
    assert set(manifest.stages) == {"text", "step", "decoder"} | {
        f"{stage}-{size}" for stage in ("step", "decoder") for size in ("64x32", "64x64")
    }
    model = family_of_student(open_pipeline(sized), student)
    with torch.no_grad():
        condition = model.encode(PROMPTS)
    for size in runtime.sizes:
        images = runtime.draw(PROMPTS, SEEDS, 2, size=size)
        assert images.shape == (3, 3, *size)
        start = torch.from_numpy(noise(SEEDS, model.latent_shape(*size)))
        with torch.no_grad():
            x = denoise(lambda x, sigma: model.velocity(x, sigma, condition), start, sigmas_of_diffusers(student, size))
            theirs = model.decode(x)
        np.testing.assert_allclose(images, theirs, atol=1e-4)
        np.testing.assert_allclose(in_torch.draw(PROMPTS, SEEDS, 2, size=size), images, atol=1e-4)
    np.testing.assert_array_equal(runtime.draw(PROMPTS, SEEDS, 2), runtime.draw(PROMPTS, SEEDS, 2, size=(64, 32)))


def test_a_size_has_sigmas_of_its_own_where_the_schedule_depends_on_it(sized: Path) -> None:
    student, manifest = read_student(sized), read_manifest(sized / "runtimes" / "onnx-staged-fp32")
    others = {bucket.name: at for bucket, at in in_buckets(student, manifest).items()}
    if student.family == "sd3":
        assert manifest.bucket_sigmas == {} and "bucket_sigmas" not in (
            sized / "runtimes" / "onnx-staged-fp32" / "manifest.json"
        ).read_text("utf-8")
    for name in ("64x32", "64x64"):
        assert others[name].sigmas[2] == pytest.approx(sigmas_of_diffusers(student, read_size(name)), abs=1e-6)
    assert (others["64x64"].sigmas == student.sigmas) == (student.family == "sd3")


def test_sigmas_that_lack_a_step_count_are_refused(sized: Path) -> None:
    folder = sized / "runtimes" / "onnx-staged-fp32"
    manifest = replace(read_manifest(folder), bucket_sigmas={"64x64": {8: (1.0,)}})
    with pytest.raises(BundleError, match="has no sigmas for 2 steps at 64x64: make it again with export.run"):
        check_runtime(folder, read_student(sized), manifest)


def test_a_size_outside_is_one_sentence_that_names_the_buckets(sized: Path) -> None:
    student = read_student(sized)
    said = rf"{student.id} generates 32x64, 64x32 or 64x64 pixels and no other size\."
    with pytest.raises(ValueError, match=said):
        load(sized, "onnx").draw(PROMPTS, SEEDS, 2, size=(128, 128))  # type: ignore[call-arg]
    sizes = sizes_of(sized, student)
    assert sizes == ((64, 32), (32, 64), (64, 64))
    for fields in ({"size": "64x32"}, {"width": 64}, {"width": 64, "height": 32}, {}):
        check(student, GenerateRequest(prompt="a", **fields), len, 10**6, sizes)
    with pytest.raises(InvalidRequest, match=f"size: {said}"):
        check(student, GenerateRequest(prompt="a", size="128x64"), len, 10**6, sizes)


def complaint(capsys: pytest.CaptureFixture[str], bundle: Path, **options: Any) -> str:
    with pytest.raises(typer.Exit):
        command.run(student=bundle, to="onnx", **options)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_dry_run_counts_every_size(sized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.run(student=sized, to="onnx", size=["64x32"], dry_run=True)
    said = capsys.readouterr().out
    assert "  decoder-64x32: " in said and "  step-64x32: " in said and said.count("text: ") == 1


def test_sizes_that_cannot_be(bundle: Path, sized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student: Student = read_student(sized)
    assert own_size(student) == (64, 32)
    assert "size is 'big': accepted is WIDTHxHEIGHT" in complaint(capsys, sized, size=["big"])
    assert "use --size with --form staged" in complaint(capsys, bundle, form="fused", size=["128x64"])
    assert f"33x64 is not a size of the family {student.family}: width is" in complaint(capsys, sized, size=["33x64"])
