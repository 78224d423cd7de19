"""The API's side of the queue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import redis.asyncio

from service.queue.job import Job, Record, State
from service.queue.scripts import prefix, source

FIELDS = ["state", "result", "key", "payload", "created_us", "claimed_us", "finished_us"]


@dataclass(frozen=True)
class Worker:
    """What a live worker says about itself."""

    id: str
    runtime: str
    host: str
    max_batch: int


@dataclass(frozen=True)
class Depth:
    """The queue at one moment; the counters only grow (until the server loses its data)."""

    waiting: int
    running: int
    oldest_s: float
    workers: int
    counters: dict[str, int]


class Producer:
    """Puts jobs of one model into the queue and reads what became of them."""

    def __init__(
        self, client: redis.asyncio.Redis, model: str, api: str, *,
        timeout_s: float, ttl_s: float, max_pending: int, max_attempts: int,
    ) -> None:  # fmt: skip
        self._client = client
        self._prefix = prefix(model)
        self._api = api
        self._timeout_ms, self._ttl_ms = round(timeout_s * 1000), round(ttl_s * 1000)
        self._max_pending, self._max_attempts = max_pending, max_attempts
        self._scripts = {name: client.register_script(source(name)) for name in ("enqueue", "cancel", "reap")}

    async def enqueue(self, job: Job) -> Literal["ok", "known", "full"]:
        """Put a job into the queue; a second call with the same id changes nothing."""
        limits = (self._timeout_ms, self._ttl_ms, self._max_pending)
        answer, _ = await self._run(
            "enqueue", job.id, job.lane, job.shape, len(job.seeds), job.to_payload(), self._api, *limits, job.key
        )
        return answer  # type: ignore[no-any-return]

    async def cancel(self, id: str) -> str:
        """Cancel a job; returns 'missing' or its state after the call ('running': marked, its worker drops it)."""
        return str(await self._run("cancel", id))

    async def reap(self) -> int:
        """Requeue the jobs whose worker has fallen silent; returns how many."""
        return int(await self._run("reap", self._max_attempts))

    async def records(self, ids: list[str]) -> dict[str, Record]:
        """The jobs among ``ids`` that exist."""
        pipeline = self._client.pipeline(transaction=False)
        for id in ids:
            pipeline.hmget(f"{self._prefix}j:{id}", FIELDS)
        rows = zip(ids, await pipeline.execute(), strict=True)
        return {id: _record(id, dict(zip(FIELDS, row, strict=True))) for id, row in rows if row[0]}

    async def workers(self) -> list[Worker]:
        """The workers that have given a sign of life lately."""
        now_us = await self._now_us()
        names = [str(name) for name in await self._client.zrangebyscore(f"{self._prefix}wk", now_us, "+inf")]
        said = await self._client.mget([f"{self._prefix}wi:{name}" for name in names]) if names else []
        alive = [(name, json.loads(info)) for name, info in zip(names, said, strict=True) if info]
        return [Worker(name, info["runtime"], info["host"], info["max_batch"]) for name, info in alive]

    async def depth(self) -> Depth:
        """How full the queue is."""
        now_us = await self._now_us()
        pipeline = self._client.pipeline(transaction=False)
        pipeline.zcard(f"{self._prefix}pending")
        pipeline.zcard(f"{self._prefix}l")
        pipeline.zrange(f"{self._prefix}pending", 0, 0, withscores=True)
        pipeline.zcount(f"{self._prefix}wk", now_us, "+inf")
        pipeline.hgetall(f"{self._prefix}n")
        waiting, running, head, workers, counters = await pipeline.execute()
        oldest_s = max(0.0, (now_us - head[0][1]) / 1e6) if head else 0.0
        return Depth(waiting, running, oldest_s, workers, {name: int(count) for name, count in counters.items()})

    async def ping(self) -> None:
        """Raises a RedisError if the server does not answer."""
        await self._client.ping()

    async def _now_us(self) -> int:
        seconds, micros = await self._client.time()
        return int(seconds) * 1_000_000 + int(micros)

    async def _run(self, name: str, *args: str | int) -> Any:
        return await self._scripts[name](keys=[self._prefix], args=list(args))


def _record(id: str, row: Mapping[str, str | None]) -> Record:
    result, payload, key = row["result"], row["payload"], row["key"]
    return Record(
        id,
        State(str(row["state"])),
        json.loads(result) if result else {},
        key or "",
        payload or "",
        created_s=_seconds(row["created_us"]) or 0.0,
        claimed_s=_seconds(row["claimed_us"]),
        finished_s=_seconds(row["finished_us"]),
    )


def _seconds(micros: str | None) -> float | None:
    return int(micros) / 1e6 if micros else None
