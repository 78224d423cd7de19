"""When to retry a call, and after how long."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fewstep.errors import Busy, FewstepError, Unreachable


@dataclass(frozen=True)
class Retries:
    """``tries`` in all; pauses double from ``first_pause_s``, with jitter, unless the service says how long to wait.

    If the service asks for more than ``longest_pause_s``, it is called again after that, but not at all if all
    remaining tries would come too early (a quota that is used up for an hour).
    """

    tries: int = 4
    first_pause_s: float = 0.5
    longest_pause_s: float = 60.0

    def pause_s(self, tried: int, error: FewstepError) -> float | None:
        """How long to wait after ``tried`` tries, or None to give up."""
        if tried >= self.tries or not isinstance(error, Busy | Unreachable):
            return None
        if isinstance(error, Busy) and not error.worth_retrying:
            return None
        asked_s = error.retry_after_s if isinstance(error, Busy) else None
        if asked_s is not None:
            patience_s = self.longest_pause_s * (self.tries - tried)
            return min(asked_s, self.longest_pause_s) if asked_s <= patience_s else None
        doubled_s = self.first_pause_s * float(2 ** min(tried - 1, 30))
        return min(doubled_s, self.longest_pause_s) * random.uniform(0.5, 1.0)
