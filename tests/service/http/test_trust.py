"""A service without keys: it answers its own machine, and nobody through it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from service.errors import Forbidden, StartupError
from service.exposure import check_exposure
from service.http.trust import check_keyless, is_local, is_loopback_name
from service.keys import KeyStore
from service.observe.logs import configure_logging
from service.settings import Settings
from tests.service.http.test_http import check_error
from tests.service.support import Service, call


def request(method: str = "POST", client: str = "127.0.0.1", **headers: str) -> dict[str, Any]:
    given = {"host": "127.0.0.1:8000", **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    return {"type": "http", "method": method, "headers": raw, "client": (client, 5)}


def test_only_this_machines_own_names_are_loopback() -> None:
    for host in ("localhost", "localhost:8000", "LOCALHOST", "a.localhost:1", "127.0.0.1", "127.3.2.1:80", "[::1]:80"):
        assert is_loopback_name(host), host
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.0.2", "x", "", "[::2]",
                 "::1", "[bad", "user@evil.example", "0.0.0.0"):  # fmt: skip
        assert not is_loopback_name(host), host


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_web_page_that_rebinds_its_name_reads_nothing(live: Service, method: str) -> None:
    """Its requests are same-origin to the browser; only the Host header tells them from ours."""
    path = {"GET": "/jobs", "POST": "/admin/models/fake/1/unload"}[method]
    headers = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000", "Sec-Fetch-Site": "same-origin"}
    response = call(method, live.url + path, headers=headers)
    assert "localhost only" in check_error(response, 403, "untrusted_request")


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
                                     {"Origin": "https://evil.example"}, {"Origin": "null"}])  # fmt: skip
def test_another_web_page_posts_nothing(live: Service, headers: dict[str, str]) -> None:
    for path in ("/admin/models/fake/1/unload", "/generate", f"/jobs/{'0' * 32}/cancel"):
        response = call("POST", live.url + path, headers=headers)
        assert "other web pages" in check_error(response, 403, "untrusted_request")
    ours = call("POST", f"{live.url}/generate", headers={"Origin": live.url, "Sec-Fetch-Site": "same-origin"},
                json={"prompt": "p"})  # fmt: skip
    assert ours.status_code == 200


PROXIED = ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Via"]


@pytest.mark.parametrize("name", PROXIED)
def test_any_sign_of_a_proxy_means_that_a_key_is_needed(live: Service, name: str) -> None:
    for method, path in (("GET", "/jobs"), ("POST", "/generate"), ("GET", "/admin/dlq"), ("GET", "/info")):
        response = call(method, live.url + path, headers={name: "1"})
        assert "keys create" in check_error(response, 403, "untrusted_request"), path
    assert call("GET", f"{live.url}/healthz", headers={name: "1"}).status_code == 200


def test_a_public_address_means_that_a_key_is_needed(tmp_path: Path) -> None:
    settings = Settings(public_url="https://pictures.example", data_dir=tmp_path)
    with pytest.raises(Forbidden, match="proxy"):
        check_keyless(request(), settings)
    with pytest.raises(StartupError, match="FEWSTEP_PUBLIC_URL"):
        check_exposure(settings, "127.0.0.1", KeyStore(tmp_path))
    KeyStore(tmp_path).create("ann")
    check_exposure(settings, "127.0.0.1", KeyStore(tmp_path))


def test_insecure_lets_other_names_in_but_no_other_web_page_and_nobody_to_the_operators_part() -> None:
    settings = Settings(insecure=True)
    check_keyless(request(host="pictures.example", x_forwarded_for="203.0.113.9"), settings)
    with pytest.raises(Forbidden, match="other web pages"):
        check_keyless(request(sec_fetch_site="cross-site"), settings)
    assert is_local(request())
    for elsewhere in (request(client="203.0.113.9"), request(host="pictures.example"), request(via="1.1 proxy"),
                      request(forwarded="for=x"), request(x_real_ip="1")):  # fmt: skip
        assert not is_local(elsewhere)


def test_an_origin_that_the_operator_allows_may_post() -> None:
    asked = request(origin="https://app.example", sec_fetch_site="cross-site")
    check_keyless(asked, Settings(cors=("https://app.example",)))
    with pytest.raises(Forbidden):
        check_keyless(asked, Settings(cors=("https://other.example",)))


def test_the_addresses_of_webhooks_stay_out_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """httpx logs every address that it sends to, at INFO."""
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        configure_logging(Settings(log_level="info"))
        assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
        assert not logging.getLogger("httpcore").isEnabledFor(logging.DEBUG)
        assert logging.getLogger("service").isEnabledFor(logging.INFO)
    finally:
        logging.getLogger().handlers[:], level = before
        logging.getLogger().setLevel(level)


def test_every_origin_may_post_where_the_operator_says_so() -> None:
    for asked in (request(origin="https://a.example", sec_fetch_site="cross-site"), request(origin="null")):
        check_keyless(asked, Settings(cors=("*",)))
        with pytest.raises(Forbidden, match="other web pages"):
            check_keyless(asked, Settings(cors=("https://b.example",)))


def test_another_web_page_may_lead_here() -> None:
    """A link that is followed is a cross-site GET, and changes nothing."""
    for method in ("GET", "HEAD", "OPTIONS"):
        check_keyless(request(method, sec_fetch_site="cross-site"), Settings())
    for method in ("POST", "DELETE", "PUT"):
        with pytest.raises(Forbidden, match="other web pages"):
            check_keyless(request(method, sec_fetch_site="cross-site"), Settings())


def test_whoever_has_no_address_is_not_this_machine() -> None:
    assert not is_local({**request(), "client": None}) and not is_local(request(client="a name"))
    assert is_local(request(client="::1"))
