"""What the queue's server knows of the quality of what was drawn, as an HTTP process reads it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

import redis.asyncio

from service.quality.drift import Probes, Stream, read_stream
from service.queue.connection import bounded
from service.queue.scripts import prefix
from service.queue.status import Worker

OLD_S = 7 * 86400  # a stream to which nothing was added for so long is shown no more


class DriftLog:
    """Reads the drift tests of one queue."""

    def __init__(self, client: redis.asyncio.Redis, queue: str) -> None:
        self._client = client
        self._prefix = prefix(queue)

    async def streams(self) -> list[Stream]:
        """What is known of each model, version, step count, size and scorer, of the last week.

        Raises:
            RedisError: the server is away.
        """
        rows: Any = await bounded(self._client.hgetall(f"{self._prefix}dr"))
        since_us = (time.time() - OLD_S) * 1e6
        return [read_stream(key, state) for key, state in _states(rows) if int(state["at_us"]) >= since_us]


def _states(rows: Mapping[str, str]) -> Iterable[tuple[str, dict[str, Any]]]:
    return [(key, json.loads(text)) for key, text in sorted(rows.items())]


def probes_of(workers: Iterable[Worker]) -> Probes:
    """What the workers' last golden probes found, by student."""
    found: dict[str, set[str]] = {}
    for worker in workers:
        for name, about in worker.models.items():
            found.setdefault(name, set()).add(about.get("probe", {}).get("outcome", "none"))
    return Probes({name: frozenset(outcomes) for name, outcomes in found.items()})
