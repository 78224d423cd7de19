"""The bodies of answers, as clients see them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.errors import STATUS, ServiceError, error_body
from service.http.schema import Strict


class Candidate(Strict):
    """One candidate generated for an image."""

    seed: int = Field(description="Posting this seed alone, with these steps, gives this image.")
    steps: int = Field(description="Its network calls.")
    round: int = Field(description="In which round it was generated, from 1.")
    rank: int = Field(description="Its place among the candidates of its image; the image is the one of rank 1.")
    reward: dict[str, float] = Field(description="As for the image.")
    reward_percentile: dict[str, float] = Field(default_factory=dict, description="As for the image.")
    reward_failed: list[str] | None = Field(None, description="The scorers that failed on it.")
    broken: bool | None = Field(None, description="true: its values are not finite, and it cannot be kept.")


class Floor(Strict):
    """The floor that decided which images were generated again."""

    scorer: str = Field(description="The scorer whose scores the floor applies to.")
    min_reward: float | str = Field(description="As it was sent.")
    asked_score: float = Field(description="The same as a standardised score.")
    score: float = Field(description="The floor in effect, when this was last decided: lower under load.")
    percentile: float | None = Field(description="The same as a percentile of the student's own images.")
    lowered: bool = Field(description="Whether load has lowered it.")
    utilization: float | None = Field(
        None,
        description="The share of the workers' time then taken by first rounds and by clearing the backlog; null if "
        "the load was not needed.",
    )


class GeneratedImage(Strict):
    """One image and how it was made."""

    b64_json: str | None = Field(None, description="The bytes of the image in base64, with response_format b64_json.")
    url: str | None = Field(
        None, description="URL of the image, with response_format url. Anyone who has the link can open it."
    )
    expires_at: int | None = Field(None, description="Unix time at which the link stops working, in seconds.")
    seed: int = Field(description="The seed that reproduces these bytes.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    num_frames: int | None = Field(None, description="Of a video.")
    fps: int | None = Field(None, description="Of a video: frames a second.")
    sha256: str = Field(description="Hash of the image's bytes.")
    reward: dict[str, float] = Field(description="Standardised score by scorer; 0 is the teacher's mean.")
    reward_percentile: dict[str, float] = Field(
        default_factory=dict,
        description="Percentage of the student's own images at these steps that score lower, by scorer.",
    )
    reward_failed: list[str] | None = Field(None, description="The scorers that failed on it and so give no score.")
    reward_worst: dict[str, float] | None = Field(
        None, description="Of a video, whose reward is the mean of its frames': that of the worst of them, by scorer."
    )
    worst_frame: dict[str, int] | None = Field(None, description="Of a video: which frame that is, from 0, by scorer.")
    steps: int | None = Field(None, description="Its network calls; with best_of or min_reward.")
    reported: dict[str, float] | None = Field(
        None,
        description="With best_of or min_reward: its score by the scorers that did not choose it, which "
        "alone are free of the choice.",
    )
    below_floor: bool | None = Field(
        None,
        description="With min_reward: true if nothing that was generated has reached the floor that was asked for.",
    )
    candidates: list[Candidate] | None = Field(
        None, description="With best_of or min_reward: all that was generated for it, in that order."
    )


EndedBy = Literal["expired", "cancelled", "failed"] | None
ENDED_BY = Field(
    None, description="What kept an image below its floor from being generated again; the images are the best so far."
)


class Timings(Strict):
    """How long each stage took, in seconds. Jobs of one batch share the times of inference and scoring."""

    queue_s: float = Field(description="From acceptance until a worker took it.")
    inference_s: float = Field(description="Generating the batch.")
    score_s: float = Field(description="Scoring the batch.")
    encode_s: float = Field(
        description="Encoding and storing this request's images, while they are scored where no score chooses."
    )
    total_s: float = Field(description="From acceptance to the end.")


LATE_SCORES = (
    "Where scores come after the images (FEWSTEP_SCORE=after): pending; done (reward has them); lost, with their "
    "worker; skipped, as too many images waited for theirs."
)
Scoring = Literal["pending", "done", "lost", "skipped"]


class GenerateResponse(Strict):
    """The images, in the order of their seeds."""

    id: str = Field(description="The job's id.")
    created: int = Field(description="Unix time of acceptance, in seconds.")
    model: str
    model_version: str
    runtime: str = Field(description="The runtime that ran the student.")
    batch_size: int = Field(description="Images in the largest runtime call that this request was part of.")
    data: list[GeneratedImage]
    timings: Timings = Field(description="How long each stage took.")
    scoring: Scoring | None = Field(None, description=LATE_SCORES)
    rank_by: str | None = Field(None, description="With best_of or min_reward: the scorer that chose.")
    floor: Floor | None = Field(None, description="With min_reward: the floor in effect.")
    ended_by: EndedBy = ENDED_BY


class ErrorDetail(Strict):
    """An error."""

    message: str = Field(description="One sentence.")
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"] = Field(
        description="The kind of error, as OpenAI classifies it."
    )
    param: str | None = Field(description="The name of the wrong field, if any.")
    code: str = Field(description="A stable identifier for programs.")


class QueuePosition(Strict):
    """A waiting job's position in the queue."""

    position: int = Field(description="Number of jobs ahead of it; jobs of a higher priority may still arrive.")
    predicted_wait_s: float = Field(description="How long those will take at the current rate; 0: not known yet.")


