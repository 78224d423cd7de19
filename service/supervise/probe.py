"""A worker's healthcheck, for containers: a worker has no port that could be asked."""

from __future__ import annotations

import asyncio

from redis.exceptions import RedisError

from service.errors import StartupError
from service.models.single import queue_name
from service.queue.connection import connect_async
from service.queue.producer import Producer
from service.queue.status import Worker, WorkerState
from service.settings import Settings


def find_worker(settings: Settings, host: str) -> None:
    """Return if a worker on this host is alive and has loaded what it serves.

    Raises:
        StartupError: none is, or the queue is out of reach.
    """
    try:
        workers = live_workers(settings)
    except RedisError as error:
        raise StartupError(f"The queue cannot be reached: {error}.") from error
    states = [worker.state for worker in workers if worker.host == host]
    if not states:
        raise StartupError(f"No worker on {host} is alive.")
    if set(states) == {WorkerState.LOADING}:
        raise StartupError(f"The workers on {host} are still loading.")


def live_workers(settings: Settings) -> list[Worker]:
    """The workers that have given a sign of life lately.

    Raises:
        RedisError: the queue is out of reach.
    """
    return asyncio.run(_workers(settings))


async def _workers(settings: Settings) -> list[Worker]:
    client = connect_async(settings.required_redis_url, retries=0)
    try:
        producer = Producer(client, queue_name(settings), "", ttl_s=1, max_pending=1, max_attempts=1)
        return await producer.workers()
    finally:
        await client.aclose()
