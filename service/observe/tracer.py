"""Spans through the queue, for whoever has the extra ``otel`` and sets FEWSTEP_TRACING; for everybody else, nothing.

A request's span (SERVER) has the enqueueing as its child (PRODUCER), whose traceparent travels with the job. A batch of
the worker is a span of its own, linked to the producers of all batch mates; in each mate's own trace lies a span
(CONSUMER) for its share, linked back to the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from service.queue.job import Job

Role = Literal["api", "worker"]


class BatchTrace:
    """One batch; its stages may run in any thread."""

    def begin(self, stage: str) -> Callable[[], object]:
        """A part of the batch begins; call what is returned when it ends."""
        return lambda: None

    def end(self) -> None:
        """The batch is settled."""


class Tracing:
    """What the service says about its work; this one listens to none of it."""

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[str]:
        """Around a request; gives its trace id ('' without one)."""
        yield ""

    def answered(self, route: str, method: str, status: int) -> None:
        """Inside ``request``: what became of it."""

    @contextmanager
    def publish(self, job: Job) -> Iterator[str]:
        """Around the enqueueing of a job; gives the traceparent that travels with it ('' without one)."""
        yield ""

    def batch(self, batch: str, jobs: Sequence[Job]) -> BatchTrace:
        """Of everything that a worker does for one batch, from now until it is ended."""
        return BatchTrace()

    def close(self) -> None:
        """Hand in what has not been exported yet."""
