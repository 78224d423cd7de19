"""Spans through the queue, with the extra ``otel`` and FEWSTEP_TRACING; without them, this does nothing.

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
        """Start a stage of the batch; call the returned function when it ends."""
        return lambda: None

    def end(self) -> None:
        """The batch is settled."""


class Tracing:
    """The interface of tracing; this implementation does nothing."""

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[str]:
        """Around a request; gives its trace id ('' without one)."""
        yield ""

    def answered(self, route: str, method: str, status: int) -> None:
        """Inside ``request``: its outcome."""

    @contextmanager
    def publish(self, job: Job) -> Iterator[str]:
        """Around the enqueueing of a job; gives the traceparent that travels with it ('' without one)."""
        yield ""

    def batch(self, batch: str, jobs: Sequence[Job]) -> BatchTrace:
        """The trace of all that a worker does for one batch, from now until ``end``."""
        return BatchTrace()

    def close(self) -> None:
        """Export what has not been exported yet."""
