"""Results in a second Redis or Valkey that keeps nothing on disk: for several machines without an object store."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, cast

import redis

from service.queue.connection import CALL_TIMEOUT_S, CONNECT_TIMEOUT_S
from service.results.store import ResultMissing, checked, reference_of

LARGEST_BYTES = 2 * 2**20


class MemoryStore:
    """One hash for each claim, which ends by itself after ``ttl_s``. An image may have 2 MiB.

    The server should have ``save ""``, ``appendonly no``, a ``maxmemory`` and ``maxmemory-policy volatile-ttl``.
    """

    def __init__(self, url: str, ttl_s: float) -> None:
        self._client: redis.Redis = redis.Redis.from_url(
            url, socket_timeout=CALL_TIMEOUT_S, socket_connect_timeout=CONNECT_TIMEOUT_S
        )
        self._ttl_ms = round(ttl_s * 1000)

    def put(self, job: str, token: str, name: str, suffix: str, data: bytes) -> str:
        """See ``ResultStore``."""
        reference = reference_of(job, token, name, suffix)
        if len(data) > LARGEST_BYTES:
            raise OSError(f"the image has {len(data)} bytes: this store accepts at most {LARGEST_BYTES}")
        key, _, field = reference.rpartition("/")
        pipeline = self._client.pipeline()
        pipeline.hset(_key(key), field, cast(Any, data))
        pipeline.pexpire(_key(key), self._ttl_ms)
        try:
            pipeline.execute()
        except redis.RedisError as error:
            raise _away(error) from error
        return reference

    def get(self, reference: str) -> bytes:
        """See ``ResultStore``."""
        key, _, field = checked(reference).rpartition("/")
        try:
            data = _answer(self._client.hget(_key(key), field))
        except redis.RedisError as error:
            raise _away(error) from error
        if data is None:
            raise ResultMissing(reference)
        return bytes(data)

    def discard(self, job: str, token: str) -> None:
        """See ``ResultStore``."""
        try:
            self._client.delete(_key(f"{job[:2]}/{job}/{token}"))
        except redis.RedisError as error:
            raise _away(error) from error

    def sweep(self, older_than_s: float, quota_bytes: int = 0) -> int:
        """Nothing is left to do: the server lets images end, and has a limit of its own."""
        return 0


def _key(claim: str) -> str:
    return f"fewstep:results:{claim}"


def _answer(value: Awaitable[Any] | Any) -> Any:
    """redis-py annotates its two kinds of clients as one."""
    return value


def _away(error: redis.RedisError) -> OSError:
    return OSError(f"the server of the results failed: {type(error).__name__}")
