"""What a student's own manifest decides about a request, without a service around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.errors import Forbidden, InvalidRequest, TooLarge
from service.http.admission import check, new_job, priority_of
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


def test_a_request_may_ask_for_exactly_what_is_allowed() -> None:
    student, one = fake_student(), 64 * 64
    for count, drawn in (({"n": 3}, 3), ({"seed": [1, 2]}, 2), ({"best_of": 4}, 4), ({"n": 2, "best_of": 3}, 6)):
        body = GenerateRequest(prompt="p", **count)
        check(student, body, lambda prompt: 1, drawn * one)
        with pytest.raises(TooLarge):
            check(student, body, lambda prompt: 1, drawn * one - 1)
    body = GenerateRequest(prompt="p")
    check(student, body, lambda prompt: student.max_tokens, one)
    with pytest.raises(InvalidRequest, match=f"has {student.max_tokens + 1} tokens.* at most {student.max_tokens}"):
        check(student, body, lambda prompt: student.max_tokens + 1, one)


def test_videos_have_a_bound_of_their_own_which_counts_their_frames() -> None:
    student, one = fake_video_student(), 64 * 64
    frames = student.image.frames
    assert frames
    body = GenerateRequest(prompt="p", n=2)
    check(student, body, lambda prompt: 1, 1, max_video_pixels=2 * frames * one)
    with pytest.raises(TooLarge):
        check(student, body, lambda prompt: 1, 2**40, max_video_pixels=2 * frames * one - 1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "64x64"}, "size"),
        ({"width": 64}, "width"),
        ({"height": 64}, "height"),
        ({"n": 1}, "n"),
        ({"num_images_per_prompt": 1}, "num_images_per_prompt"),
        ({"seed": [1]}, "seed"),
    ],
)
def test_the_field_that_asks_for_too_much_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(TooLarge) as refused:
        check(fake_student(), GenerateRequest(prompt="p", **fields), lambda prompt: 1, 64 * 64 - 1)
    assert refused.value.param == param


def test_seeds_count_up_and_begin_again_behind_the_last() -> None:
    def seeds(**fields: Any) -> tuple[int, ...]:
        return new_job(fake_student(), GenerateRequest(prompt="p", **fields), "k", "r").seeds

    assert seeds(seed=7) == (7,) and seeds(seed=0, n=2) == (0, 1) and seeds(seed=[9, 0, 9]) == (9, 0, 9)
    assert seeds(seed=2**32 - 2, n=4) == (2**32 - 2, 2**32 - 1, 0, 1)
    drawn = [seeds(n=2) for _ in range(20)]
    assert len({first for first, _ in drawn}) == 20 and all(second == (first + 1) % 2**32 for first, second in drawn)


def test_a_request_says_whether_its_prompt_may_train_and_else_its_key_does() -> None:
    def may_train(of_key: bool, **fields: Any) -> bool:
        return new_job(fake_student(), GenerateRequest(prompt="p", **fields), "k", "r", may_train=of_key).may_train

    assert [may_train(of_key) for of_key in (False, True)] == [False, True]
    assert [may_train(not said, allow_training=said) for said in (False, True)] == [False, True]


@pytest.mark.parametrize(
    ("fields", "highest", "priority"),
    [
        ({}, 5, 0),
        ({}, 0, 0),
        ({}, -3, -3),
        ({"priority": 2}, 2, 2),
        ({"priority": -5}, 2, -5),
        ({"priority": 3}, 2, None),
    ],
)
def test_a_priority_is_at_most_that_of_the_key(fields: dict[str, int], highest: int, priority: int | None) -> None:
    body = GenerateRequest(prompt="p", **fields)
    if priority is not None:
        assert priority_of(body, highest) == priority
        return
    with pytest.raises(Forbidden, match="you may ask for 2 at most") as refused:
        priority_of(body, highest)
    assert (refused.value.param, refused.value.code) == ("priority", "priority_too_high")


def test_a_job_has_all_that_was_asked_for() -> None:
    student = replace(fake_student(), image=ImageSize(96, 64))
    said = {"user": "u", "metadata": {"a": "b"}, "output_format": "webp", "output_compression": 80, "partial_images": 2}
    job = new_job(student, GenerateRequest(prompt="p", response_format="url", **said), "k", "r", priority=3)
    assert (job.prompt, job.key, job.request_id, job.priority, job.user, job.metadata) == (
        "p",
        "k",
        "r",
        3,
        "u",
        {"a": "b"},
    )
    assert (job.output_format, job.quality, job.previews, job.response_format) == ("webp", 80, 2, "url")
    sides = {}
    for fields in ({}, {"size": "32x16"}, {"width": 32}, {"height": 16}):
        job = new_job(student, GenerateRequest(prompt="p", **fields), "k", "r")
        sides[tuple(fields)] = (job.width, job.height)
    own = (student.image.width, student.image.height)
    assert sides == {(): own, ("size",): (32, 16), ("width",): (32, own[1]), ("height",): (own[0], 16)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 1, "num_images_per_prompt": 1}, "n"),
        ({"size": "64x64", "width": 64}, "size"),
        ({"size": "64x64", "height": 64}, "size"),
        ({"seed": [1, 2], "n": 3}, "seed"),
        ({"response_format": "file", "n": 2}, "n"),
        ({"response_format": "file", "stream": True}, "response_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 50, "output_format": "png"}, "output_compression"),
        ({"num_inference_steps": 3}, "num_inference_steps"),
        ({"guidance_scale": 1.0}, "guidance_scale"),
        ({"negative_prompt": ""}, "negative_prompt"),
        ({"num_frames": 5}, "num_frames"),
        ({"fps": 8}, "fps"),
        ({"output_format": "mp4"}, "output_format"),
    ],
)
def test_what_a_student_of_images_cannot_do_is_refused_by_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked({}, **fields)
    assert refused.value.param == param and refused.value.status == 422
    checked({}, response_format="file", n=1, output_format="jpeg", output_compression=50, seed=[1], size="64x64")


WIDE = {"image": ImageSize(96, 64), "baked": {"guidance_scale": 3.5}}  # height, width


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"n": 2, "best_of": 3}, "6 x 64x96 are 36864 pixels; one request may ask for 36863.", "n"),
        ({"width": 640, "height": 96}, "1 x 640x96 are 61440 pixels; one request may ask for 36863.", "width"),
        ({"seed": [1, 2, 3, 4, 5, 6]}, "6 x 64x96 are 36864 pixels; one request may ask for 36863.", "seed"),
        ({"width": 64, "height": 64}, "height: fake generates 64x96 pixels and no other size.", "height"),
        ({"width": 96, "height": 96}, "width: fake generates 64x96 pixels and no other size.", "width"),
        ({"height": 64}, "height: fake generates 64x96 pixels and no other size.", "height"),
        ({"size": "96x64"}, "size: fake generates 64x96 pixels and no other size.", "size"),
        ({"num_inference_steps": 3}, "num_inference_steps is 3: fake was trained for 1, 2, 4.", "num_inference_steps"),
        (
            {"guidance_scale": 3.25},
            "guidance_scale cannot be chosen: the guidance of fake is fixed at 3.5. Leave it out.",
            "guidance_scale",
        ),
        (
            {"negative_prompt": "p"},
            "negative_prompt has no effect on fake, which runs without the network pass that would read it. "
            "Leave it out.",
            "negative_prompt",
        ),
        (
            {"n": 1, "num_images_per_prompt": 1},
            "n is another name for num_images_per_prompt: send only one of them.",
            "n",
        ),
        (
            {"size": "64x96", "width": 64},
            "size sets both width and height: send either size or width and height.",
            "size",
        ),
        ({"seed": [1, 2], "n": 3}, "seed has 2 entries for 3 images: send one each.", "seed"),
        (
            {"response_format": "file", "num_images_per_prompt": 2},
            "response_format file returns one image: num_images_per_prompt must be 1.",
            "num_images_per_prompt",
        ),
        (
            {"response_format": "file", "seed": [1, 2]},
            "response_format file returns one image: seed must be 1.",
            "seed",
        ),
        (
            {"response_format": "file", "stream": True},
            "response_format file and stream cannot be combined: choose one.",
            "response_format",
        ),
        ({"output_compression": 1}, "output_compression is for jpeg and webp: png is lossless.", "output_compression"),
        ({"num_frames": 1}, "num_frames is for videos, and fake generates images. Leave it out.", "num_frames"),
        (
            {"output_format": "mp4"},
            "output_format mp4 is for videos, and fake generates images: use png, jpeg or webp.",
            "output_format",
        ),
        ({"rank_by": "h"}, "rank_by has no effect without best_of or min_reward: send both, or neither.", "rank_by"),
        ({"cascade": [1, 2]}, "cascade has no effect without min_reward: send both, or neither.", "cascade"),
    ],
)
def test_every_refusal_says_exactly_what_is_wrong(fields: dict[str, Any], message: str, param: str) -> None:
    student = replace(fake_student(), **WIDE)
    with pytest.raises((InvalidRequest, TooLarge)) as refused:
        check(student, GenerateRequest(prompt="p", **fields), lambda prompt: 1, 6 * 64 * 96 - 1)
    assert (str(refused.value), refused.value.param) == (message, param)
