"""What each operation of the client sends, how long it waits, and when it tries again; no network."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import httpx
import pytest

from fewstep import errors, protocol, retries
from fewstep.connection import connection
from fewstep.output import shortened, table
from fewstep.protocol import Call
from fewstep.retries import Retries

ONCE = Retries(tries=1)
KEYED = {"Idempotency-Key": "k"}


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        (protocol.generate("p", {"n": 2}, "k", ONCE), Call("POST", "generate", {"prompt": "p", "n": 2}, KEYED)),
        (protocol.generate("p", {"timeout_s": 30.0}, "k", ONCE),
         Call("POST", "generate", {"prompt": "p", "timeout_s": 30.0}, KEYED, patience_s=40.0)),
        (protocol.submit("p", {"timeout_s": 30.0}, "k", ONCE),
         Call("POST", "generate", {"prompt": "p", "timeout_s": 30.0}, {**KEYED, "Prefer": "respond-async"})),
        (protocol.job("a/b", ONCE), Call("GET", "jobs/a%2Fb")),
        (protocol.jobs(7, ["done"], True, ONCE),
         Call("GET", "jobs", query={"status": ["done"], "all": "true", "limit": 7})),
        (protocol.jobs(101, [], False, ONCE), Call("GET", "jobs", query={"limit": 100})),
        (protocol.cancel("a", ONCE), Call("POST", "jobs/a/cancel")),
        (protocol.feedback("a", "chosen", 3, ONCE),
         Call("POST", "jobs/a/feedback", {"feedback": "chosen", "image": 3})),
        (protocol.image("a", 2, ONCE), Call("GET", "jobs/a/images/2")),
        (protocol.models(ONCE), Call("GET", "v1/models")),
        (protocol.operate("GET", "admin/dlq", {"limit": 5}, None, ONCE),
         Call("GET", "admin/dlq", query={"limit": 5}, patience_s=30.0)),
        (protocol.operate("POST", "admin/x", {}, 90.0, ONCE),
         Call("POST", "admin/x", query={"wait_s": 90.0}, patience_s=120.0)),
    ],
)  # fmt: skip
def test_each_operation_sends_this(operation: Generator[Any, Any, Any], call: Call) -> None:
    assert next(operation) == call


def test_a_call_is_sent_as_utf8_json_and_waits_for_its_own_time() -> None:
    sent = Call("POST", "x", {"prompt": "é"}, {"A": "b"}, {"q": 1}, patience_s=7.0).arguments()
    assert sent == {
        "method": "POST", "url": "x", "headers": {"A": b"b", "Content-Type": b"application/json"},
        "content": '{"prompt": "é"}'.encode(), "params": {"q": 1}, "timeout": httpx.Timeout(7.0, connect=10.0),
    }  # fmt: skip
    assert Call("GET", "x").arguments() == {"method": "GET", "url": "x", "headers": {}}
    assert connection("http://h", None, 3.0).timeout == httpx.Timeout(3.0, connect=10.0)


def error(kind: type[errors.ApiError], status: int, **about: Any) -> errors.ApiError:
    return kind("No.", status, **about)


def test_a_call_is_tried_four_times_with_pauses_that_double_up_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries.random, "uniform", lambda low, high: {(0.5, 1.0): 1.0}[low, high])
    away = errors.Unreachable("Away.")
    assert [Retries().pause_s(tried, away) for tried in (1, 2, 3, 4)] == [0.5, 1.0, 2.0, None]
    patient = Retries(tries=99)
    assert [patient.pause_s(tried, away) for tried in (7, 8, 9, 60)] == [32.0, 60.0, 60.0, 60.0]


def test_only_what_may_pass_is_tried_again() -> None:
    kinds = [
        error(errors.Busy, 503), error(errors.Busy, 429), error(errors.ServerError, 500), error(errors.Refused, 422),
        error(errors.NotFound, 404), error(errors.NotAllowed, 401), error(errors.DeadlineExceeded, 504),
        errors.Unreachable("Away."), errors.TooLate("Late."), errors.WrongUse("Wrong."),
    ]  # fmt: skip
    assert [Retries().pause_s(1, kind) is not None for kind in kinds] == [
        True, True, False, False, False, False, False, True, False, False,
    ]  # fmt: skip
    assert Retries().pause_s(1, error(errors.Busy, 503, worth_retrying=False)) is None


def test_the_service_says_when_and_a_minute_is_the_longest_pause() -> None:
    def pause(tried: int, asked_s: float) -> float | None:
        return Retries().pause_s(tried, error(errors.Busy, 429, retry_after_s=asked_s))

    assert [pause(1, asked_s) for asked_s in (0.0, 7.0, 60.0, 61.0, 180.0, 180.1)] == [0.0, 7.0, 60.0, 60.0, 60.0, None]
    assert [pause(3, asked_s) for asked_s in (60.0, 60.1)] == [60.0, None] and pause(4, 1.0) is None


@pytest.mark.parametrize(
    ("status", "kind", "exit_code"),
    [
        (400, errors.Refused, 3), (401, errors.NotAllowed, 4), (403, errors.NotAllowed, 4), (404, errors.NotFound, 5),
        (409, errors.Refused, 3), (413, errors.Refused, 3), (422, errors.Refused, 3), (429, errors.Busy, 6),
        (499, errors.Refused, 3), (500, errors.ServerError, 8), (501, errors.ServerError, 8), (502, errors.Busy, 6),
        (503, errors.Busy, 6), (504, errors.DeadlineExceeded, 7), (599, errors.ServerError, 8),
    ],
)  # fmt: skip
def test_each_status_has_its_error_and_its_exit_code(status: int, kind: type[errors.ApiError], exit_code: int) -> None:
    assert errors.error_class(status) is kind and kind.exit_code == exit_code


def test_the_other_errors_have_their_exit_codes_and_say_what_they_are() -> None:
    kinds = (errors.FewstepError, errors.WrongUse, errors.Unreachable, errors.JobFailed)
    assert [kind.exit_code for kind in kinds] == [1, 2, 9, 8]
    assert errors.Unreachable("Away.").detail() == {
        "message": "Away.", "type": "Unreachable", "param": None, "code": None,
    }  # fmt: skip
    assert errors.JobFailed("No.", "expired").detail()["code"] == "expired"
    told = error(errors.Refused, 422, code="invalid_request", param="seed", request_id="r").detail()
    assert told == {
        "message": "No.", "type": "Refused", "param": "seed", "code": "invalid_request", "status": 422,
        "request_id": "r",
    }  # fmt: skip


def test_an_error_of_the_api_is_read_from_its_body_and_its_headers() -> None:
    body = {"error": {"message": "m", "code": "c", "param": "p"}, "request_id": "of the body"}
    headers = {"X-Request-ID": "of the header", "Retry-After": "3", "x-should-retry": "false"}
    found = protocol.api_error(httpx.Response(503, json=body, headers=headers))
    assert (found.message, found.code, found.param, found.request_id) == ("m", "c", "p", "of the body")
    assert (found.status, found.retry_after_s, found.worth_retrying) == (503, 3.0, False)
    bare = protocol.api_error(httpx.Response(418, headers={"X-Request-ID": "of the header", "x-should-retry": "true"}))
    assert (bare.request_id, bare.worth_retrying, bare.code) == ("of the header", True, None)
    assert "418" in bare.message


def test_text_for_people_fits_its_place() -> None:
    assert shortened("a  b\nc") == "a b c" and shortened("x" * 48) == "x" * 48
    assert shortened("x" * 49) == "x" * 47 + "…" and len(shortened("x" * 99, 10)) == 10
    assert table(["a", "bb"], [["ccc", ""], ["d", "e"]]) == "a    bb\nccc\nd    e"


@pytest.mark.parametrize(
    ("variables", "url", "proxy"),
    [
        ({"HTTP_PROXY": "http://a:1", "HTTPS_PROXY": "http://b:2"}, "http://h", "http://a:1"),
        ({"HTTP_PROXY": "http://a:1", "HTTPS_PROXY": "http://b:2"}, "https://h", "http://b:2"),
        ({"HTTPS_PROXY": "http://b:2", "ALL_PROXY": "c:3"}, "http://h", "http://c:3"),
        ({"HTTPS_PROXY": "http://b:2"}, "http://h", None),
        ({"HTTP_PROXY": "http://a:1"}, "http://127.9.9.9:80", None),
        ({"HTTP_PROXY": "http://a:1"}, "http://10.0.0.1", "http://a:1"),
    ],
)
def test_a_proxy_is_that_of_the_scheme_and_else_of_all(
    variables: dict[str, str], url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert connection(url, None, 1.0).proxy == proxy


@pytest.mark.parametrize("key", ["a b", "a\tb", "caf\u00e9", "a\n"])
def test_what_is_no_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(errors.WrongUse, match="printable ASCII characters without spaces") as refused:
        connection("http://h", key, 1.0)
    assert key not in str(refused.value)
    assert connection("http://h", None, 1.0).headers == {"User-Agent": "fewstep-python"}
    assert connection("http://h/v1/", "!~", 1.0).headers["Authorization"] == "Bearer !~"


def test_an_address_may_have_any_port_and_no_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_URL", raising=False)
    known = {
        None: "http://127.0.0.1:8000/",
        "http://h:65535/": "http://h:65535/",
        "http://h:1/base/v1": "http://h:1/base/",
    }
    assert {url: connection(url, None, 1.0).base_url for url in known} == known
    for url in ("http://h:0", "http://h?a=1", "http://h#a", "ws://h", "http://h h"):
        with pytest.raises(errors.WrongUse):
            connection(url, None, 1.0)


def test_what_goes_wrong_on_the_way_is_late_only_where_somebody_was_reached() -> None:
    kinds = {
        kind: type(protocol.error_of(kind("x")))
        for kind in (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout, httpx.ConnectTimeout, httpx.ReadError)
    }
    late = [kind.__name__ for kind, error in kinds.items() if error is errors.TooLate]
    assert late == ["ReadTimeout", "WriteTimeout", "PoolTimeout"]
    assert str(protocol.error_of(httpx.ReadError(""))) == "The service cannot be reached: ReadError."
