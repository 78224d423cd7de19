"""The states of a job and what may lead from one to the next: the one table that the Lua scripts, the model test and
the diagram in docs/reliability.md are held to."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


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
    RELEASE = "release"
    LOSE = "lose the worker"  # its lease has run out, or its process is known to be dead
    LOSE_LAST = "lose the last worker"  # so often that it is given up
    CANCEL = "cancel"
    EXPIRE = "expire"  # its deadline has passed


Q, R = State.QUEUED, State.RUNNING

# None: there is no such job. A pair that is missing changes nothing.
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

# A running job that is cancelled, or whose deadline passes, is only marked: a worker is running it. The first mark
# counts, and the next event leads to the marked state.
MARKS: Mapping[Event, State] = {Event.CANCEL: State.CANCELLED, Event.EXPIRE: State.EXPIRED}

TERMINAL = frozenset(State) - {state for state, _ in TRANSITIONS}


def after(state: State | None, event: Event, mark: State | None = None) -> tuple[State | None, State | None]:
    """The state and the mark of a job after an event."""
    if state is R and event in MARKS:
        return state, mark or MARKS[event]
    following = TRANSITIONS.get((state, event), state)
    return (mark, None) if mark and following is not state else (following, mark)


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for (state, event), following in TRANSITIONS.items():
        lines.append(f"    {state or '[*]'} --> {following}: {event}")
    for event, mark in MARKS.items():
        lines.append(f"    running --> {mark}: {event}, once its worker has noticed")
    lines += [f"    {state} --> [*]" for state in State if state in TERMINAL]
    return "\n".join(lines)
