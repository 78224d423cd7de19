"""A model of the queue in plain Python, driven side by side with the real one: after each step both say the same.

Where a job is follows from the table of states; the model adds who holds it, how often it was tried, and what waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from dataclasses import dataclass, field
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.queue.states import TERMINAL, Event, Situation, State, after
from tests.service.support import Queue

MAX_ATTEMPTS = 3
WORKERS = ("w0", "w1")
RESULT: dict[str, object] = {"images": [], "runtime": "fake"}

numbers = st.integers(0, 10_000)
workers = st.sampled_from(WORKERS)


@dataclass
class Expected:
    """What a job should be."""

    images: int
    cost: int
    situation: Situation = field(default_factory=Situation)
    attempts: int = 0
    token: str = ""
    worker: str = ""
    solo: bool = False

    @property
    def state(self) -> State | None:
        return self.situation.state

    @property
    def mark(self) -> State | None:
        return self.situation.mark

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL

    def happen(self, event: Event) -> None:
        self.situation = after(self.situation, event)


class QueueMachine(RuleBasedStateMachine):
    """``url`` and ``runner`` are set by whoever runs it."""

    url: ClassVar[str]
    runner: ClassVar[asyncio.Runner]

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(self.url, self.runner, max_attempts=MAX_ATTEMPTS)
        self.consumers = {name: self.queue.consumer(name) for name in WORKERS}
        self.jobs: dict[str, Expected] = {}
        self.stale: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.claims: dict[str, tuple[str, int, str, list[str]]] = {}
        self.dead: set[str] = set()

    def teardown(self) -> None:
        self.runner.run(self.queue.close())

    def next_id(self) -> str:
        """The same in each run of the same steps: ids decide between jobs whose turn comes at the same moment."""
        return hashlib.md5(str(len(self.jobs)).encode(), usedforsecurity=False).hexdigest()

    def pick(self, number: int, *states: str) -> str | None:
        found = [id for id, job in self.jobs.items() if not states or job.state in states]
        return found[number % len(found)] if found else None

    def held(self, worker: str) -> dict[str, Expected]:
        return {id: job for id, job in self.jobs.items() if job.state == "running" and job.worker == worker}

    @rule(images=st.integers(1, 4))
    def enqueue(self, images: int) -> None:
        job = self.queue.job(id=self.next_id(), seeds=tuple(range(images)))
        assert self.queue.enqueue(job) == "ok"
        self.jobs[job.id] = Expected(images, job.cost)
        self.jobs[job.id].happen(Event.ENQUEUE)

    @precondition(lambda self: self.jobs)
    @rule(number=numbers)
    def enqueue_again(self, number: int) -> None:
        id = self.pick(number)
        assert self.queue.enqueue(self.queue.job(id=id)) == "known"

    @rule(worker=workers, images=st.integers(-1, 8))
    def claim(self, worker: str, images: int) -> None:
        claim_id, waiting = uuid.uuid4().hex, self.pick(0, "queued")
        batch = self.consumers[worker].claim({self.queue.lane: images}, claim_id)
        assert bool(batch) == bool(waiting)
        for claimed in batch:
            job = self.jobs[claimed.id]
            assert job.state == "queued" and not (job.solo and len(batch) > 1)
            job.happen(Event.CLAIM)
            job.token, job.worker = claimed.token, worker
            job.attempts += 1
            assert claimed.attempts == job.attempts <= MAX_ATTEMPTS
        assert len(batch) <= 1 or sum(self.jobs[claimed.id].images for claimed in batch) <= images
        if batch:
            token = batch[0].token
            assert token not in self.tokens and {claimed.token for claimed in batch} == {token}
            self.tokens.add(token)
            self.claims[worker] = (claim_id, images, token, [claimed.id for claimed in batch])

    @precondition(lambda self: self.claims)
    @rule(worker=workers)
    def claim_again(self, worker: str) -> None:
        """The answer was lost, so the same call comes again."""
        if worker in self.claims:
            claim_id, images, token, ids = self.claims[worker]
            again = self.consumers[worker].claim({self.queue.lane: images}, claim_id)
            kept = [id for id in ids if self.jobs[id].state == "running" and self.jobs[id].token == token]
            assert [(claimed.id, claimed.token) for claimed in again] == [(id, token) for id in kept]

    @precondition(lambda self: self.pick(0, "running"))
    @rule(number=numbers, event=st.sampled_from((Event.DONE, Event.FAILED)))
    def finish(self, number: int, event: Event) -> None:
        id = str(self.pick(number, "running"))
        job = self.jobs[id]
        job.happen(event)
        for _ in range(2):
            assert self.consumers[job.worker].finish(id, job.token, event.value.split()[1], RESULT) == job.state

    @precondition(lambda self: self.pick(0, "running"))
    @rule(number=numbers, images=st.integers(1, 4))
    def advance(self, number: int, images: int) -> None:
        """It is drawn, and goes on at other steps."""
        id = str(self.pick(number, "running"))
        job, going = self.jobs[id], self.queue.job(seeds=tuple(range(images)), steps=2)
        job.happen(Event.ADVANCE)
        answers = [
            self.consumers[job.worker].advance(
                id, job.token, RESULT, shape=going.shape, images=going.images, cost=going.cost
            )
            for _ in range(2)
        ]
        assert answers == [job.state, "queued"]
        self.stale.append((id, job.token))
        if not job.ended:
            job.attempts -= 1
            job.images, job.cost, job.solo = images, going.cost, False

    @precondition(lambda self: self.pick(0, "running"))
    @rule(number=numbers, event=st.sampled_from((Event.CANCEL, Event.EXPIRE)))
    def finish_what_was_given_up(self, number: int, event: Event) -> None:
        id = str(self.pick(number, "running"))
        self.give_up(id, event)
        if not self.jobs[id].ended:
            self.finish(self.running(id), Event.DONE)

    @precondition(lambda self: self.pick(0, "running"))
    @rule(number=numbers, gently=st.booleans())
    def lose_what_was_cancelled(self, number: int, gently: bool) -> None:
        id = str(self.pick(number, "running"))
        self.give_up(id, Event.CANCEL)
        (self.leave if gently else self.die)(self.jobs[id].worker)

    def running(self, id: str) -> int:
        return [job for job in self.jobs if self.jobs[job].state == "running"].index(id)

    @precondition(lambda self: self.stale)
    @rule(number=numbers)
    def come_back_from_the_dead(self, number: int) -> None:
        contested = [claim for claim in self.stale if self.jobs[claim[0]].state == "running"]
        id, token = (contested or self.stale)[number % len(contested or self.stale)]
        job = self.jobs[id]
        found = self.consumers["w0"].finish(id, token, "done", RESULT)
        assert found == (job.state if job.ended and job.token == token else "fenced")
        if job.token != token or job.state != "running":
            assert self.consumers["w0"].beat({}, [(id, token)]) == {id: "lost"}
            assert not self.consumers["w0"].show(id, token, {"0:0": "x"})

    @rule(worker=workers)
    def beat(self, worker: str) -> None:
        held = self.held(worker)
        news = self.consumers[worker].beat({}, [(id, job.token) for id, job in held.items()])
        assert news == {id: job.mark for id, job in held.items() if job.mark}

    @rule(worker=workers)
    def leave(self, worker: str) -> None:
        held = self.held(worker)
        assert self.consumers[worker].release([(id, job.token) for id, job in held.items()]) == len(held)
        for id, job in held.items():
            self.stale.append((id, job.token))
            job.attempts -= 1
            job.happen(Event.RELEASE)

    @precondition(lambda self: self.pick(0, "running"))
    @rule(number=numbers)
    def fall_silent(self, number: int) -> None:
        id = str(self.pick(number, "running"))
        self.queue.client.zadd(f"{self.queue.prefix}l", {id: 1})
        assert self.queue.reap() == 1
        self.was_lost(id)

    @precondition(lambda self: self.pick(0, "running"))
    @rule(number=numbers, heir=workers)
    def be_taken_for_dead(self, number: int, heir: str) -> None:
        """It falls silent, its job goes to another, and it comes back: in steps of their own that is too rare."""
        id = str(self.pick(number, "running"))
        self.fall_silent(self.running(id))
        while self.jobs[id].state == "queued":
            self.claim(heir, 8)
        self.come_back_from_the_dead(len(self.stale) - 1)

    @rule(worker=workers)
    def die(self, worker: str) -> None:
        held = self.held(worker)
        assert self.consumers["w0"].lost(worker) == len(held)
        self.claims.pop(worker, None)
        for id in held:
            self.was_lost(id)

    @precondition(lambda self: self.pick(0, "queued"))
    @rule(worker=workers)
    def die_of_everything_that_waits(self, worker: str) -> None:
        """Single deaths are too rare to reach the limit of attempts."""
        for _ in range(4 * MAX_ATTEMPTS):
            self.claim(worker, 8)
            self.die(worker)
            self.same_as_the_queue()

    def was_lost(self, id: str) -> None:
        job = self.jobs[id]
        self.stale.append((id, job.token))
        job.happen(Event.LOSE_LAST if job.attempts >= MAX_ATTEMPTS else Event.LOSE)
        job.solo = True
        if job.state == "failed":
            self.dead.add(id)

    @precondition(lambda self: self.jobs)
    @rule(number=numbers, event=st.sampled_from((Event.CANCEL, Event.EXPIRE)))
    def give_up_any(self, number: int, event: Event) -> None:
        self.give_up(str(self.pick(number)), event)

    @precondition(lambda self: self.pick(0, "running"))
    @rule(number=numbers)
    def give_up_what_nobody_holds(self, number: int) -> None:
        """Whatever has taken the lease away: nobody would notice the mark, so it is lost as soon as it is marked."""
        id = str(self.pick(number, "running"))
        self.queue.client.zrem(f"{self.queue.prefix}l", id)
        job = self.jobs[id]
        self.stale.append((id, job.token))
        job.happen(Event.EXPIRE)
        job.happen(Event.LOSE)
        assert self.queue.cancel(id, "expired") == job.state

    def give_up(self, id: str, event: Event) -> None:
        job = self.jobs[id]
        running = job.state == "running"
        job.happen(event)
        if running and job.ended:
            self.stale.append((id, job.token))
        assert self.queue.cancel(id, "cancelled" if event is Event.CANCEL else "expired") == job.state

    @invariant()
    def same_as_the_queue(self) -> None:
        client, prefix, ids = self.queue.client, self.queue.prefix, list(self.jobs)
        pipeline = client.pipeline(transaction=False)
        for id in ids:
            pipeline.hmget(f"{prefix}j:{id}", "state", "attempts")
        for name in ("pending", "o", "l", "dead"):
            pipeline.zrange(f"{prefix}{name}", 0, -1)
        pipeline.hvals(f"{prefix}wl")
        pipeline.hvals(f"{prefix}kc")
        *rows, pending, order, leases, dead, work, keys = pipeline.execute()
        assert [tuple(row) for row in rows] == [(job.state, str(job.attempts)) for job in self.jobs.values()]
        waiting = {id: job for id, job in self.jobs.items() if job.state == "queued"}
        assert set(pending) == set(waiting) == set(order)
        assert sum(map(int, work)) == sum(job.cost for job in waiting.values())
        assert sum(map(int, keys)) == len(waiting)
        assert set(leases) == {id for id, job in self.jobs.items() if job.state == "running"}
        assert set(dead) == self.dead
        assert sorted(self.queue.notices()) == sorted(id for id, job in self.jobs.items() if job.ended)
