"""Everything that can go wrong with a call: one tree of exceptions, each with a one-sentence message.

FewstepError
├── WrongUse        the call itself is invalid; nothing was sent
├── Unreachable     there was no answer: wrong address, no network, or the service is down
├── TooLate         a deadline passed: the service's (504) or the caller's own
├── JobFailed       the job was accepted but ended without images: failed, cancelled or expired
└── ApiError        the service answered with an error
    ├── Refused     something is wrong with the request (400, 409, 413, 422); ``param`` names the field
    ├── NotAllowed  the API key is missing, unknown, or lacks the permission (401, 403)
    ├── NotFound    no such job, image, model or page (404)
    ├── Busy        the queue is full, a quota is used up, or a part is unavailable (429, 502, 503)
    └── ServerError the service failed (any other 5xx)
"""

from __future__ import annotations

from typing import Any


class FewstepError(Exception):
    """``str(error)`` is one sentence; ``exit_code`` is the command line's exit code."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def detail(self) -> dict[str, Any]:
        """The error for programs, in the form of the API's own errors."""
        return {"message": self.message, "type": type(self).__name__, "param": None, "code": None}


class WrongUse(FewstepError):
    exit_code = 2


class Unreachable(FewstepError):
    exit_code = 9


class TooLate(FewstepError):
    exit_code = 7


class JobFailed(FewstepError):
    """``code`` is the API's code for the reason."""

    exit_code = 8

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code

    def detail(self) -> dict[str, Any]:
        return {**super().detail(), "code": self.code}


class ApiError(FewstepError):
    """An error response: HTTP ``status``, the API's ``code``, and the wrong field in ``param``, if there is one.

    ``retry_after_s`` is the wait that the service asks for, ``worth_retrying`` is false if it says that a retry would
    fail in the same way, and ``request_id`` identifies the request in its log.
    """

    def __init__(
        self, message: str, status: int, *, code: str | None = None, param: str | None = None,
        request_id: str | None = None, retry_after_s: float | None = None, worth_retrying: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.worth_retrying = worth_retrying

    def detail(self) -> dict[str, Any]:
        found = {"param": self.param, "code": self.code, "status": self.status, "request_id": self.request_id}
        return {**super().detail(), **found}


class Refused(ApiError):
    exit_code = 3


class NotAllowed(ApiError):
    exit_code = 4


class NotFound(ApiError):
    exit_code = 5


class Busy(ApiError):
    exit_code = 6


class ServerError(ApiError):
    exit_code = 8


class DeadlineExceeded(TooLate, ApiError):
    """The service's own deadline (504)."""


BY_STATUS: dict[int, type[ApiError]] = {
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    429: Busy,
    502: Busy,
    503: Busy,
    504: DeadlineExceeded,
}


def error_class(status: int) -> type[ApiError]:
    """The exception for an HTTP status that is an error."""
    return BY_STATUS.get(status, ServerError if status >= 500 else Refused)
