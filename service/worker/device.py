"""When the device draws, when it could have drawn, and how long a call of each shape takes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.worker.batch_size import Load

NEWEST = 0.3  # share of the newest call in the running mean
MEMORY_S, MEMORY_CALLS = 3.0, 20  # the load is a mean over the longer of both, roughly
FORGOTTEN_CALLS = 1000  # a size that others of its shape were drawn for so often since may take another time by now
SHAPES = 16
LATE_AFTER_S = 1.0  # a call that is late by that and by its own length may be late by any time

Shape = tuple[str, str, int, int, int, int]  # model, version, height, width, frames (0: a picture), steps


@dataclass(frozen=True)
class Usage:
    """Seconds since the start in which the device drew, and in which it idled although a job waited for it."""

    busy_s: float
    starved_s: float


@dataclass(frozen=True)
class _Mean:
    """The time of calls of one size; ``number`` counts the calls of the shape until the newest of them."""

    seconds: float
    number: int


@dataclass(frozen=True)
class _Drawn:
    """What was drawn of a shape, in how many seconds of ``elapsed`` ones, gaps included; older calls count less."""

    images: float
    seconds: float
    elapsed: float
    at: float
    number: int = 1

    def and_then(self, images: int, seconds: float, now: float) -> _Drawn:
        """With one call more. An idle hour before it counts as no longer than what is remembered at all."""
        since = min(now - self.at, max(MEMORY_S, MEMORY_CALLS * seconds))
        kept = max(1 - 1 / MEMORY_CALLS, math.exp(-since / MEMORY_S))
        return _Drawn(
            kept * self.images + images,
            kept * self.seconds + seconds,
            kept * self.elapsed + since,
            now,
            self.number + 1,
        )

    def elapsed_until(self, now: float) -> float:
        return self.elapsed + now - self.at


class Device:
    """What the drawing thread reports of its calls, for the thread that claims; ``clock`` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._means: dict[Shape, dict[int, _Mean]] = {}
        self._drawn: dict[Shape, _Drawn] = {}
        self._gap_s = self._mean_gap_s = 0.0  # before a call, while its work waited
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
            self._gap_s = max(0.0, now - max(self._idle_since, waiting_since))
            self._starved_s += self._gap_s
            self._mean_gap_s += NEWEST * (self._gap_s - self._mean_gap_s)
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
            now, means = self._clock(), self._means.setdefault(shape, {})
            before, spent_s = self._drawn.get(shape), seconds + self._gap_s
            self._gap_s = 0.0
            drawn = before.and_then(images, spent_s, now) if before else _Drawn(images, spent_s, spent_s, now)
            mean_s = self._calls_s(shape).get(images, seconds)  # of what was forgotten nothing is left
            means[images] = _Mean(mean_s + NEWEST * (seconds - mean_s), drawn.number)
            self._drawn[shape] = drawn

    def loads(self) -> dict[Shape, Load]:
        """What was drawn lately, by shape: of the ``SHAPES`` that were drawn last.

        A call costs its device what lies between it and the next, too: claiming, and whatever else holds it up.
        """
        with self._changed:
            now = self._clock()
            lately = dict(sorted(self._drawn.items(), key=lambda item: item[1].at)[-SHAPES:])
            busy = {shape: drawn.seconds / drawn.elapsed_until(now) for shape, drawn in lately.items()}
            return {
                shape: Load(
                    drawn.images / drawn.elapsed_until(now),
                    1 - sum(busy.values()) + busy[shape],
                    {images: seconds + self._mean_gap_s for images, seconds in self._calls_s(shape).items()},
                )
                for shape, drawn in lately.items()
            }

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

    def _calls_s(self, shape: Shape) -> dict[int, float]:
        number = self._drawn[shape].number if shape in self._drawn else 0
        means = self._means[shape].items()
        return {images: mean.seconds for images, mean in means if number - mean.number < FORGOTTEN_CALLS}

    def _predicted_s(self, shape: Shape, images: int) -> float | None:
        means = self._means.get(shape)
        if not means:
            return None
        nearest = min(means, key=lambda count: (abs(count - images), count))
        return means[nearest].seconds * max(1.0, images / nearest)
