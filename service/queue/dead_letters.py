"""Dead letters: jobs that were given up because one worker after another died while running them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from service.queue.connection import bounded
from service.queue.job import QueueOptions, Record, Verdict
from service.queue.producer import Producer
from service.queue.scripts import Scripts


@dataclass(frozen=True)
class DeadLetter:
    """A job that was given up; ``died_s`` is when (Unix time), ``worker`` the last one that died with it."""

    record: Record
    attempts: int
    worker: str
    died_s: float


class DeadLetterQueue:
    """The dead letters of one queue; they and their jobs' records are kept for a week, the newest 1,000 of them."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._client = producer.client
        self._scripts = Scripts(producer.client, producer.queue)
        self._prefix = self._scripts.prefix

    async def newest(self, limit: int) -> list[DeadLetter]:
        """The newest first."""
        entries = await bounded(self._client.zrevrange(f"{self._prefix}dead", 0, limit - 1, withscores=True))
        return await self._read([(str(entry[0]), float(entry[1])) for entry in entries])

    async def find(self, id: str) -> DeadLetter | None:
        died_us = await bounded(self._client.zscore(f"{self._prefix}dead", id))
        found = await self._read([(id, float(died_us))] if died_us is not None else [])
        return found[0] if found else None

    async def retry(self, letter: DeadLetter, timeout_s: float) -> Verdict:
        """Queue a copy of the dead letter's job, alone in its batch, and drop the dead letter once it is queued.

        It is a new job, since an ended job never runs again; its webhook and its Idempotency-Key are the old one's. Its
        id is derived from the old id, so a repeated call finds the first one's job. 'attached': the client has sent the
        request again meanwhile, with the same key, and that job takes the place of this one.

        Raises:
            PayloadError: the job was written by another release.
        """
        old = letter.record
        again = replace(old.job, id=hashlib.sha256(f"retry {old.id}".encode()).hexdigest()[:32])
        options = QueueOptions(
            timeout_s, quota=0, solo=True, webhook=old.webhook, idempotency=old.idempotency, body=old.body
        )
        verdict = await self._producer.enqueue(again, options)
        if verdict.word in ("ok", "known", "attached"):
            await self.drop(old.id)
        return verdict

    async def drop(self, id: str) -> bool:
        """Drop a dead letter; False if there is none."""
        return bool(await bounded(self._scripts.run("drop_dead_letter", id)))

    async def _read(self, entries: list[tuple[str, float]]) -> list[DeadLetter]:
        records = await self._producer.records([id for id, _ in entries])
        pipeline = self._client.pipeline(transaction=False)
        for id, _ in entries:
            pipeline.hmget(f"{self._prefix}j:{id}", ["attempts", "worker"])
        rows = await bounded(pipeline.execute())
        return [
            DeadLetter(records[id], int(attempts or 0), worker or "", died_us / 1e6)
            for (id, died_us), (attempts, worker) in zip(entries, rows, strict=True)
            if id in records
        ]
