"""The traffic of a canary: a share of what is asked of the latest version is drawn again, by both versions, for nobody.

Both halves of a pair wait at the lowest priority under a key of their own, so that they are alike in everything but the
version, and nobody's request waits for them. What cannot be enqueued is left out: it is one pair less.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import replace

from redis.exceptions import RedisError

from service.models.choice import Choice, Served
from service.models.folder import Name
from service.quality.canary import Canary
from service.queue.job import Job, QueueOptions
from service.queue.producer import Producer
from student.runtimes.sizes import own_size

KEY = "canary"
PRIORITY = -5
TIMEOUT_S = 900.0
MOST_WAITING = 64  # jobs of all canaries: a queue that is behind is not made longer
BASE, CANDIDATE = "base", "candidate"

log = logging.getLogger(__name__)


class Mirror:
    """Enqueues pairs; ``mirror`` returns at once."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._tasks: set[asyncio.Task[None]] = set()

    def mirror(self, job: Job, choice: Choice) -> None:
        """Have a job that was accepted drawn as a pair, if it falls into the share of a canary."""
        found = choice.canary(Name(job.model, job.version))
        if found is None or not falls_into(job, *found):
            return
        task = asyncio.get_running_loop().create_task(self._enqueue(pair_of(job, found[0])))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _enqueue(self, pair: tuple[Job, Job]) -> None:
        options = QueueOptions(TIMEOUT_S, quota=0, key_pending=MOST_WAITING)
        try:
            for number, job in enumerate(pair):
                verdict = await self._producer.enqueue(job, options)
                if verdict.word not in ("ok", "known"):
                    for earlier in pair[:number]:
                        await self._producer.cancel(earlier.id)
                    return
        except RedisError as error:
            log.info("a pair of a canary is left out: %s", error)


def falls_into(job: Job, canary: Canary, candidate: Served) -> bool:
    """Whether a job is among the share; pictures that are chosen by a score are not, nor what only one can draw."""
    sizes = (own_size(candidate.student), *candidate.sizes)
    drawable = job.steps in candidate.student.steps and (job.height, job.width) in sizes
    drawn = int.from_bytes(hashlib.sha256(f"{canary.epoch} {job.id}".encode()).digest()[:4]) / 2**32
    return drawable and not (job.rank_by or job.pair) and drawn < canary.share


def pair_of(job: Job, canary: Canary) -> tuple[Job, Job]:
    """The same prompt and seeds for either version, without anything of who asked; the same ids for the same job."""
    return _half(job, canary, BASE, canary.base), _half(job, canary, CANDIDATE, canary.candidate)


def _half(job: Job, canary: Canary, side: str, version: str) -> Job:
    id = hashlib.sha256(f"{canary.epoch} {job.id} {side}".encode()).hexdigest()[:32]
    pair = hashlib.sha256(f"{canary.epoch} {job.id}".encode()).hexdigest()[:16]
    return replace(
        job, id=id, key=KEY, version=version, priority=PRIORITY, pair=f"{job.model}|{canary.epoch}|{pair}|{side}",
        previews=0, user=None, metadata={}, response_format="b64_json", request_id="", traceparent="", may_train=False,
    )  # fmt: skip
