"""Everything that can go wrong with a request: one tree of exceptions, one table of their codes.

ServiceError
├── InvalidRequest      the request itself is wrong; ``param`` names the field
├── Unauthorized        no API key, or not a valid one
├── Forbidden           the key lacks the scope, or only the operator may do this
├── NotFound
│   └── ModelGone       it was served a moment ago
├── ModelRefused        it cannot be loaded; the message says why
├── MethodNotAllowed
├── Conflict            the job's or the model's state does not allow it
├── RequestTimeout      the client stopped sending
├── TooLarge
├── UnsupportedMediaType
├── QuotaExceeded       the caller's quota is used up
│   └── TooManyStreams  it has too many streams open
├── QueueFull           try again later
├── Unavailable         the queue or every worker is out of reach, or the service is stopping
│   └── StoreUnavailable  the store of the results is out of reach
├── DeadlineExceeded    the deadline has passed, or will certainly pass
├── Cancelled           accepted, and cancelled before it was done
└── GenerationFailed    accepted, but the worker failed
StartupError            not a request: the service cannot start; the message is one sentence
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Of each code its HTTP status, and what a caller should know or do: docs/api.md lists them.
CODES = {
    "invalid_json": (400, "the body is not valid JSON"),
    "bad_request": (400, "what was sent is not valid HTTP, or its headers contradict each other"),
    "missing_api_key": (401, "send `Authorization: Bearer KEY`"),
    "invalid_api_key": (401, "the key is unknown, revoked or malformed"),
    "insufficient_scope": (403, "use a key with the required scope"),
    "priority_too_high": (403, "use a lower `priority`, or a key that allows it"),
    "untrusted_request": (403, "without API keys, a service answers only its own machine, and not other sites' pages"),
    "link_expired": (403, "the link to the image has expired or was changed: get a new one from its job"),
    "not_found": (404, "it does not exist, has expired, or belongs to another key"),
    "model_not_found": (404, "this model or version is not served; `GET /v1/models` lists what is"),
    "method_not_allowed": (405, "the address does not support this method"),
    "request_timeout": (408, "the body did not arrive in time: send it again"),
    "conflict": (409, "the state of the job, the model or the worker does not allow this"),
    "cancelled": (409, "the job was cancelled"),
    "too_large": (413, "the body is too large, or asks for too much: fewer or smaller images, or a shorter video"),
    "unsupported_media_type": (415, "send the body as uncompressed JSON, with `Content-Type: application/json`"),
    "invalid_request": (422, "correct the field that `param` names"),
    "idempotency_mismatch": (422, "this `Idempotency-Key` belongs to another request: use a new one"),
    "model_refused": (422, "the model cannot be served; the message says why"),
    "quota_exceeded": (429, "wait for `Retry-After`; `X-RateLimit-*` shows what is left"),
    "too_many_waiting": (429, "let some of your waiting jobs finish, or wait for `Retry-After`"),
    "too_many_streams": (429, "close one of your open event streams first"),
    "internal_error": (500, "the service failed unexpectedly; report the `request_id` to the operator"),
    "generation_failed": (500, "the image could not be generated; if that persists, report it to the operator"),
    "worker_lost": (500, "workers died repeatedly while they ran this job: report it to the operator"),
    "storage_failed": (500, "the image could not be stored: retry once; if that persists, report it to the operator"),
    "result_missing": (500, "the file of the image no longer exists: repeat the request with the same seed"),
    "queue_full": (503, "wait for `Retry-After`, which is measured, then retry"),
    "unavailable": (503, "a part of the service cannot be reached: wait for `Retry-After`, then retry"),
    "deadline_exceeded": (504, "the job was not done within `timeout_s`, or was certain not to be"),
}
STATUS = {code: status for code, (status, _) in CODES.items()}
RETRY_AFTER_S = 1
# The job has used the device, or was ended on purpose: OpenAI's clients would retry by themselves and waste work.
NOT_WORTH_A_RETRY = ("cancelled", "generation_failed", "worker_lost", "deadline_exceeded")


class StartupError(Exception):
    """The service cannot start; the message is one sentence that says why."""


class ServiceError(Exception):
    """An answer other than 200; ``default_message`` stands in for a missing message.

    A ``code`` that is not in the table is a later release's: a worker may be newer than this process. It is passed on,
    and the rest of the answer is that of the class's own code.
    """

    code = "internal_error"
    default_message = "The service failed unexpectedly."

    def __init__(
        self,
        message: str = "",
        param: str | None = None,
        *,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message or type(self).default_message)
        self._retry_after_s = retry_after_s
        self._headers = dict(headers or {})
        self.message = message or type(self).default_message
        self.param = param
        self.code = code or type(self).code

    @property
    def status(self) -> int:
        return STATUS[self._known]

    @property
    def headers(self) -> dict[str, str]:
        """Its own headers and Retry-After in whole seconds: the measured wait, or one second for a short outage."""
        if self._retry_after_s is None and self._known in NOT_WORTH_A_RETRY:
            return {**self._headers, "x-should-retry": "false"}
        if self._retry_after_s is None and self.status != 503:
            return self._headers
        return {**self._headers, "Retry-After": str(max(RETRY_AFTER_S, math.ceil(self._retry_after_s or 0)))}

    @property
    def _known(self) -> str:
        return self.code if self.code in STATUS else type(self).code


class InvalidRequest(ServiceError):
    code = "invalid_request"


class Unauthorized(ServiceError):
    code = "invalid_api_key"


class Forbidden(ServiceError):
    code = "insufficient_scope"


class NotFound(ServiceError):
    code = "not_found"


class ModelGone(NotFound):
    code = "model_not_found"


class ModelRefused(ServiceError):
    code = "model_refused"


class MethodNotAllowed(ServiceError):
    code = "method_not_allowed"


class Conflict(ServiceError):
    code = "conflict"


class RequestTimeout(ServiceError):
    code = "request_timeout"


class UnsupportedMediaType(ServiceError):
    code = "unsupported_media_type"


class TooLarge(ServiceError):
    code = "too_large"


class QuotaExceeded(ServiceError):
    code = "quota_exceeded"


class TooManyStreams(QuotaExceeded):
    code = "too_many_streams"


class QueueFull(ServiceError):
    code = "queue_full"
    default_message = "The queue is full: too many jobs are waiting."


class Unavailable(ServiceError):
    code = "unavailable"


class StoreUnavailable(Unavailable):
    default_message = "The result store cannot be reached."


class DeadlineExceeded(ServiceError):
    code = "deadline_exceeded"


class Cancelled(ServiceError):
    code = "cancelled"


class GenerationFailed(ServiceError):
    code = "generation_failed"


def error_detail(error: ServiceError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def error_body(error: ServiceError, request_id: str) -> dict[str, Any]:
    """The body of every answer that is not a success, with the request's id beside the error."""
    return {"error": error_detail(error), "request_id": request_id}
