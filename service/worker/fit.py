"""How many images fit into a call, as those that ran out of memory have shown; else each batch would fail first."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

FORGET_S = 600.0  # the memory may have been another model's, or another process's


class Fit:
    """By shape (what decides a call's memory but for its images); for the thread that draws."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._drew: dict[Hashable, int] = {}
        self._most: dict[Hashable, tuple[int, float]] = {}

    def most(self, shape: Hashable, at_most: int) -> int:
        """How many images the next call may have."""
        images, until = self._most.get(shape, (at_most, 0.0))
        return min(images, at_most) if self._clock() < until else at_most

    def drew(self, shape: Hashable, images: int) -> None:
        """A call of so many images had enough memory."""
        self._drew[shape] = max(images, self._drew.get(shape, 1))

    def ran_out(self, shape: Hashable, images: int) -> None:
        """A call of so many images, more than one, had too little: half of it may do, or what has been drawn since."""
        drew = self._drew[shape] = min(self._drew.get(shape, 1), images - 1)
        self._most[shape] = (max(images // 2, drew), self._clock() + FORGET_S)
