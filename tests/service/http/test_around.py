"""What happens around a request: its id, its count, its line in the log, and how large its body may be."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from service.errors import TooLarge
from service.http.middleware import BodyLimit, RequestContext
from service.http.schema import GenerateRequest
from service.http.videos import check_volume, format_of, fps_of, frames_of
from service.observe.context import current_request
from service.observe.tracer import Tracing
from student.runtimes.fake import fake_student, fake_video_student

Counted = list[tuple[Any, ...]]


def around(app: Any, method: str = "GET", route: str | None = None, **headers: str) -> tuple[list[Any], Counted]:
    """What is sent and what is counted where ``app`` answers one request."""
    sent: list[Any] = []
    counted: Counted = []

    async def send(message: Any) -> None:
        sent.append(message)

    def count(*one: Any) -> None:
        counted.append(one)

    scope: dict[str, Any] = {
        "type": "http", "method": method, "path": "/",
        "headers": [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()],
    }  # fmt: skip
    if route is not None:
        scope["route"] = SimpleNamespace(path=route)
    metrics: Any = SimpleNamespace(request=count)
    asyncio.run(RequestContext(app, metrics, Tracing())(scope, receive_nothing, send))
    return sent, counted


async def receive_nothing() -> Any:
    return {"type": "http.request"}


async def answers(scope: Any, receive: Any, send: Any) -> None:
    current_request.get().headers["X-Extra"] = "1"  # type: ignore[union-attr]
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def hangs_up(scope: Any, receive: Any, send: Any) -> None:
    pass


async def crashes(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("secret")


async def crashes_late(scope: Any, receive: Any, send: Any) -> None:
    await answers(scope, receive, send)
    raise RuntimeError("secret")


@pytest.mark.parametrize(
    ("method", "route", "said", "level"),
    [
        ("GET", "/healthz", ("/healthz", "GET"), "DEBUG"),
        ("GET", "/readyz", ("/readyz", "GET"), "DEBUG"),
        ("GET", "/metrics", ("/metrics", "GET"), "DEBUG"),
        ("HEAD", "/jobs/{id}", ("/jobs/{id}", "HEAD"), "INFO"),
        *((method, "/x", ("/x", method), "INFO") for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS")),
        ("BREW", "/x", ("/x", "other"), "INFO"),
        ("get", None, ("other", "other"), "INFO"),
    ],
)
def test_a_request_is_counted_and_told_by_its_route(
    method: str, route: str | None, said: tuple[str, str], level: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "service.http.middleware")
    _, [(found_route, found_method, status, seconds)] = around(answers, method, route)
    assert (found_route, found_method, status) == (*said, 201) and 0 <= seconds < 5
    [line] = [record for record in caplog.records if record.name == "service.http.middleware"]
    told = {name: line.__dict__[name] for name in ("method", "route", "status", "duration_s")}
    assert told == {"method": said[1], "route": said[0], "status": 201, "duration_s": round(seconds, 4)}
    assert (line.levelname, line.getMessage()) == (level, "request answered")


def test_an_answer_has_the_requests_id_and_what_was_noted_for_it() -> None:
    sent, _ = around(answers, x_request_id="A-z.0_9:/+=@")
    assert sent[0]["headers"] == [(b"x-request-id", b"A-z.0_9:/+=@"), (b"x-extra", b"1")] and len(sent) == 2
    assert current_request.get() is None, "it is over"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("x" * 128, True), ("x" * 129, False), ("", False), ("a b", False), ("\u00e9", False), ("a\n", False)],
)  # fmt: skip
def test_an_id_that_could_spoil_a_log_is_replaced_by_one_of_128_bits(given: str, kept: bool) -> None:
    sent, _ = around(answers, x_request_id=given)
    found = dict(sent[0]["headers"])[b"x-request-id"].decode()
    assert found == given if kept else len(bytes.fromhex(found)) == 16
    assert kept or found != dict(around(answers)[0][0]["headers"])[b"x-request-id"].decode()


def test_a_crash_is_a_500_in_the_usual_form_and_its_words_stay_here(caplog: pytest.LogCaptureFixture) -> None:
    sent, [(_, _, status, _)] = around(crashes, x_request_id="mine")
    assert sent[0]["status"] == status == 500
    body = json.loads(sent[1]["body"])
    assert body["request_id"] == "mine" and "secret" not in json.dumps(body)
    [line] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert line.getMessage() == "request failed" and line.exc_info is not None


def test_an_answer_that_has_begun_breaks_off_and_counts_as_what_it_was() -> None:
    counted: Counted = []
    metrics: Any = SimpleNamespace(request=lambda *one: counted.append(one))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "headers": []}
    with pytest.raises(RuntimeError):
        asyncio.run(RequestContext(crashes_late, metrics, Tracing())(scope, receive_nothing, send))
    assert [one[2] for one in counted] == [201] and len(sent) == 2, "no second head"


def test_who_hangs_up_before_the_answer_counts_as_499() -> None:
    sent, [(_, _, status, _)] = around(hangs_up)
    assert status == 499 and sent == []


def test_what_is_not_a_request_is_passed_on() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    lifespan: Any = ({"type": "lifespan"}, receive_nothing, receive_nothing)
    metrics: Any = None
    asyncio.run(RequestContext(app, metrics, Tracing())(*lifespan))
    asyncio.run(BodyLimit(app, 1)(*lifespan))
    assert seen == [lifespan, lifespan] and lifespan[0] == {"type": "lifespan"}


def read_body(sizes: list[int], declared: str | None, most: int = 10) -> int:
    """How many bytes the application gets of a body that comes in parts of these sizes."""
    parts = [{"type": "http.request", "body": b"x" * size} for size in sizes]
    got = 0

    async def receive() -> Any:
        return parts.pop(0) if parts else {"type": "http.disconnect"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal got
        while (message := await receive())["type"] == "http.request":
            got += len(message["body"])

    headers = [] if declared is None else [(b"content-length", declared.encode())]
    asyncio.run(BodyLimit(app, most)({"type": "http", "headers": headers}, receive, receive_nothing))  # type: ignore[arg-type]
    return got


@pytest.mark.parametrize("declared", [None, "10", "junk", "-1", ""])
@pytest.mark.parametrize("sizes", [[10], [4, 6], [0, 10, 0], []])
def test_a_body_up_to_the_limit_is_read(sizes: list[int], declared: str | None) -> None:
    assert read_body(sizes, declared) == sum(sizes)


@pytest.mark.parametrize(
    ("sizes", "declared"),
    [([11], None), ([10, 1], None), ([10, 1], "5"), ([1], "11"), ([1], "9" * 13), ([1], "0" * 13)],
)  # fmt: skip
def test_a_larger_body_is_refused_at_the_first_byte_too_many(sizes: list[int], declared: str | None) -> None:
    with pytest.raises(HTTPException) as refused:
        read_body(sizes, declared)
    assert refused.value.status_code == 413


def test_what_a_video_has_unless_the_request_says_otherwise() -> None:
    videos, pictures = fake_video_student(), fake_student()
    usual, asked = GenerateRequest(prompt="p"), GenerateRequest(prompt="p", num_frames=5, fps=24, output_format="webp")
    assert (frames_of(videos, usual), fps_of(videos, usual), format_of(videos, usual)) == (9, 8, "mp4")
    assert (frames_of(videos, asked), fps_of(videos, asked), format_of(videos, asked)) == (5, 24, "webp")
    assert (frames_of(pictures, usual), fps_of(pictures, usual), format_of(pictures, usual)) == (0, 0, "png")
    assert (frames_of(pictures, asked), fps_of(pictures, asked)) == (0, 0), "a picture is no video of any length"


@pytest.mark.parametrize(
    ("num_frames", "drawn", "most", "hint", "param"),
    [
        (9, 1, 9, None, None),
        (9, 2, 18, None, None),
        (9, 1, 8, "the longest that fits has 5 frames", "num_frames"),
        (None, 1, 8, "the longest that fits has 5 frames", "num_frames"),
        (13, 1, 12, "the longest that fits has 9 frames", "num_frames"),
        (9, 3, 26, "the longest that fits has 5 frames", "num_frames"),
        (9, 9, 9, "the longest that fits has 1 frame", "num_frames"),
        (9, 10, 9, "no length fits at this size", "num_frames"),
        (None, 10, 9, "no length fits at this size", None),
    ],
)
def test_the_pixels_of_one_request_are_bounded_and_the_refusal_says_what_fits(
    num_frames: int | None, drawn: int, most: int, hint: str | None, param: str | None
) -> None:
    """In frames of 64x32."""
    body, area = GenerateRequest(prompt="p", num_frames=num_frames), 64 * 32
    if hint is None:
        return check_volume(fake_video_student(), body, (32, 64), drawn, most * area)
    with pytest.raises(TooLarge) as refused:
        check_volume(fake_video_student(), body, (32, 64), drawn, most * area)
    frames = num_frames or 9
    assert str(refused.value) == (
        f"{drawn} x 64x32 x {frames} frames are {frames * area * drawn} pixels; one request may ask for "
        f"{most * area}: {hint}."
    )
    assert refused.value.param == param
