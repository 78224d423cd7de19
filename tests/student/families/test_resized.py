"""The sigmas of another size than the student's own: those that the published pipeline's scheduler has there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from export.adoption import own_schedule, own_sigmas
from student.bundle import Student, from_json, to_json
from student.families.find import family_of, family_of_student
from student.families.resized import resized
from student.pipeline import shift_no_more
from tests.student.families import tiny
from tests.student.families.tiny_chat import flux2, qwen_image

SIZE = (256, 128)  # pixels: many more tokens than the 64x32 of a tiny student
STEPS = (4, 2)


def scheduled_by_diffusers(pipe: Any, nfe: int, size: tuple[int, int]) -> list[float]:
    """The sigmas that a whole call of the pipeline leaves in its own scheduler, which still shifts by the size."""
    pipe(
        prompt=["a"], height=size[0], width=size[1], num_inference_steps=nfe, output_type="latent",
        max_sequence_length=tiny.MAX_TOKENS, guidance_scale=1.0,
    )  # fmt: skip
    return [float(sigma) for sigma in pipe.scheduler.sigmas[:-1]]


@pytest.mark.parametrize("make", [tiny.flux, flux2, qwen_image], ids=["flux", "flux2", "qwen_image"])
def test_a_size_has_the_sigmas_of_the_pipelines_own_scheduler(make: Callable[[], Any], tmp_path: Path) -> None:
    pipe = make()
    theirs = {nfe: scheduled_by_diffusers(pipe, nfe, SIZE) for nfe in STEPS}
    student = tiny.build(tmp_path / "tiny", pipe, STEPS)
    kept = from_json(to_json(student))
    model = family_of_student(pipe, kept)  # whose scheduler shifts no more
    ours = resized(model, kept, SIZE)
    for nfe in STEPS:
        assert ours.sigmas[nfe] == pytest.approx(theirs[nfe], abs=1e-6)
    assert ours.sigmas[4] != pytest.approx(student.sigmas[4], abs=1e-5)  # two steps may have the ends alone
    assert resized(model, kept, (64, 32)).sigmas == student.sigmas


def test_a_model_whose_pipeline_spaces_its_sigmas_to_the_last_timestep_is_followed_too() -> None:
    """SD3 with a shift by the size: its pipeline gives no sigmas, and the scheduler's own end at 1/1000, not 1/n."""
    pipe = tiny.sd3(with_t5=False, dual=False)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**tiny.FLUX_DYNAMIC, base_image_seq_len=8)
    family, size = family_of(pipe), (128, 96)
    own = family.latent_shape(64, 32)
    schedule = own_schedule(family, STEPS, own)
    theirs = {nfe: scheduled_by_diffusers(pipe, nfe, size) for nfe in STEPS}
    student = student_of(family, {nfe: own_sigmas(family, nfe, own) for nfe in STEPS}, schedule)
    shift_no_more(pipe)
    for nfe, sigmas in resized(family_of(pipe), student, size).sigmas.items():
        assert sigmas == pytest.approx(theirs[nfe], abs=1e-6)
        assert sigmas != pytest.approx(student.sigmas[nfe], abs=1e-6)


def test_a_static_shift_is_the_same_at_every_size() -> None:
    pipe = tiny.sd3(with_t5=False, dual=False)
    family = family_of(pipe)
    shape = family.latent_shape(64, 32)
    assert own_schedule(family, STEPS, shape) is None
    student = student_of(family, {nfe: own_sigmas(family, nfe, shape) for nfe in STEPS}, None)
    assert resized(family, student, (64, 64)).sigmas == student.sigmas
    assert "schedule" not in to_json(student)  # a manifest, and a fingerprint, as earlier releases wrote them


def test_the_fingerprint_has_the_schedule_that_other_sizes_are_drawn_with(tmp_path: Path) -> None:
    student = tiny.build(tmp_path / "tiny", tiny.flux(), STEPS)
    assert student.schedule is not None
    other = replace(student, schedule={**student.schedule, "max_shift": 1.3})
    assert len({student.fingerprint(), other.fingerprint(), replace(student, schedule=None).fingerprint()}) == 3


def student_of(family: Any, sigmas: dict[int, tuple[float, ...]], schedule: Any) -> Student:
    made = tiny.manifest(family, STEPS, family.geometry(64, 32))
    return replace(made, sigmas=sigmas, schedule=schedule)
