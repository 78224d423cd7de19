"""The HTTP process's side of the queue."""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Literal

import redis
import redis.asyncio

from service.queue.connection import bounded
from service.queue.job import STEPS_DONE, Job, Position, QueueOptions, Record, Verdict
from service.queue.result import read_result, with_scores
from service.queue.scripts import Scripts
from service.queue.states import State
from service.queue.status import FAILED, Depth, Usage, Worker, WorkerState, read_usages, read_worker

FIELDS = [
    "state", "result", "key", "payload", "created_us", "claimed_us", "finished_us", "previews", "cancel", "short",
    "idem", "body", "webhook", "scoring", "scores",
]  # fmt: skip
MOST_OWNED = 1000  # as many as enqueue.lua keeps in the list of a key
DAY_S = 86400
SECRET_KEPT_S = 30 * DAY_S
MOST_WORKERS = 1000  # that are reported
REPLICATED_WITHIN_MS = 500


class Producer:
    """Puts jobs into one queue and reads their records.

    ``managed``: which models are served is registered in the queue, and may change. A level of priority is worth the
    work of ``priority_images`` images; ``quota`` is the work that a key may ask for in a minute, in thousands of
    pixel-steps (0: no limit). ``replicas``: how many must hold a job before it counts as accepted.
    """

    def __init__(
        self, client: redis.asyncio.Redis, queue: str, api: str, *,
        ttl_s: float, max_pending: int, max_attempts: int, priority_images: int = 50, quota: int = 0,
        managed: bool = False, replicas: int = 0,
    ) -> None:  # fmt: skip
        self.client = client
        self.queue = queue
        self._client = client
        self._scripts = Scripts(client, queue)
        self._prefix = self._scripts.prefix
        self._managed = managed
        self._replicas = replicas
        self._api = api
        self._limits = {"ttl_ms": round(ttl_s * 1000), "max_pending": max_pending, "quota": quota}
        self._max_attempts = max_attempts
        self._priority_images = priority_images

    async def enqueue(self, job: Job, options: QueueOptions) -> Verdict:
        """Put a job into the queue; a second call with the same id changes nothing."""
        asked = {
            "id": job.id, "lane": job.lane, "shape": job.shape, "images": job.images, "payload": job.to_payload(),
            "key": job.key, "cost": job.cost, "priority": job.priority,
            "bonus": job.priority * self._priority_images * job.cost // job.images,
            "reply": self._api, "webhook": options.webhook, "watch": options.watched, "client": options.client,
            "model": f"{job.model}/{job.version}" if self._managed else "",
            "idem": options.idempotency, "body": options.body, "solo": options.solo,
            "timeout_ms": round(options.timeout_s * 1000), "key_pending": options.key_pending, "pair": job.pair,
            "open_ended": options.open_ended,
        }  # fmt: skip
        quota = self._limits["quota"] if options.quota is None else options.quota
        document = json.dumps({**asked, **self._limits, "quota": quota})
        word, id, wait_ms, left = await (
            self._replicated(document) if self._replicas else self._run("enqueue", document)
        )
        wait_s = int(wait_ms) / 1000
        if word in ("full", "key_full", "left"):  # clients that were refused together must not retry together
            wait_s *= random.uniform(1.0, 2.0)
        return Verdict(word, id, wait_s, int(left), quota)

    async def _replicated(self, document: str) -> Any:
        """Enqueue, and wait until enough replicas hold the job; WAIT is about what its own connection has written."""
        pipeline = self._client.pipeline(transaction=False)
        await self._scripts.run("enqueue", document, pipeline=pipeline)
        pipeline.wait(self._replicas, REPLICATED_WITHIN_MS)
        verdict, copies = await bounded(pipeline.execute())
        if verdict[0] == "ok" and copies < self._replicas:
            await self.cancel(verdict[1])
            raise redis.ConnectionError(f"only {copies} of {self._replicas} replicas hold the job")
        return verdict

    async def cancel(self, id: str, why: Literal["cancelled", "expired"] = "cancelled") -> str:
        """End a job; returns 'missing' or its state after the call ('running': marked, its worker drops it)."""
        return str(await self._run("cancel", id, why))

    async def erase(self, id: str) -> str:
        """Remove the record of a job that has ended; returns 'missing', 'erased', or its state if it stays."""
        return str(await self._run("erase", id))

    async def leave(self, id: str, client: str, grace_s: float) -> str:
        """A client has disconnected: if no other one waits, the job is given up after ``grace_s``."""
        return str(await self._run("leave", id, client, round(grace_s * 1000)))

    async def detach(self, id: str, client: str) -> str:
        """A client stops waiting and will fetch the job later: it is no longer given up when clients disconnect."""
        return str(await self._run("detach", id, client))

    async def watch(self, id: str) -> None:
        """Receive all further events of a job in the reply stream."""
        await self._run("watch", id, self._api)

    async def position(self, id: str) -> Position | None:
        """A job's position in the queue, or None if it is not waiting."""
        position, wait_ms = await self._run("position", id)
        return Position(int(position), int(wait_ms) / 1000) if position >= 0 else None

    async def reap(self) -> int:
        """Requeue the jobs whose lease has expired; returns how many."""
        return int(await self._run("reap", self._max_attempts))

    async def count_failures(self, failures: Mapping[str, int]) -> None:
        """Count failures of background tasks, by their names."""
        pipeline = self._client.pipeline(transaction=False)
        for task, count in failures.items():
            pipeline.hincrby(f"{self._prefix}n", f"{FAILED}{task}", count)
        await bounded(pipeline.execute())

    async def records(self, ids: list[str]) -> dict[str, Record]:
        """The jobs among ``ids`` that exist."""
        pipeline = self._client.pipeline(transaction=False)
        for id in ids:
            pipeline.hmget(f"{self._prefix}j:{id}", FIELDS)
        rows = zip(ids, await bounded(pipeline.execute()), strict=True)
        return {id: _record(id, dict(zip(FIELDS, row, strict=True))) for id, row in rows if row[0]}

    async def owned(
        self,
        key: str,
        limit: int,
        *,
        after_us: int | None = None,
        oldest_first: bool = False,
        wanted: Callable[[Record], bool] | None = None,
    ) -> list[Record]:
        """The jobs of a key that are still kept, in the order of their acceptance, newest first unless it is said
        otherwise: those that come after ``after_us``, and are ``wanted`` (all, if it is None)."""
        found: list[Record] = []
        name, bound = f"{self._prefix}k:{key}", None if after_us is None else f"({after_us}"
        for start in range(0, MOST_OWNED, limit):  # a record may expire before its entry in the list
            if oldest_first:
                ids = await bounded(self._client.zrangebyscore(name, bound or "-inf", "+inf", start, limit))
            else:
                ids = await bounded(self._client.zrevrangebyscore(name, bound or "+inf", "-inf", start, limit))
            if not ids:
                break
            found += filter(wanted, (await self.records([str(id) for id in ids])).values())
            if len(found) >= limit:
                break
        return found[:limit]

    async def owners(self) -> list[str]:
        """The keys that have jobs here."""
        start = f"{self._prefix}k:"
        names = await bounded(_all(self._client.scan_iter(f"{start}*", count=1000)))
        return [name.removeprefix(start) for name in names]

    async def usage(self, days: int) -> list[Usage]:
        """The usage of each key on each of the last days (UTC), including today."""
        today = await self._now_us() // (DAY_S * 1_000_000)
        pipeline = self._client.pipeline(transaction=False)
        numbers = range(today, today - days, -1)
        for number in numbers:
            pipeline.hgetall(f"{self._prefix}u:{number}")
        return [
            usage
            for number, counts in zip(numbers, await bounded(pipeline.execute()), strict=True)
            for usage in read_usages(number * DAY_S, counts)
        ]

    async def workers(self) -> list[Worker]:
        """The live workers."""
        now_us = await self._now_us()
        living = self._client.zrangebyscore(f"{self._prefix}wk", now_us, "+inf", start=0, num=MOST_WORKERS)
        names = [str(name) for name in await bounded(living)]
        if not names:
            return []
        asked = [f"{self._prefix}{what}:{name}" for name in names for what in ("wi", "wo")]
        said = await bounded(self._client.mget(asked))
        alive = zip(names, said[::2], said[1::2], strict=True)
        return [read_worker(name, json.loads(info), str(order or "")) for name, info, order in alive if info]

    async def order(self, worker: str, wanted: WorkerState) -> str:
        """Have a worker pause, drain, or (``READY``) go on; returns 'missing', or what is wanted of it now: a worker
        that drains does so for good."""
        word = str(await self._run("order", worker, "" if wanted is WorkerState.READY else wanted.value))
        return word or WorkerState.READY.value

    async def depth(self) -> Depth:
        """How full the queue is."""
        now_us = await self._now_us()
        pipeline = self._client.pipeline(transaction=False)
        pipeline.zcard(f"{self._prefix}pending")
        pipeline.zcard(f"{self._prefix}l")
        pipeline.zrange(f"{self._prefix}pending", 0, 0, withscores=True)
        pipeline.zcount(f"{self._prefix}wk", now_us, "+inf")
        pipeline.hgetall(f"{self._prefix}n")
        waiting, running, head, workers, counters = await bounded(pipeline.execute())
        oldest_s = max(0.0, (now_us - head[0][1]) / 1e6) if head else 0.0
        return Depth(waiting, running, oldest_s, workers, {name: int(count) for name, count in counters.items()})

    async def shared_secret(self, name: str) -> bytes | None:
        """Random bytes that all processes of this queue share under this name; the first caller creates them.

        None: there are none yet, and the server refuses writes at the moment.
        """
        key = f"{self._prefix}secret:{name}"
        pipeline = self._client.pipeline(transaction=False)
        pipeline.set(key, secrets.token_hex(32), nx=True)
        pipeline.expire(key, SECRET_KEPT_S)
        pipeline.get(key)
        *_, found = await bounded(pipeline.execute(raise_on_error=False))
        if isinstance(found, Exception):
            raise found
        return bytes.fromhex(found) if found else None

    async def take_turn(self, duty: str, for_s: float) -> bool:
        """Whether this process does a duty now; for ``for_s`` seconds no other process will."""
        key, until_ms = f"{self._prefix}turn:{duty}", max(1, round(for_s * 1000))
        return bool(await bounded(self._client.set(key, self._api, nx=True, px=until_ms)))

    async def _now_us(self) -> int:
        seconds, micros = await bounded(self._client.time())
        return int(seconds) * 1_000_000 + int(micros)

    async def _run(self, name: str, *args: str | int) -> Any:
        return await bounded(self._scripts.run(name, *args))


