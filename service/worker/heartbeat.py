"""Renews a worker's leases in a thread of its own, so that a long runtime call does not count as a dead worker."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from redis.exceptions import RedisError

from service.observe.accelerators import Accelerators
from service.observe.background import Background
from service.queue.consumer import Consumer
from service.queue.job import Claimed
from service.queue.status import WorkerState

SOONEST_S = 0.1  # between two beats, however often news is asked for
FIRST_MEASURED_S = 2.0  # for the first beat to say what the GPUs do
STALE_S = 30.0  # what was measured so long ago is not reported: the driver hangs

log = logging.getLogger(__name__)

Held = tuple[str, str]  # id, token


class Heartbeat:
    """Renews leases every ``interval_s``, and reports the GPUs and what is counted; ``consumer`` must be its own.

    ``on_drain`` is called, perhaps more than once, when an operator wants the worker to end.
    """

    def __init__(
        self, consumer: Consumer, info: Mapping[str, Any], interval_s: float, accelerators: Accelerators | None = None,
        counts: Callable[[], Mapping[str, int]] = dict, background: Background | None = None,
        on_drain: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self._consumer = consumer
        self._info = info
        self._interval_s = interval_s
        self._accelerators = accelerators
        self._gpus: Mapping[str, Mapping[str, float]] = {}
        self._measured = threading.Event()
        self._measured_at = 0.0
        self.counts = counts  # a worker that loads has none yet
        self._on_drain = on_drain
        self._order = ""
        self._reported: Counter[str] = Counter()
        self._held: set[Held] = set()
        self._dropped: dict[Held, str] = {}
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._end = threading.Event()
        self.background = background or Background()
        self._failures: Mapping[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._accelerators is not None:
            threading.Thread(target=self._measure, args=(self._accelerators,), name="gpus", daemon=True).start()
            self._measured.wait(FIRST_MEASURED_S)
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(self._interval_s)

    def stop(self) -> None:
        """Renew nothing any more."""
        self._end.set()
        self._wanted.set()

    def hold(self, jobs: Iterable[Claimed]) -> None:
        """Keep these leases alive from now on."""
        with self._lock:
            self._held |= {(job.id, job.token) for job in jobs}

    def let_go(self, job: Claimed) -> None:
        """This job has ended, or was handed back."""
        with self._lock:
            self._held.discard((job.id, job.token))
            self._dropped.pop((job.id, job.token), None)

    def dropped(self, job: Claimed) -> str | None:
        """'cancelled', 'expired' or 'lost' if a held job needs no further work, else None; as of the last beat."""
        with self._lock:
            return self._dropped.get((job.id, job.token))

    def held(self) -> list[Held]:
        """The (id, token) of the jobs that are held now."""
        with self._lock:
            return sorted(self._held)

    @property
    def claims(self) -> bool:
        """Whether the worker is to claim jobs: no operator has paused it or drains it, as of the last beat."""
        return not self._order

    @property
    def drains(self) -> bool:
        """Whether an operator wants the worker to end, as of the last beat."""
        return self._order == WorkerState.DRAINING

    def ask(self) -> None:
        """Beat as soon as may be, so that ``dropped`` has news; this returns at once."""
        self._wanted.set()

    def beat(self) -> None:
        """One beat now."""
        failures = self.background.failures
        failed = {task: count - self._failures.get(task, 0) for task, count in failures.items()}
        try:
            news = self._consumer.beat(self._said(len(held := self.held())), held, failed)
            self._report()
        except RedisError as error:
            log.warning("no heartbeat: %s", error)
            return
        self._failures = failures
        self._follow(self._consumer.order)
        with self._lock:
            known = {id: (id, token) for id, token in held if (id, token) in self._held}
            self._dropped.update({known[id]: reason for id, reason in news.items() if id in known})

    def _said(self, jobs: int) -> dict[str, Any]:
        """What the worker says about itself."""
        gpus = self._gpus if time.monotonic() - self._measured_at < max(STALE_S, 3 * self._interval_s) else {}
        about = {**self._info, "gpus": gpus, "jobs": jobs}
        return {**about, "state": self._order} if self._order else about

    def _follow(self, order: str) -> None:
        """Do as an operator wants, and say so in the next beat, which comes at once where that is news."""
        if order != self._order:
            log.info("an operator wants this worker to be %s", order or WorkerState.READY)
            self._order = order
            self._wanted.set()
        if self.drains:
            self._on_drain()

    def _report(self) -> None:
        """Hand in what was counted since the last beat that arrived."""
        counts = Counter(self.counts())
        fresh = counts - self._reported
        if fresh:
            self._consumer.count(fresh)
            self._reported = counts

    def _run(self) -> None:
        duty = self.background.duty("heartbeat", vital=True)
        while not self._end.is_set():
            self._wanted.wait(self._interval_s)
            self._wanted.clear()
            if self._end.is_set():
                return
            try:
                self.beat()
            except Exception as error:  # whatever it is: a worker without leases would draw in vain
                duty.failed(error)
            else:
                duty.succeeded()
            self._end.wait(SOONEST_S)

    def _measure(self, accelerators: Accelerators) -> None:
        """In a thread of its own: leases depend neither on what a driver says of itself nor on when."""
        try:
            while not self._end.is_set():
                self._gpus, self._measured_at = accelerators.measure(), time.monotonic()
                self._measured.set()
                self._end.wait(self._interval_s)
        except Exception as error:
            log.warning("GPUs are no longer reported: %s", error)
            self._gpus = {}
            self._measured.set()
