"""A bound on how long a call of a network may take: one that hangs must not hold its jobs for ever."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.worker.device import Device, Shape

TIMES_USUAL = 20.0  # a call that takes so many times what its like took is taken for hung
SHORTEST_BOUND_S = 30.0
FIRST_BOUND_S = 600.0  # of a call whose like was never measured
LOOK_EVERY_S = 0.05

log = logging.getLogger(__name__)


class Bounds:
    """How long calls may take: ``setting_s``, or by what was measured where that is 0.

    ``warm_up_s()`` is the longest warm-up of the students that are loaded now.
    """

    def __init__(self, device: Device, setting_s: float = 0.0, warm_up_s: Callable[[], float] = lambda: 0.0) -> None:
        self._device = device
        self._setting_s = setting_s
        self._warm_up_s = warm_up_s

    @property
    def longest_s(self) -> float:
        """Seconds that a call of which nothing is known may take."""
        return self._setting_s or max(FIRST_BOUND_S, TIMES_USUAL * self._warm_up_s())

    def of(self, shape: Shape, images: int) -> float:
        """Seconds that a call of this shape may take."""
        if self._setting_s:
            return self._setting_s
        usual_s = self._device.predicted_s(shape, images)
        return self.longest_s if usual_s is None else max(SHORTEST_BOUND_S, TIMES_USUAL * usual_s)


class Watchdog:
    """Calls ``on_hang`` once, from a thread of its own, when a call has gone on for longer than its bound."""

    def __init__(self, on_hang: Callable[[str], object]) -> None:
        self._on_hang = on_hang
        self._ends: dict[int, tuple[float, str]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def __enter__(self) -> Watchdog:
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    @contextmanager
    def watching(self, what: str, bound_s: float) -> Iterator[None]:
        """Around a call."""
        mark = object()
        with self._lock:
            self._ends[id(mark)] = (time.monotonic() + bound_s, what)
        try:
            yield
        finally:
            with self._lock:
                del self._ends[id(mark)]

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_EVERY_S):
            if hung := self._overdue():
                log.critical("%s has exceeded its time limit; the worker exits", hung)
                self._on_hang(hung)
                return

    def _overdue(self) -> str | None:
        with self._lock:
            now = time.monotonic()
            return next((what for end, what in self._ends.values() if end < now), None)
