"""Background duties: what a process repeats beside its main work, and whether it still succeeds.

A duty that fails is logged, counted and repeated: no exception may end it, or any other duty.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from redis.exceptions import RedisError

BROKEN_AFTER = 3  # consecutive failures; fewer may be transient
LONGEST_PAUSE_S = 1.0  # after a failure, unless the duty's own pause is longer

log = logging.getLogger(__name__)


@dataclass
class Duty:
    """One duty; ``vital``: without it the process is not ready."""

    name: str
    vital: bool
    failures: int = 0
    in_a_row: int = 0
    reason: str = ""

    def succeeded(self) -> None:
        self.in_a_row = 0

    def failed(self, error: Exception) -> None:
        self.failures += 1
        self.in_a_row += 1
        self.reason = type(error).__name__
        if isinstance(error, RedisError | OSError):
            log.warning("background task %s failed: %s", self.name, error)
        else:
            log.error("background task %s failed", self.name, exc_info=error)


class Background:
    """The duties of one process. Its counts may be read from any thread."""

    def __init__(self) -> None:
        self._duties: dict[str, Duty] = {}
        self._reported: Counter[str] = Counter()

    def duty(self, name: str, vital: bool = False) -> Duty:
        """The duty of this name, for a caller that runs it itself."""
        return self._duties.setdefault(name, Duty(name, vital))

    async def forever(
        self, name: str, action: Callable[[], Awaitable[object]], every_s: float = 0.0, *, vital: bool = False
    ) -> None:
        """Run it every ``every_s`` until cancelled, whatever it raises.

        A cancellation that a library swallowed in the middle of the action (redis-py 8.1 was seen to) counts after it.
        """
        duty, task = self.duty(name, vital), asyncio.current_task()
        while not (task and task.cancelling()):
            try:
                await action()
                duty.succeeded()
                pause_s = every_s
            except Exception as error:
                duty.failed(error)
                pause_s = max(every_s, min(LONGEST_PAUSE_S, 0.1 * duty.in_a_row))
            if not (task and task.cancelling()):
                await asyncio.sleep(pause_s)

    def forever_in_thread(
        self, name: str, action: Callable[[], object], every_s: float, stopping: threading.Event, *, vital: bool = False
    ) -> None:
        """The same in a thread of its own, which ends when ``stopping`` is set; it starts with the pause."""
        duty = self.duty(name, vital)
        while not stopping.wait(every_s):
            try:
                action()
                duty.succeeded()
            except Exception as error:
                duty.failed(error)

    @property
    def failures(self) -> dict[str, int]:
        """The number of failures of each duty that has ever failed."""
        return {duty.name: duty.failures for duty in list(self._duties.values()) if duty.failures}

    @property
    def unreported(self) -> dict[str, int]:
        """The failures of each duty that are not in ``reported`` yet."""
        return dict(Counter(self.failures) - self._reported)

    def reported(self, failures: Mapping[str, int]) -> None:
        """So many failures more are counted elsewhere from now on."""
        self._reported.update(failures)

    @property
    def broken(self) -> str | None:
        """The error of the first vital duty that keeps failing, or None."""
        for duty in list(self._duties.values()):
            if duty.vital and duty.in_a_row >= BROKEN_AFTER:
                return f"{duty.name} fails ({duty.reason})"
        return None
