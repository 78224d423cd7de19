"""Sends a load, open or closed, and records the outcome of each request. The clock is the event loop's.

Closed: a fixed number of users, each of whom waits for an answer before the next request. Open: requests are sent when
they are due, whether or not earlier ones are answered; latencies count from that moment, so that a stalled service (or
client) cannot hide behind requests that were never sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from fewstep.errors import ApiError, FewstepError
from fewstep.load.workload import Arrival, Request

MOST_IN_FLIGHT = 2000


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request; ``stages`` are seconds that the service itself measured."""

    images: int = 0
    error: str | None = None
    batch_size: int | None = None
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One request; times in seconds from the start of the load."""

    due_s: float
    done_s: float
    outcome: Outcome

    @property
    def latency_s(self) -> float:
        return self.done_s - self.due_s


Send = Callable[[Request], Awaitable[Outcome]]  # raises FewstepError
Watch = Callable[[Sample], None]


def ignore(sample: Sample) -> None:
    """The default: do nothing."""


async def closed_loop(
    send: Send, requests: Iterator[Request], users: int, *, count: int | None = None, seconds: float | None = None,
    watch: Watch = ignore,
) -> list[Sample]:  # fmt: skip
    """``users`` users until ``count`` requests were sent or ``seconds`` have passed; waits for all answers."""
    clock = asyncio.get_running_loop().time
    start_s, samples = clock(), list[Sample]()
    left = islice(requests, count)

    async def user() -> None:
        while (seconds is None or clock() - start_s < seconds) and (request := next(left, None)) is not None:
            due_s = clock() - start_s
            outcome = await _outcome(send, request)
            samples.append(Sample(due_s, clock() - start_s, outcome))
            watch(samples[-1])

    async with asyncio.TaskGroup() as group:
        for _ in range(users):
            group.create_task(user())
    return samples


async def open_loop(
    send: Send, arrivals: Sequence[Arrival], *, most_in_flight: int = MOST_IN_FLIGHT, watch: Watch = ignore
) -> list[Sample]:
    """Send each request when it is due, and wait for all answers. Beyond ``most_in_flight`` requests wait in line,
    which adds to their latency."""
    clock = asyncio.get_running_loop().time
    start_s, samples = clock(), list[Sample]()
    places = asyncio.Semaphore(most_in_flight)

    async def one(arrival: Arrival) -> None:
        async with places:
            outcome = await _outcome(send, arrival.request)
        samples.append(Sample(arrival.at_s, clock() - start_s, outcome))
        watch(samples[-1])

    async with asyncio.TaskGroup() as group:
        for arrival in arrivals:
            if (early_s := start_s + arrival.at_s - clock()) > 0:
                await asyncio.sleep(early_s)
            group.create_task(one(arrival))
    return samples


async def _outcome(send: Send, request: Request) -> Outcome:
    try:
        return await send(request)
    except FewstepError as error:
        return Outcome(error=code_of(error))


def code_of(error: FewstepError) -> str:
    """The API's code of an error, else its status, else its kind."""
    return error.code or str(error.status) if isinstance(error, ApiError) else type(error).__name__
