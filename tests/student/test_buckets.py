"""Other sizes and lengths than a student's own: their names, their graphs, and the student as it is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from student.bundle import BundleError, ImageSize, Student
from student.families.two_experts import called_at, is_high
from student.runtimes.buckets import Bucket, files_of, in_buckets, read_bucket, sizes_of, stage_name
from student.runtimes.experts import stages_of, step_stage
from student.runtimes.manifest import Graph, RuntimeManifest, write_manifest
from student.runtimes.sizes import SizeRange, at_size, draws, own_size, read_size, refusal, size_name
from tests import tiny

PICTURE = tiny.student({})
VIDEO = replace(PICTURE, latents=replace(PICTURE.latents, frames=2), image=ImageSize(64, 64, 5, 16))


def graph(*latents: int) -> Graph:
    return Graph(f"{latents}.onnx", "0", (), {"latents": ("batch", 16, *latents)}, {})


def manifest(stages: Mapping[str, Graph], *buckets: str, **more: Any) -> RuntimeManifest:
    about: dict[str, Any] = {"graphs": {}, "parity": {}, "opset": 20, "versions": {}, **more}
    return RuntimeManifest(
        "onnx-staged-fp32", "staged", "fp32", "x", "0", stages=stages, buckets={name: {} for name in buckets}, **about
    )


@pytest.mark.parametrize(
    ("bucket", "name"),
    [(Bucket((256, 320)), "320x256"), (Bucket((256, 320), 33), "320x256x33"), (Bucket((8, 9), 1), "9x8x1")],
)
def test_a_bucket_is_named_by_width_height_and_frames(bucket: Bucket, name: str) -> None:
    assert bucket.name == name and read_bucket(name) == bucket
    assert stage_name("step_2", bucket) == f"step_2-{name}" and stage_name("decoder", bucket) == f"decoder-{name}"
    assert stage_name("text", bucket) == "text" and stage_name("step", None) == "step"


@pytest.mark.parametrize(
    "name", ["", "320", "320x", "x320", "0x32", "32x032", "320x256xa", "320x256x-1", "1x2x3x4", "123456x1"]
)
def test_what_is_no_bucket_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="accepted is WIDTHxHEIGHT"):
        read_bucket(name)


def test_the_student_in_a_bucket_has_its_graphs_latents_and_its_sigmas() -> None:
    own = {4: (1.0, 0.9, 0.8, 0.5), 2: (1.0, 0.8)}
    stages = {"step": graph(8, 8), "step-96x32": graph(4, 12), "decoder-128x64": graph(8, 16)}
    found = in_buckets(PICTURE, manifest(stages, "96x32", "128x64", bucket_sigmas={"96x32": own}))
    assert list(found) == [Bucket((32, 96)), Bucket((64, 128))]
    first, second = found.values()
    assert (first.image, first.latents.shape, first.sigmas) == (ImageSize(32, 96), (16, 4, 12), own)
    assert (second.image, second.latents.shape, second.sigmas) == (ImageSize(64, 128), (16, 8, 16), PICTURE.sigmas)
    assert replace(first, image=PICTURE.image, latents=PICTURE.latents, sigmas=PICTURE.sigmas) == PICTURE


def test_a_video_in_a_bucket_has_its_length_or_the_students_own() -> None:
    stages = {"step_2-96x32": graph(2, 4, 12), "step-64x64x9": graph(3, 8, 8)}
    found = in_buckets(VIDEO, manifest(stages, "96x32", "64x64x9"))
    assert [(there.image, there.latents.shape) for there in found.values()] == [
        (ImageSize(32, 96, 5, 16), (16, 2, 4, 12)),
        (ImageSize(64, 64, 9, 16), (16, 3, 8, 8)),
    ]


def test_a_bucket_without_a_graph_is_refused() -> None:
    with pytest.raises(BundleError, match="^the runtime onnx-staged-fp32 has no graph for 96x32: make it again with"):
        in_buckets(PICTURE, manifest({"step": graph(8, 8), "text": graph()}, "96x32"))


def test_a_buckets_files_are_its_own_and_the_text_of_all(tmp_path: Path) -> None:
    names = ("text", "step", "step_2", "decoder", "step-96x32", "decoder-96x32")
    whole = manifest({name: replace(graph(8, 8), file=f"{name}.onnx") for name in names})
    own, other = files_of(tmp_path, whole, None), files_of(tmp_path, whole, Bucket((32, 96)))
    assert own == {name: tmp_path / f"{name}.onnx" for name in ("text", "step", "step_2", "decoder")}
    assert other == {
        "text": tmp_path / "text.onnx",
        "step": tmp_path / "step-96x32.onnx",
        "decoder": tmp_path / "decoder-96x32.onnx",
    }


def test_the_sizes_of_a_bundle_are_its_own_and_those_of_its_finished_runtimes(tmp_path: Path) -> None:
    for name, buckets in (
        ("b", ("96x32", "64x64x9")), ("a", ("32x32", "96x32")), (".b.part", ("160x160",)), ("c", ("1x",)),
    ):  # fmt: skip
        (tmp_path / "runtimes" / name).mkdir(parents=True)
        write_manifest(tmp_path / "runtimes" / name, manifest({}, *buckets))
    (tmp_path / "runtimes" / "d").mkdir()
    (tmp_path / "runtimes" / "batches.json").write_text(json.dumps({}))
    assert sizes_of(tmp_path, PICTURE) == ((64, 64), (32, 32), (32, 96))
    assert sizes_of(tmp_path / "nothing", PICTURE) == ((64, 64),)


def test_a_size_is_written_width_first() -> None:
    assert size_name((256, 320)) == "320x256" and read_size("320x256") == (256, 320) and own_size(VIDEO) == (64, 64)
    for wrong in ("320X256", "320x256 ", "0320x256", "320x0", "100000x1", "+1x1"):
        with pytest.raises(ValueError, match="accepted is WIDTHxHEIGHT in pixels, for example 320x256$"):
            read_size(wrong)


def test_a_range_has_the_multiples_up_to_its_most() -> None:
    limited, free = SizeRange(16, 48), SizeRange(16)
    sides = [side for side in range(-32, 100) if (side, 16) in limited]
    assert sides == [16, 32, 48] == [side for side in range(-32, 100) if (16, side) in limited]
    assert (16 * 999, 16) in free and (16, 8) not in free and "16x16" not in free and None not in free
    assert str(limited) == "sides that are multiples of 16 pixels up to 48"
    assert str(free) == "sides that are multiples of 16 pixels"


def test_a_runtime_draws_its_sizes_and_its_range_else_the_students_own() -> None:
    runtimes = (
        SimpleNamespace(),
        SimpleNamespace(sizes=((64, 64), (8, 24))),
        SimpleNamespace(sizes=((64, 64),), size_range=None),
        SimpleNamespace(sizes=((64, 64),), size_range=SizeRange(16, 128)),
    )
    asked = [(64, 64), (8, 24), (128, 16), (144, 16)]
    assert [[draws(runtime, PICTURE, size) for size in asked] for runtime in runtimes] == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, False, False],
        [True, False, True, False],
    ]


def test_a_refusal_names_every_size() -> None:
    assert refusal("x", [(64, 32)]) == "x generates 32x64 pixels and no other size."
    assert refusal("x", [(1, 2), (3, 4), (5, 6)]) == "x generates 2x1, 4x3 or 6x5 pixels and no other size."


def test_a_student_at_another_size_keeps_all_else() -> None:
    there = at_size(VIDEO, (32, 96), (4, 12))
    assert replace(there, image=VIDEO.image, latents=VIDEO.latents) == VIDEO
    assert there.image == ImageSize(32, 96, 5, 16) and there.latents == replace(VIDEO.latents, height=4, width=12)


def test_the_boundary_itself_is_rounded_as_torch_rounds_it() -> None:
    """A sigma that float32 cannot tell from it belongs to the first expert, whichever way a thousandfold is rounded."""
    for boundary in (k / 7919 for k in range(4000, 7919, 7)):
        for sigma in (boundary, boundary * (1 - 1e-8), boundary * (1 - 6e-8)):
            expected = "step" if bool(is_high(torch.tensor([sigma]) * 1000, boundary)) else "step_2"
            assert step_stage(sigma, boundary) == expected, (sigma, boundary)


SIGMAS = tuple(k / 997 for k in range(997, 0, -1))


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.417, 1.0, 1 / 3])
def test_graphs_and_torch_part_the_sigmas_at_the_same_one(boundary: float) -> None:
    """In the pipeline's own arithmetic, also where a sigma is the boundary and where float32 rounds it."""
    below = float(torch.nextafter(torch.tensor(boundary), torch.tensor(0.0)))
    for sigma in (*SIGMAS, boundary, below, boundary * (1 - 1e-9), boundary * (1 + 1e-9)):
        assert {"step": "transformer", "step_2": "transformer_2"}[step_stage(sigma, boundary)] == (
            called_at([sigma], boundary)[0]
        ), sigma
        assert step_stage(sigma, None) == "step"


@pytest.mark.parametrize(
    ("boundary", "stages"),
    [(None, ("step",)), (0.875, ("step", "step_2")), (0.2, ("step",)), (1.1, ("step_2",)), (0.25, ("step",))],
)
def test_a_student_needs_the_experts_that_one_of_its_schedules_reaches(
    boundary: float | None, stages: tuple[str, ...]
) -> None:
    student: Student = replace(PICTURE, steps=(4, 1), sigmas={4: (1.0, 0.75, 0.5, 0.25), 1: (1.0,)})
    assert stages_of(student, boundary) == ("text", *stages, "decoder")
