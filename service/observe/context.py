"""The context of the current request: response headers, quota, and fields of its log lines."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

ANONYMOUS = "anonymous"


@dataclass
class RequestInfo:
    """``key`` is the id of the caller's key, ``quota`` the key's own one in megapixel-steps a minute,
    ``allow_training`` whether it consents to training; ``headers`` are added to the answer, whatever it is; ``job_id``
    is the job that it led to."""

    request_id: str
    key: str = ANONYMOUS
    quota: float | None = None
    allow_training: bool = False
    job_id: str = ""
    trace_id: str = ""
    headers: dict[str, str] = field(default_factory=dict)


current_request: ContextVar[RequestInfo | None] = ContextVar("current_request", default=None)
