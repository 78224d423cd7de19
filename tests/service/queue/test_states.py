"""Every situation of a job and everything that may happen to it, on a real server, against the tables."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from service.queue.states import MARKED, MARKS, TERMINAL, TRANSITIONS, WITH_IMAGES, Event, Situation, State, after
from tests.service.support import Queue

RESULT: dict[str, object] = {"images": []}
MAX_ATTEMPTS = 3
NEW = Situation(State.QUEUED)


class Life:
    """One job on a real queue."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.job = queue.job()
        self.token = "0"
        self.worker = queue.consumer("w")
        assert queue.enqueue(self.job, client="c") == "ok"

    @property
    def situation(self) -> Situation:
        state = State(self.queue.state(self.job.id))
        mark = self.queue.field(self.job.id, "cancel") if state is State.RUNNING else None
        return Situation(state, State(mark) if mark else None, bool(self.queue.field(self.job.id, "best")))

    def enqueue(self) -> None:
        self.queue.enqueue(self.job)

    def claim(self) -> None:
        for claimed in self.worker.claim({self.queue.lane: 1}, uuid.uuid4().hex):
            self.token = claimed.token

    def finish(self, state: str) -> None:
        self.worker.finish(self.job.id, self.token, state, RESULT)

    def advance(self) -> None:
        self.worker.advance(self.job.id, self.token, RESULT, shape="64x64|2", images=1, cost=8)

    def release(self) -> None:
        self.worker.release([(self.job.id, self.token)])

    def hand_back(self, spared: bool = False) -> None:
        self.worker.hand_back([(self.job.id, self.token)], spared=spared)

    def hand_back_too_often(self) -> None:
        """The device has failed under it so often that this counts as an attempt."""
        self._set("spared", MAX_ATTEMPTS)
        self.hand_back(spared=True)

    def let_the_lease_end(self) -> None:
        self.queue.let_leases_end()
        self.queue.reap()

    def die(self) -> None:
        self.worker.lost("w")

    def cancel(self) -> None:
        self.queue.cancel(self.job.id)

    def disconnect(self, grace_s: float = 0.0) -> None:
        self.queue.leave(self.job.id, "c", grace_s)
        self.queue.let_deadlines_pass("ab")
        self.queue.reap()

    def expire(self) -> None:
        self.queue.cancel(self.job.id, "expired")

    def let_the_deadline_pass(self) -> None:
        self.queue.let_deadlines_pass()
        self.queue.reap()

    def tried(self, attempts: int) -> Life:
        """As if it had been claimed so often."""
        self._set("attempts", attempts)
        return self

    def _set(self, field: str, value: int) -> None:
        if self.queue.state(self.job.id) == State.RUNNING:
            self.queue.client.hset(f"{self.queue.prefix}j:{self.job.id}", field, value)


# Whatever is an event, by each script and argument that is one.
CAUSES: dict[Event, list[Callable[[Life], None]]] = {
    Event.ENQUEUE: [Life.enqueue],
    Event.CLAIM: [Life.claim],
    Event.DONE: [lambda life: life.finish("done")],
    Event.FAILED: [lambda life: life.finish("failed")],
    Event.ADVANCE: [Life.advance],
    Event.RELEASE: [Life.release, Life.hand_back, lambda life: life.hand_back(spared=True)],
    Event.LOSE: [
        lambda life: life.tried(1).let_the_lease_end(),
        lambda life: life.tried(1).die(),
        lambda life: life.tried(1).hand_back_too_often(),
    ],
    Event.LOSE_LAST: [
        lambda life: life.tried(MAX_ATTEMPTS).let_the_lease_end(),
        lambda life: life.tried(MAX_ATTEMPTS).die(),
        lambda life: life.tried(MAX_ATTEMPTS).hand_back_too_often(),
    ],
    Event.CANCEL: [Life.cancel, Life.disconnect, lambda life: life.disconnect(grace_s=30)],
    Event.EXPIRE: [Life.expire, Life.let_the_deadline_pass],
}


def ways() -> dict[Situation, list[Event]]:
    """How each situation that the tables allow is reached: the shortest way from a new job."""
    found: dict[Situation, list[Event]] = {NEW: []}
    for situation in (queue := [NEW]):
        for event in Event:
            if (following := after(situation, event)) not in found:
                found[following] = [*found[situation], event]
                queue.append(following)
    return found


@pytest.mark.parametrize(
    ("event", "cause"), [(event, number) for event in Event for number in range(len(CAUSES[event]))]
)
def test_the_scripts_do_what_the_tables_say(queue: Queue, event: Event, cause: int) -> None:
    for situation, way in ways().items():
        life = Life(queue)
        for step in way:
            CAUSES[step][0](life)
        assert life.situation == situation, f"the way to {situation}"
        CAUSES[event][cause](life)
        assert life.situation == after(situation, event), f"{event} of {situation}"
        queue.client.delete(*queue.client.keys(f"{queue.prefix}*"))


def test_the_tables_are_about_all_states_and_events() -> None:
    assert {state for state, _ in TRANSITIONS if state} | TERMINAL == set(State)
    assert {event for _, event in TRANSITIONS} | set(MARKS) == set(Event) == set(CAUSES)
    assert {State.QUEUED, State.RUNNING} == set(State) - TERMINAL
    assert {state for state, _, _ in ways()} == set(State)
    assert after(Situation(), Event.ENQUEUE) == NEW


def test_a_terminal_state_is_never_left() -> None:
    ended = [situation for situation in ways() if situation.state in TERMINAL]
    assert {after(situation, event) == situation for situation in ended for event in Event} == {True}


def test_the_first_mark_counts_and_the_next_event_leads_to_it() -> None:
    marked = Situation(State.RUNNING, State.CANCELLED)
    assert after(Situation(State.RUNNING), Event.CANCEL) == marked == after(marked, Event.EXPIRE)
    leads = {event: after(marked, event).state for _, event in TRANSITIONS if (State.RUNNING, event) in TRANSITIONS}
    assert {event: state for event, state in leads.items() if state is not State.CANCELLED} == MARKED


def test_a_job_with_images_ends_in_nothing_but_done() -> None:
    """And in one step: each event that ends it, or would mark it, is in the table of these."""
    ends = {pair for pair, state in TRANSITIONS.items() if state in TERMINAL and state is not State.DONE}
    assert set(WITH_IMAGES) == ends | {(State.RUNNING, event) for event in MARKS}
    assert {situation.state for situation in ways() if situation.best} == {State.QUEUED, State.RUNNING, State.DONE}
    assert not [situation for situation in ways() if situation.best and situation.mark]
