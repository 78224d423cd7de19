"""The bodies of requests and responses, as clients see them. Everything is strict: no coercion, no unknown fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_PROMPT_CHARS = 1000
MAX_IMAGES = 10
SEED_LIMIT = 2**32
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def _not_blank(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("a prompt needs at least one word")
    return prompt


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class GenerateRequest(_Strict):
    """What to draw."""

    prompt: Annotated[str, AfterValidator(_not_blank)] = Field(
        min_length=1,
        max_length=MAX_PROMPT_CHARS,
        description="What to draw, in words.",
        examples=["a small red heart above a large blue star on a cream background"],
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=SEED_LIMIT,
        description="Where the noise comes from: the same prompt and seed give the same bytes. Unset: drawn, and told "
        "in the answer. Image k of a request uses (seed + k) mod 2^32.",
        examples=[7],
    )
    num_images_per_prompt: int = Field(1, ge=1, le=MAX_IMAGES, description="How many images of the prompt.")
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="Format of the images.")
    response_format: Literal["b64_json", "file"] = Field(
        "b64_json", description="b64_json: JSON with the images in base64. file: the bytes of the one image."
    )


class GeneratedImage(_Strict):
    """One image and where it came from."""

    b64_json: str = Field(description="The bytes of the image in base64.")
    seed: int = Field(description="Posting this seed alone gives the same bytes.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    sha256: str = Field(description="Hash of the image's bytes.")
    reward: dict[str, float] = Field(description="Standardised score by scorer; 0 is the teacher's mean.")


class Timings(_Strict):
    """Where the time went, in seconds. Batch mates share the times of inference and scoring."""

    queue_s: float = Field(description="From acceptance to the worker.")
    inference_s: float = Field(description="Drawing the batch.")
    score_s: float = Field(description="Scoring the batch.")
    encode_s: float = Field(description="Encoding and storing this request's images.")
    total_s: float = Field(description="From the request's arrival to its answer.")


class GenerateResponse(_Strict):
    """The images, in the order of their seeds."""

    id: str = Field(description="The job's id.")
    created: int = Field(description="Unix time of the answer, in seconds.")
    model: str
    model_version: str
    runtime: str = Field(description="How the student was run.")
    batch_size: int = Field(description="Number of images in the largest call that this request rode in.")
    data: list[GeneratedImage]
    timings: Timings


class ErrorDetail(_Strict):
    """What went wrong."""

    message: str = Field(description="One sentence.")
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The field that is wrong, if one is.")
    code: str = Field(description="A word for programs.")


class ErrorResponse(_Strict):
    """The body of every answer that is not a success."""

    error: ErrorDetail
    request_id: str = Field(description="The answer's X-Request-ID header.")


def error_responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses`` for these status codes."""
    meaning = {
        400: "The body is not JSON.",
        404: "There is no such page.",
        413: "The body is too large.",
        422: "A field is missing, unknown or wrong; error.param names it.",
        500: "The picture could not be drawn.",
        503: "Too much work is waiting, or a part of the service is away; see the Retry-After header.",
        504: "The picture was not ready in time.",
    }
    return {code: {"model": ErrorResponse, "description": meaning[code]} for code in codes}
