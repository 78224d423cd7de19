"""Who may do what: every route of the application, and every job, from outside and with every kind of key."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute

from service.http.access import PUBLIC, SCOPE_OF, Access, needed_scope
from service.http.app import build_app
from service.keys import SCOPES, Key, KeyStore
from service.observe.context import RequestInfo, current_request
from service.settings import Settings
from tests.service.http.test_http import check_error
from tests.service.support import (
    PATIENCE_S,
    REPOSITORY,
    Api,
    Service,
    call,
    clean_environment,
    eventually,
    post,
)

NOBODYS_JOB = "0" * 32


def routes_of(routes: Sequence[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, address) of everything that the application answers, described or not."""
    for route in routes:
        if (included := getattr(route, "original_router", None)) is not None:
            yield from routes_of(included.routes, prefix + route.include_context.prefix)  # type: ignore[attr-defined]
        else:
            for method in sorted(route.methods or {"GET"}):  # type: ignore[attr-defined]
                yield method, prefix + route.path  # type: ignore[attr-defined]


def all_routes(tmp_path: Path) -> list[tuple[str, str]]:
    return list(routes_of(build_app(Settings(runtime="fake", data_dir=tmp_path)).routes))


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def test_every_route_is_public_by_design_or_asks_for_a_key_with_its_scope(
    make_api: Callable[..., Api], tmp_path: Path
) -> None:
    routes = all_routes(tmp_path / "elsewhere")
    assert {("POST", "/generate"), ("GET", "/jobs/{id}"), ("GET", "/openapi.json"), ("GET", "/")} <= set(routes)
    keys = KeyStore(tmp_path / "data")
    texts = {scope: keys.create(scope, [scope])[1] for scope in SCOPES}
    api = make_api()
    with httpx.Client(base_url=api.url, trust_env=False, timeout=PATIENCE_S) as client:

        def status(headers: dict[str, str]) -> int:
            url = template.format(id=NOBODYS_JOB, k=0, name="page.js", model="none", version="1", action="remix")
            return client.request(method, url, headers=headers).status_code

        for method, template in routes:
            asked = ("GET" if method == "HEAD" else method, template)
            listed = {scope for route, scope in SCOPE_OF.items() if route == asked}
            if template in PUBLIC and method in ("GET", "HEAD"):
                assert status({}) not in (401, 403), (method, template)
                continue
            assert len(listed) == 1, f"service.http.access says nothing of {method} {template}"
            for headers in ({}, bearer("fewstep_0_0"), {"Authorization": texts["read"]}):
                assert status(headers) == 401, (method, template)
            assert {scope for scope in SCOPES if status(bearer(texts[scope])) != 403} == listed, (method, template)


def test_the_table_says_what_was_agreed() -> None:
    assert set(PUBLIC) == {"/", "/page/{name}", "/favicon.ico", "/docs", "/healthz", "/readyz"}
    agreed = {
        "generate": [
            ("POST", "/generate"),
            ("POST", f"/jobs/{NOBODYS_JOB}/cancel"),
            ("POST", "/v1/images/generations"),
            ("DELETE", f"/v1/videos/video_{NOBODYS_JOB}"),
        ],
        "read": [
            ("GET", "/v1/videos"),
            ("GET", f"/jobs/{NOBODYS_JOB}"),
            ("GET", f"/jobs/{NOBODYS_JOB}/images/3"),
            ("HEAD", "/openapi.json"),
        ],
        "metrics": [("GET", "/metrics"), ("HEAD", "/metrics")],
        "admin": [("POST", "/metrics"), ("DELETE", f"/jobs/{NOBODYS_JOB}")],
    }
    for scope, addresses in agreed.items():
        assert {needed_scope(*address) for address in addresses} == {scope}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nowhere"),
        ("POST", "/"),
        ("DELETE", "/healthz"),
        ("GET", "/healthz/"),
        ("GET", "//healthz"),
        ("GET", "/page/../metrics"),
        ("GET", "/page/%2e%2e/metrics"),
        ("POST", "/page/page.js"),
        ("OPTIONS", "/generate"),
        ("PUT", "/generate"),
        ("GET", "/GENERATE"),
    ],
)
def test_what_is_not_listed_needs_admin(method: str, path: str) -> None:
    assert needed_scope(method, path) == "admin"


