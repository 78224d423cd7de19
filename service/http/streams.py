"""How many event streams each key has open in this process: each asks the queue once or twice a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import TooManyStreams


class Streams:
    """Counts open streams by key, and refuses those beyond ``most``."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    def check(self, key: str) -> None:
        """Return if one more may be opened.

        Raises:
            TooManyStreams: the key has as many as it may.
        """
        if self._open[key] >= self._most:
            raise TooManyStreams(f"This key has {self._most} streams open already: close one first.")

    @contextmanager
    def opened(self, key: str) -> Iterator[None]:
        """Around a stream."""
        self._open[key] += 1
        try:
            yield
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]
