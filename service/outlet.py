"""Where log lines leave the process: a reader that is slow, or gone, never holds up the service."""

from __future__ import annotations

import logging
import os
import queue
import threading

MOST_LINES = 10_000  # that wait for the reader; whatever comes then is dropped and counted
LAST_WORDS_S = 0.5  # how long the end of the process waits for the reader


class Outlet(logging.Handler):
    """Writes lines to a file descriptor from a thread of its own.

    A write to a pipe that nobody reads blocks for ever, so neither a request nor a batch may do it. Lines are formatted
    where they are logged, as they tell of the request at hand. The descriptor is written to directly: a stream's lock,
    held by a thread that hangs, would stop the end of the process.
    """

    def __init__(self, descriptor: int, most_lines: int = MOST_LINES) -> None:
        super().__init__()
        self.dropped = 0
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(most_lines)
        self._told = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self.dropped += 1
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Return when every line has been written, or after a moment."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, LAST_WORDS_S)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            try:
                self._put(f"{line}\n")
                self._confess()
            except OSError:  # nobody will ever read it
                self.dropped += 1
            finally:
                self._lines.task_done()

    def _confess(self) -> None:
        """Say how many lines are missing here."""
        if (dropped := self.dropped) > self._told:
            lost, self._told = dropped - self._told, dropped
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
