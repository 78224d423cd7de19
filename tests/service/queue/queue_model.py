"""A model of the queue in plain Python, driven side by side with the real one: after each step both say the same."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.queue.job import TERMINAL
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
    state: str = "queued"
    attempts: int = 0
    token: str = ""
    worker: str = ""
    marked: bool = False
    solo: bool = False

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL


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

    def pick(self, number: int, *states: str) -> str | None:
        found = [id for id, job in self.jobs.items() if not states or job.state in states]
        return found[number % len(found)] if found else None

    def held(self, worker: str) -> dict[str, Expected]:
        return {id: job for id, job in self.jobs.items() if job.state == "running" and job.worker == worker}

    @rule(images=st.integers(1, 4))
    def enqueue(self, images: int) -> None:
        job = self.queue.job(seeds=tuple(range(images)))
        assert self.queue.enqueue(job) == "ok"
        self.jobs[job.id] = Expected(images, job.cost)

    @precondition(lambda self: self.jobs)
    @rule(number=numbers)
    def enqueue_again(self, number: int) -> None:
        id = self.pick(number)
        assert self.queue.enqueue(self.queue.job(id=id)) == "known"

    @rule(worker=workers, images=st.integers(-1, 8))
    def claim(self, worker: str, images: int) -> None:
        claim_id, waiting = uuid.uuid4().hex, self.pick(0, "queued")
        batch = self.consumers[worker].claim(self.queue.lane, images, claim_id)
        assert bool(batch) == bool(waiting)
        for claimed in batch:
            job = self.jobs[claimed.id]
            assert job.state == "queued" and not (job.solo and len(batch) > 1)
            job.state, job.token, job.worker = "running", claimed.token, worker
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
            again = self.consumers[worker].claim(self.queue.lane, images, claim_id)
            kept = [id for id in ids if self.jobs[id].state == "running" and self.jobs[id].token == token]
            assert [(claimed.id, claimed.token) for claimed in again] == [(id, token) for id in kept]

    @precondition(lambda self: self.pick(0, "running"))
    @rule(number=numbers, state=st.sampled_from(("done", "failed")))
    def finish(self, number: int, state: str) -> None:
        id = str(self.pick(number, "running"))
        job = self.jobs[id]
        job.state = "cancelled" if job.marked else state
        for _ in range(2):
            assert self.consumers[job.worker].finish(id, job.token, state, RESULT) == job.state

    @precondition(lambda self: self.pick(0, "running"))
    @rule(number=numbers)
    def finish_what_was_cancelled(self, number: int) -> None:
        id = str(self.pick(number, "running"))
        self.jobs[id].marked = True
        assert self.queue.cancel(id) == "running"
        self.finish([job for job in self.jobs if self.jobs[job].state == "running"].index(id), "done")

    @precondition(lambda self: self.pick(0, "running"))
    @rule(number=numbers, gently=st.booleans())
    def lose_what_was_cancelled(self, number: int, gently: bool) -> None:
        id = str(self.pick(number, "running"))
        self.jobs[id].marked = True
        assert self.queue.cancel(id) == "running"
        (self.leave if gently else self.die)(self.jobs[id].worker)

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
        assert news == {id: "cancelled" for id, job in held.items() if job.marked}

    @rule(worker=workers)
    def leave(self, worker: str) -> None:
        held = self.held(worker)
        assert self.consumers[worker].release([(id, job.token) for id, job in held.items()]) == len(held)
        for id, job in held.items():
            self.stale.append((id, job.token))
            job.attempts -= 1
            job.state = "cancelled" if job.marked else "queued"

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
        self.fall_silent([job for job in self.jobs if self.jobs[job].state == "running"].index(id))
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
        if job.marked:
            job.state = "cancelled"
        elif job.attempts < MAX_ATTEMPTS:
            job.state, job.solo = "queued", True
        else:
            job.state = "failed"
            self.dead.add(id)

    @precondition(lambda self: self.jobs)
    @rule(number=numbers)
    def cancel(self, number: int) -> None:
        id = str(self.pick(number))
        job = self.jobs[id]
        if job.state == "queued":
            job.state = "cancelled"
        job.marked = job.marked or job.state == "running"
        assert self.queue.cancel(id) == job.state

    @invariant()
    def same_as_the_queue(self) -> None:
        client, prefix, ids = self.queue.client, self.queue.prefix, list(self.jobs)
        pipeline = client.pipeline(transaction=False)
        for id in ids:
            pipeline.hmget(f"{prefix}j:{id}", "state", "attempts")
        for name in ("pending", "l", "dead"):
            pipeline.zrange(f"{prefix}{name}", 0, -1)
        pipeline.get(f"{prefix}work")
        *rows, pending, leases, dead, work = pipeline.execute()
        assert [tuple(row) for row in rows] == [(job.state, str(job.attempts)) for job in self.jobs.values()]
        waiting = {id: job for id, job in self.jobs.items() if job.state == "queued"}
        assert set(pending) == set(waiting) and int(work or 0) == sum(job.cost for job in waiting.values())
        assert set(leases) == {id for id, job in self.jobs.items() if job.state == "running"}
        assert set(dead) == self.dead
        assert sorted(self.queue.notices()) == sorted(id for id, job in self.jobs.items() if job.ended)
