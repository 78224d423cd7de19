"""The API without a network: requests, the meaning of responses, and retries.

Each operation is a generator that yields calls and pauses and receives the responses; ``Client`` and ``AsyncClient``
only carry them out, so that both behave the same.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, RootModel, ValidationError

from fewstep.answers import Answer, Feedback, Job, Jobs, Model, Models, Word
from fewstep.connection import CONNECT_S
from fewstep.errors import ApiError, FewstepError, TooLate, Unreachable, WrongUse, error_class
from fewstep.request import Options, body_of
from fewstep.retries import Retries

MARGIN_S = 10.0  # what an answer may take beyond the deadline that the service itself keeps
OPERATION_S = 30.0  # the same for an operator's call
KEY_HEADER = "Idempotency-Key"
PAGE = 100  # jobs that the service lists at a time
SHOWN_CHARS = 200


@dataclass(frozen=True)
class Call:
    """One HTTP request; ``patience_s`` is how long to wait for its response (None: the client's default)."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, Any] = field(default_factory=dict)
    patience_s: float | None = None

    def arguments(self) -> dict[str, Any]:
        """The same for httpx.

        Raises:
            WrongUse: something in it cannot be sent.
        """
        try:
            found: dict[str, Any] = {
                "method": self.method,
                "url": self.path,
                "headers": {name: value.encode("ascii") for name, value in self.headers.items()},
            }
            if self.body is not None:
                found["content"] = json.dumps(self.body, ensure_ascii=False, allow_nan=False).encode("utf-8")
                found["headers"]["Content-Type"] = b"application/json"
        except (ValueError, TypeError) as error:
            raise WrongUse(f"The request cannot be sent: {_reason(error)}.") from None
        if self.query:
            found["params"] = dict(self.query)
        if self.patience_s is not None:
            found["timeout"] = httpx.Timeout(self.patience_s, connect=CONNECT_S)
        return found


@dataclass(frozen=True)
class Pause:
    """Wait this long."""

    seconds: float


Outcome = httpx.Response | httpx.TransportError | None
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Object = RootModel[dict[str, Any]]
Steps = Generator[Call | Pause, Outcome, T]


def asked(call: Call, retries: Retries) -> Steps[httpx.Response]:
    """The response to a call, with retries where they are worthwhile. The call must be safe to repeat.

    Raises:
        FewstepError
    """
    tried = 0
    while True:
        outcome = yield call
        tried += 1
        error = error_of(outcome)
        if error is None:
            assert isinstance(outcome, httpx.Response)
            return outcome
        pause_s = retries.pause_s(tried, error)
        if pause_s is None:
            raise error
        yield Pause(pause_s)


def generate(prompt: str, options: Options, key: str | None, retries: Retries) -> Steps[Answer]:
    """POST /generate, and wait for the images."""
    patience_s = options.get("timeout_s")
    call = _posting(prompt, options, key, {}, None if patience_s is None else patience_s + MARGIN_S)
    return read((yield from asked(call, retries)), Answer)


def submit(prompt: str, options: Options, key: str | None, retries: Retries) -> Steps[Job]:
    """POST /generate without waiting."""
    call = _posting(prompt, options, key, {"Prefer": "respond-async"}, None)
    return read((yield from asked(call, retries)), Job)


def job(id: str, retries: Retries) -> Steps[Job]:
    """GET /jobs/{id}."""
    return read((yield from asked(Call("GET", job_path(id)), retries)), Job)


def jobs(limit: int, status: Sequence[str], everybody: bool, retries: Retries) -> Steps[list[Job]]:
    """GET /jobs, page by page, until there are ``limit`` of them."""
    found: list[Job] = []
    query: dict[str, Any] = {**({"status": list(status)} if status else {}), **({"all": "true"} if everybody else {})}
    while True:
        query = {**query, "limit": min(limit - len(found), PAGE)}
        page = read((yield from asked(Call("GET", "jobs", query=query), retries)), Jobs)
        found += page.data
        if page.next is None or len(found) >= limit:
            return found
        query = {**query, "cursor": page.next}


def cancel(id: str, retries: Retries) -> Steps[Job]:
    """POST /jobs/{id}/cancel."""
    return read((yield from asked(Call("POST", job_path(id, "/cancel")), retries)), Job)


def feedback(id: str, word: Word, index: int, retries: Retries) -> Steps[Feedback]:
    """POST /jobs/{id}/feedback; a repeated call changes nothing."""
    call = Call("POST", job_path(id, "/feedback"), body={"feedback": word, "image": index})
    return read((yield from asked(call, retries)), Feedback)


def image(id: str, index: int, retries: Retries) -> Steps[bytes]:
    """GET /jobs/{id}/images/{k}."""
    return (yield from asked(Call("GET", job_path(id, f"/images/{index}")), retries)).content


def models(retries: Retries) -> Steps[list[Model]]:
    """GET /v1/models."""
    return read((yield from asked(Call("GET", "v1/models"), retries)), Models).data


def operate(
    method: str, path: str, query: Mapping[str, Any], wait_s: float | None, retries: Retries
) -> Steps[dict[str, Any]]:
    """Call an operator's route, whose response is a JSON object. Only a call that reads is retried.

    ``wait_s`` is how long the service waits for its workers.
    """
    whole = query if wait_s is None else {**query, "wait_s": wait_s}
    call = Call(method, path, query=whole, patience_s=(wait_s or 0.0) + OPERATION_S)
    answer = yield from asked(call, retries if method == "GET" else Retries(tries=1))
    return read(answer, Object).root


def job_path(id: str, below: str = "") -> str:
    """The path of a job.

    Raises:
        WrongUse: the id is empty or not text.
    """
    if not id:
        raise WrongUse("The job's id is empty: accepted is the id of a job.")
    return f"jobs/{quoted(id)}{below}"


def quoted(part: str) -> str:
    """One part of a path.

    Raises:
        WrongUse: it is not text.
    """
    try:
        return quote(part, safe="")
    except UnicodeEncodeError as error:
        raise WrongUse(f"The request cannot be sent: {_reason(error)}.") from None


def error_of(outcome: Outcome) -> FewstepError | None:
    """The exception for a call's outcome, or None for a success."""
    if isinstance(outcome, httpx.Response):
        return None if outcome.is_success else api_error(outcome)
    if isinstance(outcome, httpx.TimeoutException) and not isinstance(outcome, httpx.ConnectTimeout):
        return TooLate("The service did not answer in time.")
    reason = (str(outcome) or type(outcome).__name__)[:SHOWN_CHARS].rstrip(".")
    return Unreachable(f"The service cannot be reached{_where(outcome)}: {reason}.")


def api_error(response: httpx.Response) -> ApiError:
    """The exception for an error response, which may also come from a proxy in between."""
    try:
        body = response.json()
        detail = body["error"]
        message, request_id = str(detail["message"]), body.get("request_id")
    except (ValueError, KeyError, TypeError):
        detail, request_id = {}, None
        message = f"The service answered {response.status_code} {response.reason_phrase}".rstrip() + "."
    return error_class(response.status_code)(
        message,
        response.status_code,
        code=detail.get("code"),
        param=detail.get("param"),
        request_id=request_id or response.headers.get("X-Request-ID"),
        retry_after_s=retry_after_s(response.headers.get("Retry-After")),
        worth_retrying=response.headers.get("x-should-retry") != "false",
    )


def retry_after_s(header: str | None) -> float | None:
    """The seconds of a Retry-After header, which has seconds or a date (RFC 9110, 10.2.3); None if it has neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def read(response: httpx.Response, kind: type[M]) -> M:
    """The response as a type.

    Raises:
        FewstepError: it is something else.
    """
    try:
        return kind.model_validate_json(response.content)
    except ValidationError:
        address = response.request.url
        raise FewstepError(f"The response of {address} is not a fewstep service's; is the address right?") from None


def loads(text: str) -> dict[str, Any]:
    """The JSON object of an event, or an empty one."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _where(failure: httpx.TransportError | None) -> str:
    """The host that was called, without the user name and password that its address may contain."""
    try:
        asked_url = failure.request.url if failure is not None else None
    except RuntimeError:  # a failure without a request
        return ""
    return f" at {asked_url.scheme}://{asked_url.netloc.decode('ascii')}" if asked_url is not None else ""


def _reason(error: Exception) -> str:
    """Why httpx or JSON would not accept it, for its author."""
    if isinstance(error, UnicodeEncodeError) and error.encoding == "ascii":
        return "a header may contain only ASCII characters"
    if isinstance(error, UnicodeEncodeError):
        return "it contains bytes that are not UTF-8 text"
    return "it contains a number that is not finite" if isinstance(error, ValueError) else str(error)


def _posting(
    prompt: str, options: Options, key: str | None, headers: Mapping[str, str], patience_s: float | None
) -> Call:
    """The call, with its own idempotency key, so that a retry finds the first try's job instead of generating again."""
    keyed = {KEY_HEADER: key or secrets.token_hex(16), **headers}
    return Call("POST", "generate", body_of(prompt, options), keyed, patience_s=patience_s)
