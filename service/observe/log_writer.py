"""Writes log lines without blocking: a reader that is slow or gone never holds up the service."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator

MOST_LINES = 10_000  # waiting for the reader; further ones are dropped and counted
FLUSH_S = 0.5  # how long the process waits for the reader when it exits
POLL_EVERY_S = 0.005
GATHER_S = 0.01  # lines that come within this time of each other are written together: each wake-up costs the others
ATOMIC_BYTES = 4096  # what a pipe takes in one piece (PIPE_BUF), so that processes that share it never mix lines


class LogWriter(logging.Handler):
    """Writes lines to a file descriptor from a thread of its own.

    A write to a pipe that nobody reads blocks forever, so neither a request nor a batch may do it. Lines are formatted
    where they are logged, since they contain the request's context. The descriptor is written to directly: a stream's
    lock, held by a thread that hangs, would block the exit of the process. A signal handler may log in the middle of
    this, so no lock may be held but the handler's own reentrant one: SimpleQueue has none.
    """

    def __init__(self, descriptor: int, most_lines: int = MOST_LINES) -> None:
        super().__init__()
        self.dropped = 0
        self._descriptor = descriptor
        self._most_lines = most_lines
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._put_in = self._taken_out = 0
        self._reported = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= self._most_lines:
            self.dropped += 1
            return
        try:
            line = self.format(record)
        except Exception:
            return self.handleError(record)
        self._put_in += 1
        self._lines.put(line)

    def flush(self) -> None:
        """Return when every line has been written, or after a moment."""
        deadline = time.monotonic() + FLUSH_S
        while self._taken_out < self._put_in and time.monotonic() < deadline:
            time.sleep(POLL_EVERY_S)

    def _write(self) -> None:
        while True:
            lines = [self._lines.get()]
            time.sleep(GATHER_S)
            lines += [self._lines.get() for _ in range(self._lines.qsize())]
            for piece in _pieces(lines):
                try:
                    self._put(piece)
                    self._report_dropped()
                except OSError:  # nobody will ever read it
                    self.dropped += piece.count(b"\n")
            self._taken_out += len(lines)

    def _report_dropped(self) -> None:
        """Write how many lines were dropped here."""
        if (dropped := self.dropped) > self._reported:
            lost, self._reported = dropped - self._reported, dropped
            about = {"dropped": lost, "dropped_in_all": dropped}
            words = f"{lost} log lines were dropped: they were not read in time"
            record = logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"})
            record.msg = words
            record.__dict__.update(about)
            self._put(_encoded(self.format(record)))

    def _put(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]


def _encoded(line: str) -> bytes:
    return f"{line}\n".encode("utf-8", "backslashreplace")


def _pieces(lines: Iterable[str]) -> Iterator[bytes]:
    """Whole lines, as many together as one write takes in one piece; a longer line goes alone."""
    piece = b""
    for line in map(_encoded, lines):
        if piece and len(piece) + len(line) > ATOMIC_BYTES:
            yield piece
            piece = b""
        piece += line
    yield piece
