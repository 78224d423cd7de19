"""How an API process learns what happens to jobs: one stream, one reader, and the job itself as the truth."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from service.queue.job import Record
from service.queue.producer import Producer
from service.queue.scripts import prefix

BLOCK_S = 2.0
POLL_S = 2.0
FOLLOW_S = 1.0
PAUSE_AFTER_ERROR_S = 0.2

log = logging.getLogger(__name__)

Enqueue = Callable[[], Awaitable[str]]


class Replies:
    """Reads the reply stream of this process and wakes whoever waits for a job.

    ``observe`` is called once for each record of a job that a worker has ended, whether somebody waits or not.
    """

    def __init__(
        self, client: redis.asyncio.Redis, producer: Producer, queue: str, api: str, observe: Callable[[Record], None]
    ) -> None:
        self._client = client
        self._producer = producer
        self._stream = f"{prefix(queue)}r:{api}"
        self._observe = observe
        self._news: dict[str, set[asyncio.Queue[Record]]] = {}

    @contextmanager
    def news(self, id: str) -> Iterator[asyncio.Queue[Record]]:
        """The records of a job from now on, as the stream tells of them. (It may miss some: look at the job, too.)"""
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
        """The record of a job when it has ended; without end, so set a limit around it.

        ``news`` must have been opened before the job was enqueued, or ``check_first`` be set. It looks at the job now
        and then, so that a notice that was lost costs ``POLL_S``. A job that the server has forgotten (it came back
        without its data) is enqueued again; ``enqueue`` returns the id to wait for, which then may be another.
        """
        wait_s = 0.0 if check_first else POLL_S
        while True:
            record = await _next(news, wait_s) or await self._look(id)
            wait_s = POLL_S
            if isinstance(record, Record):
                if record.terminal:
                    return record
            elif record == "forgotten" and (other := await _quietly(enqueue)) not in (None, id):
                with self.news(other) as others:
                    return await self.ended(other, others, enqueue, check_first=True)

    async def follow(self, id: str, enqueue: Enqueue | None = None) -> AsyncIterator[Record]:
        """A job's record now and whenever something may have happened to it, and at least every ``FOLLOW_S``.

        It ends with the job, and without ``enqueue`` also if the server has forgotten it.
        """
        with self.news(id) as news:
            with suppress(RedisError):  # looking at it now and then is enough
                await self._producer.watch(id)
            record: Record | str | None = None
            while True:
                record = record or await self._look(id)
                if record == "forgotten":
                    if enqueue is None:
                        return
                    await _quietly(enqueue)
                if isinstance(record, Record):
                    yield record
                    if record.terminal:
                        return
                record = await _next(news, FOLLOW_S)

    async def read_forever(self) -> None:
        """The reader: ends only when it is cancelled."""
        last = "0"
        while True:
            try:
                last = await self._read(last)
            except RedisError as error:
                log.warning("the reply stream cannot be read: %s", error)
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)

    async def _read(self, last: str) -> str:
        answer: Any = await self._client.xread({self._stream: last}, block=round(BLOCK_S * 1000), count=256)
        for _, entries in answer:
            await self._deliver([fields for _, fields in entries])
            last = entries[-1][0]
        return last

    async def _deliver(self, notices: list[dict[str, str]]) -> None:
        ended = {notice["id"] for notice in notices if notice["what"] == "end"}
        wanted = [notice["id"] for notice in notices if notice["id"] in ended or notice["id"] in self._news]
        for record in (await self._producer.records(list(dict.fromkeys(wanted)))).values():
            if record.id in ended:
                self._observe(record)
            for news in self._news.get(record.id, ()):
                news.put_nowait(record)

    async def _look(self, id: str) -> Record | str | None:
        """The job's record, or 'forgotten', or None while the server is away."""
        try:
            return (await self._producer.records([id])).get(id) or "forgotten"
        except RedisError:
            return None


async def _next(news: asyncio.Queue[Record], wait_s: float) -> Record | None:
    """The newest record, waited for; None if there was none in time."""
    try:
        record = await asyncio.wait_for(news.get(), wait_s)
    except TimeoutError:
        return None
    while not news.empty():
        record = news.get_nowait()
    return record


async def _quietly(enqueue: Enqueue) -> str | None:
    """Enqueue again; a server that is away or refuses is asked another time."""
    try:
        return await enqueue()
    except RedisError:
        return None
