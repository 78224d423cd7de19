"""Webhooks, against a real receiver on this machine: signed, tried again, never lost, never where they may not go."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import signal
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.webhook_key import key_of
from service.webhooks import signature
from service.webhooks.deliver import retry_after_s, send
from service.webhooks.target import Rules, TargetRefused, check_url, find_target
from tests.service.support import Service, alive, call, eventually, post, running_service

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
ON = {"WEBHOOK_SECRET": SECRET, "WEBHOOK_NETWORKS": "127.0.0.0/8", "WEBHOOK_HTTP": "true", "WEBHOOK_RETRY_S": "0.1"}


class Receiver:
    """Takes what is sent to it; ``answers`` are the statuses of the next answers, then 204."""

    def __init__(self) -> None:
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.received.append((self.path, headers, body))
                status, more = receiver.answers.pop(0) if receiver.answers else (204, {})
                self.send_response(status)
                for name, value in more.items():
                    self.send_header(name, value)
                self.end_headers()

            do_GET = do_POST  # a client that follows a redirect may ask with GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def at(self, path: str, count: int = 1) -> list[dict[str, Any]]:
        """Waits for so many events at a path; each is signed as the specification says."""
        found = eventually(lambda: (all := [row for row in self.received if row[0] == path])[count - 1 :] and all)
        return [checked(headers, body) for _, headers, body in found]


def checked(headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """The event in a request, whose signature is computed again from the text of the specification."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{key}" and headers["content-type"] == "application/json"
    return {**json.loads(body), "webhook-id": headers["webhook-id"]}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("webhooks") / "data", **ON) as running:
        yield running


def later(service: Service, **fields: Any) -> str:
    answer = call("POST", f"{service.url}/generate", json=fields, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_the_signature_is_that_of_the_specifications_own_example() -> None:
    """The example of the reference implementations (standard-webhooks, test_webhook)."""
    key = key_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signature.headers(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_every_end_of_a_job_is_told_of(service: Service, receiver: Receiver) -> None:
    done = later(service, prompt="a red heart", seed=4, webhook_url=receiver.url("/done?x=1"))
    failed = post(service.url, prompt="fake:raise", webhook_url=receiver.url("/failed"))
    [report] = receiver.at("/done?x=1")
    assert (report["type"], report["data"]["id"], report["webhook-id"]) == ("job.done", done, f"{done}.done")
    assert report["data"] == call("GET", f"{service.url}/jobs/{done}").json()
    assert call("GET", report["data"]["data"][0]["url"]).status_code == 200
    [report] = receiver.at("/failed")
    assert report["type"] == "job.failed" and failed.status_code == 500
    assert report["data"]["error"]["code"] == "generation_failed"


def test_a_cancelled_and_an_expired_job_are_told_of_if_that_was_asked(service: Service, receiver: Receiver) -> None:
    slow = later(service, prompt="fake:sleep=1.5")
    fields = {"prompt": "p", "webhook_url": receiver.url("/ended"), "webhook_events": ["job.cancelled", "job.expired"]}
    ids = {"job.cancelled": later(service, **fields), "job.expired": later(service, timeout_s=0.3, **fields)}
    later(service, **fields)  # it will be done, and nobody wants to know
    call("POST", f"{service.url}/jobs/{ids['job.cancelled']}/cancel")
    report = receiver.at("/ended", 2)
    assert {event["type"]: event["data"]["id"] for event in report} == ids
    eventually(lambda: call("GET", f"{service.url}/jobs/{slow}").json()["status"] == "done")
    later(service, prompt="p", webhook_url=receiver.url("/after"))
    receiver.at("/after")
    assert len(receiver.at("/ended")) == 2


def test_a_receiver_that_fails_is_tried_again_with_the_same_id(service: Service, receiver: Receiver) -> None:
    receiver.answers = [(500, {}), (404, {})]
    id = later(service, prompt="p", webhook_url=receiver.url("/again"))
    assert [event["webhook-id"] for event in receiver.at("/again", 3)] == [f"{id}.done"] * 3
    eventually(lambda: service.redis.zcard("fewstep:{fake}:wh") == 0, "it is settled")
    text = call("GET", f"{service.url}/metrics").text
    assert 'fewstep_webhooks_total{outcome="failed"} 2.0' in text


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_is_not_followed(service: Service, receiver: Receiver, status: int) -> None:
    receiver.answers = [(status, {"Location": receiver.url("/elsewhere")})]
    later(service, prompt="p", webhook_url=receiver.url(f"/moved-{status}"))
    assert len(receiver.at(f"/moved-{status}", 2)) == 2
    assert not [row for row in receiver.received if row[0] == "/elsewhere"]


def test_a_receiver_that_is_gone_for_good_is_not_tried_again(service: Service, receiver: Receiver) -> None:
    receiver.answers = [(410, {})]
    later(service, prompt="p", webhook_url=receiver.url("/gone"))
    receiver.at("/gone")
    eventually(lambda: service.redis.zcard("fewstep:{fake}:wh") == 0, "it is settled")
    later(service, prompt="p", webhook_url=receiver.url("/next"))
    receiver.at("/next")
    assert len(receiver.at("/gone")) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://127.0.0.1/", "https://"),
        ("http://10.0.0.1/", "not public"),
        ("http://user:word@127.0.0.1/", "user name or password"),
        ("http://", "has no host"),
    ],
)
def test_an_address_that_is_not_allowed_is_refused_at_once(service: Service, url: str, words: str) -> None:
    error = post(service.url, prompt="p", webhook_url=url).json()["error"]
    assert error["param"] == "webhook_url" and words in error["message"]


