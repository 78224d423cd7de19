"""The other workers of this machine: do they draw at this moment?"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "drawing.lock"


class Neighbours:
    """A file in their common folder, which each worker has locked while it draws; a lock ends with its process."""

    def __init__(self, data_dir: Path) -> None:
        self._file = os.open(data_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextmanager
    def drawing(self) -> Iterator[bool]:
        """While this worker draws; True if another one was drawing when it began."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # had only by who is alone
            crowded = False
        except BlockingIOError:
            crowded = True
        fcntl.flock(self._file, fcntl.LOCK_SH)  # waits no longer than another one is between these two lines
        try:
            yield crowded
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
