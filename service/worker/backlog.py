"""How much drawn work waits to be finished: the bound that makes the drawing thread wait for the slower stages."""

from __future__ import annotations

import threading

MOST_BYTES = 2**29
MOST_BATCHES = 8


class Backlog:
    """Batches that were drawn and are not settled yet."""

    def __init__(self, most_bytes: int = MOST_BYTES, most_batches: int = MOST_BATCHES) -> None:
        self._most_bytes = most_bytes
        self._most_batches = most_batches
        self._bytes = self._batches = 0
        self._changed = threading.Condition()

    def add(self, num_bytes: int, wait: bool = True) -> None:
        """Take on a batch; ``wait`` until there is room for it. The first one always has room."""
        with self._changed:
            self._changed.wait_for(lambda: not wait or not self._batches or self._fits(num_bytes))
            self._batches += 1
            self._bytes += num_bytes

    def offer(self, num_bytes: int) -> bool:
        """Take on a batch if there is room for it; whether there was."""
        with self._changed:
            if self._batches and not self._fits(num_bytes):
                return False
            self._batches += 1
            self._bytes += num_bytes
            return True

    def remove(self, num_bytes: int) -> None:
        """A batch has been settled."""
        with self._changed:
            self._batches -= 1
            self._bytes -= num_bytes
            self._changed.notify_all()

    def wait_until_empty(self, patience_s: float | None = None) -> bool:
        """Return when everything is settled (True), or after ``patience_s`` (False)."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._batches, patience_s)

    def _fits(self, num_bytes: int) -> bool:
        return self._batches < self._most_batches and self._bytes + num_bytes <= self._most_bytes
