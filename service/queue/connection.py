"""Connections to the queue's server. redis-py repeats a call whose answer was lost: every script can be repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from service.errors import StartupError

OLDEST = (7, 0)
RETRIES = 12  # about 4 s in all: a restarted server is back by then
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
CONNECT_TIMEOUT_S = 2.0
CALL_TIMEOUT_S = 5.0
LONGEST_CALL_S = 8.0  # including retries: a server that never answers must not block a client for a minute
MOST_CONNECTIONS = 32  # of one event loop; a call that finds all of them taken waits for one
CONNECTION_WAIT_S = 4.0

T = TypeVar("T")


def check_server(url: str) -> None:
    """Return if the server answers and is new enough for the scripts.

    Raises:
        StartupError: it does not, or is not.
    """
    client = connect(url)
    try:
        version = str(client.info("server")["redis_version"])
    except redis.RedisError as error:
        raise StartupError(f"The server of FEWSTEP_REDIS_URL does not answer ({error}).") from error
    finally:
        client.close()
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise StartupError(f"The server of FEWSTEP_REDIS_URL has version {version}: accepted is 7.0 or later.")


def connect(url: str, *, block_s: float = 0.0, retries: int = RETRIES) -> redis.Redis:
    """A client for one thread; ``block_s`` is the longest that a call of it waits on the server's side."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=CALL_TIMEOUT_S + block_s,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(ExponentialBackoff(cap=LONGEST_PAUSE_S, base=FIRST_PAUSE_S), retries),
    )


def connect_async(url: str, *, block_s: float = 0.0, retries: int = RETRIES) -> redis.asyncio.Redis:
    """The same for an event loop.

    A call raises ``redis.ConnectionError`` when none of its connections has come free for ``CONNECTION_WAIT_S``.
    """
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=MOST_CONNECTIONS,
        timeout=CONNECTION_WAIT_S,
        decode_responses=True,
        socket_timeout=CALL_TIMEOUT_S + block_s,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=AsyncRetry(ExponentialBackoff(cap=LONGEST_PAUSE_S, base=FIRST_PAUSE_S), retries),
    )
    return redis.asyncio.Redis.from_pool(pool)


async def bounded(call: Awaitable[T]) -> T:
    """The answer of a call.

    Raises:
        redis.TimeoutError: it took longer than ``LONGEST_CALL_S``, repetitions included.
    """
    try:
        async with asyncio.timeout(LONGEST_CALL_S):
            return await call
    except TimeoutError as error:
        raise redis.TimeoutError(f"no answer within {LONGEST_CALL_S:g} s") from error
