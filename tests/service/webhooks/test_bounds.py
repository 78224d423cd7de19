"""A receiver cannot hold a sender up, nor make it read or send more than once."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from service.observe.metrics import Metrics
from service.queue.job import Record
from service.settings import Settings
from service.webhooks import deliver
from service.webhooks.outbox import Delivery
from service.webhooks.target import RESOLVE_S, Target
from tests.service.support import Queue


def test_a_delivery_is_nobody_elses_for_longer_than_one_try_takes() -> None:
    """Finding the address and sending are bounded; the answer's body is not read."""
    assert deliver.LEASE_S > RESOLVE_S + deliver.SEND_S


def test_a_record_is_there_for_the_last_try_of_its_webhook(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(ttl_s=60.0)
    job, silent = queue.job(), queue.add()
    assert queue.enqueue(job, webhook='{"url": "https://example.com"}') == "ok"
    kept_s = {}
    for id in (job.id, silent):
        queue.cancel(id)
        kept_s[id] = queue.client.pttl(f"{queue.prefix}j:{id}") / 1000
    longest_s = deliver.MAX_TRIES * (deliver.LONGEST_PAUSE_S * (1 + deliver.JITTER) + deliver.LEASE_S)
    assert kept_s[silent] <= 60 and kept_s[job.id] > longest_s


def test_an_answer_without_end_is_not_read() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def status() -> int:
        async with await asyncio.start_server(endless, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            target = Target(urlsplit(f"http://127.0.0.1:{port}/hook"), "127.0.0.1", port, "127.0.0.1")
            context = ssl.create_default_context()
            async with asyncio.timeout(10):  # never reached, unless the body is read
                return (await deliver.send(target, {}, b"{}", context)).status_code

    assert asyncio.run(status()) == 200


def test_a_receiver_that_never_answers_has_some_hands_and_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [Delivery(f"slow {k}", 1, "http://slow.example/hook", (), "") for k in range(deliver.AT_ONE_HOST + 5)]
    quick = [Delivery(f"quick {k}", 1, "http://quick.example/hook", (), "") for k in range(3)]
    begun: list[str] = []
    put_back: list[str] = []

    class Waiting:
        """Everything that is due, once."""

        async def take(self, limit: int, lease_s: float) -> list[Delivery]:
            return [*slow, *quick] if not begun and limit >= len(slow) + len(quick) else []

        async def put_back(self, id: str, pause_s: float) -> None:
            put_back.append(id)

    class Records:
        async def records(self, ids: list[str]) -> dict[str, Record]:
            return {}

    async def never(_: object, delivery: Delivery, record: Record | None) -> None:
        begun.append(delivery.id)
        await asyncio.Event().wait()

    async def run() -> None:
        settings = Settings(runtime="fake")
        parts: tuple[Any, ...] = (Records(), Waiting(), Metrics("m", "1", {}), None)
        deliverer = deliver.Deliverer(settings, *parts)
        await deliverer.deliver()
        await asyncio.sleep(0)
        for task in deliverer.sending:
            task.cancel()
        await asyncio.gather(*deliverer.sending, return_exceptions=True)

    monkeypatch.setattr(deliver.Deliverer, "_one", never)
    asyncio.run(run())
    of_slow = [delivery.id for delivery in slow]
    assert begun == [*of_slow[: deliver.AT_ONE_HOST], *(delivery.id for delivery in quick)]
    assert put_back == of_slow[deliver.AT_ONE_HOST :]


async def as_its_id_says(_: object, delivery: Delivery, record: Record | None) -> None:
    if delivery.id == "never":
        await asyncio.Event().wait()
    if delivery.id == "fails":
        raise OSError("the queue is away")


def to(host: str, *ids: str) -> list[Delivery]:
    return [Delivery(id, 1, f"http://{host}/hook", (), "") for id in ids]


def test_hands_are_free_again_when_a_request_is_over_however_it_ended_and_no_more_are_taken_than_are_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three rounds of eight to one host, beside some that never end; one in each round fails in an unknown way."""
    taken: list[int] = []
    due: list[Delivery] = []
    put_back: list[str] = []

    class Outbox:
        async def take(self, limit: int, lease_s: float) -> list[Delivery]:
            taken.append(limit)
            found, due[:] = due[:limit], due[limit:]
            return found

        async def put_back(self, id: str, pause_s: float) -> None:
            put_back.append(id)

    class Records:
        async def records(self, ids: list[str]) -> dict[str, Record]:
            return {}

    async def run() -> None:
        parts: tuple[Any, ...] = (Records(), Outbox(), Metrics("m", "1", {}), None)
        deliverer = deliver.Deliverer(Settings(runtime="fake"), *parts)
        due.extend([*to("slow.example", "never", "never"), *to("deaf.example", "never")])
        for _ in range(3):
            due.extend(to("quick.example", "fails", *(["sent"] * (deliver.AT_ONE_HOST - 1))))
            await deliverer.deliver()
            while len(deliverer.sending) > 3:
                await asyncio.sleep(0)
        assert dict(deliverer._hosts) == {"slow.example": 2, "deaf.example": 1}, "nothing is kept of the others"
        due.extend(delivery for host in range(deliver.AT_ONCE) for delivery in to(f"h{host}.example", "never"))
        for _ in range(2):
            await deliverer.deliver()
        assert len(deliverer.sending) == deliver.AT_ONCE and len(due) == 3
        for task in deliverer.sending:
            task.cancel()
        await asyncio.gather(*deliverer.sending, return_exceptions=True)

    monkeypatch.setattr(deliver.Deliverer, "_one", as_its_id_says)
    asyncio.run(run())
    free = deliver.AT_ONCE - 3
    assert taken == [deliver.AT_ONCE, free, free, free] and put_back == [], "where none is free nobody is asked"


@pytest.mark.parametrize(("asked_s", "least_s", "most_s"), [(0.0, 4.0, 6.0), (100.0, 100.0, 100.0), (1.0, 4.0, 6.0)])
def test_a_receiver_is_left_alone_for_as_long_as_it_asks_and_never_for_less_than_the_pause(
    monkeypatch: pytest.MonkeyPatch, asked_s: float, least_s: float, most_s: float
) -> None:
    postponed: list[float] = []

    class Outbox:
        async def postpone(self, id: str, pause_s: float) -> None:
            postponed.append(pause_s)

    async def busy(*_: object) -> tuple[str, float]:
        return "failed", asked_s

    monkeypatch.setattr(deliver.Deliverer, "_try", busy)
    parts: tuple[Any, ...] = (None, Outbox(), Metrics("m", "1", {}), None)
    deliverer = deliver.Deliverer(Settings(runtime="fake", webhook_retry_s=5.0), *parts)
    record: Any = SimpleNamespace(readable=True, state="done")
    asyncio.run(deliverer._one(Delivery("j", 1, "http://a.example/", ("job.done",), ""), record))
    [pause_s] = postponed
    assert least_s <= pause_s <= most_s
