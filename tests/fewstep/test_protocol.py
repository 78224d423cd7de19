"""Calls, errors and retries, without a network: the operations are generators that are given answers."""

from __future__ import annotations

from collections.abc import Generator
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from fewstep import protocol
from fewstep.errors import Busy, FewstepError, NotFound, Refused, ServerError, TooLate, Unreachable, error_class
from fewstep.protocol import Call, Pause, retry_after_s
from fewstep.retries import Retries

RETRIES = Retries(tries=3, first_pause_s=1.0, longest_pause_s=60.0)
JOB = {
    "id": "a" * 32, "status": "done", "created": 1, "model": "m", "model_version": "1", "prompt": "p", "seeds": [1],
}  # fmt: skip


def response(status: int, body: Any = None, **headers: str) -> httpx.Response:
    request = httpx.Request("POST", "http://service/generate")
    return httpx.Response(status, json=body, headers=headers, request=request)


def busy(**headers: str) -> httpx.Response:
    error = {"message": "Too many requests are waiting.", "type": "server_error", "param": None, "code": "queue_full"}
    return response(503, {"error": error, "request_id": "r"}, **headers)


def send(steps: Generator[Any, Any, Any], *outcomes: Any) -> tuple[list[Any], Any]:
    """What an operation asks for when it is given these answers (a pause is given None), and its result."""
    asked, given, outcome = [], list(outcomes), None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration as end:
            return asked, end.value
        except FewstepError as error:
            return asked, error
        asked.append(step)
        outcome = None if isinstance(step, Pause) else given.pop(0)


def test_every_try_of_a_call_has_the_same_idempotency_key_and_every_call_its_own() -> None:
    def keys() -> set[str]:
        broken = httpx.ReadError("reset")
        asked, _ = send(protocol.submit("p", {}, None, RETRIES), broken, broken, response(202, JOB))
        calls = [step for step in asked if isinstance(step, Call)]
        assert len(calls) == 3
        return {call.headers["Idempotency-Key"] for call in calls}

    first, second = keys(), keys()
    assert len(first) == len(second) == 1 and first != second
    asked, _ = send(protocol.submit("p", {}, "mine", RETRIES), response(202, JOB))
    assert asked[0].headers["Idempotency-Key"] == "mine"


def test_a_busy_service_is_asked_again_when_it_says() -> None:
    done = response(202, JOB)
    asked, job = send(protocol.submit("p", {}, None, RETRIES), busy(**{"Retry-After": "7"}), done)
    assert [step.seconds for step in asked if isinstance(step, Pause)] == [7.0]
    assert job.status == "done"


def test_a_pause_that_is_too_long_is_told_instead_of_cut_short() -> None:
    asked, error = send(protocol.job("a", RETRIES), busy(**{"Retry-After": "61"}))
    assert len(asked) == 1 and isinstance(error, Busy) and error.retry_after_s == 61.0


def test_tries_are_bounded_and_the_last_error_is_told() -> None:
    asked, error = send(protocol.job("a", RETRIES), busy(), busy(), busy())
    assert sum(isinstance(step, Call) for step in asked) == 3
    pauses = [step.seconds for step in asked if isinstance(step, Pause)]
    assert 0.5 <= pauses[0] <= 1.0 and 1.0 <= pauses[1] <= 2.0
    assert isinstance(error, Busy) and str(error) == "Too many requests are waiting."
    assert (error.code, error.status, error.request_id) == ("queue_full", 503, "r")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500, 504])
def test_what_would_be_answered_the_same_again_is_not_asked_again(status: int) -> None:
    asked, error = send(protocol.job("a", RETRIES), response(status, {"error": {"message": "No."}}))
    assert len(asked) == 1 and isinstance(error, error_class(status)) and str(error) == "No."


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [(422, Refused, 3), (404, NotFound, 5), (429, Busy, 6), (503, Busy, 6), (504, TooLate, 7), (500, ServerError, 8)],
)
def test_each_kind_of_answer_has_its_exit_code(status: int, kind: type[FewstepError], code: int) -> None:
    found = error_class(status)
    assert issubclass(found, kind) and found.exit_code == code


def test_an_error_that_something_in_between_wrote_is_still_a_sentence() -> None:
    page = httpx.Response(502, text="<html>", request=httpx.Request("GET", "http://service/"))
    error = protocol.api_error(page)
    assert isinstance(error, Busy) and str(error) == "The service answered 502 Bad Gateway."


def test_an_answer_that_is_not_the_services_is_a_sentence() -> None:
    asked, error = send(protocol.job("a", RETRIES), response(200, {"hello": "world"}))
    assert type(error) is FewstepError and "is the address right?" in str(error)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (httpx.ConnectError("refused"), Unreachable),
        (httpx.ConnectTimeout("slow"), Unreachable),
        (httpx.ReadTimeout("slow"), TooLate),
    ],
)
def test_what_goes_wrong_on_the_way_has_its_kind(failure: httpx.TransportError, kind: type[FewstepError]) -> None:
    assert type(protocol.error_of(failure)) is kind


@pytest.mark.parametrize(("header", "seconds"), [(None, None), ("12", 12.0), ("soon", None), ("", None)])
def test_retry_after_is_read(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header) == seconds


def test_retry_after_may_be_a_date() -> None:
    assert retry_after_s(formatdate(0, usegmt=True)) == 0.0
    later = retry_after_s("Wed, 01 Jan 2200 00:00:00 GMT")
    assert later is not None and later > 1e9


def test_waiting_looks_less_and_less_often_and_knows_its_limit() -> None:
    waiting = response(200, {**JOB, "status": "queued"})
    asked, job = send(protocol.wait("a", None, RETRIES), waiting, waiting, waiting, response(200, JOB))
    pauses = [step.seconds for step in asked if isinstance(step, Pause)]
    assert pauses == sorted(pauses) and len(set(pauses)) == 3
    assert job.status == "done"
    _, error = send(protocol.wait("a", 0.0, RETRIES), waiting)
    assert type(error) is TooLate and "still queued" in str(error)


def test_what_is_left_out_is_not_sent() -> None:
    asked, _ = send(protocol.submit("p", {"seed": 7, "model": None, "n": 2}, None, RETRIES), response(202, JOB))
    assert asked[0].body == {"prompt": "p", "seed": 7, "n": 2}


def test_an_answer_may_take_as_long_as_the_request_says() -> None:
    asked, _ = send(protocol.generate("p", {"timeout_s": 300.0}, None, RETRIES), httpx.ReadTimeout("slow"))
    assert asked[0].arguments()["timeout"].read > 300.0
