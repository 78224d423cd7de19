"""What becomes of a delivery: how often it is tried and when, what counts as delivered, and what is owed meanwhile."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from service.errors import InvalidRequest
from service.http.schema import GenerateRequest
from service.http.webhooks import webhook_of
from service.queue.connection import connect_async
from service.settings import Settings
from service.webhooks import deliver
from service.webhooks.deliver import MAX_TRIES, Deliverer, retry_after_s
from service.webhooks.outbox import Delivery, Outbox
from service.webhooks.target import Rules, TargetRefused, check_url, find_target
from tests.service.support import Queue

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ALL = ("job.done", "job.failed", "job.cancelled", "job.expired")


class Noted:
    """An outbox and the metrics of one deliverer, which note what is done to them."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.outcomes: list[str] = []

    async def complete(self, id: str) -> None:
        self.done.append(("complete", id))

    async def postpone(self, id: str, delay_s: float) -> None:
        self.done.append(("postpone", id, delay_s))

    def webhook(self, outcome: str) -> None:
        self.outcomes.append(outcome)


def deliverer(noted: Noted, **settings: Any) -> Deliverer:
    known: Any = Settings(runtime="fake", webhook_secret=SECRET, **settings)
    parts: tuple[Any, ...] = (None, noted, noted, None)
    return Deliverer(known, *parts)


def ended(state: str = "done", readable: bool = True) -> Any:
    return SimpleNamespace(id="j", state=state, readable=readable, finished_s=1.5)


def answered(monkeypatch: pytest.MonkeyPatch, status: int, attempt: int = 1, **headers: str) -> Noted:
    """What is done where a receiver gives this answer to a try."""

    async def find(url: str, rules: Rules) -> str:
        return url

    async def body(*_: object) -> bytes:
        return b"{}"

    async def send(*_: object) -> httpx.Response:
        return httpx.Response(status, headers=headers)

    monkeypatch.setattr(deliver, "find_target", find)
    monkeypatch.setattr(Deliverer, "_body", body)
    monkeypatch.setattr(Deliverer, "_send", send)
    monkeypatch.setattr(deliver.random, "uniform", lambda low, high: {(0.8, 1.2): 1.0}[low, high])
    noted = Noted()
    asyncio.run(deliverer(noted)._one(Delivery("j", attempt, "https://a.example/", ALL, ""), ended()))
    return noted


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "delivered"), (204, "delivered"), (299, "delivered"), (300, "failed"), (302, "failed"), (404, "failed"),
        (410, "gone"), (429, "failed"), (500, "failed"),
    ],
)  # fmt: skip
def test_a_success_ends_it_and_so_does_a_receiver_that_is_gone(
    status: int, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = answered(monkeypatch, status)
    assert noted.outcomes == [outcome]
    assert noted.done == [("postpone", "j", 5.0) if outcome == "failed" else ("complete", "j")]


def test_pauses_triple_from_five_seconds_to_ten_minutes_and_the_eighth_try_is_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses = [answered(monkeypatch, 500, attempt).done for attempt in range(1, 8)]
    assert pauses == [[("postpone", "j", pause_s)] for pause_s in (5.0, 15.0, 45.0, 135.0, 405.0, 600.0, 600.0)]
    last = answered(monkeypatch, 500, 8)
    assert (last.outcomes, last.done) == (["given_up"], [("complete", "j")]) and MAX_TRIES == 8
    assert answered(monkeypatch, 200, 8).outcomes == ["delivered"]


def test_a_receiver_says_when_it_wants_to_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answered(monkeypatch, 503, **{"Retry-After": "90"}).done == [("postpone", "j", 90.0)]
    assert answered(monkeypatch, 503, **{"Retry-After": "2"}).done == [("postpone", "j", 5.0)], "not sooner than usual"


def test_a_date_says_it_too() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=100), usegmt=True)
    far = format_datetime(datetime.now(UTC) + timedelta(days=100), usegmt=True)
    assert 90 < retry_after_s(soon) <= 100 and retry_after_s(past) == 0.0 and retry_after_s(far) == 600.0


@pytest.mark.parametrize("record", [None, ended(readable=False)])
def test_what_cannot_be_described_any_more_is_dropped_and_counted(record: Any) -> None:
    noted = Noted()
    asyncio.run(deliverer(noted)._one(Delivery("j", 1, "https://a.example/", ALL, ""), record))
    assert (noted.outcomes, noted.done) == (["lost"], [("complete", "j")])


def test_an_end_that_nobody_asked_for_is_not_sent_and_not_counted() -> None:
    noted = Noted()
    asyncio.run(deliverer(noted)._one(Delivery("j", 1, "https://a.example/", ("job.failed",), ""), ended()))
    assert (noted.outcomes, noted.done) == ([], [("complete", "j")])


def test_an_event_says_what_has_ended_when_and_how_a_client_sees_it() -> None:
    async def describe(record: Any, base_url: str) -> dict[str, Any]:
        return {"id": record.id, "seen_from": base_url}

    one = deliverer(Noted())
    one._describe = describe
    body = asyncio.run(one._body(Delivery("j", 1, "https://a.example/", ALL, "http://h/"), ended("failed")))
    assert json.loads(body) == {
        "type": "job.failed", "timestamp": "1970-01-01T00:00:01.500000+00:00",
        "data": {"id": "j", "seen_from": "http://h/"},
    }  # fmt: skip