class JobStatus(Strict):
    """The state of a job."""

    id: str = Field(description="The job's id.")
    status: Literal["queued", "running", "done", "failed", "cancelled", "expired"] = Field(
        description="Its state; the last four are final."
    )
    created: int = Field(description="Unix time of acceptance, in seconds.")
    started: float | None = Field(description="Unix time at which a worker took it (for the last time), in seconds.")
    finished: float | None = Field(description="Unix time of its end, in seconds.")
    expires_at: int | None = Field(description="Once it has ended: Unix time until which it and its images are kept.")
    key: str | None = Field(description="The id of the API key it belongs to; shown to keys with the scope admin.")
    model: str
    model_version: str
    prompt: str
    seeds: list[int] = Field(description="One for each image, including random ones.")
    user: str | None = Field(description="As sent in the request.")
    metadata: dict[str, str] = Field(description="As sent in the request.")
    priority: int
    cancelling: bool = Field(description="It is still running, but will be dropped after the current step.")
    progress: int | None = Field(
        None, description="Of a video, per cent of its network calls that are done, where the runtime shows its steps."
    )
    queue: QueuePosition | None = Field(description="While it is queued.")
    data: list[GeneratedImage] = Field(description="When it is done: its images, each with its url.")
    runtime: str | None = Field(description="When it is done: how the student was run.")
    batch_size: int | None = Field(
        description="Once it is done: images in the largest runtime call that it was part of."
    )
    timings: Timings | None = Field(description="Once it is done: how long each stage took.")
    scoring: Scoring | None = Field(description=LATE_SCORES)
    rank_by: str | None = Field(None, description="With best_of or min_reward: the scorer that chooses.")
    floor: Floor | None = Field(None, description="When it is done, with min_reward: the floor in effect.")
    ended_by: EndedBy = ENDED_BY
    error: ErrorDetail | None = Field(description="Once it has failed, expired or been cancelled: why.")


class JobList(Strict):
    """Jobs, newest first."""

    data: list[JobStatus]
    next: str | None = Field(description="The cursor of the next page; null on the last page.")


class ErrorResponse(Strict):
    """The body of every answer that is not a success."""

    error: ErrorDetail
    request_id: str = Field(description="The value of the response's X-Request-ID header.")


MEANING = {
    400: "The body is not JSON.",
    401: "An API key is needed, or the one that was sent is not valid.",
    403: "The key lacks the scope for this.",
    404: "There is no such page, job, image or model.",
    408: "The body did not arrive in time.",
    409: "The job's state does not allow this: it has not ended yet, or it was cancelled.",
    413: "The body is too large, or the request asks for more pixels than allowed.",
    415: "The body is not JSON, or is compressed.",
    422: "A field is missing, unknown or wrong; error.param names it.",
    429: "The key has used up its quota, or has too many streams open; see the Retry-After header.",
    500: "The image could not be generated.",
    503: "Too many jobs are waiting, or a part of the service is unavailable; see the Retry-After header.",
    504: "The image was not ready in time, or could not have been; see the Retry-After header.",
}


def error_responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses`` for these status codes."""
    return {code: _error_response(code) for code in codes}


def _error_response(status: int) -> dict[str, Any]:
    words = [code for code, of in STATUS.items() if of == status]
    sample = ServiceError(MEANING[status], code=words[0])
    return {
        "model": ErrorResponse,
        "description": f"{MEANING[status]} (code: {' or '.join(words)})",
        "content": {"application/json": {"example": error_body(sample, "0123456789abcdef0123456789abcdef")}},
    }
