"""The registry of models, where several are served: the wanted state of each version; only Lua scripts write it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import redis
import redis.asyncio

from service.quality.canary import Canary, Plan, Sums, read_canary, read_sums
from service.queue.connection import bounded
from service.queue.job import readable_lanes
from service.queue.scripts import Scripts


class ModelState(StrEnum):
    """The wanted state of a version; ``refused`` and ``unloaded`` are final until it is loaded again."""

    LOADING = "loading"
    SERVING = "serving"
    UNLOADING = "unloading"
    UNLOADED = "unloaded"
    REFUSED = "refused"


@dataclass(frozen=True)
class Entry:
    """``attempt`` distinguishes attempts to load; ``reason`` says why it was refused."""

    state: ModelState
    attempt: str = ""
    reason: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class ModelStates:
    """Everything that is registered: entries by ``id/version``, the promoted version and the canary by id."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    promoted: Mapping[str, str] = field(default_factory=dict)
    canaries: Mapping[str, Canary] = field(default_factory=dict)


def read_states(answer: Sequence[Sequence[str]]) -> ModelStates:
    """The states in the answer of the reading script."""
    entries = {name: _entry(json.loads(text)) for name, text in _pairs(answer[0])}
    canaries = {id: read_canary(id, json.loads(text)) for id, text in _pairs(answer[2])}
    return ModelStates(entries, dict(_pairs(answer[1])), canaries)


def _entry(data: Mapping[str, str]) -> Entry:
    return Entry(ModelState(data["state"]), data["attempt"], data["reason"])


def _pairs(row: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(row[::2], row[1::2], strict=True)


class ModelRegistry:
    """The states as an HTTP process reads and changes them."""

    def __init__(self, client: redis.asyncio.Redis, queue: str) -> None:
        self._client = client
        self._scripts = Scripts(client, queue)

    async def read(self) -> ModelStates:
        return read_states(await self._run("read"))

    async def init(self, states: ModelStates) -> None:
        """Register what is not registered yet."""
        entries = {name: asdict(entry) for name, entry in states.entries.items()}
        await self._run("init", json.dumps(entries), json.dumps(dict(states.promoted)))

    async def transition(self, name: str, from_states: Sequence[str], entry: Entry) -> bool:
        """Set this entry if the version is in one of these states ('none': it is not registered)."""
        return bool(await self._run("transition", name, " ".join(from_states), entry.to_json()))

    async def unload(self, name: str) -> str:
        """'ok', 'missing', 'promoted' or 'last'; after 'ok' the queue accepts no more jobs for it."""
        return str(await self._run("unload", name, Entry(ModelState.UNLOADING).to_json()))

    async def promote(self, id: str, version: str) -> bool:
        """Make this version 'latest'; False if it is not served."""
        return bool(await self._run("promote", id, version) == "ok")

    async def promote_first(self, id: str, version: str) -> None:
        """The same, unless a version was promoted before."""
        await self._run("promote_first", id, version)

    async def start_canary(self, model: str, candidate: str, share: float, plan: Plan) -> str:
        """Compare a version with the promoted one: 'ok', 'missing', 'latest' or 'running'."""
        entry = {"epoch": secrets.token_hex(8), "candidate": candidate, "share": share, "plan": asdict(plan)}
        return str(await self._run("canary_start", model, candidate, json.dumps(entry)))

    async def end_canary(self, canary: Canary, state: str, reason: str) -> str:
        """End it, if it still runs; returns what it is then."""
        return str(await self._run("canary_end", canary.model, canary.epoch, state, reason))

    async def sums(self, canary: Canary) -> Sums:
        """The sums over its pairs."""
        row: Any = await bounded(self._client.hgetall(f"{self._scripts.prefix}cs:{canary.epoch}"))
        return read_sums(row)

    async def _run(self, verb: str, *args: str) -> Any:
        return await bounded(self._scripts.run(f"models/{verb}", *args))


class WorkerRegistry:
    """The states as a worker reads them."""

    def __init__(self, client: redis.Redis, queue: str) -> None:
        self._scripts = Scripts(client, queue)

    def read(self) -> ModelStates:
        return read_states(self._run("read"))

    def idle(self, lane: str) -> bool:
        """Whether no job of a lane waits or runs."""
        return all(self._run("idle", form) for form in readable_lanes(lane))

    def _run(self, verb: str, *args: str) -> Any:
        return self._scripts.run(f"models/{verb}", *args)
