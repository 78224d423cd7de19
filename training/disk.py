"""What a run can do without is left out where the disk has no room for it, and the run says so."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.markup import escape

from training.progress import console

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Spared:
    """The things that are left out; each is said once, and again after it could be written meanwhile."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    @contextmanager
    def unless_full(self, what: str, path: Path) -> Iterator[None]:
        """Around writing ``what`` to ``path``; any other error is raised."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if what not in self._said:
                sentence = f"{path} cannot be written ({error.strerror}): the run continues without {what}"
                console.print(f"[yellow]{escape(sentence)}[/yellow]", highlight=False)
            self._said.add(what)
        else:
            self._said.discard(what)


SPARED = Spared()
unless_full = SPARED.unless_full
