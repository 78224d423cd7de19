"""What is served, as an HTTP process sees it; with FEWSTEP_MODELS it also moves each model from state to state.

Every HTTP process does so, in any order: each transition names the state it starts from, so a second changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.errors import StartupError
from service.models.choice import Choice, Served
from service.models.folder import Folder, Name
from service.models.registry import Entry, ModelRegistry, ModelState, ModelStates
from service.models.single import counter_of, open_student
from service.quality.canary import Canary, Decision, Sums, judge
from service.queue.producer import Producer
from service.queue.status import Worker, WorkerState
from service.settings import Settings
from student.bundle import BundleError
from student.runtimes.buckets import sizes_of

POLL_EVERY_S = 0.5
BUSY_POLL_S = 0.1
LOADABLE = ("none", ModelState.REFUSED, ModelState.UNLOADED, ModelState.UNLOADING)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """One version of a model: ``state`` is 'available' if it is not registered; ``workers`` have loaded it."""

    name: Name
    state: str
    reason: str
    promoted: bool
    workers: tuple[Worker, ...]


class SingleModel:
    """The one student of FEWSTEP_MODEL."""

    def __init__(self, settings: Settings) -> None:
        student = open_student(settings)
        sizes = () if settings.is_fake else sizes_of(settings.model, student)
        try:
            served = Served(student, counter_of(settings.model, student, settings), sizes)
        except BundleError as error:
            raise StartupError(f"{error}.") from error
        self.choice = Choice({served.name: served})

    async def refresh(self) -> None:
        """Nothing changes."""

    async def poll(self) -> None:
        """Nothing changes."""
        await asyncio.sleep(POLL_EVERY_S)

    async def canaries(self) -> list[tuple[Canary, Sums]]:
        """There is nothing to compare with."""
        return []


class ModelController:
    """The students of FEWSTEP_MODELS."""

    def __init__(self, settings: Settings, folder: Folder, registry: ModelRegistry, producer: Producer) -> None:
        self.folder = folder
        self.registry = registry
        self.choice = Choice({})
        self.states = ModelStates()
        self._settings = settings
        self._producer = producer
        self._workers: Sequence[Worker] = ()
        self._began = False
        self._unreadable: Mapping[Name, str] = {}

    async def poll(self) -> None:
        """Refresh, and pause until it is time to do so again; an outage of the queue leaves everything as it was.

        Raises:
            RedisError: the queue's server is away.
        """
        await self.refresh()
        moving = any(entry.state in (ModelState.LOADING, ModelState.UNLOADING) for entry in self._entries.values())
        await asyncio.sleep(BUSY_POLL_S if moving else POLL_EVERY_S)

    async def refresh(self) -> None:
        """Read the states, advance those that can be, and adopt what is served.

        Raises:
            RedisError: the queue's server is away.
        """
        states = await self.registry.read()
        if not states.entries or not self._began:
            await self.registry.init(await asyncio.to_thread(self._beginning, states))
            self._began = True
            states = await self.registry.read()
        workers = await self._producer.workers()
        self._workers = [worker for worker in workers if worker.state is not WorkerState.LOADING or worker.refused]
        if await self._advance(states):
            states = await self.registry.read()
        if await self._judge(states):
            states = await self.registry.read()
        await self._take_over(states)

    async def load(self, name: Name) -> None:
        """Ask the workers to load a version; ``version`` shows its progress."""
        await self.registry.transition(str(name), LOADABLE, Entry(ModelState.LOADING, attempt=secrets.token_hex(8)))
        await self.refresh()

    def version(self, name: Name) -> Version:
        """The state of a version, as of the last refresh."""
        entry = self._entries.get(str(name))
        held = tuple(worker for worker in self._workers if str(name) in worker.models)
        promoted = self.choice.latest(name.id) == name.version
        return Version(name, entry.state if entry else "available", entry.reason if entry else "", promoted, held)

    def versions(self) -> list[Version]:
        """Every version that is in the directory or registered."""
        said = {Name.of(name) for name in self._entries}
        found = self.folder.names()
        return [self.version(name) for name in [*found, *sorted(said - set(found), key=str)]]

    async def canaries(self) -> list[tuple[Canary, Sums]]:
        """Each model's last canary, as of the last refresh, and what its pairs have shown.

        Raises:
            RedisError: the queue's server is away.
        """
        return [(canary, await self.registry.sums(canary)) for canary in self.states.canaries.values()]

    @property
    def _entries(self) -> Mapping[str, Entry]:
        return self.states.entries

    def _beginning(self, states: ModelStates) -> ModelStates:
        """The first states of unregistered models: what this process knew (the server has lost its data), else to load
        the newest version of each. A model that is added later is not registered either."""
        if not states.entries and self._entries:
            return self.states
        known = {Name.of(name).id for name in states.entries}
        fresh = [name for name in self.folder.newest() if name.id not in known]
        return ModelStates({str(name): Entry(ModelState.LOADING, attempt=secrets.token_hex(8)) for name in fresh})

    async def _advance(self, states: ModelStates) -> bool:
        """Advance the versions that the workers are done with; True if any state has changed."""
        moved = False
        for name, entry in states.entries.items():
            if (after := self._after(name, entry)) is not None:
                moved = await self.registry.transition(name, [entry.state], after) or moved
                log.info("model %s: %s%s", name, after.state, f" ({after.reason})" if after.reason else "")
                if after.state is ModelState.SERVING:
                    found = Name.of(name)
                    await self.registry.promote_first(found.id, found.version)
        return moved

    async def _judge(self, states: ModelStates) -> bool:
        """End the canaries that have shown enough; True if any has. Every process does so: the first one counts."""
        sums = {canary.epoch: await self.registry.sums(canary) for canary in states.canaries.values() if canary.running}
        ended = False
        for canary in states.canaries.values():
            if canary.epoch not in sums or (end := self._end_of(canary, sums[canary.epoch], states)) is None:
                continue
            state = await self.registry.end_canary(canary, *end)
            log.info("canary %s %s against %s: %s (%s)", canary.model, canary.candidate, canary.base, state, end[1])
            ended = True
        return ended

    def _end_of(self, canary: Canary, sums: Sums, states: ModelStates) -> tuple[str, str] | None:
        """How a canary ends, and why; None while it goes on."""
        entry = states.entries.get(f"{canary.model}/{canary.candidate}")
        if not entry or entry.state is not ModelState.SERVING or states.promoted.get(canary.model) != canary.base:
            return "stopped", "the versions that are served have changed"
        both = [self.choice.served.get(Name(canary.model, of)) for of in (canary.base, canary.candidate)]
        scorers = [frozenset(served.student.scorers) for served in both if served]
        verdict = judge(sums, canary.plan, frozenset.intersection(*scorers) if len(scorers) == 2 else frozenset())
        if len(scorers) < 2 and verdict.decision is Decision.PROMOTE:
            return None  # this process cannot read what must have been scored
        return None if verdict.decision is Decision.GO_ON else (verdict.decision, verdict.reason)

    def _after(self, name: str, entry: Entry) -> Entry | None:
        """The entry that follows this one; None while it must wait."""
        holding = [worker for worker in self._workers if name in worker.models]
        if entry.state is ModelState.UNLOADING and self._workers and not holding:
            return Entry(ModelState.UNLOADED)
        if entry.state is not ModelState.LOADING:
            return None
        for worker in self._workers:
            refusal = worker.refused.get(name)
            if refusal and refusal["attempt"] == entry.attempt:
                return Entry(ModelState.REFUSED, entry.attempt, refusal["reason"])
        ready = bool(self._workers) and len(holding) == len(self._workers)
        return Entry(ModelState.SERVING, entry.attempt) if ready else None

    async def _take_over(self, states: ModelStates) -> None:
        served = {Name.of(name) for name, entry in states.entries.items() if entry.state is ModelState.SERVING}
        said = (dict(states.promoted), dict(states.canaries))
        if served != set(self.choice.served) or said != (dict(self.choice.promoted), dict(self.choice.canaries)):
            kept = {name: found for name, found in self.choice.served.items() if name in served}
            opened = await asyncio.to_thread(self._open, sorted(served - set(kept), key=str))
            self.choice = Choice({**kept, **opened}, *said)
        self.states = states

    def _open(self, names: Sequence[Name]) -> dict[Name, Served]:
        """The students that the workers serve, as far as this process can read them; why it cannot is logged once."""
        opened: dict[Name, Served] = {}
        unreadable: dict[Name, str] = {}
        for name in names:
            try:
                student = self.folder.student(name)
                count_tokens = counter_of(self.folder.bundle(name), student, self._settings)
                opened[name] = Served(student, count_tokens, sizes_of(self.folder.bundle(name), student))
            except BundleError as error:
                unreadable[name] = str(error)
                if self._unreadable.get(name) != unreadable[name]:
                    log.warning("%s is loaded by workers, but its files cannot be read here: %s", name, error)
        self._unreadable = unreadable
        return opened