def test_the_outbox_gives_each_delivery_to_one_and_counts_its_tries(queue: Queue) -> None:
    outbox, run = Outbox(connect_async(queue.url), queue.model), queue.runner.run
    asked = {"url": "https://a.example/", "events": ["job.done"], "base_url": "http://h/"}
    ids = []
    for _ in range(3):
        ids.append((job := queue.job()).id)
        queue.enqueue(job, webhook=json.dumps(asked))
        queue.cancel(job.id)
    first = run(outbox.take(2, 30.0))
    assert [each.id for each in first] == ids[:2], "the oldest, as many as are wanted"
    assert first[0] == Delivery(ids[0], 1, "https://a.example/", ("job.done",), "http://h/")
    assert [each.id for each in run(outbox.take(9, 30.0))] == ids[2:] and run(outbox.take(9, 30.0)) == []
    now_us = queue.client.time()[0] * 1e6
    due = {id: (at - now_us) / 1e6 for id, at in queue.client.zrange(f"{queue.prefix}wh", 0, -1, withscores=True)}
    assert all(28 < due_s < 32 for due_s in due.values()), "nobody else's for as long"
    queue.let_deadlines_pass("wh")
    run(outbox.complete(ids[0]))
    run(outbox.postpone(ids[1], 60.0))
    run(outbox.put_back(ids[2], 0.0))
    assert [(each.id, each.attempt) for each in run(outbox.take(9, 30.0))] == [(ids[2], 1)], "it was not tried"
    queue.let_deadlines_pass("wh")
    assert sorted((each.id, each.attempt) for each in run(outbox.take(9, 30.0))) == sorted([(ids[1], 2), (ids[2], 2)])
    queue.client.delete(f"{queue.prefix}j:{ids[1]}")
    queue.let_deadlines_pass("wh")
    taken = {each.id: each for each in run(outbox.take(9, 30.0))}
    assert taken[ids[1]] == Delivery(ids[1], 0, "", (), ""), "its record is gone: nothing can be sent"
    assert queue.client.zrange(f"{queue.prefix}wh", 0, -1) == [ids[2]], "so it is due only once"
    run(outbox._scripts._client.aclose())


def test_what_was_delivered_meanwhile_or_is_gone_is_not_put_back(queue: Queue) -> None:
    outbox, run = Outbox(connect_async(queue.url), queue.model), queue.runner.run
    job = queue.job()
    queue.enqueue(job, webhook=json.dumps({"url": "https://a.example/", "events": [], "base_url": ""}))
    queue.cancel(job.id)
    assert [each.id for each in run(outbox.take(9, 0.0))] == [job.id]
    run(outbox.complete(job.id))
    run(outbox.postpone(job.id, 0.0))
    assert run(outbox.take(9, 0.0)) == []
    run(outbox.put_back("0" * 32, 0.0))
    assert not queue.client.exists(f"{queue.prefix}j:{'0' * 32}"), "a record without a state, for ever"
    run(outbox._scripts._client.aclose())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://a.example/" + "x" * 2031, "too long"),
        ("https://a.example/ x", "unescaped"),
        ("https://a.example/\u00e9", "unescaped"),
        ("https://a.example/\x7f", "unescaped"),
        ("https://a.example:0/", "has no host"),
        ("https:///x", "has no host"),
        ("https://a.example:99999/", "not a URL"),
        ("https://[::1/", "not a URL"),
        ("https://user@a.example/", "user name or password"),
        ("https://:word@a.example/", "user name or password"),
        ("http://a.example/", "https://"),
        ("ftp://a.example/", "https://"),
    ],
)
def test_what_is_no_address_for_a_webhook_is_refused(url: str, words: str) -> None:
    with pytest.raises(TargetRefused, match=words):
        check_url(url, Rules())


def test_the_longest_address_is_taken_and_without_tls_only_where_it_is_said() -> None:
    longest = "https://a.example/" + "x" * 2030
    assert len(longest) == 2048 and check_url(longest, Rules()).hostname == "a.example"
    assert check_url("http://a.example/~!", Rules(http=True)).hostname == "a.example"


@pytest.mark.parametrize(
    ("url", "port"),
    [("https://a.example/", 443), ("http://a.example/", 80), ("https://a.example:1/", 1)],
)
def test_the_port_is_that_of_the_url_or_of_its_scheme(url: str, port: int) -> None:
    async def resolve(host: str, asked: int) -> list[str]:
        assert (host, asked) == ("a.example", port)
        return ["8.8.8.8", "8.8.4.4"]

    target = asyncio.run(find_target(url, Rules(http=True), resolve))
    assert (target.host, target.port, target.address) == ("a.example", port, "8.8.8.8")
    assert target.pinned_url == f"{url.partition(':')[0]}://8.8.8.8:{port}/"


def test_a_name_without_an_address_may_have_one_later() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return []

    with pytest.raises(OSError, match="has no address"):
        asyncio.run(find_target("https://a.example/", Rules(), resolve))


def test_a_request_is_kept_with_its_events_and_the_address_that_the_client_called() -> None:
    known: Any = Settings(runtime="fake", webhook_secret=SECRET)

    def kept(**fields: Any) -> Any:
        return webhook_of(GenerateRequest(prompt="p", **fields), known, "http://h/")

    url = "https://a.example/"
    assert json.loads(kept(webhook_url=url)) == {"url": url, "events": list(ALL), "base_url": "http://h/"}
    assert json.loads(kept(webhook_url=url, webhook_events=["job.failed"]))["events"] == ["job.failed"]
    assert kept() == ""
    with pytest.raises(InvalidRequest, match="needs a webhook_url"):
        kept(webhook_events=["job.done"])
    with pytest.raises(InvalidRequest, match="webhook_url: it must begin with https://") as refused:
        kept(webhook_url="http://a.example/")
    assert refused.value.param == "webhook_url"
    without: Any = Settings(runtime="fake")
    with pytest.raises(InvalidRequest, match="webhooks are not enabled"):
        webhook_of(GenerateRequest(prompt="p", webhook_url=url), without, "http://h/")
