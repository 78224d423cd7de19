"""What travels through the queue: the job that the API accepts, and the record that a worker leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal

SCHEMA_VERSION = 3


class State(StrEnum):
    """Where a job is; it never leaves a terminal state."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset({State.DONE, State.FAILED, State.CANCELLED, State.EXPIRED})


class PayloadError(ValueError):
    """A payload that this version cannot read."""


def lane(model: str, version: str) -> str:
    """The part of the queue that workers with this model, version and payload format can serve."""
    return f"{SCHEMA_VERSION}|{model}|{version}"


@dataclass(frozen=True)
class Job:
    """One request: ``len(seeds)`` images of one prompt.

    ``key`` names who asked: whoever may read or cancel the job. ``quality`` is that of JPEG and WebP (None: usual).
    ``previews`` is how many looks at each unfinished image are wanted. ``traceparent`` is the W3C header of
    the span that sent it (empty: none).
    """

    id: str
    key: str
    model: str
    version: str
    height: int
    width: int
    steps: int
    prompt: str
    seeds: tuple[int, ...]
    output_format: str
    quality: int | None
    response_format: str
    previews: int
    priority: int
    user: str | None
    metadata: Mapping[str, str]
    request_id: str
    traceparent: str = ""

    @property
    def lane(self) -> str:
        return lane(self.model, self.version)

    @property
    def shape(self) -> str:
        """What batch mates share beside the lane: never the prompt, the seed, the output format or who asks."""
        return f"{self.height}x{self.width}|{self.steps}"

    @property
    def cost(self) -> int:
        """What drawing it costs, in thousands of pixel-steps."""
        return max(1, self.height * self.width * self.steps // 1000) * len(self.seeds)

    @property
    def flow(self) -> str:
        """Whom it takes turns with: inside a priority, every key gets the same."""
        return f"{self.priority}|{self.key}"

    def to_payload(self) -> str:
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def from_payload(cls, payload: str) -> Job:
        """The job of a payload.

        Raises:
            PayloadError: not written by this version of the service.
        """
        try:
            data = json.loads(payload)
            if data.pop("schema_version") != SCHEMA_VERSION or set(data) != {f.name for f in fields(cls)}:
                raise PayloadError("the job was written by another version of the service")
            return cls(**{**data, "seeds": tuple(data["seeds"])})
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise PayloadError("the job cannot be read") from error


@dataclass(frozen=True)
class QueueOptions:
    """How a job is to be queued.

    ``client`` names an open connection that waits for it (empty: nobody, it is asked for later). ``watched``: whoever
    accepted it wants to hear of more than its end. ``idempotency`` is the digest of a client's Idempotency-Key and of
    the client itself (empty: none), ``body`` that of what was asked. ``webhook`` is what to send where at its end.
    ``quota`` is the key's own one, in thousands of pixel-steps a minute (None: the usual one). ``solo``: it shares its
    batch with nobody.
    """

    timeout_s: float
    client: str = ""
    watched: bool = False
    idempotency: str = ""
    body: str = ""
    webhook: str = ""
    quota: int | None = None
    solo: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the queue says to a job; ``id`` is the job that is to be waited for.

    ``wait_s`` is, for a job that was accepted, the predicted wait; for one that was refused, after how long another try
    is worth it; 0 where nothing was measured yet. ``quota`` (0: none) and
    ``quota_left`` are in thousands of pixel-steps.
    """

    word: Literal["ok", "known", "attached", "mismatch", "quota", "full", "late", "gone"]
    id: str
    wait_s: float
    quota_left: int
    quota: int = 0


@dataclass(frozen=True)
class Position:
    """Where a waiting job stands: ``position`` jobs come before it and take about ``wait_s`` (0: nothing is known)."""

    position: int
    wait_s: float


@dataclass(frozen=True)
class Claimed:
    """A job that a worker holds: ``token`` proves it, ``queue_s`` is how long it waited for this claim."""

    id: str
    token: str
    payload: str
    attempts: int
    queue_s: float


@dataclass(frozen=True)
class Record:
    """A job as the queue knows it; ``result`` is what the worker left, empty before. Times are Unix times in seconds.

    ``key`` is who may see it, ``payload`` what was asked for. ``previews`` refers to looks at unfinished images in the
    result store, by "number:image". ``giving_up``: it runs, and its worker has been told to drop it.
    """

    id: str
    state: State
    result: Mapping[str, Any]
    key: str = ""
    payload: str = ""
    created_s: float = 0.0
    claimed_s: float | None = None
    finished_s: float | None = None
    previews: Mapping[str, str] = field(default_factory=dict)
    giving_up: bool = False

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def readable(self) -> bool:
        """Whether this version of the service can tell what was asked for."""
        try:
            return bool(self.job)
        except PayloadError:
            return False

    @property
    def job(self) -> Job:
        """What was asked for.

        Raises:
            PayloadError: by another version of the service.
        """
        return Job.from_payload(self.payload)
