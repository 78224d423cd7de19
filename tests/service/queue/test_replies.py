"""Whoever waits hears of the end, whatever is in the stream and whatever the server forgets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from service.http.tasks import end
from service.observe.background import Background
from service.observe.metrics import Metrics
from service.queue.connection import connect_async
from service.queue.job import Job, QueueOptions, Record
from service.queue.replies import POLL_S, Replies
from service.queue.scripts import Scripts
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
