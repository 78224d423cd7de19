"""A worker's healthcheck, for containers: a worker has no port that could be asked."""

from __future__ import annotations

import asyncio

from redis.exceptions import RedisError

from service.errors import StartupError
from service.models.single import queue_name
from service.queue.connection import connect_async
from service.queue.producer import Producer
from service.settings import Settings


def find_worker(settings: Settings, host: str) -> None:
    """Return if a worker on this host is alive.

    Raises:
        StartupError: none is, or the queue is out of reach.
    """
    try:
        hosts = asyncio.run(_hosts(settings))
    except RedisError as error:
        raise StartupError(f"The queue cannot be reached: {error}.") from error
    if host not in hosts:
        raise StartupError(f"No worker on {host} has given a sign of life.")


async def _hosts(settings: Settings) -> list[str]:
    client = connect_async(settings.required_redis_url, retries=0)
    try:
        producer = Producer(client, queue_name(settings), "", ttl_s=1, max_pending=1, max_attempts=1)
        return [worker.host for worker in await producer.workers()]
    finally:
        await client.aclose()
