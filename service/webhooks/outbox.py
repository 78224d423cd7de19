"""The webhooks that have yet to be delivered.

A job's end puts its webhook here in the same transition, so that none is forgotten when a process dies; whoever takes
one has it for a while, and if it dies too, somebody else takes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import redis.asyncio

from service.queue.connection import bounded
from service.queue.scripts import Scripts


@dataclass(frozen=True)
class Delivery:
    """One delivery: the job that has ended, which try this is (from 1), and what the client asked for."""

    id: str
    attempt: int
    url: str
    events: tuple[str, ...]
    base_url: str


class Outbox:
    """Takes deliveries out, and puts back what has failed."""

    def __init__(self, client: redis.asyncio.Redis, queue: str) -> None:
        self._scripts = Scripts(client, queue)

    async def take(self, limit: int, lease_s: float) -> list[Delivery]:
        """Deliveries whose time has come; nobody else gets them for ``lease_s``."""
        rows = await self._run("take", limit, round(lease_s * 1000))
        return [_delivery(id, int(attempt), json.loads(asked or "{}")) for id, attempt, asked in rows]

    async def complete(self, id: str) -> None:
        """Delivered, or given up."""
        await self._run("complete", id)

    async def postpone(self, id: str, delay_s: float) -> None:
        """Try again after ``delay_s``."""
        await self._run("postpone", id, round(delay_s * 1000))

    async def put_back(self, id: str, delay_s: float) -> None:
        """It was not tried: the same after ``delay_s``, and no try is counted."""
        await self._run("postpone", id, round(delay_s * 1000), 1)

    async def _run(self, verb: str, *args: str | int) -> Any:
        return await bounded(self._scripts.run(f"webhooks/{verb}", *args))


def _delivery(id: str, attempt: int, asked: dict[str, Any]) -> Delivery:
    """Tolerantly: what another release has put there must not hold up the rest."""
    return Delivery(id, attempt, asked.get("url", ""), tuple(asked.get("events", ())), asked.get("base_url", ""))
