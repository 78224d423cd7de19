"""OpenAI's request in our own form, and our answer in theirs: field by field."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import InvalidRequest, NotFound
from service.http.openai.schema import ImagesRequest
from service.http.openai.translate import described, pick, quality_of, translated, usage
from service.models.choice import Choice, Served
from service.models.folder import Name
from student.runtimes.fake import fake_student, fake_video_student
from tests.service.support import a_job

SERVED = Served(fake_student(), lambda prompt: len(prompt.split()))


def asked(shows_steps: bool = True, **fields: Any) -> dict[str, Any]:
    """What is asked for in our own form, apart from the prompt."""
    body = translated(ImagesRequest(prompt="p", **fields), SERVED, shows_steps)
    said = {name: getattr(body, name) for name in body.model_fields_set - {"prompt"}}
    return {name: value for name, value in said.items() if value is not None}


@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ({}, {}),
        ({"model": "fake"}, {"model": "fake"}),
        ({"model": "fake@1"}, {"model": "fake", "model_version": "1"}),
        ({"n": 3, "size": "64x64"}, {"n": 3, "size": "64x64"}),
        ({"size": "auto"}, {}),
        ({"response_format": "url", "output_format": "webp", "output_compression": 50},
         {"response_format": "url", "output_format": "webp", "output_compression": 50}),
        ({"user": "u"}, {"user": "u"}),
        ({"user": "u", "safety_identifier": "s"}, {"user": "s"}),
        ({"seed": [1, 2], "allow_training": False}, {"seed": [1, 2], "allow_training": False}),
        ({"stream": True, "partial_images": 2}, {"stream": True, "partial_images": 2}),
        ({"best_of": 2, "rank_by": "trained", "min_reward": 0.5},
         {"best_of": 2, "rank_by": "trained", "min_reward": 0.5}),
        ({"quality": "low"}, {"num_inference_steps": 1}),
        ({"quality": "medium"}, {"num_inference_steps": 2}),
        ({"quality": "high"}, {"num_inference_steps": 4}),
        ({"num_inference_steps": 2}, {"num_inference_steps": 2}),
        ({"num_inference_steps": 2, "quality": "auto"}, {"num_inference_steps": 2}),
        ({"background": "opaque", "moderation": "low"}, {}),
    ],
)  # fmt: skip
def test_a_request_says_the_same_in_our_form(fields: dict[str, Any], ours: dict[str, Any]) -> None:
    usual = {"num_inference_steps": 4, "best_of": 1}
    assert asked(**fields) == {**usual, **ours}


def test_a_cascade_says_the_step_counts_itself() -> None:
    assert asked(cascade=[1, 2], min_reward=0.5) == {"cascade": [1, 2], "min_reward": 0.5, "best_of": 1}
    with pytest.raises(InvalidRequest, match="send either quality or cascade"):
        asked(cascade=[1, 2], min_reward=0.5, quality="low")


def test_previews_that_no_runtime_has_are_left_out() -> None:
    """OpenAI promises "at most" so many."""
    assert "partial_images" not in asked(shows_steps=False, stream=True, partial_images=2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"style": "vivid"}, "style"), ({"complexity": "low"}, "complexity"), ({"frame_count": 2}, "frame_count"),
        ({"frame_duration_ms": 9}, "frame_duration_ms"), ({"background": "transparent"}, "background"),
        ({"output_format": "gif"}, "output_format"), ({"output_format": "svg"}, "output_format"),
        ({"partial_images": 1}, "partial_images"), ({"quality": "low", "num_inference_steps": 2}, "quality"),
    ],
)  # fmt: skip
def test_what_no_student_can_do_is_refused_by_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(**fields)
    assert refused.value.param == param


def test_the_model_is_the_one_that_is_named_and_draws_images() -> None:
    video = Served(fake_video_student(), len)
    choice = Choice({Name("fake", "1"): SERVED, video.name: video})
    assert pick(choice, ImagesRequest(prompt="p", model="fake@1")) is SERVED
    with pytest.raises(InvalidRequest, match="ask for them at /v1/videos"):
        pick(choice, ImagesRequest(prompt="p", model=video.name.id))
    with pytest.raises(NotFound):
        pick(choice, ImagesRequest(prompt="p", model="fake@2"))


def test_a_quality_is_the_rank_of_a_step_count() -> None:
    student = fake_student()
    assert [quality_of(steps, student) for steps in (1, 2, 4)] == ["low", "medium", "high"]
    alone = replace(student, steps=(4,), sigmas={4: student.sigmas[4]})
    assert quality_of(4, alone) == quality_of(4, None) == "high"


def test_an_answer_counts_the_prompts_tokens_and_the_latent_ones_of_all_that_was_drawn() -> None:
    services: Any = SimpleNamespace(
        models=SimpleNamespace(choice=SimpleNamespace(served={Name("fake", "1"): SERVED})),
    )
    job = a_job(prompt="a red heart", width=96, height=64, steps=2, output_format="jpeg")
    assert usage(services, job, 3).model_dump() == {
        "input_tokens": 3, "input_tokens_details": {"text_tokens": 3, "image_tokens": 0},
        "output_tokens": 3 * 8 * 8 // 4, "total_tokens": 3 + 48,
    }  # fmt: skip
    assert described(services, job) == {
        "background": "opaque", "output_format": "jpeg", "quality": "medium", "size": "96x64",
    }  # fmt: skip
    gone = usage(services, replace(job, version="9"), 3)
    assert (gone.input_tokens, gone.output_tokens) == (0, 0), "a student that is served no more"
