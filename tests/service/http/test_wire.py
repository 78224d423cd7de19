"""Requests as they come over the wire: what cannot be read in one way only, or never ends, is refused."""

from __future__ import annotations

import gzip
import json
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import STATUS, Cancelled, DeadlineExceeded, GenerationFailed, ServiceError
from service.http import protocol, server
from service.keys import KeyStore
from tests.service.http.test_http import check_error
from tests.service.support import Api, Service, call, post

JSON = {"Content-Type": "application/json"}


def exchange(url: str, text: bytes, timeout_s: float = 30.0) -> bytes:
    """Everything that comes back for these bytes, until the other side closes."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        connection.sendall(text)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


def test_two_lengths_for_one_body_are_a_smuggled_request(live: Service) -> None:
    host = live.url.removeprefix("http://")
    head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 4\r\n"
    answer = exchange(live.url, f"{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /jobs HTTP/1.1\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1 ") == 1
    assert b"bad_request" in answer and b"connection: close" in answer.lower()


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate"])
def test_a_compressed_body_is_refused_by_its_encoding(live: Service, encoding: str) -> None:
    body = gzip.compress(b'{"prompt": "p"}')
    response = call("POST", f"{live.url}/generate", content=body, headers={**JSON, "Content-Encoding": encoding})
    assert encoding in check_error(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "text/json; charset=x", ""])
@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
def test_a_body_that_is_not_json_is_refused_by_its_type(live: Service, kind: str, path: str) -> None:
    response = call("POST", live.url + path, content=b'{"prompt": "p"}', headers={"Content-Type": kind} if kind else {})
    message = check_error(response, 415, "unsupported_media_type")
    assert "Content-Type: application/json" in message and kind.partition(";")[0] in message


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"])
def test_every_way_to_write_json_is_read(live: Service, kind: str) -> None:
    response = call("POST", f"{live.url}/generate", content=b'{"prompt": "p"}', headers={"Content-Type": kind})
    assert response.status_code == 200, response.text


def test_head_is_get_without_the_body(live: Service) -> None:
    id = post(live.url, prompt="p").json()["id"]
    for path in ("/metrics", "/v1/models", "/info", "/jobs", f"/jobs/{id}", f"/jobs/{id}/images/0", "/healthz",
                 "/readyz", "/", "/docs", "/openapi.json"):  # fmt: skip
        head, get = call("HEAD", live.url + path), call("GET", live.url + path)
        assert head.status_code == get.status_code == 200, path
        assert head.content == b"" and head.headers["Content-Type"] == get.headers["Content-Type"], path
    check_error(call("GET", f"{live.url}/nothing"), 404, "not_found")
    assert call("HEAD", f"{live.url}/nothing").status_code == 404


def test_an_address_with_a_slash_too_many_is_told_the_right_one(live: Service) -> None:
    for wrong, right in (("/generate/", "/generate"), ("//generate", "/generate"), ("/v1//models/", "/v1/models")):
        assert f"extra slashes, the address is {right}." in check_error(call("GET", live.url + wrong), 404, "not_found")


def test_the_icon_is_where_browsers_ask_for_it(live: Service) -> None:
    icon = call("GET", f"{live.url}/favicon.ico")
    assert icon.status_code == 200 and icon.headers["Content-Type"] == "image/svg+xml"


def test_a_client_that_never_ends_its_head_or_its_body_is_sent_away(
    live_impatient: Api,
) -> None:
    host = live_impatient.url.removeprefix("http://")
    assert exchange(live_impatient.url, b"GET /healthz HTTP/1.1\r\nX-Slow: ") == b""
    whole = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    answer = exchange(live_impatient.url, whole + b"GET /healthz HTTP/1.1\r\nX-Slow: ")
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1, "also behind a request that was whole"
    head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
    assert exchange(live_impatient.url, head.encode() + b'{"prom').startswith(b"HTTP/1.1 408")


@pytest.fixture
def live_impatient(make_api: Callable[..., Api]) -> Api:
    """Its bounds are so short that the test need not wait for those that are usual."""
    return make_api(LOG_LEVEL="warning", HEAD_TIMEOUT_S="1", BODY_TIMEOUT_S="1")


@pytest.mark.parametrize(
    "host", ["a b", "a/b", "u@127.0.0.1", "127.0.0.1:abc", "127.0.0.1:123456", "a\u00e9", "a?b", "[::1"]
)
def test_a_host_that_is_no_name_is_refused_before_it_could_be_in_a_link(live: Service, host: str) -> None:
    answer = exchange(live.url, f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400") and b"one Host header" in answer


def test_a_request_has_one_host(live: Service) -> None:
    """As RFC 9112 has it: HTTP/1.0 alone may have none."""
    two = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    for text in (two, b"GET /healthz HTTP/1.1\r\n\r\n"):
        assert exchange(live.url, text).startswith(b"HTTP/1.1 400")
    for host in ("localhost", "a_b.example:80", "[::1]:8000", "[fe80::1%25eth0]", "10.0.0.1:", ""):
        text = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        assert exchange(live.url, text.encode()).startswith(b"HTTP/1.1 200"), host
    assert exchange(live.url, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_head_is_bounded(live: Service) -> None:
    host = live.url.removeprefix("http://")
    lines = "".join(f"X-{k}: {'y' * 1000}\r\n" for k in range(protocol.MAX_HEAD_BYTES // 1000 + 5))
    answer = exchange(live.url, f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n{lines}".encode())
    assert answer.startswith(b"HTTP/1.1 400") and b"at most 32768 bytes" in answer
    endless = exchange(live.url, f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nX: {'y' * 40_000}".encode())
    assert endless.startswith(b"HTTP/1.1 400") and b"at most 32768 bytes" in endless, "one header without an end"


def test_the_bound_on_a_head_is_one_for_each_request_of_a_connection(live: Service) -> None:
    host, _, port = live.url.removeprefix("http://").partition(":")
    request = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nX: {'y' * 4000}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=30) as connection, connection.makefile("rb") as answers:
        for _ in range(protocol.MAX_HEAD_BYTES // 4000 + 3):
            connection.sendall(request)
            assert answers.readline().startswith(b"HTTP/1.1 200")
            head = b"".join(iter(answers.readline, b"\r\n")).lower()
            answers.read(int(head.partition(b"content-length:")[2].split()[0]))


def test_head_is_counted_under_its_route(live: Service) -> None:
    assert call("HEAD", f"{live.url}/v1/models").status_code == 200
    lines = call("GET", f"{live.url}/metrics").text.splitlines()
    assert [line for line in lines if 'method="HEAD"' in line and 'route="/v1/models"' in line]


def test_bytes_that_are_no_http_are_refused_in_the_form_of_every_error(live: Service) -> None:
    for text in (b"\x16\x03\x01 hello\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n"):
        head, _, body = exchange(live.url, text).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "bad_request"


def test_a_client_that_offers_another_protocol_is_answered_in_this_one_and_then_let_go(live: Service) -> None:
    host = live.url.removeprefix("http://")
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    body = json.dumps({"prompt": "p"})
    head = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{offer}\r\n"
    answer = exchange(live.url, f"POST /generate HTTP/1.1\r\n{head}{body}".encode())
    assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer.lower()


def test_requests_in_one_piece_are_answered_in_their_order(live: Service) -> None:
    host = live.url.removeprefix("http://")
    one = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n"
    last = f"GET /nothing HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    answer = exchange(live.url, (one + one + last).encode())
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404"]


def test_the_process_asks_for_descriptors_and_takes_no_more_clients_than_it_has(live: Service) -> None:
    soft, hard = resource.prlimit(live.pids()["api"], resource.RLIMIT_NOFILE)
    assert soft == min(hard, server.DESCRIPTORS_WANTED) if hard > 0 else soft == server.DESCRIPTORS_WANTED


def test_what_only_burns_work_again_is_not_to_be_retried() -> None:
    for error in (Cancelled("c."), GenerationFailed("g."), GenerationFailed("w.", code="worker_lost"),
                  DeadlineExceeded("drawn too late.")):  # fmt: skip
        assert error.headers["x-should-retry"] == "false" and "Retry-After" not in error.headers
    late = DeadlineExceeded("not even begun.", retry_after_s=3)
    assert late.headers == {"Retry-After": "3"}
    for code in ("internal_error", "storage_failed", "unavailable", "queue_full"):
        assert "x-should-retry" not in ServiceError("m.", code=code).headers
    assert STATUS["too_many_streams"] == 429


def test_a_failed_drawing_says_so_over_http(live: Service) -> None:
    assert post(live.url, prompt="fake:raise").headers["x-should-retry"] == "false"


def test_a_stream_too_many_is_refused_before_its_job_is_queued(make_api: Callable[..., Api]) -> None:
    api = make_api(MAX_STREAMS="1")
    host = api.url.removeprefix("http://")
    body = json.dumps({"prompt": "p", "stream": True}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(api.address) as first:
        first.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert first.recv(65536).startswith(b"HTTP/1.1 200")
        [id] = api.ids()
        check_error(call("POST", f"{api.url}/generate", json={"prompt": "p", "stream": True}), 429, "too_many_streams")
        check_error(call("GET", f"{api.url}/jobs/{id}/events"), 429, "too_many_streams")
        assert api.ids() == [id]


def test_pages_of_an_allowed_origin_may_read_the_answers(make_api: Callable[..., Api]) -> None:
    closed, opened = make_api(), make_api(CORS="https://app.example")
    origin = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert "Access-Control-Allow-Origin" not in call("GET", f"{closed.url}/jobs", headers=origin).headers
    origin["Access-Control-Request-Headers"] = "authorization"
    asked = call("OPTIONS", f"{opened.url}/generate", headers=origin)
    assert asked.status_code == 200 and asked.headers["Access-Control-Allow-Origin"] == "https://app.example"
    answer = call("GET", f"{opened.url}/jobs", headers={"Origin": "https://app.example"})
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert "X-Request-ID" in answer.headers["Access-Control-Expose-Headers"]
    other = call("GET", f"{opened.url}/jobs", headers={"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in other.headers


def test_the_docs_open_in_a_browser_though_there_are_keys(make_api: Callable[..., Api], tmp_path: Path) -> None:
    KeyStore(tmp_path / "data").create("ann")
    api = make_api()
    assert call("GET", f"{api.url}/docs").status_code == 200
    check_error(call("GET", f"{api.url}/openapi.json"), 401, "missing_api_key")


def test_a_process_is_ready_when_a_worker_holds_what_it_serves(make_api: Callable[..., Api]) -> None:
    api = make_api()
    other = {"fake/0": {"runtime": "onnx", "shows_steps": True}}
    worker = {"runtime": "onnx", "host": "h", "max_batch": 8, "models": other}
    api.redis.zadd(f"{api.prefix}wk", {"w": 9e15})
    api.redis.set(f"{api.prefix}wi:w", json.dumps(worker))
    assert "fake/1" in check_error(call("GET", f"{api.url}/readyz"), 503, "unavailable")
    worker["models"] = {"fake/1": {"runtime": "torch", "shows_steps": True}}
    api.redis.set(f"{api.prefix}wi:w", json.dumps(worker))
    ready = call("GET", f"{api.url}/readyz").json()
    assert (ready["model_version"], ready["runtime"], ready["workers"]) == ("1", "torch", 1)


def test_what_is_served_is_named_to_whoever_asks_for_something_else(live: Service) -> None:
    message = check_error(post(live.url, prompt="p", model="dall-e-3"), 404, "model_not_found", "model")
    assert message == "The model 'dall-e-3' is not served: accepted is fake."
    message = check_error(post(live.url, prompt="p", model_version="7"), 404, "model_not_found", "model_version")
    assert message == "Version '7' of model fake is not served: accepted is 1."


def test_a_prompt_may_be_as_long_as_the_student_reads(live: Service) -> None:
    message = check_error(post(live.url, prompt="word " * 3000), 422, "invalid_request", "prompt")
    assert "3000 tokens" in message
    assert post(live.url, prompt="x" * 20_000).status_code == 200


@pytest.mark.parametrize(("answering", "closed"), [(None, True), (True, False), (False, True)])
def test_a_head_that_is_late_ends_a_connection_but_no_answer_that_is_on_its_way(
    answering: bool | None, closed: bool
) -> None:
    """A client that begins its next request while it waits for an answer still gets that answer."""
    done: list[Any] = []
    connection: Any = object.__new__(protocol.BoundedHttp)
    connection.cycle = None if answering is None else SimpleNamespace(response_complete=not answering)
    connection.transport = SimpleNamespace(close=lambda: done.append("closed"))
    connection.loop = SimpleNamespace(call_later=lambda *arguments: done.append(arguments) or "a timer")
    connection._head_timer = "the timer that is over"
    connection._head_is_late()
    assert done == (["closed"] if closed else [(30.0, connection._head_is_late)])
    assert connection._head_timer == (None if closed else "a timer")
