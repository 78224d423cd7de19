"""Background duties: what a process does again and again beside its work, and whether it still does it.

A duty that fails is logged, counted, and done again: no exception of one may end it, or take others with it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from redis.exceptions import RedisError

BROKEN_AFTER = 3  # failures in a row: fewer are an accident
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
        """The duty of this name, for whoever does it in a way of its own."""
        return self._duties.setdefault(name, Duty(name, vital))

    async def forever(
        self, name: str, action: Callable[[], Awaitable[object]], every_s: float = 0.0, *, vital: bool = False
    ) -> None:
        """Do it, pause for ``every_s``, and do it again, whatever happens; ends only when it is cancelled."""
        duty = self.duty(name, vital)
        while True:
            try:
                await action()
                duty.succeeded()
                pause_s = every_s
            except Exception as error:
                duty.failed(error)
                pause_s = max(every_s, min(LONGEST_PAUSE_S, 0.1 * duty.in_a_row))
            await asyncio.sleep(pause_s)

    def forever_in_thread(
        self, name: str, action: Callable[[], object], every_s: float, stopping: threading.Event, *, vital: bool = False
    ) -> None:
        """The same in a thread of its own, which ends when ``stopping`` is set; it begins with the pause."""
        duty = self.duty(name, vital)
        while not stopping.wait(every_s):
            try:
                action()
                duty.succeeded()
            except Exception as error:
                duty.failed(error)

    @property
    def failures(self) -> dict[str, int]:
        """How often each duty that has ever failed did."""
        return {duty.name: duty.failures for duty in list(self._duties.values()) if duty.failures}

    @property
    def unreported(self) -> dict[str, int]:
        """Those failures of each duty that ``reported`` has not been told of."""
        return dict(Counter(self.failures) - self._reported)

    def reported(self, failures: Mapping[str, int]) -> None:
        """So many failures more are counted elsewhere from now on."""
        self._reported.update(failures)

    @property
    def broken(self) -> str | None:
        """What is wrong with the first vital duty that cannot be done any more, if there is one."""
        for duty in list(self._duties.values()):
            if duty.vital and duty.in_a_row >= BROKEN_AFTER:
                return f"{duty.name} fails ({duty.reason})"
        return None
