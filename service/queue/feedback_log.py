"""The prompts that may train later students, and what clients say of images, as an HTTP process handles them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import redis.asyncio

from service.quality.feedback import FeedbackPolicy, Word, exported
from service.queue.connection import bounded
from service.queue.scripts import Scripts


class FeedbackLog:
    """The log of one queue; finish.lua adds to it what ranks low."""

    def __init__(self, client: redis.asyncio.Redis, queue: str, policy: FeedbackPolicy) -> None:
        self._client = client
        self._scripts = Scripts(client, queue)
        self._policy = policy

    async def note(self, id: str, image: int, word: Word, digest: str, entry: Mapping[str, Any]) -> str:
        """Note what a client says of an image: 'ok', 'same', 'missing' or the state of a job without images.

        With a ``digest`` (of a prompt that may train) it counts in the log, where ``entry`` is what is kept of it.
        """
        policy = self._policy
        limits = (policy.most, policy.most_per_key, policy.kept_ms)
        return str(
            await bounded(self._scripts.run("feedback/note", id, image, word, digest, json.dumps(dict(entry)), *limits))
        )

    async def prompts(self, key: str | None = None) -> list[dict[str, Any]]:
        """What is kept of all keys, or of one: each prompt once, the lowest first, without whose it is."""
        rows: Any = await bounded(self._client.hgetall(f"{self._scripts.prefix}fb"))
        return exported(rows, key)

    async def erase(self, key: str | None = None) -> int:
        """Erase what is kept of a key, or of all; returns how many prompts that was."""
        return int(await bounded(self._scripts.run("feedback/erase", key or "")))
