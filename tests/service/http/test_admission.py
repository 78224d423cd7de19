"""What a student's own manifest decides about a request, without a service around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.http.admission import check, new_job
from service.http.schema import GenerateRequest
from student.bundle import ImageSize
from student.runtimes.fake import fake_student


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


def test_a_student_of_videos_is_refused_in_one_sentence() -> None:
    video = {"image": ImageSize(64, 64, 5), "latents": replace(fake_student().latents, frames=2)}
    with pytest.raises(InvalidRequest, match="fake draws videos: this service answers with pictures only."):
        checked(video)


def test_steps_are_those_of_the_student_and_the_most_unless_chosen() -> None:
    student = fake_student()
    assert new_job(student, GenerateRequest(prompt="p"), "k", "r").steps == max(student.steps)
    assert new_job(student, GenerateRequest(prompt="p", num_inference_steps=2), "k", "r").steps == 2
    with pytest.raises(InvalidRequest, match="trained for 4"):
        checked({"steps": (4,), "sigmas": {4: (1.0, 0.75, 0.5, 0.25)}}, num_inference_steps=2)


def test_ids_are_128_random_bits_and_the_owner_is_written_on_the_job() -> None:
    jobs = [new_job(fake_student(), GenerateRequest(prompt="p"), "key-1", "r") for _ in range(50)]
    assert len({job.id for job in jobs}) == 50 and {len(bytes.fromhex(job.id)) for job in jobs} == {16}
    assert {job.key for job in jobs} == {"key-1"}
