"""How many event streams each key has open, in all HTTP processes of a queue: each asks it once or twice a second."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.exceptions import RedisError

from service.errors import TooManyStreams
from service.queue.connection import bounded
from service.queue.producer import Producer
from service.queue.scripts import Scripts

log = logging.getLogger(__name__)

RENEW_S = 10.0
KEPT_S = 3 * RENEW_S  # the streams of a process that has died count for no longer
RENEWED_AT_ONCE = 1000


class Streams:
    """Counts open streams by key, in the queue, and refuses those beyond ``most``."""

    def __init__(self, producer: Producer, most: int) -> None:
        self._scripts = Scripts(producer.client, producer.queue)
        self._client = producer.client
        self._most = most
        self._open: dict[str, str] = {}

    async def open(self, key: str) -> str:
        """Count one more; returns its id, for ``close``.

        Raises:
            TooManyStreams: the key has reached its limit.
            RedisError: the queue is out of reach.
        """
        id = secrets.token_hex(8)
        asked = (id, key, self._most, round(KEPT_S * 1000))
        if not await bounded(self._scripts.run("open_stream", *asked)):
            raise TooManyStreams(f"This key already has {self._most} streams open: close one first.")
        self._open[id] = key
        return id

    async def close(self, id: str) -> None:
        """Count it no more; where the queue is out of reach it ends by itself."""
        key = self._open.pop(id)
        try:
            await bounded(self._client.zrem(f"{self._scripts.prefix}st:{key}", id))
        except RedisError as error:
            log.warning("a stream is counted for up to %.0f s more: %s", KEPT_S, error)

    @asynccontextmanager
    async def unless_refused(self, key: str) -> AsyncIterator[str]:
        """Around what leads to a stream: if that fails, the stream is closed."""
        id = await self.open(key)
        try:
            yield id
        except BaseException:
            await self.close(id)
            raise

    async def renew(self) -> None:
        """Go on counting those that are open; to be called every ``RENEW_S``.

        Raises:
            RedisError: the queue is out of reach.
        """
        pairs = list(self._open.items())
        for start in range(0, len(pairs), RENEWED_AT_ONCE):
            some = [part for pair in pairs[start : start + RENEWED_AT_ONCE] for part in pair]
            await bounded(self._scripts.run("renew_streams", round(KEPT_S * 1000), *some))
