"""SIGTERM as a request to stop at the next suitable moment (a job scheduler sends it before it kills)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that is set when SIGTERM arrives; on exit the earlier handler is restored.

    Only the main thread receives signals; in another the event is never set.
    """
    received = threading.Event()

    def handle(_: int, __: FrameType | None) -> None:
        received.set()

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
