"""Exception handlers: every exception becomes the same error body."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from service.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    ServiceError,
    TooLarge,
    Unavailable,
    error_body,
)
from service.http.description import OPENAI_PATHS, VIDEOS_PATH
from service.http.openai.schema import ImagesRequest
from service.http.openai.translate import as_openai
from service.http.openai.videos import VideosRequest
from service.http.schema import GenerateRequest

SHOWN_CHARS = 80

log = logging.getLogger(__name__)


def add_handlers(app: FastAPI) -> None:
    """Make the app return every error in the same form."""

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> JSONResponse:
        return _answer(request, error)

    @app.exception_handler(RedisError)
    async def queue_error(request: Request, error: RedisError) -> JSONResponse:
        log.warning("the queue cannot be reached: %s", error)
        return _answer(request, Unavailable("The queue cannot be reached."))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _answer(request, from_validation(error.errors()[0], _fields(request)))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _answer(request, from_http(error, request.url.path), dict(error.headers or {}))


def from_validation(error: dict[str, Any], fields: Collection[str]) -> ServiceError:
    """The first error of a body, in one sentence that names the field; ``fields`` are the known ones."""
    kind, field = error["type"], _field(error["loc"])
    if kind == "json_invalid":
        return ServiceError("The body is not valid JSON.", code="invalid_json")
    if kind == "string_unicode" and field is None:
        return InvalidRequest("A field's name is not valid Unicode.")
    if field is None:
        return InvalidRequest("The body must be a JSON object, sent with Content-Type: application/json.")
    if kind == "missing":
        return InvalidRequest(f"{field} is missing.", param=field)
    if kind == "extra_forbidden" and len(error["loc"]) == 2:
        nearest = difflib.get_close_matches(field, fields, n=1, cutoff=0)[0]
        return InvalidRequest(f"{field} is not a field of this request (did you mean {nearest}?).", param=field)
    message = error["msg"].removeprefix("Value error, ")
    where = "" if len(error["loc"]) == 2 else _entry(error["loc"])
    return InvalidRequest(f"{field}{where}: {message[:1].lower()}{message[1:]}.", param=field)


def from_http(error: HTTPException, path: str = "/") -> ServiceError:
    """What the framework itself refuses."""
    if error.status_code == 404:
        meant = re.sub("/+", "/", path).rstrip("/")
        hint = f" Without the extra slashes, the address is {_printable(meant)}." if meant not in ("", path) else ""
        return NotFound(f"There is no such page.{hint}")
    if error.status_code == 405:
        return MethodNotAllowed("This address does not support this method.")
    if error.status_code == 408:
        return RequestTimeout("The body did not arrive in time.")
    if error.status_code == 413:
        return TooLarge("The body is too large.")
    if error.status_code == 400:
        return ServiceError("The body is not valid JSON.", code="invalid_json")
    return ServiceError()


def _fields(request: Request) -> Collection[str]:
    if request.url.path == VIDEOS_PATH:
        return VideosRequest.model_fields
    return ImagesRequest.model_fields if request.url.path in OPENAI_PATHS else GenerateRequest.model_fields


def _field(location: tuple[Any, ...]) -> str | None:
    """The field's name, made printable: the client may have sent anything."""
    return _printable(str(location[1])) if len(location) > 1 else None


def _entry(location: tuple[Any, ...]) -> str:
    """Which entry of a list or an object is wrong, if any."""
    entries = [part for part in location[2:] if isinstance(part, int)]
    return f"[{entries[0]}]" if entries else ""


def _printable(name: str) -> str:
    return name[:SHOWN_CHARS].encode("utf-8", "replace").decode("utf-8")


def _answer(request: Request, error: ServiceError, headers: dict[str, str] | None = None) -> JSONResponse:
    body = error_body(error, request.state.request_id)
    status = as_openai(error) if request.url.path in OPENAI_PATHS else error.status
    return JSONResponse(body, status, headers={**error.headers, **(headers or {})})
