"""When the device draws, when it could have drawn, and how long a call of each shape takes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

NEWEST = 0.3  # share of the newest call in the running mean
LATE_AFTER_S = 1.0  # a call that is late by that and by its own length may be late by any time

Shape = tuple[str, str, int, int, int, int]  # model, version, height, width, frames (0: a picture), steps


@dataclass(frozen=True)
class Usage:
    """Seconds since the start in which the device drew, and in which it idled although a job waited for it."""

    busy_s: float
    starved_s: float


class Device:
    """What the drawing thread reports of its calls, for the thread that claims; ``clock`` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._means_s: dict[tuple[Shape, int], float] = {}
        self._started: float | None = None
        self._free_at = self._idle_since = clock()
        self._busy_s = self._starved_s = 0.0

    @property
    def idle(self) -> bool:
        return self._started is None

    @property
    def usage(self) -> Usage:
        with self._changed:
            running = 0.0 if self._started is None else self._clock() - self._started
            return Usage(self._busy_s + running, self._starved_s)

    def begin(self, shape: Shape, images: int, waiting_since: float) -> None:
        """The device draws from now on; the work had waited since that moment of the clock."""
        with self._changed:
            if self._started is not None:
                return  # whoever took the batch has said so
            now = self._clock()
            self._starved_s += max(0.0, now - max(self._idle_since, waiting_since))
            self._started, self._free_at = now, now + (self._predicted_s(shape, images) or 0.0)

    def end(self) -> None:
        """The device is free."""
        with self._changed:
            now = self._clock()
            self._busy_s += now - (self._started or now)
            self._started, self._idle_since, self._free_at = None, now, now
            self._changed.notify_all()

    def measured(self, shape: Shape, images: int, seconds: float) -> None:
        """Note how long one call took."""
        with self._changed:
            mean_s = self._means_s.get((shape, images), seconds)
            self._means_s[shape, images] = mean_s + NEWEST * (seconds - mean_s)

    def predicted_s(self, shape: Shape, images: int) -> float | None:
        """The likely time of a call: the mean of its like, else scaled from the nearest; None: nothing is known."""
        with self._changed:
            return self._predicted_s(shape, images)

    @property
    def late(self) -> bool:
        """Whether the device draws for so long that nobody knows when it will be free."""
        with self._changed:
            return self._late()

    def wait_until_free(self, margin_s: float, patience_s: float) -> bool:
        """Return when the device is likely to be free in ``margin_s`` (True), or after ``patience_s`` (False)."""
        deadline = self._clock() + patience_s
        with self._changed:
            while self._started is not None:
                now = self._clock()
                soon_s = math.inf if self._late() else self._free_at - margin_s - now
                if soon_s <= 0:
                    return True
                if now >= deadline:
                    return False
                self._changed.wait(min(soon_s, deadline - now))
            return True

    def wait_until_idle(self, patience_s: float) -> bool:
        """Return when the device is free (True), or after ``patience_s`` (False)."""
        with self._changed:
            return self._changed.wait_for(lambda: self._started is None, patience_s)

    def _late(self) -> bool:
        if self._started is None:
            return False
        return self._clock() - self._free_at > max(LATE_AFTER_S, self._free_at - self._started)

    def _predicted_s(self, shape: Shape, images: int) -> float | None:
        if (exact := self._means_s.get((shape, images))) is not None:
            return exact
        known = [(abs(count - images), count) for of, count in self._means_s if of == shape]
        if not known:
            return None
        _, nearest = min(known)
        return self._means_s[shape, nearest] * max(1.0, images / nearest)
