"""Calls, errors and retries, without a network: the operations are generators that are given answers."""

from __future__ import annotations

from collections.abc import Generator
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from fewstep import protocol
from fewstep.errors import (
    Busy,
    FewstepError,
    NotFound,
    Refused,
    ServerError,
    TooLate,
    Unreachable,
    WrongUse,
    error_class,
)
from fewstep.events import SILENCE_S, Following
from fewstep.protocol import Call, Pause, retry_after_s
from fewstep.request import Options
from fewstep.retries import Retries
from service.http.schema import GenerateRequest

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


def test_a_service_that_asks_for_long_is_called_again_as_often_as_that_can_help() -> None:
    """Two pauses of at most 60 s are left after the first try, one after the second."""
    done = response(200, JOB)
    later, enough = busy(**{"Retry-After": "61"}), busy(**{"Retry-After": "20"})
    asked, job = send(protocol.job("a", RETRIES), later, enough, done)
    assert [step.seconds for step in asked if isinstance(step, Pause)] == [60.0, 20.0] and job.status == "done"
    asked, error = send(protocol.job("a", RETRIES), later, later)
    assert sum(isinstance(step, Call) for step in asked) == 2
    assert isinstance(error, Busy) and error.retry_after_s == 61.0
    asked, error = send(protocol.job("a", RETRIES), busy(**{"Retry-After": "121"}))
    assert len(asked) == 1 and isinstance(error, Busy) and error.retry_after_s == 121.0


def test_a_service_that_says_not_to_is_not_called_again() -> None:
    asked, error = send(protocol.job("a", RETRIES), busy(**{"Retry-After": "1", "x-should-retry": "false"}))
    assert len(asked) == 1 and isinstance(error, Busy) and not error.worth_retrying


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


def test_waiting_is_never_silent_beyond_its_end() -> None:
    """A connection may stay silent for 60 s, but not beyond the end; and it is renewed at most once a second."""
    now = 1000.0
    following = Following("a", RETRIES, within_s=70.0, clock=lambda: now)
    assert following.call.patience_s == 60.0 and not following.renew
    now += 30.0  # 40 s are left, and this connection would wait 60 for the next word
    assert following.renew
    following.closed()  # the client closed it itself: no error
    assert following.call.patience_s == 40.0 and not following.renew
    now += 0.5
    assert not following.renew
    with pytest.raises(Unreachable, match="before the job did"):
        following.closed()
    assert following.broken(Unreachable("Away.")) <= 39.5
    now += 39.5
    for late in (lambda: following.call, lambda: following.renew, lambda: following.broken(Unreachable("Away."))):
        with pytest.raises(TooLate, match="Job a had not ended after 70 s."):
            late()


def test_a_pause_before_the_next_connection_ends_with_the_time_that_is_left() -> None:
    now = [100.0]
    full = Busy("Full.", 503, retry_after_s=7.0)
    waiting = Following("j", Retries(tries=9), within_s=20.0, clock=lambda: now[0])
    assert waiting.broken(full) == 7.0
    now[0] += 17.0
    assert waiting.broken(full) == 3.0
    now[0] += 3.0
    with pytest.raises(TooLate, match="had not ended after 20 s"):
        waiting.broken(full)
    assert Following("j", Retries(tries=9)).broken(full) == 7.0


def test_following_without_an_end_waits_as_long_as_a_stream_may_be_silent() -> None:
    following = Following("a", RETRIES, clock=lambda: 0.0)
    assert following.call.patience_s == SILENCE_S and not following.renew


def test_every_field_of_the_api_can_be_asked_for() -> None:
    """The service's own description of its request is the key; what the client sets by its methods is left out."""
    elsewhere = {"prompt", "num_images_per_prompt", "stream"}
    assert set(Options.__annotations__) == set(GenerateRequest.model_fields) - elsewhere


@pytest.mark.parametrize(
    ("prompt", "options", "key", "reason"),
    [
        ("a caf\udce9", {}, None, "it contains bytes that are not UTF-8 text"),
        ("p", {"user": "\udce9"}, None, "it contains bytes that are not UTF-8 text"),
        ("p", {"timeout_s": float("nan")}, None, "it contains a number that is not finite"),
        ("p", {"seed": object()}, None, "Object of type object is not JSON serializable"),
        ("p", {}, "caf\u00e9", "a header may contain only ASCII characters"),
    ],
)
def test_what_cannot_be_sent_is_one_sentence(prompt: str, options: Any, key: str | None, reason: str) -> None:
    call = next(protocol.submit(prompt, options, key, RETRIES))
    assert isinstance(call, Call)
    with pytest.raises(WrongUse) as caught:
        call.arguments()
    assert str(caught.value) == f"The request cannot be sent: {reason}."


def test_an_id_that_is_not_text_is_one_sentence() -> None:
    with pytest.raises(WrongUse, match="not UTF-8 text"):
        next(protocol.job("\udce9", RETRIES))


def test_an_operators_call_is_repeated_only_if_it_reads() -> None:
    broken = httpx.ReadError("reset")
    asked, body = send(protocol.operate("GET", "admin/dlq", {"limit": 1}, None, RETRIES), broken, response(200, {}))
    assert sum(isinstance(step, Call) for step in asked) == 2 and body == {}
    asked, error = send(protocol.operate("POST", "admin/dlq/x/retry", {}, 90.0, RETRIES), broken)
    assert len(asked) == 1 and isinstance(error, Unreachable)
    assert asked[0].query == {"wait_s": 90.0} and asked[0].patience_s > 90.0


def test_a_list_is_read_page_by_page_until_there_are_enough() -> None:
    def page(count: int, next: str | None) -> httpx.Response:
        return response(200, {"data": [JOB] * count, "next": next})

    pages = page(100, "a"), page(100, "b"), page(30, None)
    asked, found = send(protocol.jobs(230, ["done", "failed"], True, RETRIES), *pages)
    chosen = {"status": ["done", "failed"], "all": "true"}
    assert len(found) == 230 and [dict(call.query) for call in asked] == [
        {**chosen, "limit": 100},
        {**chosen, "limit": 100, "cursor": "a"},
        {**chosen, "limit": 30, "cursor": "b"},
    ]
    asked, found = send(protocol.jobs(101, [], False, RETRIES), page(100, "a"), page(1, "b"))
    assert len(found) == 101 and dict(asked[1].query) == {"limit": 1, "cursor": "a"}
    asked, found = send(protocol.jobs(500, [], False, RETRIES), response(200, {"data": [JOB] * 100}))
    assert len(found) == 100  # a service of before there were pages


def test_what_is_left_out_is_not_sent() -> None:
    asked, _ = send(protocol.submit("p", {"seed": 7, "model": None, "n": 2}, None, RETRIES), response(202, JOB))
    assert asked[0].body == {"prompt": "p", "seed": 7, "n": 2}


def test_an_answer_may_take_as_long_as_the_request_says() -> None:
    asked, _ = send(protocol.generate("p", {"timeout_s": 300.0}, None, RETRIES), httpx.ReadTimeout("slow"))
    assert asked[0].arguments()["timeout"].read > 300.0