def test_refusals_have_the_one_form_and_say_what_is_missing(make_api: Callable[..., Api], tmp_path: Path) -> None:
    key, text = KeyStore(tmp_path / "data").create("ann", ["read"])
    api = make_api()
    missing = call("POST", f"{api.url}/generate", json={"prompt": "p"})
    assert "Authorization: Bearer" in check_error(missing, 401, "missing_api_key")
    assert missing.headers["WWW-Authenticate"] == 'Bearer realm="fewstep"'
    wrong = call("POST", f"{api.url}/generate", headers=bearer(text[:-1]))
    check_error(wrong, 401, "invalid_api_key")
    assert 'error="invalid_token"' in wrong.headers["WWW-Authenticate"]
    narrow = call("POST", f"{api.url}/generate", headers=bearer(text), content=b"not even json")
    assert "lacks the scope generate" in check_error(narrow, 403, "insufficient_scope")
    assert 'scope="generate"' in narrow.headers["WWW-Authenticate"]
    KeyStore(tmp_path / "data").revoke(key.id)
    check_error(call("GET", f"{api.url}/jobs/{NOBODYS_JOB}", headers=bearer(text)), 401, "invalid_api_key")
    assert api.states() == []


def test_the_first_key_closes_a_running_service(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api = make_api()
    assert call("GET", f"{api.url}/jobs/{NOBODYS_JOB}").status_code == 404
    _, text = KeyStore(tmp_path / "data").create("ann")
    assert call("GET", f"{api.url}/jobs/{NOBODYS_JOB}").status_code == 401
    assert call("GET", f"{api.url}/jobs/{NOBODYS_JOB}", headers=bearer(text)).status_code == 404


class Caller:
    """Somebody with a key."""

    def __init__(self, url: str, keys: KeyStore, name: str, **options: Any) -> None:
        self.key: Key
        self.key, self.text = keys.create(name, **options)
        self._url = url

    def __call__(self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
        return call(method, self._url + path, headers={**bearer(self.text), **(headers or {})}, **options)

    def later(self, prompt: str, **headers: str) -> str:
        """The id of a job that is asked for later."""
        headers = {"Prefer": "respond-async", **headers}
        accepted = self("POST", "/generate", headers=headers, json={"prompt": prompt, "seed": 1})
        assert accepted.status_code == 202, accepted.text
        return str(accepted.json()["id"])


def test_a_job_is_its_owners_and_nobody_elses_can_know_of_it(keyed: tuple[Service, KeyStore]) -> None:
    service, keys = keyed
    ann, bob = (Caller(service.url, keys, name) for name in ("ann", "bob"))
    id = ann.later("a red heart")
    done = eventually(lambda: (found := ann("GET", f"/jobs/{id}").json())["status"] == "done" and found)
    assert done["seeds"] == [1]
    unknown = check_error(bob("GET", f"/jobs/{NOBODYS_JOB}"), 404, "not_found")
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("POST", "/cancel")):
        assert check_error(bob(method, f"/jobs/{id}{path}"), 404, "not_found") == unknown
        assert ann(method, f"/jobs/{id}{path}").status_code == 200


def test_another_key_cannot_cancel_a_job_that_waits(keyed: tuple[Service, KeyStore]) -> None:
    service, keys = keyed
    ann, bob = (Caller(service.url, keys, name) for name in ("ann", "bob"))
    id = ann.later("fake:sleep=1 p")
    assert bob("POST", f"/jobs/{id}/cancel").status_code == 404
    assert eventually(lambda: (s := ann("GET", f"/jobs/{id}").json()["status"]) not in ("queued", "running") and s) == (
        "done"
    )


def test_an_idempotency_key_belongs_to_a_key(keyed: tuple[Service, KeyStore]) -> None:
    service, keys = keyed
    ann, bob = (Caller(service.url, keys, name) for name in ("ann", "bob"))
    first = ann.later("p", **{"Idempotency-Key": "same"})
    assert ann.later("p", **{"Idempotency-Key": "same"}) == first
    assert bob.later("p", **{"Idempotency-Key": "same"}) != first


def test_a_key_is_a_flow_of_the_queue(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api = make_api()
    ann = Caller(api.url, KeyStore(tmp_path / "data"), "ann")
    id = ann.later("p")
    assert api.hash_of(id)["key"] == ann.key.id
    assert api.redis.zscore(f"{api.prefix}f", ann.key.id)


def test_quotas_are_told_in_headers_and_a_key_may_have_its_own(make_api: Callable[..., Api], tmp_path: Path) -> None:
    """One image of the fake student costs 16 thousand pixel-steps."""
    api, keys = make_api(QUOTA="0.08"), KeyStore(tmp_path / "data")
    usual, own = Caller(api.url, keys, "usual"), Caller(api.url, keys, "own", quota=0.016)
    body = {"prompt": "p", "num_images_per_prompt": 2}
    later = {"Prefer": "respond-async"}
    report = usual("POST", "/generate", headers=later, json=body)
    assert report.status_code == 202
    assert {name: report.headers[f"X-RateLimit-{name}"] for name in ("Limit", "Remaining", "Reset")} == {
        "Limit": "80",
        "Remaining": "48",
        "Reset": "24",
    }
    assert report.headers["RateLimit-Policy"] == '"kilopixel-steps";q=80;w=60'
    assert report.headers["RateLimit"] == '"kilopixel-steps";r=48;t=24'
    assert own("POST", "/generate", headers=later, json={"prompt": "p"}).headers["X-RateLimit-Remaining"] == "0"
    refused = own("POST", "/generate", json={"prompt": "p"})
    check_error(refused, 429, "quota_exceeded")
    assert refused.headers["X-RateLimit-Limit"] == "16" and refused.headers["X-RateLimit-Remaining"] == "0"
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    assert "X-RateLimit-Limit" not in usual("GET", "/metrics").headers
    wrong = usual("POST", "/generate", json={})
    assert wrong.status_code == 422 and "X-RateLimit-Limit" not in wrong.headers


def test_without_a_quota_there_are_no_such_headers(live: Service) -> None:
    assert not [name for name in post(live.url, prompt="p").headers if "ratelimit" in name.lower()]


def test_the_description_says_which_addresses_need_a_key(tmp_path: Path) -> None:
    schema = build_app(Settings(runtime="fake", data_dir=tmp_path)).openapi()
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            scope = needed_scope(method.upper(), path)
            assert operation["security"] == ([{}, {"ApiKey": []}] if scope else []), path
            assert ({"401", "403"} <= set(operation["responses"])) == bool(scope), path


def serve(data_dir: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.run", *arguments],
        cwd=REPOSITORY,
        env=clean_environment({"RUNTIME": "fake", "PORT": "0", "DATA_DIR": str(data_dir), **settings}),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
@pytest.mark.parametrize("command", ["serve", "api"])
def test_other_machines_are_not_let_in_without_a_key(host: str, command: str, tmp_path: Path) -> None:
    if host == "::" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    keys = KeyStore(tmp_path / "data")
    keys.revoke(keys.create("gone")[0].id)
    ended = serve(tmp_path / "data", command, HOST=host, REDIS_URL="unix:///nowhere.sock")
    [line] = ended.stderr.splitlines()
    assert ended.returncode == 1 and ended.stdout == ""
    assert "no API key" in line and "fewstep keys create" in line and "--insecure" in line


def test_other_machines_are_let_in_with_a_key_or_when_it_is_said(tmp_path: Path) -> None:
    """What is refused then is only the server of the queue, which comes later."""
    KeyStore(tmp_path / "keyed").create("ann")
    for data_dir, arguments, settings in (
        ("keyed", (), {}),
        ("open", ("--insecure",), {}),
        ("open", ("serve", "--insecure"), {}),
        ("open", (), {"INSECURE": "true"}),
    ):
        ended = serve(tmp_path / data_dir, *arguments, HOST="0.0.0.0", REDIS_URL="unix:///nowhere.sock", **settings)
        assert ended.returncode == 1 and "FEWSTEP_REDIS_URL" in ended.stderr


def test_a_broken_file_of_keys_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "keys.json").write_text("rubbish")
    ended = serve(tmp_path / "data")
    [line] = ended.stderr.splitlines()
    assert ended.returncode == 1 and "keys.json is not a key file" in line


def test_a_key_asks_for_no_higher_priority_than_it_may(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api, keys, later = make_api(), KeyStore(tmp_path / "data"), {"Prefer": "respond-async"}
    usual, urgent = Caller(api.url, keys, "usual"), Caller(api.url, keys, "urgent", max_priority=2)
    admin, humble = Caller(api.url, keys, "root", scopes=SCOPES), Caller(api.url, keys, "humble", max_priority=-2)

    def ask(caller: Caller, **fields: int) -> httpx.Response:
        return caller("POST", "/generate", headers=later, json={"prompt": "p", **fields})

    allowed = [(usual, 0), (usual, -5), (urgent, 2), (admin, 5), (humble, -2)]
    assert [ask(caller, priority=priority).json().get("priority") for caller, priority in allowed] == [0, -5, 2, 5, -2]
    assert [ask(caller).json()["priority"] for caller in (usual, urgent, admin, humble)] == [0, 0, 0, -2]
    waiting = api.waiting()
    for caller, highest in ((usual, 0), (urgent, 2), (humble, -2)):
        refused = ask(caller, priority=highest + 1)
        message = check_error(refused, 403, "priority_too_high", "priority")
        assert message == f"priority is {highest + 1}: you may ask for {highest} at most."
    assert api.waiting() == waiting


def test_without_keys_priorities_are_for_this_machine(make_api: Callable[..., Api]) -> None:
    api, body = make_api(INSECURE="true"), {"prompt": "p", "priority": 1}
    later = {"Prefer": "respond-async"}
    assert call("POST", f"{api.url}/generate", headers=later, json=body).json()["priority"] == 1
    elsewhere = call("POST", f"{api.url}/generate", headers={**later, "X-Forwarded-For": "192.0.2.1"}, json=body)
    check_error(elsewhere, 403, "priority_too_high", "priority")


@pytest.mark.parametrize(
    ("header", "admitted"),
    [
        ("Bearer {}", True), ("bearer {}", True), ("BEARER   {}  ", True), ("Bearer{}", False), ("Basic {}", False),
        ("{}", False), ("Bearer {}x", False), ("Bearer", False), ("", False),
    ],
)  # fmt: skip
def test_a_key_is_sent_as_a_bearer_however_the_word_is_written(header: str, admitted: bool, tmp_path: Path) -> None:
    key, text = KeyStore(tmp_path).create("ann", ["read"], quota=2.5, allow_training=True)
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        info = current_request.get()
        assert info is not None
        found.append((scope["state"], (info.key, info.quota, info.allow_training)))

    async def send(message: Any) -> None:
        found.append(message.get("status"))

    scope = {
        "type": "http", "method": "GET", "path": "/jobs", "state": {"request_id": "r"}, "query_string": b"",
        "headers": [(b"authorization", header.format(text).encode())] if header else [],
    }  # fmt: skip
    token = current_request.set(RequestInfo("r"))
    try:
        asyncio.run(Access(app, KeyStore(tmp_path), Settings())(scope, None, send))  # type: ignore[arg-type]
    finally:
        current_request.reset(token)
    if not admitted:
        assert found[0] == 401
        return
    [(state, noted)] = found
    assert state == {"request_id": "r", "key": key.id, "scopes": ("read",), "keyed": True, "highest_priority": 0}
    assert noted == (key.id, 2.5, True)
