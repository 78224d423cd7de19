"""When a call is worth another try, and after how long."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fewstep.errors import Busy, FewstepError, Unreachable


@dataclass(frozen=True)
class Retries:
    """``tries`` in all; pauses double from ``first_pause_s`` on, with jitter, unless the service says how long.

    A service that wants more patience than ``longest_pause_s`` is not asked again: coming back earlier than it said
    would help nobody.
    """

    tries: int = 4
    first_pause_s: float = 0.5
    longest_pause_s: float = 60.0

    def pause_s(self, tried: int, error: FewstepError) -> float | None:
        """How long to wait after ``tried`` tries, or None to give up."""
        if tried >= self.tries or not isinstance(error, Busy | Unreachable):
            return None
        told_s = error.retry_after_s if isinstance(error, Busy) else None
        if told_s is not None:
            return told_s if told_s <= self.longest_pause_s else None
        doubled_s = self.first_pause_s * float(2 ** min(tried - 1, 30))
        return min(doubled_s, self.longest_pause_s) * random.uniform(0.5, 1.0)
