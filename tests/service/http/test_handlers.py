"""Every error has one form: what pydantic and the framework refuse, as one sentence that names the field."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from redis.exceptions import ConnectionError as RedisConnectionError
from starlette.exceptions import HTTPException

from service.errors import Forbidden, InvalidRequest, QueueFull, ServiceError
from service.http.handlers import add_handlers, from_http, from_validation
from service.http.openai.translate import as_openai
from service.http.schema import GenerateRequest

FIELDS = GenerateRequest.model_fields


def fault(kind: str, *location: Any, msg: str = "Input should be valid") -> ServiceError:
    return from_validation({"type": kind, "loc": ("body", *location), "msg": msg}, FIELDS)


@pytest.mark.parametrize(
    ("kind", "location", "message", "param", "code"),
    [
        ("json_invalid", (3,), "The body is not valid JSON.", None, "invalid_json"),
        ("missing", ("prompt",), "prompt is missing.", "prompt", "invalid_request"),
        ("extra_forbidden", ("sed",), "sed is not a field of this request (did you mean seed?).", "sed",
         "invalid_request"),
        ("extra_forbidden", ("metadata", "x"), "metadata: input should be valid.", "metadata", "invalid_request"),
        ("int_type", ("seed",), "seed: input should be valid.", "seed", "invalid_request"),
        ("int_type", ("seed", "many", 1), "seed[1]: input should be valid.", "seed", "invalid_request"),
        ("int_type", ("cascade", 0), "cascade[0]: input should be valid.", "cascade", "invalid_request"),
        ("model_type", (), "The body must be a JSON object, sent with Content-Type: application/json.", None,
         "invalid_request"),
        ("string_unicode", (), "A field's name is not valid Unicode.", None, "invalid_request"),
        ("string_unicode", ("prompt",), "prompt: input should be valid.", "prompt", "invalid_request"),
        ("int_type", ("x" * 99,), f"{'x' * 80}: input should be valid.", "x" * 80, "invalid_request"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_one_sentence(
    kind: str, location: tuple[Any, ...], message: str, param: str | None, code: str
) -> None:
    error = fault(kind, *location)
    assert (str(error), error.param, error.code) == (message, param, code)


def test_our_own_checks_speak_for_themselves() -> None:
    error = fault("value_error", "prompt", msg="Value error, must contain at least one word")
    assert str(error) == "prompt: must contain at least one word."


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "not_found"), (405, "method_not_allowed"), (408, "request_timeout"), (413, "too_large"),
     (400, "invalid_json"), (418, "internal_error")],
)  # fmt: skip
def test_what_the_framework_refuses_has_a_code_of_ours(status: int, code: str) -> None:
    assert from_http(HTTPException(status)).code == code


@pytest.mark.parametrize(
    ("path", "hint"),
    [("/a", ""), ("/", ""), ("/a/", "/a"), ("//a", "/a"), ("/a//b/", "/a/b"), ("//", "")],
)
def test_slashes_too_many_are_told(path: str, hint: str) -> None:
    said = str(from_http(HTTPException(404), path))
    assert said == "There is no such page." + (f" Without the extra slashes, the address is {hint}." if hint else "")


def answers(error: Exception, path: str = "/x") -> httpx.Response:
    app = FastAPI()
    add_handlers(app)

    @app.middleware("http")
    async def identify(request: Any, call_next: Any) -> Any:
        request.state.request_id = "the id"
        return await call_next(request)

    @app.post(path)
    async def fail() -> None:
        raise error

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path)

    return asyncio.run(ask())


def test_every_kind_of_error_is_answered_in_one_form_with_its_headers() -> None:
    full = answers(QueueFull(retry_after_s=3.0))
    assert (full.status_code, full.headers["Retry-After"]) == (503, "3")
    assert json.loads(full.text) == {
        "error": {
            "message": "The queue is full: too many jobs are waiting.", "type": "server_error", "param": None,
            "code": "queue_full",
        },
        "request_id": "the id",
    }  # fmt: skip
    away = answers(RedisConnectionError("canary"))
    assert (away.status_code, away.json()["error"]["code"], away.headers["Retry-After"]) == (503, "unavailable", "1")
    assert "canary" not in away.text, "the address of the queue is nobody's business"
    late = answers(HTTPException(408, headers={"Connection": "close"}))
    assert (late.status_code, late.headers["Connection"]) == (408, "close")


@pytest.mark.parametrize(("path", "status"), [("/generate", 422), ("/v1/images/generations", 400), ("/v1/videos", 400)])
def test_openais_clients_expect_400_for_a_wrong_field(path: str, status: int) -> None:
    assert answers(InvalidRequest("m", "p"), path).status_code == status
    assert answers(Forbidden("m"), path).status_code == 403
    assert (as_openai(InvalidRequest("m")), as_openai(QueueFull())) == (400, 503)


@pytest.mark.parametrize(
    ("path", "unknown", "nearest"),
    [
        ("/generate", "num_frame", "num_frames"),
        ("/generate", "safety_id", "seed"),
        ("/v1/images/generations", "safety_id", "safety_identifier"),
        ("/v1/videos", "second", "seconds"),
        ("/v1/videos", "input_references", "input_reference"),
    ],
)
def test_the_nearest_field_is_one_of_the_address_that_was_asked(path: str, unknown: str, nearest: str) -> None:
    error = RequestValidationError([{"type": "extra_forbidden", "loc": ("body", unknown), "msg": "No."}])
    said = answers(error, path).json()["error"]
    assert said["message"] == f"{unknown} is not a field of this request (did you mean {nearest}?)."
    assert said["param"] == unknown
