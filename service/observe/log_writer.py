"""Where log lines leave the process: a reader that is slow, or gone, never holds up the service."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time

MOST_LINES = 10_000  # that wait for the reader; whatever comes then is dropped and counted
FLUSH_S = 0.5  # how long the end of the process waits for the reader
POLL_EVERY_S = 0.005


class LogWriter(logging.Handler):
    """Writes lines to a file descriptor from a thread of its own.

    A write to a pipe that nobody reads blocks for ever, so neither a request nor a batch may do it. Lines are formatted
    where they are logged, as they tell of the request at hand. The descriptor is written to directly: a stream's lock,
    held by a thread that hangs, would stop the end of the process. A signal's handler may log in the middle of this,
    so no lock may be held there but the handler's own, which its thread may take twice: SimpleQueue has none.
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
            line = self._lines.get()
            try:
                self._put(f"{line}\n")
                self._confess()
            except OSError:  # nobody will ever read it
                self.dropped += 1
            finally:
                self._taken_out += 1

    def _confess(self) -> None:
        """Say how many lines are missing here."""
        if (dropped := self.dropped) > self._reported:
            lost, self._reported = dropped - self._reported, dropped
            about = {"dropped": lost, "dropped_in_all": dropped}
            words = f"{lost} log lines were dropped: nobody read them in time"
            record = logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"})
            record.msg = words
            record.__dict__.update(about)
            self._put(f"{self.format(record)}\n")

    def _put(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(self._descriptor, data) :]
