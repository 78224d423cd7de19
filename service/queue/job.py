"""What the queue carries: the job that the API accepts, and the record with the worker's result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from service.queue.states import TERMINAL, State

# The oldest form of a job that is written and read. A job is written in the lowest form whose readers understand all
# that it asks for: during a rolling upgrade the workers of both releases draw what both understand.
SCHEMA_VERSION = 3
# Fields that came later, with the form that its readers must know. One that may be ignored keeps the form as it is.
LATER: Mapping[str, int] = {
    "candidates": 4, "candidate_seeds": 4, "rank_by": 4, "min_reward": 4, "cascade": 4, "frames": 5, "fps": 5,
    "pair": SCHEMA_VERSION, "may_train": SCHEMA_VERSION,
}  # fmt: skip
READABLE = (SCHEMA_VERSION, *sorted(set(LATER.values()) - {SCHEMA_VERSION}))
PRIORITIES = range(-5, 6)  # as enqueue.lua counts them


STEPS_DONE = "steps"  # beside the previews of a running job: how many of its network calls are done


class PayloadError(ValueError):
    """A payload that this version cannot read."""


def lane(model: str, version: str, form: int = SCHEMA_VERSION) -> str:
    """The part of the queue that workers can serve which hold this model and version and read this form of jobs."""
    return f"{form}|{model}|{version}"


def readable_lanes(of: str) -> tuple[str, ...]:
    """All lanes that workers of this release serve if they serve lane ``of``."""
    names = of.partition("|")[2]
    return tuple(f"{form}|{names}" for form in READABLE)


def shape(height: int, width: int, frames: int, steps: int) -> str:
    """The part of a batch key that follows the lane; a picture has 0 frames."""
    return f"{height}x{width}{f'x{frames}' if frames else ''}|{steps}"


@dataclass(frozen=True)
class Job:
    """One request: ``len(seeds)`` images of one prompt.

    Of each image ``candidates`` are drawn, with ``candidate_seeds[image]`` (empty: the image's own seed), and the one
    that the scorer ``rank_by`` likes best is kept. With ``min_reward`` (a standardised score, or "p20": that percentile
    of the student's own) they are drawn one after the other until one is that good, then others at the next step count
    of ``cascade``; ``steps`` is the first. See ``rounds``.

    ``key`` is the id of its owner's API key. ``quality`` is that of JPEG and WebP (None: the default). ``previews`` is
    how many previews of each unfinished image are wanted. ``traceparent`` is the W3C header of the span that sent it
    (empty: none). ``frames`` (0: it asks for pictures) and ``fps`` are those of videos.
    ``pair`` is set if it is half of a canary's pair, whose pictures are sent to nobody: model|epoch|pair|side.
    ``may_train``: whoever asked allows that its prompt trains later students.
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
    quality: int | None = None
    response_format: str = "b64_json"
    previews: int = 0
    priority: int = 0
    user: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""
    traceparent: str = ""
    candidates: int = 1
    candidate_seeds: tuple[tuple[int, ...], ...] = ()
    rank_by: str = ""
    min_reward: float | str | None = None
    cascade: tuple[int, ...] = ()
    frames: int = 0
    fps: int = 0
    pair: str = ""
    may_train: bool = False

    @property
    def form(self) -> int:
        """The lowest form that can express all that this job asks for."""
        return max([SCHEMA_VERSION, *(LATER[name] for name in self._later())])

    @property
    def lane(self) -> str:
        return lane(self.model, self.version, self.form)

    @property
    def images(self) -> int:
        """The pictures that are drawn for it: each image has so many candidates. Those of the first round, if there is
        a ``min_reward``: whether there is another one, nobody knows yet."""
        return len(self.seeds) * (self.candidates if self.min_reward is None else 1)

    @property
    def shape(self) -> str:
        """What jobs of a batch share besides the lane: never the prompt, seed, output format or owner."""
        return shape(self.height, self.width, self.frames, self.steps)

    @property
    def cost(self) -> int:
        """Its cost, in thousands of pixel-steps."""
        return max(1, self.height * self.width * max(1, self.frames) * self.steps // 1000) * self.images

    def to_payload(self) -> str:
        """The job as it is stored. A newer field with its default is left out, since older releases refuse it."""
        silent = set(LATER) - set(self._later())
        stated = {name: value for name, value in asdict(self).items() if name not in silent}
        return json.dumps({"schema_version": self.form, **stated})

    @classmethod
    def from_payload(cls, payload: str) -> Job:
        """The job of a payload. What is missing has its default, and what this release does not know is left out.

        Raises:
            PayloadError: it asks for something that this release does not know, or is not a job.
        """
        known = {field.name for field in fields(cls)}
        try:
            data = json.loads(payload)
            if data["schema_version"] not in READABLE:
                raise PayloadError("the job was written by another version of the service")
            stated = {name: value for name, value in data.items() if name in known}
            lists: dict[str, Any] = {name: tuple(stated[name]) for name in ("seeds", "cascade") if name in stated}
            candidates = tuple(tuple(seeds) for seeds in stated.get("candidate_seeds", ()))
            found: dict[str, Any] = {**stated, **lists, "seeds": lists["seeds"], "candidate_seeds": candidates}
            return cls(**found)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise PayloadError("the job cannot be read") from error

    def _later(self) -> list[str]:
        """The fields of newer forms that differ from their defaults."""
        return [
            field.name for field in fields(self) if field.name in LATER and getattr(self, field.name) != field.default
        ]


@dataclass(frozen=True)
class QueueOptions:
    """How a job is to be queued.

    ``client`` is the id of an open connection that waits for it (empty: it will be fetched later). ``watched``: the
    process that accepted it wants all of its events, not only its end. ``idempotency`` is the digest of a client's
    Idempotency-Key and of the client (empty: none), ``body`` that of the request. ``webhook`` is what to send at its
    end. ``quota`` is the key's own, in thousands of pixel-steps a minute (None: the service's). ``solo``: it runs alone
    in its batch. ``key_pending`` is the most jobs of its key that may wait (0: no limit but the queue's).
    ``open_ended``: the client waits on its connection, and has not said for how long.
    """

    timeout_s: float
    client: str = ""
    watched: bool = False
    idempotency: str = ""
    body: str = ""
    webhook: str = ""
    quota: int | None = None
    solo: bool = False
    key_pending: int = 0
    open_ended: bool = False


@dataclass(frozen=True)
class Verdict:
    """The queue's answer to a job; ``id`` is the job to wait for.

    ``wait_s`` is the predicted wait of an accepted job, or after how long a refused one may be retried; 0 where nothing
    was measured yet. ``quota`` (0: none) and ``quota_left`` are in thousands of pixel-steps.
    """

    word: Literal["ok", "known", "attached", "mismatch", "quota", "full", "key_full", "late", "left", "gone"]
    id: str
    wait_s: float
    quota_left: int
    quota: int = 0


@dataclass(frozen=True)
class Position:
    """A waiting job's position: ``position`` jobs are ahead of it and take about ``wait_s`` (0: unknown)."""

    position: int
    wait_s: float


@dataclass(frozen=True)
class Claimed:
    """A job that a worker holds: ``token`` proves it, ``queue_s`` is how long it waited for this claim.

    ``best`` is what earlier rounds have left (empty: there was none).
    """

    id: str
    token: str
    payload: str
    attempts: int
    queue_s: float
    best: str = ""


@dataclass(frozen=True)
class Record:
    """A job as the queue knows it; ``result`` is what the worker left, empty before. Times are Unix times in seconds.

    ``result`` has the form of ``result.read_result``. ``short`` is set if the job is done with the pictures of an
    earlier round: why there are no better ones. ``idempotency``, ``body`` and ``webhook`` are as in ``QueueOptions``.
    ``key`` is who may see it, ``payload`` what was asked for. ``previews`` refers to those of unfinished images in the
    result store, by "number:image"; ``steps_done`` are the network calls of a running job, where its worker tells.
    ``giving_up``: it runs, and its worker has been asked to drop it. ``scoring`` is set if the scores come after the
    pictures: 'pending', 'done', 'lost' (with their worker) or 'skipped' (there were too many to score).
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
    steps_done: int = 0
    giving_up: bool = False
    short: str = ""
    idempotency: str = ""
    body: str = ""
    webhook: str = ""
    scoring: str = ""

    @property
    def settled(self) -> bool:
        """Whether it has ended, and nothing that belongs to it is still to come."""
        return self.terminal and self.scoring != "pending"

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def readable(self) -> bool:
        """Whether this version of the service can read the request."""
        try:
            return bool(self.job)
        except PayloadError:
            return False

    @cached_property
    def job(self) -> Job:
        """The job of the request.

        Raises:
            PayloadError: another version of the service wrote it.
        """
        return Job.from_payload(self.payload)
