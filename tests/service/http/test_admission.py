"""What a student's own manifest decides about a request, without a service around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.http.admission import check, new_job
from service.http.schema import GenerateRequest
from student.bundle import ImageSize
from student.runtimes.fake import fake_student, fake_video_student
from student.runtimes.sizes import SizeRange


def checked(student_changes: dict[str, Any], **fields: Any) -> None:
    student = replace(fake_student(), **student_changes)
    check(student, GenerateRequest(prompt="p", **fields), lambda prompt: 1, 2**24)


def test_the_guidance_that_was_baked_in_may_be_named_and_no_other() -> None:
    baked = {"baked": {"guidance_scale": 3.5}}
    checked(baked, guidance_scale=3.5)
    with pytest.raises(InvalidRequest, match="fixed at 3.5"):
        checked(baked, guidance_scale=3.4)
    with pytest.raises(InvalidRequest, match="fixed at 3.5"):
        checked(baked, guidance_scale=0.0)


def test_a_job_says_how_long_its_videos_are_and_how_fast_they_play() -> None:
    student = replace(fake_video_student(), image=ImageSize(64, 64, 9))
    job = new_job(student, GenerateRequest(prompt="p"), "k", "r")
    assert (job.frames, job.fps, job.output_format) == (9, 16, "mp4"), "16 where the student says nothing"
    body = GenerateRequest(prompt="p", num_frames=5, fps=30, output_format="webp")
    job = new_job(fake_video_student(), body, "k", "r")
    assert (job.frames, job.fps, job.output_format) == (5, 30, "webp")
    job = new_job(fake_student(), GenerateRequest(prompt="p"), "k", "r")
    assert (job.frames, job.fps, job.output_format) == (0, 0, "png")


def test_steps_are_those_of_the_student_and_the_most_unless_chosen() -> None:
    student = fake_student()
    assert new_job(student, GenerateRequest(prompt="p"), "k", "r").steps == max(student.steps)
    assert new_job(student, GenerateRequest(prompt="p", num_inference_steps=2), "k", "r").steps == 2
    with pytest.raises(InvalidRequest, match="trained for 4"):
        checked({"steps": (4,), "sigmas": {4: (1.0, 0.75, 0.5, 0.25)}}, num_inference_steps=2)


RANGE = SizeRange(16, 128)


@pytest.mark.parametrize(
    ("size", "size_range", "said"),
    [
        ("64x64", None, ""),
        ("96x64", None, "size: fake generates 64x64 pixels and no other size."),
        ("96x64", RANGE, ""),
        ("128x16", RANGE, ""),
        ("97x64", RANGE, "size is 97x64: fake generates sides that are multiples of 16 pixels up to 128."),
        ("144x64", RANGE, "size is 144x64: fake generates sides that are multiples of 16 pixels up to 128."),
        ("144x64", SizeRange(16), ""),
        ("8x64", SizeRange(16), "size is 8x64: fake generates sides that are multiples of 16 pixels."),
    ],
)
def test_a_runtime_that_is_not_compiled_draws_every_size_of_its_models_range(
    size: str, size_range: SizeRange | None, said: str
) -> None:
    body = GenerateRequest(prompt="p", size=size)
    if not said:
        return check(fake_student(), body, lambda prompt: 1, 2**24, size_range=size_range)
    with pytest.raises(InvalidRequest) as refused:
        check(fake_student(), body, lambda prompt: 1, 2**24, size_range=size_range)
    assert str(refused.value) == said


def test_ids_are_128_random_bits_and_the_owner_is_written_on_the_job() -> None:
    jobs = [new_job(fake_student(), GenerateRequest(prompt="p"), "key-1", "r") for _ in range(50)]
    assert len({job.id for job in jobs}) == 50 and {len(bytes.fromhex(job.id)) for job in jobs} == {16}
    assert {job.key for job in jobs} == {"key-1"}
