"""Links to pictures: they open without a key, for whoever has them, until they expire."""

from __future__ import annotations

import asyncio
import base64
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

from service.errors import Forbidden
from service.http.links import Links, sign
from service.keys import KeyStore
from service.queue.job import Record
from service.queue.producer import DAY_S
from service.queue.states import State
from tests.service.http.test_access import Caller, bearer
from tests.service.http.test_http import check_error
from tests.service.support import Queue, Service, call, eventually


@pytest.fixture
def ann(keyed: tuple[Service, KeyStore]) -> Caller:
    service, keys = keyed
    return Caller(service.url, keys, "ann")


def test_a_picture_by_url_opens_without_a_key(keyed: tuple[Service, KeyStore], ann: Caller) -> None:
    body = {"prompt": "p", "seed": 3, "response_format": "url"}
    [image] = ann("POST", "/generate", json=body).json()["data"]
    inline = ann("POST", "/generate", json={"prompt": "p", "seed": 3}).json()["data"][0]["b64_json"]
    assert call("GET", image["url"]).content == base64.b64decode(inline)
    assert call("HEAD", image["url"]).status_code == 200
    assert 3590 <= image["expires_at"] - time.time() <= 3600, "as long as the picture is kept"
    openai = ann("POST", "/v1/images/generations", json={"prompt": "p", "response_format": "url"}).json()["data"]
    assert call("GET", openai[0]["url"]).status_code == 200
    check_error(call("GET", image["url"].partition("?")[0]), 401, "missing_api_key")


def test_a_link_is_good_for_its_picture_its_time_and_nothing_else(keyed: tuple[Service, KeyStore], ann: Caller) -> None:
    service, _ = keyed
    [image, other] = ann("POST", "/generate", json={"prompt": "p", "n": 2, "response_format": "url"}).json()["data"]
    parts = urlsplit(image["url"])
    asked = {name: value for name, (value,) in parse_qs(parts.query).items()}
    id, secret = parts.path.split("/")[2], bytes.fromhex(str(service.redis.get("fewstep:{fake}:secret:links")))
    past = int(time.time()) - 1

    def status(path: str, **query: object) -> int:
        return call("GET", service.url + path, params={**asked, **query}).status_code

    assert status(parts.path) == 200
    assert status(urlsplit(other["url"]).path) == 403, "another picture"
    assert status(parts.path, expires=int(asked["expires"]) + 1) == 403, "another time"
    assert (
        status(parts.path, signature="")
        == status(parts.path, signature="A" * 24)
        == status(parts.path, signature="é")
        == 403
    )
    assert status(parts.path, expires=past, signature=sign(secret, id, 0, past)) == 403, "signed, and expired"
    for rest in ("", "/events", "/cancel"):
        assert status(f"/jobs/{id}{rest}") == 401, rest
    response = call("GET", service.url + parts.path, params={**asked, "signature": "x"}, headers=bearer(ann.text))
    assert "new one" in check_error(response, 403, "link_expired", "signature")


def test_processes_of_one_queue_share_the_secret_and_those_of_another_do_not(
    keyed: tuple[Service, KeyStore], live: Service
) -> None:
    ours, theirs = (service.redis.get("fewstep:{fake}:secret:links") for service in (keyed[0], live))
    assert ours and ours != theirs


def test_a_job_says_when_it_began_when_it_ended_and_how_long_it_is_kept(ann: Caller) -> None:
    before = time.time()
    id = ann.later("p")
    job = eventually(lambda: (found := ann("GET", f"/jobs/{id}").json())["status"] == "done" and found)
    assert before - 1 <= job["created"] <= job["started"] <= job["finished"] <= time.time() + 1
    assert job["expires_at"] == int(job["finished"] + 3600) and job["key"] is None
    assert job["data"][0]["expires_at"] == job["expires_at"]


def test_jobs_are_listed_page_by_page_and_by_their_status(ann: Caller) -> None:
    ids = [ann.later(f"p{k}") for k in range(5)]
    eventually(lambda: all(ann("GET", f"/jobs/{id}").json()["status"] == "done" for id in ids))
    seen: list[str] = []
    cursor: dict[str, object] = {}
    while True:
        page = ann("GET", "/jobs", params={"limit": 2, **cursor}).json()
        assert len(page["data"]) <= 2
        seen += [job["id"] for job in page["data"]]
        if page["next"] is None:
            break
        cursor = {"cursor": page["next"]}
    assert seen == ids[::-1]
    assert [job["id"] for job in ann("GET", "/jobs", params={"status": "done"}).json()["data"]] == ids[::-1]
    assert ann("GET", "/jobs", params=[("status", "failed"), ("status", "queued")]).json()["data"] == []
    check_error(ann("GET", "/jobs", params={"status": "lost"}), 422, "invalid_request", "status")
    check_error(ann("GET", "/jobs", params={"cursor": "x"}), 422, "invalid_request", "cursor")


