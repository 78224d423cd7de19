"""SIGTERM as a request to stop (a job scheduler sends it before it kills): at once, or at the next suitable moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from training.processes import Processes
from training.rundir import RunStopped


class Terminated(BaseException):
    """SIGTERM arrived where a program may end at once; the message is one sentence. (No ``Exception``: whoever asks
    somebody else's code catches these.)
    """


_ended: list[str] = []  # sentences of ``Terminated``, which Python ignores in a callback of its garbage collection
_asked: list[threading.Event] = []  # those of the ``sigterm`` blocks that the program is in


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that is set when SIGTERM arrives; on exit the earlier handler is restored.

    Only the main thread receives signals; in another the event is never set.
    """
    received = threading.Event()

    def handle(_: int, __: FrameType | None) -> None:
        received.set()

    _asked.append(received)
    try:
        with _handler(handle):
            yield received
    finally:
        _asked.remove(received)


@contextmanager
def stopped_at_once(sentence: str) -> Iterator[None]:
    """SIGTERM raises Terminated with this sentence wherever the program is: for parts that leave nothing half done."""

    def handle(_: int, __: FrameType | None) -> None:
        _ended.append(sentence)
        raise Terminated(sentence)

    try:
        with _handler(handle):
            yield
    finally:
        _ended.clear()


def stop_if_asked(processes: Processes) -> None:
    """Between two parts of something long; every process must call it.

    Raises:
        RunStopped: one of the processes was asked to stop.
        Terminated: this one was, inside ``stopped_at_once``, and has not ended.
    """
    if _ended:
        raise Terminated(_ended[-1])
    if _asked and processes.any(_asked[-1].is_set())[0]:
        raise RunStopped("stopped: the same command resumes from the last checkpoint")


@contextmanager
def _handler(handle: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
