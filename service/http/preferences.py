"""The headers with which a client states which kind of response it wants."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from service.errors import InvalidRequest
from service.http.schema import GenerateRequest

LONGEST_WAIT_S = 3600
KEY = re.compile(r"[\x21-\x7e]{1,255}")
KEY_HEADER = "Idempotency-Key"
# Fields that came after the first release whose digests are compared: where they say nothing they do not count.
LATER = ("best_of", "rank_by", "min_reward", "cascade", "num_frames", "fps", "allow_training")


@dataclass(frozen=True)
class Preference:
    """A Prefer header (RFC 7240): ``asynchronously``, or wait at most ``wait_s`` for the result."""

    asynchronously: bool = False
    wait_s: int | None = None

    @property
    def applied(self) -> str:
        """The Preference-Applied header of a response that honours it; empty without a preference."""
        parts = ["respond-async"] if self.asynchronously else []
        return ", ".join(parts + ([f"wait={self.wait_s}"] if self.wait_s is not None else []))


def read_preference(header: str) -> Preference:
    """The known preferences of a header; others are ignored, as the RFC requires. The first of two counts."""
    words = [part.partition(";")[0].strip().lower() for part in header.split(",")]
    waits = [match[1] for word in words if (match := re.fullmatch(r'wait\s*=\s*"?([0-9]{1,9})"?', word))]
    return Preference("respond-async" in words, min(int(waits[0]), LONGEST_WAIT_S) if waits else None)


def idempotency(header: str | None, key: str) -> str:
    """The digest of an Idempotency-Key and its owner; empty without one.

    Raises:
        InvalidRequest: it is empty, too long, or has characters outside printable ASCII.
    """
    if header is None:
        return ""
    if not KEY.fullmatch(header):
        raise InvalidRequest(f"{KEY_HEADER} must be 1 to 255 printable ASCII characters without spaces.", KEY_HEADER)
    return hashlib.sha256(f"{key}\n{header}".encode()).hexdigest()


def digest(body: GenerateRequest) -> str:
    """A digest that is equal for two bodies that ask for the same, however they are written, and equal to that of an
    earlier release where both understand the body: a request may be repeated in the middle of a rolling upgrade."""
    silent = {name for name in LATER if getattr(body, name) == type(body).model_fields[name].default}
    as_before = body.model_copy(update={"output_format": body.output_format or "png"})
    return hashlib.sha256(as_before.model_dump_json(exclude=silent).encode()).hexdigest()