def _record(id: str, row: Mapping[str, str | None]) -> Record:
    result = with_scores(read_result(row["result"], done=row["state"] == State.DONE), row["scores"])
    payload, key = row["payload"], row["key"]
    previews = json.loads(row["previews"] or "{}")
    steps_done = int(previews.pop(STEPS_DONE, 0))
    return Record(
        id,
        _state(str(row["state"])),
        result,
        key or "",
        payload or "",
        created_s=_seconds(row["created_us"]) or 0.0,
        claimed_s=_seconds(row["claimed_us"]),
        finished_s=_seconds(row["finished_us"]),
        previews=previews,
        steps_done=steps_done,
        giving_up=row["state"] == "running" and row["cancel"] is not None,
        short=row["short"] or "",
        idempotency=row["idem"] or "",
        body=row["body"] or "",
        webhook=row["webhook"] or "",
        scoring=row["scoring"] or str(result.get("scoring", "")),
    )


def _state(name: str) -> State:
    """The state; one that only another release knows counts as running, so that this release does not end it."""
    return State(name) if name in list(State) else State.RUNNING


def _seconds(micros: str | None) -> float | None:
    return int(micros) / 1e6 if micros else None


async def _all(names: AsyncIterator[Any]) -> list[str]:
    return [str(name) async for name in names]
