"""Everything that can go wrong with a request: one tree of exceptions, one table from code to HTTP status.

ServiceError
├── InvalidRequest      the request itself is wrong; ``param`` names the field
├── NotFound
├── MethodNotAllowed
├── Conflict            not now: the job is in another state
├── TooLarge
├── QueueFull           try again later
├── Unavailable         the queue or every worker is out of reach, or the service is stopping
├── DeadlineExceeded    accepted, but not done in time
└── GenerationFailed    accepted, but the worker could not do it
StartupError            not a request: the service cannot start; the message is one sentence
"""

from __future__ import annotations

from typing import Any

STATUS = {
    "invalid_json": 400,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "too_large": 413,
    "invalid_request": 422,
    "internal_error": 500,
    "generation_failed": 500,
    "worker_lost": 500,
    "result_missing": 500,
    "queue_full": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
}
RETRY_AFTER_S = 1


class StartupError(Exception):
    """The service cannot start, for a reason that one sentence tells."""


class ServiceError(Exception):
    """An answer other than 200; ``code`` is a key of STATUS."""

    code = "internal_error"

    def __init__(self, message: str, param: str | None = None, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code

    @property
    def status(self) -> int:
        return STATUS[self.code]

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status == 503 else {}


class InvalidRequest(ServiceError):
    code = "invalid_request"


class NotFound(ServiceError):
    code = "not_found"


class MethodNotAllowed(ServiceError):
    code = "method_not_allowed"


class Conflict(ServiceError):
    code = "conflict"


class TooLarge(ServiceError):
    code = "too_large"


class QueueFull(ServiceError):
    code = "queue_full"


class Unavailable(ServiceError):
    code = "unavailable"


class DeadlineExceeded(ServiceError):
    code = "deadline_exceeded"


class GenerationFailed(ServiceError):
    code = "generation_failed"


def error_body(error: ServiceError, request_id: str) -> dict[str, Any]:
    """The body of every answer that is not a success, in OpenAI's form with the request's id beside it."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    detail = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": detail, "request_id": request_id}
