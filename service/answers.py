"""The bodies of answers, as clients see them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.schema import Strict


class GeneratedImage(Strict):
    """One image and where it came from."""

    b64_json: str | None = Field(None, description="The bytes of the image in base64, with response_format b64_json.")
    url: str | None = Field(None, description="Where the bytes of the image are, with response_format url.")
    seed: int = Field(description="Posting this seed alone gives the same bytes.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    sha256: str = Field(description="Hash of the image's bytes.")
    reward: dict[str, float] = Field(description="Standardised score by scorer; 0 is the teacher's mean.")


class Timings(Strict):
    """Where the time went, in seconds. Batch mates share the times of inference and scoring."""

    queue_s: float = Field(description="From acceptance to the worker.")
    inference_s: float = Field(description="Drawing the batch.")
    score_s: float = Field(description="Scoring the batch.")
    encode_s: float = Field(description="Encoding and storing this request's images.")
    total_s: float = Field(description="From the request's arrival to its answer.")


class GenerateResponse(Strict):
    """The images, in the order of their seeds."""

    id: str = Field(description="The job's id.")
    created: int = Field(description="Unix time of the answer, in seconds.")
    model: str
    model_version: str
    runtime: str = Field(description="How the student was run.")
    batch_size: int = Field(description="Number of images in the largest call that this request rode in.")
    data: list[GeneratedImage]
    timings: Timings


class ErrorDetail(Strict):
    """What went wrong."""

    message: str = Field(description="One sentence.")
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The field that is wrong, if one is.")
    code: str = Field(description="A word for programs.")


class ErrorResponse(Strict):
    """The body of every answer that is not a success."""

    error: ErrorDetail
    request_id: str = Field(description="The answer's X-Request-ID header.")


MEANING = {
    400: "The body is not JSON.",
    404: "There is no such page, job, image or model.",
    409: "The job has not ended yet.",
    413: "The body is too large, or more pixels are asked for than one request may have.",
    422: "A field is missing, unknown or wrong; error.param names it.",
    500: "The picture could not be drawn.",
    503: "Too much work is waiting, or a part of the service is away; see the Retry-After header.",
    504: "The picture was not ready in time.",
}


def error_responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses`` for these status codes."""
    return {code: {"model": ErrorResponse, "description": MEANING[code]} for code in codes}
