"""The states of a job and what may lead from one to the next: the one table that the Lua scripts, the model test and
the diagram in docs/reliability.md are held to."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class State(StrEnum):
    """Where a job is. A terminal state is never left."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Event(StrEnum):
    """What may happen to a job; each is one script, or one argument of it."""

    ENQUEUE = "enqueue"  # by a client
    CLAIM = "claim"  # by a worker
    DONE = "finish done"  # by the worker that holds it, as the three after it
    FAILED = "finish failed"
    ADVANCE = "advance"
    RELEASE = "release"  # or hand back
    LOSE = "lose the worker"  # its lease has run out, or its process is known to be dead
    LOSE_LAST = "lose the last worker"  # so often that it is given up
    CANCEL = "cancel"
    EXPIRE = "expire"  # its deadline has passed


class Situation(NamedTuple):
    """All that decides what an event does to a job."""

    state: State | None = None  # None: there is no such job
    mark: State | None = None  # what a running job ends as once its worker has noticed
    best: bool = False  # whether it has images of an earlier round


Q, R = State.QUEUED, State.RUNNING

# A pair that is missing changes nothing.
TRANSITIONS: Mapping[tuple[State | None, Event], State] = {
    (None, Event.ENQUEUE): Q,
    (Q, Event.CLAIM): R,
    (Q, Event.CANCEL): State.CANCELLED,
    (Q, Event.EXPIRE): State.EXPIRED,
    (R, Event.DONE): State.DONE,
    (R, Event.FAILED): State.FAILED,
    (R, Event.ADVANCE): Q,
    (R, Event.RELEASE): Q,
    (R, Event.LOSE): Q,
    (R, Event.LOSE_LAST): State.FAILED,
}

# A job that has images of an earlier round is done with them, whatever ends it; and at once, because nobody need wait
# for its worker. These pairs come before those above.
WITH_IMAGES: Mapping[tuple[State, Event], State] = {
    (Q, Event.CANCEL): State.DONE,
    (Q, Event.EXPIRE): State.DONE,
    (R, Event.CANCEL): State.DONE,
    (R, Event.EXPIRE): State.DONE,
    (R, Event.FAILED): State.DONE,
    (R, Event.LOSE_LAST): State.DONE,
}

# A running job without such images that is cancelled, or whose deadline passes, is only marked: a worker is running it.
# The first mark counts, and the next event leads to the marked state; but for those below, which lead to another.
MARKS: Mapping[Event, State] = {Event.CANCEL: State.CANCELLED, Event.EXPIRE: State.EXPIRED}
MARKED: Mapping[Event, State] = {Event.ADVANCE: State.DONE}  # the round that has just ended has images

TERMINAL = frozenset(State) - {state for state, _ in TRANSITIONS}


def after(situation: Situation, event: Event) -> Situation:
    """The situation of a job after an event."""
    state, mark, best = situation
    following = TRANSITIONS.get((state, event))
    if best and state:
        following = WITH_IMAGES.get((state, event), following)
    if following is None:
        return situation._replace(mark=mark or MARKS[event]) if state is R and event in MARKS else situation
    return Situation(MARKED.get(event, mark) if mark else following, None, best or event is Event.ADVANCE)


def diagram() -> str:
    """The tables as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    lines += [f"    {state or '[*]'} --> {following}: {event}" for (state, event), following in TRANSITIONS.items()]
    lines += [f"    running --> {mark}: {event}, once its worker has noticed" for event, mark in MARKS.items()]
    lines += [f"    running --> {following}: {event}, if marked" for event, following in MARKED.items()]
    for ends in dict.fromkeys((state, following) for (state, _), following in WITH_IMAGES.items()):
        events = [event for (state, event), following in WITH_IMAGES.items() if (state, following) == ends]
        lines.append(f"    {ends[0]} --> {ends[1]}: {_either(events)}, with images of an earlier round")
    lines += [f"    {state} --> [*]" for state in State if state in TERMINAL]
    return "\n".join(lines)


def _either(events: list[Event]) -> str:
    return " or ".join(part for part in (", ".join(events[:-1]), events[-1]) if part)