def test_an_admin_sees_and_cancels_everybodys_jobs_and_nobody_else_does(
    keyed: tuple[Service, KeyStore], ann: Caller
) -> None:
    service, keys = keyed
    admin = Caller(service.url, keys, "root", scopes=["generate", "read", "admin"])
    bob = Caller(service.url, keys, "bob")
    hold, id = ann.later("fake:sleep=2 hold"), ann.later("p")
    listed = admin("GET", "/jobs", params={"all": True, "limit": 100}).json()["data"]
    assert [(job["key"]) for job in listed if job["id"] in (hold, id)] == [ann.key.id] * 2
    assert id not in [job["id"] for job in admin("GET", "/jobs").json()["data"]], "its own are the usual answer"
    check_error(bob("GET", "/jobs", params={"all": True}), 403, "insufficient_scope")
    assert bob("POST", f"/jobs/{id}/cancel").status_code == 404
    assert admin("POST", f"/jobs/{id}/cancel").json()["status"] in ("cancelled", "running")
    assert ann("GET", f"/jobs/{id}").json()["key"] is None


def test_what_was_drawn_is_counted_for_each_key(keyed: tuple[Service, KeyStore], ann: Caller) -> None:
    service, keys = keyed
    admin = Caller(service.url, keys, "root", scopes=["admin"])
    for count in (1, 3):
        ann("POST", "/generate", json={"prompt": "p", "n": count})
    ann("POST", "/generate", json={"prompt": "fake:raise"})
    rows = [row for row in admin("GET", "/admin/usage").json()["data"] if row["key"] == ann.key.id]
    # An image of the fake student costs 64 x 64 pixels times 4 steps, in whole thousands.
    assert [(row["jobs"], row["images"], row["megapixel_steps"]) for row in rows] == [(2, 4, 0.064)]
    assert rows[0]["day"] in {time.strftime("%Y-%m-%d", time.gmtime(time.time() - back)) for back in (0, 60)}
    check_error(ann("GET", "/admin/usage"), 403, "insufficient_scope")


class Clock:
    """Both clocks that the signer reads."""

    now = 2000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def test_a_link_works_up_to_its_last_second(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.links.time", clock := Clock())
    links = Links(queue.producer, 100.0)
    record = Record("a" * 32, State.DONE, {}, created_s=1000.0, finished_s=2000.4)
    link = queue.runner.run(links.to_image("http://h/", record, 3))
    address, _, signature = link.url.partition("&signature=")
    assert (address, link.expires) == (f"http://h/jobs/{record.id}/images/3?expires=2100", 2100)
    assert len(base64.urlsafe_b64decode(signature)) == 18
    assert links.expires(replace(record, finished_s=None)) == 1100, "of a job that never ran"
    for wrong in (("b" * 32, 3, 2100, signature), (record.id, 2, 2100, signature), (record.id, 3, 2101, signature),
                  (record.id, 3, 2100, signature[:-1]), (record.id, 3, 2100, "")):  # fmt: skip
        with pytest.raises(Forbidden) as refused:
            queue.runner.run(links.check(*wrong))
        assert (refused.value.code, refused.value.param) == ("link_expired", "signature")
    for now, opens in ((2000.0, True), (2100.0, True), (2100.1, False)):
        clock.now = now
        with nullcontext() if opens else pytest.raises(Forbidden):
            queue.runner.run(links.check(record.id, 3, link.expires, signature))


def test_the_secret_is_read_again_after_a_minute(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a link of a process that has it for a minute yet is not good for long where the server has lost it."""
    monkeypatch.setattr("service.http.links.time", clock := Clock())
    links, name = Links(queue.producer, 100.0), f"{queue.prefix}secret:links"
    record = Record("a" * 32, State.DONE, {}, finished_s=2000.0)

    def signature() -> str:
        return queue.runner.run(links.to_image("", record, 0)).url.rpartition("=")[2]

    first, secret = signature(), bytes.fromhex(str(queue.client.get(name)))
    assert first == sign(secret, record.id, 0, 2100) and len(secret) == 32
    assert 29 * DAY_S < queue.client.ttl(name) <= 30 * DAY_S
    queue.client.delete(name)
    clock.now += 60.0
    assert signature() == first
    clock.now += 0.1
    assert signature() != first


def test_a_secret_that_cannot_be_made_now_costs_no_answer_and_is_asked_for_again() -> None:
    """The links of that answer open nothing; those of the next one do, and nobody can guess either."""
    secrets: list[bytes | None] = [None, None, b"the secret"]

    async def shared_secret(name: str) -> bytes | None:
        return secrets.pop(0)

    async def run() -> list[str]:
        links = Links(SimpleNamespace(shared_secret=shared_secret), 100.0)  # type: ignore[arg-type]
        record = Record("a" * 32, State.DONE, {}, finished_s=2000.0)
        return [(await links.to_image("", record, 0)).url.rpartition("=")[2] for _ in range(4)]

    first, second, *good = asyncio.run(run())
    assert len({first, second, sign(b"", "a" * 32, 0, 2100)}) == 3, "not signed with nothing"
    assert good == [sign(b"the secret", "a" * 32, 0, 2100)] * 2
