"""Where the pictures lie between the worker and the client: never the queue's server.

Bytes are stored under job and token before the job ends. The token is that of the claim that drew them: two workers
that drew the same job never write the same thing, the job's record points at the winner's, and losers are discarded.
"""

from __future__ import annotations

import re
from typing import Protocol

REFERENCE = re.compile(r"[0-9a-f]{2}/[0-9a-f]{32}/[0-9]+/(p[0-9]-)?[0-9]+\.[a-z0-9]+")


class ResultMissing(Exception):
    """No such result: never written, or swept away."""


class ResultStore(Protocol):
    """A store that is away or full raises an OSError from any of these."""

    def put(self, job: str, token: str, name: str, suffix: str, data: bytes) -> str:
        """Store one image; returns the reference to get it back with."""
        ...

    def get(self, reference: str) -> bytes:
        """The bytes of an image.

        Raises:
            ResultMissing: there is no such image (any more).
        """
        ...

    def discard(self, job: str, token: str) -> None:
        """Remove what one claim of a job has written, if anything."""
        ...

    def sweep(self, older_than_s: float, quota_bytes: int = 0) -> int:
        """Remove jobs whose images are so old, and beyond a quota (0: none) the oldest; returns how many."""
        ...


def reference_of(job: str, token: str, name: str, suffix: str) -> str:
    """``<shard>/<job>/<token>/<k>.<format>``, a preview's name beside as ``p<i>-<k>``.

    Raises:
        ValueError: the parts make none.
    """
    reference = f"{job[:2]}/{job}/{token}/{name}.{suffix}"
    if not REFERENCE.fullmatch(reference):
        raise ValueError(f"{reference!r} is not a reference to a result")
    return reference


def checked(reference: str) -> str:
    """The same reference.

    Raises:
        ResultMissing: nothing can lie there.
    """
    if not REFERENCE.fullmatch(reference):
        raise ResultMissing(reference)
    return reference
