"""Keeps a worker's leases alive from a thread of its own: a long call of the runtime must not look like death."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from redis.exceptions import RedisError

from service.queue.consumer import Consumer
from service.queue.job import Claimed
from service.worker.accelerators import Accelerators

log = logging.getLogger(__name__)


class Heartbeat:
    """Renews leases every ``interval_s``, and tells of the GPUs; ``consumer`` must be its own, not the worker's."""

    def __init__(
        self, consumer: Consumer, info: Mapping[str, Any], interval_s: float, accelerators: Accelerators | None = None
    ) -> None:
        self._consumer = consumer
        self._info = info
        self._interval_s = interval_s
        self._accelerators = accelerators
        self._gpus: Mapping[str, Mapping[str, float]] = {}
        self._held: dict[str, str] = {}
        self._dropped: dict[str, str] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._look()
        self.beat(self._consumer)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(self._interval_s)

    @contextmanager
    def holding(self, jobs: Sequence[Claimed]) -> Iterator[None]:
        """Keep these leases alive meanwhile."""
        with self._lock:
            self._held = {job.id: job.token for job in jobs}
            self._dropped = {}
        try:
            yield
        finally:
            with self._lock:
                self._held = {}

    def dropped(self, id: str) -> str | None:
        """'cancelled', 'expired' or 'lost' if a held job needs no further work, else None; as of the last beat."""
        with self._lock:
            return self._dropped.get(id)

    def held(self) -> list[tuple[str, str]]:
        """The (id, token) of the jobs that are held now."""
        with self._lock:
            return list(self._held.items())

    def beat(self, consumer: Consumer) -> None:
        """One beat now; the worker's thread may ask for one, with a consumer of its own."""
        try:
            news = consumer.beat({**self._info, "gpus": self._gpus}, self.held())
        except RedisError as error:
            log.warning("no heartbeat: %s", error)
            return
        with self._lock:
            self._dropped.update({id: reason for id, reason in news.items() if id in self._held})

    def _run(self) -> None:
        while not self._end.wait(self._interval_s):
            self._look()
            self.beat(self._consumer)

    def _look(self) -> None:
        """Not in ``beat``, which the worker's thread calls too: a driver may take its time."""
        if self._accelerators is not None:
            self._gpus = self._accelerators.look()
