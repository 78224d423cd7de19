"""How an HTTP process learns what happens to jobs: one stream, one reader, and the job's record as the authority."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from service.errors import QueueFull, QuotaExceeded
from service.queue.job import Record
from service.queue.producer import Producer
from service.queue.scripts import prefix

BLOCK_S = 2.0
POLL_S = 2.0
FOLLOW_S = 1.0

Enqueue = Callable[[], Awaitable[str]]


class Replies:
    """Reads the reply stream of this process and wakes whoever waits for a job.

    ``observe`` is called once for each record of a job that a worker has ended, whether somebody waits or not, and
    ``observe_scores`` once for each whose scores have come later than that, or count as lost.
    """

    def __init__(
        self, client: redis.asyncio.Redis, producer: Producer, queue: str, api: str,
        observe: Callable[[Record], None], observe_scores: Callable[[Record], None] = lambda record: None,
    ) -> None:  # fmt: skip
        self._client = client
        self._producer = producer
        self._stream = f"{prefix(queue)}r:{api}"
        self._observers = {"end": observe, "score": observe_scores}
        self._news: dict[str, set[asyncio.Queue[Record]]] = {}
        self._last = "0"

    @contextmanager
    def news(self, id: str) -> Iterator[asyncio.Queue[Record]]:
        """The records of a job from now on, as they arrive in the stream, which may miss some: read the job too."""
        mine: asyncio.Queue[Record] = asyncio.Queue()
        self._news.setdefault(id, set()).add(mine)
        try:
            yield mine
        finally:
            self._news[id].discard(mine)
            if not self._news[id]:
                del self._news[id]

    async def ended(
        self, id: str, news: asyncio.Queue[Record], enqueue: Enqueue, *, check_first: bool = False
    ) -> Record:
        """Wait for the end of a job, without a timeout of its own, and return its record.

        ``news`` must have been opened before the job was enqueued, or ``check_first`` be set. The job is polled too, so
        that a lost notice costs ``POLL_S``. A job that the server has lost (it restarted without its data) is enqueued
        again; ``enqueue`` returns the id to wait for, which then may be another.
        """
        wait_s = 0.0 if check_first else POLL_S
        while True:
            record = await _next(news, wait_s) or await self._current(id)
            wait_s = POLL_S
            if isinstance(record, Record):
                if record.terminal:
                    return record
            elif record == "forgotten" and (other := await _quietly(enqueue)) not in (None, id):
                with self.news(other) as others:
                    return await self.ended(other, others, enqueue, check_first=True)

    async def follow(
        self, id: str, enqueue: Enqueue | None = None, *, within_s: float = math.inf, scores: bool = True
    ) -> AsyncIterator[Record | None]:
        """A job's record now and whenever something may have happened to it, and at least every ``FOLLOW_S``.

        None stands for a moment in which nothing is known: the server is away, or has forgotten the job. It ends with
        the job (with its ``scores``, where they come later), after ``within_s``, and without ``enqueue`` also if the
        server has forgotten it. ``enqueue`` returns
        the id to follow from then on, which may be another.
        """
        deadline = time.monotonic() + within_s
        while True:
            successor: str | None = None
            async for record, successor in self._follow_one(id, enqueue, deadline, scores):  # noqa: B007 - the last one counts
                yield record
            if successor is None:
                return
            id = successor

    async def _follow_one(
        self, id: str, enqueue: Enqueue | None, deadline: float, scores: bool
    ) -> AsyncIterator[tuple[Record | None, str | None]]:
        """The records of one id; the last entry says which id follows, if any does."""
        with self.news(id) as news:
            with suppress(RedisError):  # polling is enough
                await self._producer.watch(id)
            record: Record | str | None = None
            while time.monotonic() < deadline:
                record = record or await self._current(id)
                if isinstance(record, Record):
                    yield record, None
                    if record.settled or (record.terminal and not scores):
                        return
                else:
                    other = None
                    if record == "forgotten":
                        other = await _quietly(enqueue) if enqueue else None
                    if other not in (None, id) or (record == "forgotten" and enqueue is None):
                        yield None, other
                        return
                    yield None, None
                record = await _next(news, FOLLOW_S)

    async def read(self) -> None:
        """Wait for the next entries of the stream and deliver them; to be called in a loop.

        Raises:
            RedisError: the server is down; nothing was skipped.
            ExceptionGroup: ``observe`` has failed for some records. Those who wait for them got them anyway.
        """
        answer: Any = await self._client.xread({self._stream: self._last}, block=round(BLOCK_S * 1000), count=256)
        for _, entries in answer:
            await self._deliver([fields for _, fields in entries], entries[-1][0])

    async def _deliver(self, notices: list[dict[str, str]], last: str) -> None:
        notified = {what: {notice["id"] for notice in notices if notice["what"] == what} for what in self._observers}
        wanted = [notice["id"] for notice in notices if notice["id"] in self._news or notice["what"] in notified]
        records = (await self._producer.records(list(dict.fromkeys(wanted)))).values()
        self._last = last
        failures: list[Exception] = []
        for record in records:
            for news in self._news.get(record.id, ()):
                news.put_nowait(record)
            for what, observe in self._observers.items():
                if record.id not in notified[what]:
                    continue
                try:
                    observe(record)
                except Exception as error:
                    failures.append(error)
        if failures:
            raise ExceptionGroup("the ends of some jobs could not be recorded", failures)

    async def _current(self, id: str) -> Record | str | None:
        """The job's record, or 'forgotten', or None while the server is down."""
        try:
            return (await self._producer.records([id])).get(id) or "forgotten"
        except RedisError:
            return None


async def _next(news: asyncio.Queue[Record], wait_s: float) -> Record | None:
    """Wait for a record and return the newest; None if there was none in time."""
    try:
        async with asyncio.timeout(wait_s):  # wait_for of Python 3.11 may swallow a cancellation
            record = await news.get()
    except TimeoutError:
        return None
    while not news.empty():
        record = news.get_nowait()
    return record


async def _quietly(enqueue: Enqueue) -> str | None:
    """Enqueue again; None if the server is down or full, to be tried later."""
    try:
        return await enqueue()
    except (RedisError, QueueFull, QuotaExceeded):
        return None