def test_a_name_that_leads_inside_gets_no_request(service: Service, receiver: Receiver, tmp_path: Path) -> None:
    """``localhost`` is a name like any other: what counts is where it leads."""
    inside = {**ON, "WEBHOOK_NETWORKS": "192.0.2.0/24"}
    with running_service(tmp_path / "data", **inside) as other:
        later(other, prompt="p", webhook_url=f"http://localhost:{receiver.port}/inside")
        eventually(lambda: 'outcome="refused"} 1.0' in call("GET", f"{other.url}/metrics").text, "it is refused")
    assert not [row for row in receiver.received if row[0] == "/inside"]


def test_what_is_owed_survives_the_death_of_every_process(receiver: Receiver, tmp_path: Path) -> None:
    settings = {**ON, "WEBHOOK_RETRY_S": "0.5", "RUNTIME": "fake"}
    receiver.answers = [(503, {})] * 3
    service = Service(tmp_path / "data", settings)
    try:
        service.wait_until_ready()
        id = later(service, prompt="p", webhook_url=receiver.url("/restart"))
        receiver.at("/restart")
        for pid in service.pids().values():
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(map(alive, service.pids().values())), "all of it is dead")
    finally:
        service.process.kill()
        service.process.wait()
    before = len(receiver.at("/restart"))
    receiver.answers = []
    with running_service(tmp_path / "data", **ON):
        assert receiver.at("/restart", before + 1)[-1]["webhook-id"] == f"{id}.done"


def test_they_are_off_unless_there_is_a_secret(live: Service) -> None:
    error = post(live.url, prompt="p", webhook_url="https://example.com/").json()["error"]
    assert error["param"] == "webhook_url" and "webhooks are not enabled" in error["message"]
    error = post(live.url, prompt="p", webhook_events=["job.done"]).json()["error"]
    assert error["param"] == "webhook_events"


PRIVATE = (
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.1.1", "198.18.0.1",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "fe80::1",
    "fc00::1", "ff02::1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:1::1", "fec0::1",
)  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_no_address_inside_is_allowed_however_it_is_written(address: str) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["8.8.8.8", address]  # one that is allowed before it does not help

    with pytest.raises(TargetRefused, match="not public"):
        asyncio.run(find_target("https://hook.test/", Rules(), resolve))
    literal = f"[{address}]" if ":" in address else address
    with pytest.raises(TargetRefused, match="not public"):
        check_url(f"https://{literal}/", Rules())


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "017700000001", "127.1"])
def test_other_ways_to_write_an_address_are_names_that_are_resolved(host: str) -> None:
    with pytest.raises((TargetRefused, OSError)):
        asyncio.run(find_target(f"https://{host}/", Rules()))


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["2606:4700::1111"]

    target = asyncio.run(find_target("https://hook.test:8443/a?b=c#d", Rules(), resolve))
    assert asked == ["hook.test"] and target.host == "hook.test"
    assert target.pinned_url == "https://[2606:4700::1111]:8443/a?b=c"
    network = Rules([ip_network("10.0.0.0/8")])
    assert check_url("https://10.9.9.9/", network).hostname == "10.9.9.9"
    with pytest.raises(TargetRefused, match="https://"):
        check_url("http://10.9.9.9/", network)


def test_of_several_networks_each_is_allowed_and_nothing_beside_them() -> None:
    networks = Rules([ip_network(text) for text in ("10.0.0.0/8", "fd00::/8", "192.168.1.0/24")])
    for host in ("10.9.9.9", "[fd00::1]", "192.168.1.255", "[::ffff:192.168.1.7]", "8.8.8.8"):
        assert check_url(f"https://{host}/", networks).port is None
    for host in ("[fe80::1]", "192.168.2.1", "[::ffff:192.168.2.7]", "127.0.0.1"):
        with pytest.raises(TargetRefused, match="not public"):
            check_url(f"https://{host}/", networks)

    async def resolve(host: str, port: int) -> list[str]:
        return ["10.1.1.1", "192.168.1.1", "172.16.0.1"]

    with pytest.raises(TargetRefused, match="not public"):
        asyncio.run(find_target("https://hook.test/", networks, resolve))


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("99999999999", 600.0), ("soon", 0.0), ("", 0.0)])
def test_how_long_a_receiver_wants_to_be_left_alone(header: str, seconds: float) -> None:
    assert retry_after_s(header) == seconds


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for hook.test and its key in one file."""
    folder = tmp_path_factory.mktemp("tls")
    command = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hook.test",
        "-addext", "subjectAltName=DNS:hook.test", "-keyout", folder / "key.pem", "-out", folder / "cert.pem",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return both


def test_the_certificate_must_be_that_of_the_name_though_the_connection_goes_to_the_address(certificate: Path) -> None:
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        writer.close()

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async def post_to(name: str) -> int:
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(certificate)
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=own)
        async with server:
            port = server.sockets[0].getsockname()[1]
            rules = Rules([ip_network("127.0.0.0/8")])
            target = await find_target(f"https://{name}:{port}/x", rules, resolve)
            return (await send(target, {}, b"{}", ssl.create_default_context(cafile=str(certificate)))).status_code

    assert asyncio.run(post_to("hook.test")) == 204
    assert heads[0].startswith(b"POST /x HTTP/1.1") and b"host: hook.test:" in heads[0].lower()
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        asyncio.run(post_to("other.test"))
    assert len(heads) == 1
