"""An event loop whose time passes at once: where everybody sleeps, its clock jumps to the first who wakes."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    now_s = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        self.now_s += timeout or 0.0
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in no time."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(coroutine)
