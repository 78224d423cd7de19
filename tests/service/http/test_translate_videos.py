"""OpenAI's words for videos, translated: requests into ours, and our jobs into theirs."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from service.errors import InvalidRequest
from service.http.openai.videos import (
    VideosRequest,
    form_fields,
    frames_in,
    job_id,
    pick_video,
    read_body,
    translated_video,
    video_of,
)
from service.models.choice import Choice, Served
from service.models.folder import Name
from service.queue.job import Record
from service.queue.states import State
from student.runtimes.fake import fake_student, fake_video_student
from tests.service.support import a_job

STUDENT = fake_video_student()  # 9 frames at 8 a second, 4 in each latent frame but the first
SERVED = Served(STUDENT, len)
FORM = "multipart/form-data; boundary=x"


def form(*parts: tuple[str, bytes]) -> bytes:
    return b"".join(b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (n.encode(), v) for n, v in parts) + (
        b"--x--\r\n"
    )


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"),
    [
        (1.0, 8, 9), (2.0, 8, 17), (1.49, 8, 9), (1.5, 8, 13), (0.1, 8, 1), (0.5, 8, 5), (4.0, 16, 65),
        (2.32, 50, 117), (8.2, 60, 493), (20.08, 50, 1005),
    ],
)  # fmt: skip
def test_as_many_whole_latent_frames_as_fit_into_the_time(seconds: float, fps: int, frames: int) -> None:
    assert frames_in(STUDENT, seconds, fps) == frames


@pytest.mark.parametrize(("seconds", "frames"), [(1.125, 9), (2.0, 16), (0.01, 1)])
def test_a_student_that_does_not_tell_its_step_is_asked_for_what_fits(seconds: float, frames: int) -> None:
    alone = replace(STUDENT, latents=replace(STUDENT.latents, frames=1))
    assert frames_in(alone, seconds, 8) == frames


@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ({}, {"num_frames": None, "fps": None, "seed": None, "num_inference_steps": None}),
        ({"seconds": 2}, {"num_frames": 17, "fps": None}),
        ({"seconds": 2, "fps": 16}, {"num_frames": 33, "fps": 16}),
        ({"fps": 16}, {"num_frames": None, "fps": 16}),
        ({"size": "64x32"}, {"size": "64x32"}),
        ({"seed": 0, "num_inference_steps": 2}, {"seed": 0, "num_inference_steps": 2}),
    ],
)
def test_a_request_says_the_same_in_our_form(fields: dict[str, Any], ours: dict[str, Any]) -> None:
    asked = translated_video(VideosRequest(prompt="waves", **fields), SERVED)
    assert (asked.prompt, asked.model, asked.model_version) == ("waves", "fake-video", "1")
    assert {name: getattr(asked, name) for name in ours} == ours


def test_what_is_too_long_or_begins_with_a_picture_is_refused() -> None:
    for fields, param in (({"seconds": 128.0}, "seconds"), ({"input_reference": "a.png"}, "input_reference")):
        with pytest.raises(InvalidRequest) as caught:
            translated_video(VideosRequest(prompt="waves", **fields), SERVED)
        assert caught.value.param == param
    assert translated_video(VideosRequest(prompt="waves", seconds=127.75), SERVED).num_frames == 1021


def test_the_model_is_the_one_that_is_named_and_draws_videos() -> None:
    pictures = Served(fake_student(), len)
    both = Choice({Name("fake", "1"): pictures, Name("fake-video", "1"): SERVED})
    for model in ("fake-video", "fake-video@1", "fake-video@latest"):
        assert pick_video(both, VideosRequest(prompt="p", model=model)) is SERVED
    assert pick_video(Choice({Name("fake-video", "1"): SERVED}), VideosRequest(prompt="p")) is SERVED
    with pytest.raises(InvalidRequest, match="fake generates images: ask for them at /v1/images/generations"):
        pick_video(both, VideosRequest(prompt="p", model="fake"))


def test_a_form_is_its_fields_and_of_a_file_its_name() -> None:
    body = form(('name="prompt"', "Wellen, grün".encode()), ('name="input_reference"; filename="a.png"', b"\x89PNG"))
    assert form_fields(FORM, body) == {"prompt": "Wellen, grün", "input_reference": "a.png"}


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("multipart/form-data", form(('name="a"', b"1")), "must name the boundary"),
        (FORM, form(('name="a"', b"1"), ('name="a"', b"2")), "a name of its own"),
        (FORM, form(("", b"1")), "a name of its own"),
        (FORM, form(('name="a"', b"\xff\xfe")), "UTF-8"),
    ],
)
def test_a_form_that_cannot_be_read_is_refused(kind: str, body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        form_fields(kind, body)


def read(kind: str, body: bytes) -> VideosRequest:
    async def whole() -> bytes:
        return body

    request: Any = SimpleNamespace(body=whole, headers={"content-type": kind} if kind else {})
    return asyncio.run(read_body(request))


def test_a_body_is_json_or_a_form_whose_numbers_are_text() -> None:
    asked = VideosRequest(prompt="waves", seconds=4.0, seed=7)
    assert read("application/json", b'{"prompt": "waves", "seconds": 4, "seed": 7}') == asked
    fields = form(('name="prompt"', b"waves"), ('name="seconds"', b"4"), ('name="seed"', b"7"))
    assert read(FORM, fields) == read("Multipart/Form-Data ; boundary=x", fields) == asked
    for kind, body in (("", b'{"seconds": 4}'), (FORM, form(('name="seconds"', b"4")))):
        with pytest.raises(RequestValidationError) as caught:
            read(kind, body)
        assert caught.value.errors()[0]["loc"][:2] == ("body", "prompt")


JOB = a_job(id="b" * 32, model="fake-video", frames=17, fps=8, width=64, height=32)
LINKS = SimpleNamespace(links=SimpleNamespace(expires=lambda record: 777))


def record(state: State, **fields: Any) -> Record:
    return Record(
        id=JOB.id, state=state, payload=JOB.to_payload(), created_s=10.9,
        **{"result": {}, **fields},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (record(State.QUEUED), ("queued", 0, None, None, None)),
        (record(State.RUNNING, steps_done=1), ("in_progress", 25, None, None, None)),
        (record(State.DONE, finished_s=20.9), ("completed", 100, 20, 777, None)),
        (record(State.FAILED, finished_s=20.9, result={"error": {"code": "storage_failed", "message": "m"}}),
         ("failed", 0, None, 777, "storage_failed")),
        (record(State.CANCELLED, finished_s=20.9), ("failed", 0, None, 777, "cancelled")),
        (record(State.EXPIRED, finished_s=20.9), ("failed", 0, None, 777, "deadline_exceeded")),
    ],
)  # fmt: skip
def test_a_job_is_a_video_at_any_time_of_its_life(found: Record, said: tuple[Any, ...]) -> None:
    video = video_of(LINKS, found)  # type: ignore[arg-type]
    error = video.error.code if video.error else None
    assert (video.status, video.progress, video.completed_at, video.expires_at, error) == said
    assert (video.id, video.object, video.created_at) == ("video_" + "b" * 32, "video", 10)
    assert (video.model, video.prompt, video.seconds, video.size) == ("fake-video", "a red heart", "2.125", "64x32")
    assert job_id(video.id) == JOB.id


EDGES: dict[str, tuple[list[Any], list[Any]]] = {
    "prompt": (["p", "x" * 32_000], ["", " \n\t ", "x" * 32_001, None]),
    "model": (["", "x" * 128, None], ["x" * 129]),
    "seconds": ([0.001, 1024, "4", None], [0, -1, 1024.1, "soon"]),
    "size": (["1x1", "99999x99999", None], ["0x1", "1x0", "100000x1", "auto", "64"]),
    "input_reference": ([None], []),
    "seed": ([0, 2**32 - 1, "7", None], [-1, 2**32, 1.5]),
    "fps": ([1, 60, "24", None], [0, 61, 23.9]),
    "num_inference_steps": ([1, 1000, "4", None], [0, 1001]),
}


def test_every_field_has_its_edges_here() -> None:
    assert set(EDGES) == set(VideosRequest.model_fields)


@pytest.mark.parametrize("name", EDGES)
def test_the_outermost_values_are_taken_and_the_next_ones_refused(name: str) -> None:
    """What is taken here is taken in our own form, too, or refused in one sentence."""

    def taken(value: Any) -> bool:
        try:
            asked = VideosRequest(**{"prompt": "p", name: value})
        except ValidationError as error:
            assert {fault["loc"][0] for fault in error.errors()} == {name}
            return False
        with suppress(InvalidRequest):
            translated_video(asked, SERVED)
        return True

    accepted, refused = EDGES[name]
    assert [value for value in accepted if not taken(value)] == []
    assert [value for value in refused if taken(value)] == []
