"""The service's responses as types. Fields that a newer service adds are kept, not refused."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fewstep.errors import WrongUse

Status = Literal["queued", "running", "done", "failed", "cancelled", "expired"]
Scoring = Literal["pending", "done", "lost", "skipped"]  # where scores come after the pictures (FEWSTEP_SCORE=after)
Word = Literal["chosen", "rejected", "rerolled"]
FINAL: frozenset[Status] = frozenset({"done", "failed", "cancelled", "expired"})


class Lenient(BaseModel):
    """Frozen; unknown fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class Candidate(Lenient):
    """One picture that was generated for an image; the one with ``rank`` 1 was kept."""

    seed: int
    steps: int
    round: int
    rank: int
    reward: dict[str, float]


class Floor(Lenient):
    """The requested floor (``min_reward``, ``asked_score``), and the one in effect, which load may lower."""

    scorer: str
    min_reward: float | str
    asked_score: float
    score: float
    percentile: float | None = None
    lowered: bool = False


class Picture(Lenient):
    """One image, or one video, which also has ``num_frames`` and ``fps``.

    ``reward`` is the standardised score by scorer (0 is the teacher's mean); for a video the mean over its frames, of
    which ``worst_frame`` has the lowest, ``reward_worst``. If it was chosen (``best_of``, ``min_reward``), ``reported``
    are its scores by the scorers that did not choose it, and ``candidates`` are all pictures generated for it.
    """

    seed: int
    width: int
    height: int
    sha256: str
    reward: dict[str, float]
    num_frames: int | None = None
    fps: int | None = None
    reward_failed: list[str] | None = None
    reward_worst: dict[str, float] | None = None
    worst_frame: dict[str, int] | None = None
    b64_json: str | None = None
    url: str | None = None
    steps: int | None = None
    reported: dict[str, float] | None = None
    below_floor: bool | None = None
    candidates: list[Candidate] | None = None

    @property
    def data(self) -> bytes:
        """The bytes of the image file.

        Raises:
            WrongUse: the answer has an address instead; ``Client.image`` fetches it.
        """
        if self.b64_json is None:
            raise WrongUse("This answer has the image's address, not its bytes: fetch it with Client.image.")
        return base64.b64decode(self.b64_json)

    def save(self, path: str | Path) -> Path:
        """Write the image file; returns where."""
        path = Path(path)
        path.write_bytes(self.data)
        return path


class Timings(Lenient):
    """The time of each stage, in seconds."""

    queue_s: float
    inference_s: float
    score_s: float
    encode_s: float
    total_s: float


class Answer(Lenient):
    """The images of a request, in the order of their seeds."""

    id: str
    created: int
    model: str
    model_version: str
    runtime: str
    batch_size: int
    data: list[Picture]
    timings: Timings
    scoring: Scoring | None = None
    rank_by: str | None = None
    floor: Floor | None = None
    ended_by: str | None = None


class QueuePlace(Lenient):
    """``position`` jobs are ahead; they take about ``predicted_wait_s`` (0: not known yet)."""

    position: int
    predicted_wait_s: float


class Problem(Lenient):
    """Why a job has no images."""

    message: str
    code: str | None = None


class Job(Lenient):
    """A job in any state. Times are Unix times in seconds; ``key`` is shown to keys with the scope admin."""

    id: str
    status: Status
    created: int
    model: str
    model_version: str
    prompt: str
    seeds: list[int]
    user: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    priority: int = 0
    cancelling: bool = False
    progress: int | None = None
    queue: QueuePlace | None = None
    data: list[Picture] = Field(default_factory=list)
    runtime: str | None = None
    batch_size: int | None = None
    timings: Timings | None = None
    scoring: Scoring | None = None
    rank_by: str | None = None
    floor: Floor | None = None
    ended_by: str | None = None
    error: Problem | None = None
    started: float | None = None
    finished: float | None = None
    expires_at: int | None = None
    key: str | None = None

    @property
    def final(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self.status in FINAL


class Jobs(Lenient):
    """Jobs, newest first; ``next`` is the cursor of the next page."""

    data: list[Job]
    next: str | None = None


class Feedback(Lenient):
    """The recorded feedback on an image; ``trains``: its prompt may train later students."""

    id: str
    image: int
    feedback: Word
    trains: bool


class Model(Lenient):
    """A served student."""

    id: str


class Models(Lenient):
    """The served models."""

    data: list[Model]


class Event(Lenient):
    """One server-sent event of a job's life: queued, started, progress (of videos), image_generation.partial_image,
    image_generation.completed, done or error, and scored where that comes later. ``number`` is fixed for each event of
    a job; updates of a job's place in the queue and of its progress have none."""

    name: str
    number: int | None
    data: dict[str, Any]

    @property
    def picture(self) -> bytes | None:
        """The bytes of the image that came with the event, finished or not; None if none did."""
        encoded = self.data.get("b64_json")
        return base64.b64decode(encoded) if isinstance(encoded, str) else None
