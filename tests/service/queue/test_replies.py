"""Whoever waits hears of the end, whatever is in the stream and whatever the server forgets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.errors import QueueFull, QuotaExceeded
from service.http.tasks import end
from service.observe.background import Background
from service.observe.metrics import Metrics
from service.queue import replies as module
from service.queue.connection import connect_async
from service.queue.job import Job, QueueOptions, Record
from service.queue.replies import POLL_S, Replies
from service.queue.scripts import Scripts
from service.queue.states import State
from tests.service.support import Queue


class Process:
    """An HTTP process as far as its replies go."""

    def __init__(self, queue: Queue, observe: Callable[[Record], None] = lambda record: None) -> None:
        self.queue = queue
        self.background = Background()
        self.client = connect_async(queue.url, block_s=2)
        self.replies = Replies(self.client, queue.producer, queue.model, "api", observe)

    async def reading(self, what: Callable[[], Awaitable[Any]]) -> Any:
        reader = asyncio.create_task(self.background.forever("replies", self.replies.read, vital=True))
        try:
            return await asyncio.wait_for(what(), 20)
        finally:
            await end([reader])
            await self.client.aclose()

    async def enqueue(self, job: Job, **options: Any) -> str:
        return (await self.queue.producer.enqueue(job, QueueOptions(60.0, **options))).id

    async def drawn(self, job: Job, result: str = '{"images": []}') -> float:
        """How long the answer takes from the moment at which a worker has ended the job."""
        worker = self.queue.consumer("w")
        with self.replies.news(job.id) as news:
            await self.enqueue(job)
            ended = asyncio.create_task(self.replies.ended(job.id, news, lambda: self.enqueue(job)))
            [claimed] = await asyncio.to_thread(worker.claim, {self.queue.lane: 1})
            scripts = Scripts(self.queue.client, self.queue.model)
            began = time.monotonic()
            await asyncio.to_thread(scripts.run, "finish", job.id, claimed.token, "done", result)
            await ended
            return time.monotonic() - began


@pytest.mark.parametrize(
    "result", ["no json", "{}", '{"images": [{}], "runtime": 7}', '{"version": 9, "images": null}']
)
def test_a_result_that_makes_no_sense_harms_nobody(queue: Queue, result: str) -> None:
    metrics = Metrics("m", "1", {})
    process = Process(queue, metrics.record)

    async def both() -> list[float]:
        return [await process.drawn(queue.job(), result), await process.drawn(queue.job())]

    waits = queue.runner.run(process.reading(both))
    assert max(waits) < POLL_S, "told by the stream, not found by looking"
    assert process.background.failures == {}


def test_an_observer_that_fails_is_counted_and_keeps_nobody_waiting(queue: Queue) -> None:
    seen: list[str] = []

    def observe(record: Record) -> None:
        seen.append(record.id)
        raise KeyError("a bug")

    process, jobs = Process(queue, observe), [queue.job() for _ in range(3)]

    async def all_of_them() -> list[float]:
        return [await process.drawn(job) for job in jobs]

    assert max(queue.runner.run(process.reading(all_of_them))) < POLL_S
    assert seen == [job.id for job in jobs], "each once: the stream goes on"
    assert process.background.failures["replies"] >= 2


async def follow(process: Process, id: str, enqueue: Callable[[], Awaitable[str]], **limits: float) -> list[str]:
    """What a stream hears, until it ends."""
    heard = []
    async for record in process.replies.follow(id, enqueue, **limits):
        heard.append(str(record.state) if record else "nothing")
    return heard


def test_two_streams_of_one_key_end_after_the_server_lost_its_data(queue: Queue) -> None:
    """The second to ask is attached to what the first has queued anew, under another id."""
    one, two = queue.job(), queue.job()
    process = Process(queue)

    async def again(job: Job) -> str:
        return await process.enqueue(job, client=job.id, idempotency="digest", body="b")

    async def run() -> list[list[str]]:
        assert await again(one) == one.id == await again(two)
        await asyncio.to_thread(lambda: queue.client.delete(*queue.client.keys(f"{queue.prefix}*")))
        assert await again(two) == two.id
        streams = [asyncio.create_task(follow(process, one.id, lambda job=job: again(job))) for job in (one, two)]  # type: ignore[misc]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(queue.draw)
        return list(await asyncio.gather(*streams))

    heard = queue.runner.run(process.reading(run))
    assert [stream[-1] for stream in heard] == ["done", "done"]


def test_a_stream_hears_that_nothing_is_known_and_ends_at_its_deadline(queue: Queue) -> None:
    process = Process(queue)

    async def refused() -> str:
        raise ConnectionError

    async def away() -> str:
        with suppress(ConnectionError):
            await refused()
        return "0" * 32

    async def run() -> list[str]:
        return await follow(process, "0" * 32, away, within_s=1.5)

    heard = queue.runner.run(process.reading(run))
    assert heard and set(heard) == {"nothing"}


class Told:
    """A producer whose records are told beforehand by id, one after another; the last one stays."""

    def __init__(self, **records: list[Any]) -> None:
        self._records = records
        self.watched: list[str] = []

    async def records(self, ids: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for id in ids:
            told = self._records.get(id, [None])
            one = told.pop(0) if len(told) > 1 else told[0]
            if isinstance(one, Exception):
                raise one
            found |= {id: one} if one else {}
        return found

    async def watch(self, id: str) -> None:
        self.watched.append(id)
        raise RedisConnectionError  # polling is enough


def of(state: State, id: str = "a", scoring: str = "") -> Record:
    return Record(id, state, {}, scoring=scoring)


QUEUED, RUNNING, DONE = of(State.QUEUED), of(State.RUNNING), of(State.DONE)
PENDING, SCORED = of(State.DONE, scoring="pending"), of(State.DONE, scoring="done")
AWAY = RedisConnectionError("away")


def replies_of(told: Told, monkeypatch: pytest.MonkeyPatch) -> Replies:
    monkeypatch.setattr(module, "FOLLOW_S", 0.001)
    monkeypatch.setattr(module, "POLL_S", 0.001)
    stub: Any = told
    return Replies(None, stub, "q", "api", lambda record: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("records", "asked_again", "scores", "heard", "watched"),
    [
        ([QUEUED, RUNNING, DONE, DONE], None, True, [QUEUED, RUNNING, DONE], "a"),
        ([PENDING, PENDING, SCORED, SCORED], None, True, [PENDING, PENDING, SCORED], "a"),
        ([RUNNING, PENDING, SCORED, SCORED], None, False, [RUNNING, PENDING], "a"),
        ([QUEUED, AWAY, DONE], None, True, [QUEUED, None, DONE], "a"),
        ([QUEUED, None, DONE], None, True, [QUEUED, None], "a"),
        ([QUEUED, None, DONE], ["a"], True, [QUEUED, None, DONE], "a"),
        ([QUEUED, None, DONE], [QueueFull(), QuotaExceeded(), AWAY, "a"], True, [QUEUED, None, DONE], "a"),
        ([None], ["b"], True, [None, of(State.DONE, "b")], "ab"),
        ([None], [QueueFull(), "b"], True, [None, None, of(State.DONE, "b")], "ab"),
    ],
)
def test_a_stream_tells_what_is_known_until_the_end(
    records: list[Any], asked_again: list[Any] | None, scores: bool, heard: list[Record | None], watched: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told = Told(a=list(records), b=[of(State.DONE, "b")])
    replies, answers = replies_of(told, monkeypatch), list(asked_again or ())

    async def enqueue() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    async def run() -> list[Record | None]:
        following = replies.follow("a", enqueue if asked_again else None, scores=scores)
        async with asyncio.timeout(20):
            return [record async for record in following]

    assert asyncio.run(run()) == heard
    assert told.watched == list(watched) and replies._news == {}


@pytest.mark.parametrize(
    ("records", "asked_again", "ended"),
    [
        ([QUEUED, AWAY, RUNNING, DONE], [], "a"),
        ([PENDING], [], "a"),
        ([None, None, DONE], ["a", "a"], "a"),
        ([None], [QueueFull(), QuotaExceeded(), AWAY, "b"], "b"),
    ],
)
def test_whoever_waits_gets_the_end_of_the_job_or_of_the_one_that_takes_its_place(
    records: list[Any], asked_again: list[Any], ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(a=list(records), b=[of(State.QUEUED, "b"), of(State.FAILED, "b")])
    replies = replies_of(told, monkeypatch)

    async def enqueue() -> str:
        answer = asked_again.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    async def run() -> Record:
        with replies.news("a") as news:
            async with asyncio.timeout(20):
                return await replies.ended("a", news, enqueue)

    found = asyncio.run(run())
    assert (found.id, found.terminal, asked_again, replies._news) == (ended, True, [], {})


def test_a_job_is_looked_at_before_the_first_pause_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replies = replies_of(Told(a=[DONE]), monkeypatch)
    waited: list[float] = []

    async def next_one(news: Any, wait_s: float) -> None:
        waited.append(wait_s)

    monkeypatch.setattr(module, "_next", next_one)
    for check_first in (True, False):
        with replies.news("a") as news:
            asyncio.run(replies.ended("a", news, lambda: None, check_first=check_first))  # type: ignore[arg-type, return-value]
    assert waited == [0.0, 0.001]


def test_the_newest_of_several_news_counts_and_the_stream_is_read_on_from_its_last_entry() -> None:
    asked: list[tuple[Any, ...]] = []
    entries = [("5-0", {"id": "a", "what": "end"}), ("6-0", {"id": "b", "what": "other"})]

    async def xread(*arguments: Any, **options: Any) -> list[Any]:
        asked.append((*arguments, options))
        return [("stream", entries)] if len(asked) == 1 else []

    seen: list[Record] = []
    client, told = SimpleNamespace(xread=xread), Told(a=[DONE], b=[of(State.DONE, "b")])
    replies = Replies(client, told, "q", "api", seen.append)  # type: ignore[arg-type]

    async def run() -> Record | None:
        with replies.news("a") as news:
            news.put_nowait(QUEUED)
            await replies.read()
            await replies.read()
            return await module._next(news, 1.0)

    assert asyncio.run(run()) == DONE
    options = {"block": 2000, "count": 256}
    assert asked == [({replies._stream: last}, options) for last in ("0", "6-0")]
    assert seen == [DONE], "nobody waits for the other, and it has not ended"
