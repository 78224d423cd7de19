"""Every state and every event, on a real server, against the table; and the document's diagram."""

from __future__ import annotations

import itertools
import uuid
from pathlib import Path

import pytest

from service.queue.states import MARKS, TERMINAL, TRANSITIONS, Event, State, after, diagram
from tests.service.support import Queue

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "reliability.md"
RESULT: dict[str, object] = {"images": []}
MAX_ATTEMPTS = 3
# How each state is reached: the shortest way through the table, marked or not.
WAYS: dict[tuple[State, State | None], list[Event]] = {
    (State.QUEUED, None): [],
    (State.RUNNING, None): [Event.CLAIM],
    (State.RUNNING, State.CANCELLED): [Event.CLAIM, Event.CANCEL],
    (State.RUNNING, State.EXPIRED): [Event.CLAIM, Event.EXPIRE],
    (State.DONE, None): [Event.CLAIM, Event.DONE],
    (State.FAILED, None): [Event.CLAIM, Event.FAILED],
    (State.CANCELLED, None): [Event.CANCEL],
    (State.EXPIRED, None): [Event.EXPIRE],
}


class Life:
    """One job on a real queue."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.job = queue.job()
        self.token = "0"
        self.worker = queue.consumer("w")
        assert queue.enqueue(self.job) == "ok"

    def happen(self, event: Event) -> None:
        id, queue = self.job.id, self.queue
        if event is Event.ENQUEUE:
            queue.enqueue(self.job)
        elif event is Event.CLAIM:
            for claimed in self.worker.claim(queue.lane, 1, uuid.uuid4().hex):
                self.token = claimed.token
        elif event in (Event.DONE, Event.FAILED):
            self.worker.finish(id, self.token, event.value.split()[1], RESULT)
        elif event is Event.ADVANCE:
            self.worker.advance(id, self.token, RESULT, shape="64x64|2", images=1, cost=8)
        elif event is Event.RELEASE:
            self.worker.release([(id, self.token)])
        elif event in (Event.LOSE, Event.LOSE_LAST):
            attempts = MAX_ATTEMPTS if event is Event.LOSE_LAST else 1
            if queue.state(id) == "running":
                queue.client.hset(f"{queue.prefix}j:{id}", "attempts", attempts)
            queue.let_leases_end()
            queue.reap()
        else:
            queue.cancel(id, "cancelled" if event is Event.CANCEL else "expired")

    @property
    def mark(self) -> str | None:
        return self.queue.field(self.job.id, "cancel") if self.queue.state(self.job.id) == "running" else None


@pytest.mark.parametrize("event", Event)
def test_the_scripts_do_what_the_table_says(queue: Queue, event: Event) -> None:
    for (state, mark), way in WAYS.items():
        life = Life(queue)
        for step in way:
            life.happen(step)
        assert (queue.state(life.job.id), life.mark) == (state, mark), f"the way to {state}"
        life.happen(event)
        expected = after(state, event, mark)
        if event is Event.ADVANCE and mark:
            expected = (State.DONE, None)  # with what the round has drawn
        if expected[0] is State.RUNNING and expected[1] is None:
            assert (queue.state(life.job.id), life.mark) == ("running", None), f"{event} of {state}"
        else:
            assert (queue.state(life.job.id), life.mark) == expected, f"{event} of {state}, marked {mark}"
        if queue.state(life.job.id) not in TERMINAL:
            queue.cancel(life.job.id)
            life.happen(Event.RELEASE)
        queue.client.delete(*queue.client.keys(f"{queue.prefix}*"))


def test_the_table_is_about_all_states_and_events() -> None:
    assert {state for state, _ in TRANSITIONS if state} | TERMINAL == set(State)
    assert {event for _, event in TRANSITIONS} | set(MARKS) == set(Event)
    assert {State.QUEUED, State.RUNNING} == set(State) - TERMINAL
    for state, event in itertools.product(TERMINAL, Event):
        assert after(state, event) == (state, None), "it is never left"
    assert after(State.RUNNING, Event.EXPIRE, State.CANCELLED) == (State.RUNNING, State.CANCELLED), "the first counts"
    assert after(State.RUNNING, Event.LOSE_LAST, State.CANCELLED) == (State.CANCELLED, None)


def test_the_documents_diagram_is_the_table() -> None:
    assert f"```mermaid\n{diagram()}\n```" in DOCUMENT.read_text("utf-8")
