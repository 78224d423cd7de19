"""student.json: what is written is read back, and what contradicts itself is refused by name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline, FluxPipeline

from student.bundle import BundleError, Scorer, Student, from_json, read_student, to_json
from student.files import hash_files, hash_weights, verify_files, write_student
from tests import tiny

SCORERS = {
    "trained": Scorer("scorers/trained.onnx", mean=0.5, std=2.0, role="trained", source_sha256="ab" * 32),
    "heldout": Scorer("scorers/heldout.onnx", mean=-1.0, std=0.5, role="heldout", source_sha256="cd" * 32),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny.build(path, SCORERS)
    return path


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_what_is_written_is_read_back(bundle: Path) -> None:
    read = read_student(bundle)
    assert read == replace(tiny.student(SCORERS), latents=read.latents, files=hash_files(bundle))
    assert from_json(json.loads(json.dumps(to_json(read)))) == read
    assert read.latents.shape == (16, 8, 8)
    assert (read.latents.scaling_factor, read.latents.shift_factor) == (0.6, 0.15)


def test_diffusers_opens_it(bundle: Path) -> None:
    assert isinstance(DiffusionPipeline.from_pretrained(bundle), FluxPipeline)


def test_every_file_of_the_pipeline_is_hashed_and_no_other(bundle: Path) -> None:
    on_disk = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert set(read_student(bundle).files) == on_disk - {"student.json"}
    assert "transformer/diffusion_pytorch_model.safetensors" in on_disk


def test_export_and_the_card_do_not_touch_the_hashes(copy: Path) -> None:
    for name in ("runtimes/onnx-fused-fp32/model.onnx", "scorers/trained.onnx", "README.md"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("later")
    verify_files(copy, read_student(copy))


def test_a_changed_missing_or_added_file_is_named(copy: Path) -> None:
    student = read_student(copy)
    weights = copy / "vae" / "config.json"
    original = weights.read_bytes()
    weights.write_bytes(original + b" ")
    with pytest.raises(BundleError, match=r"vae/config\.json has changed"):
        verify_files(copy, student)
    weights.unlink()
    with pytest.raises(BundleError, match=r"vae/config\.json is missing"):
        verify_files(copy, student)
    weights.write_bytes(original)
    (copy / "vae" / "extra.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"vae/extra\.bin is not named"):
        verify_files(copy, student)


def test_the_hash_of_a_scorer_is_of_its_weights_and_configuration(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("one")
    before = hash_weights(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert hash_weights(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("two")
    assert hash_weights(tmp_path) != before
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").unlink()
    with pytest.raises(BundleError, match="holds no weights"):
        hash_weights(tmp_path)


def test_a_folder_that_is_no_student(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a student: it has no student\.json"):
        read_student(tmp_path)
    with pytest.raises(BundleError, match="is not a diffusers pipeline"):
        write_student(tmp_path, tiny.student({}))
    (tmp_path / "student.json").write_text("{")
    with pytest.raises(BundleError, match=r"student\.json: Expecting"):
        read_student(tmp_path)


def test_the_fingerprint_follows_the_pixels(bundle: Path) -> None:
    """It changes with all that a picture depends on, and with nothing else."""
    student = read_student(bundle)
    same = replace(student, id="other", version="2", evaluation=(), scorers={}, reward_reference={})
    assert same.fingerprint() == student.fingerprint()
    for other in (
        replace(student, sigmas={**student.sigmas, 4: (1.0, 0.75, 0.5, 0.2)}),
        replace(student, latents=replace(student.latents, shift_factor=0.0)),
        replace(student, files={**student.files, "vae/config.json": "0"}),
        replace(student, max_tokens=25),
    ):
        assert other.fingerprint() != student.fingerprint()


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.update(format=2), "format is 2: this version reads format 1"),
    (lambda d: d.update(time_convention="t=0 noise"), "time_convention is 't=0 noise': accepted is"),
    (lambda d: d.update(id="../x"), r"id is '\.\./x'"),
    (lambda d: d.update(steps=[4]), r"steps is \[4\] and sigmas has \[2, 4\]"),
    (lambda d: d.update(steps=[], sigmas={}), r"steps is \[\]"),
    (lambda d: d["sigmas"].update({"2": [1.0, 0.5, 0.1]}), r"sigmas\[2\] is .* accepted are 2 decreasing values"),
    (lambda d: d["sigmas"].update({"2": [0.5, 1.0]}), r"sigmas\[2\] is .* accepted are 2 decreasing values"),
    (lambda d: d["sigmas"].update({"2": [1.0, 0.0]}), r"sigmas\[2\] is .* accepted are 2 decreasing values"),
    (lambda d: d["sigmas"].update({"2": [1.5, 0.5]}), r"sigmas\[2\] is .* accepted are 2 decreasing values"),
    (lambda d: d["latents"].update(height=7), "latents are 7x8: packing 2 must divide both"),
    (lambda d: d.update(max_tokens=0), "whole numbers of 1 or more"),
    (lambda d: d["scorers"]["trained"].update(role="judge"), "role is 'judge': accepted is trained or heldout"),
    (lambda d: d["scorers"]["trained"].update(std=0.0), r"scorers\.trained\.std is 0\.0"),
    (lambda d: d.pop("teacher"), r"student\.json lacks the field 'teacher'"),
    (lambda d: d.update(techer="x"), r"student\.json has the unknown field 'techer'"),
    (lambda d: d["latents"].pop("packing"), "latents lacks the field 'packing'"),
    (lambda d: d.update(sigmas=[1.0]), "student.json"),
]


@pytest.mark.parametrize("spoil, message", BROKEN)
def test_a_manifest_that_contradicts_itself_is_refused(
    bundle: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    data = json.loads((bundle / "student.json").read_text())
    spoil(data)
    (tmp_path / "student.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message):
        read_student(tmp_path)


def test_a_student_in_memory_is_checked_too() -> None:
    with pytest.raises(BundleError, match="accepted is a number above 0"):
        replace(tiny.student(SCORERS), scorers={"trained": replace(SCORERS["trained"], std=-1.0)})
    assert isinstance(tiny.student({}), Student)


def test_a_picture_has_no_frames_and_a_video_has_both(bundle: Path) -> None:
    """The manifests, and with them the fingerprints, of students of pictures are older than videos."""
    student = read_student(bundle)
    assert "frames" not in json.dumps(to_json(student))
    video = replace(student, latents=replace(student.latents, frames=3), image=replace(student.image, frames=9))
    assert video.latents.shape == (16, 3, 8, 8)
    assert from_json(json.loads(json.dumps(to_json(video)))) == video
    assert video.fingerprint() != student.fingerprint()
    with pytest.raises(BundleError, match="latents.frames is 3 and image.frames is None: accepted are both or neither"):
        replace(student, latents=replace(student.latents, frames=3))
    with pytest.raises(BundleError, match="accepted are whole numbers of 1 or more"):
        replace(student, latents=replace(student.latents, frames=0), image=replace(student.image, frames=1))
