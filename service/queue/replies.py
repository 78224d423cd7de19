"""How an API process learns that its jobs have ended: one stream, one reader, and the job itself as the truth."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from service.queue.job import Job, Record
from service.queue.producer import Producer
from service.queue.scripts import prefix

BLOCK_S = 2.0
POLL_S = 2.0
PAUSE_AFTER_ERROR_S = 0.2

log = logging.getLogger(__name__)


class Replies:
    """Reads the reply stream of this process and wakes whoever waits for a job.

    ``observe`` is called once for each record of a job that a worker has ended, whether somebody waits or not.
    """

    def __init__(
        self, client: redis.asyncio.Redis, producer: Producer, model: str, api: str, observe: Callable[[Record], None]
    ) -> None:
        self._client = client
        self._producer = producer
        self._stream = f"{prefix(model)}r:{api}"
        self._observe = observe
        self._waiters: dict[str, asyncio.Future[Record]] = {}

    async def result(self, job: Job, enqueue: Callable[[], Awaitable[None]]) -> Record:
        """Enqueue a job and return its record when it has ended; without end, so set a limit around it.

        The waiter is registered before the job is enqueued and looks at the job itself now and then, so that an
        answer that was written at any moment, or a lost one, is found. A job that the server has forgotten (it
        came back without its data) is enqueued again under the same id.
        """
        future = self._waiters[job.id] = asyncio.get_running_loop().create_future()
        try:
            await enqueue()
            while True:
                try:
                    return await asyncio.wait_for(asyncio.shield(future), POLL_S)
                except TimeoutError:
                    if record := await self._look(job, enqueue):
                        return record
        finally:
            del self._waiters[job.id]

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
            await self._deliver([fields["id"] for _, fields in entries])
            last = entries[-1][0]
        return last

    async def _deliver(self, ids: list[str]) -> None:
        for record in (await self._producer.records(ids)).values():
            self._observe(record)
            waiter = self._waiters.get(record.id)
            if waiter and not waiter.done():
                waiter.set_result(record)

    async def _look(self, job: Job, enqueue: Callable[[], Awaitable[None]]) -> Record | None:
        try:
            record = (await self._producer.records([job.id])).get(job.id)
            if record is None:
                await enqueue()
                return None
        except RedisError:
            return None
        return record if record.terminal else None
