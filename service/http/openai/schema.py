"""The bodies of OpenAI's image API, as its clients write and read them.

All of its fields are known. One that would change the picture in a way that a few-step student cannot follow is refused
with the reason, never ignored; so is a field that nobody knows.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from service.http.responses import Candidate
from service.http.responses import Floor as FloorInEffect
from service.http.schema import (
    EXAMPLE,
    MAX_BEST_OF,
    MAX_IMAGES,
    MAX_PREVIEWS,
    MAX_PROMPT_CHARS,
    Cascade,
    Floor,
    Seeds,
    Strict,
)

Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]


def not_blank(prompt: str) -> str:
    """The prompt.

    Raises:
        ValueError: there is nothing in it.
    """
    if not prompt.strip():
        raise ValueError("must contain at least one word")
    return prompt


class ImagesRequest(Strict):
    """What to draw, in OpenAI's words."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": EXAMPLE["prompt"], "n": 1, "size": "auto"}]})

    prompt: Annotated[str, AfterValidator(not_blank)] = Field(
        min_length=1, max_length=MAX_PROMPT_CHARS, description="What to draw, in words.", examples=["a red heart"]
    )
    model: str | None = Field(
        None, max_length=128, description="The id of a served student, or id@version. Unset: the only one."
    )
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="How many images. Unset: 1.")
    size: str | None = Field(
        None,
        pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$",
        description="auto, or WIDTHxHEIGHT: the student's own size and no other.",
        examples=["auto", "64x64"],
    )
    quality: Quality | None = Field(
        None,
        description="Becomes a step count that the student was trained for: low the least, medium one in the middle, "
        "everything else the most.",
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="b64_json (also if unset): the images in base64. url: their addresses."
    )
    output_format: Literal["png", "jpeg", "webp", "gif", "svg"] | None = Field(
        None, description="png (also if unset), jpeg or webp. gif and svg are refused."
    )
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp. Unset: 95.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None,
        ge=0,
        le=MAX_PREVIEWS,
        description="With stream: how many previews to send, at most. A runtime that shows no steps sends none.",
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="Images are opaque: transparent is refused."
    )
    moderation: Literal["auto", "low"] | None = Field(None, description="Has no effect: there is no filter.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Refused: say it in the prompt.")
    complexity: Literal["low", "medium", "high"] | None = Field(
        None, description="Refused: it has no effect on a student."
    )
    frame_count: int | None = Field(None, description="Refused: for gif only.")
    frame_duration_ms: int | None = Field(None, description="Refused: for gif only.")
    user: str | None = Field(None, max_length=128, description="Your own name for the user; kept with the job.")
    safety_identifier: str | None = Field(None, max_length=128, description="The same; it takes precedence over user.")
    seed: Seeds | None = Field(
        None, description="Not OpenAI's (extra_body): see /generate; without it, seeds are drawn.", examples=[7]
    )
    num_inference_steps: int | None = Field(
        None, ge=1, le=1000, description="Not OpenAI's (extra_body): a trained step count, instead of quality."
    )
    best_of: int = Field(1, ge=1, le=MAX_BEST_OF, description="Not OpenAI's (extra_body): see /generate.", examples=[4])
    rank_by: str | None = Field(None, max_length=64, description="Not OpenAI's (extra_body): see /generate.")
    min_reward: Floor | None = Field(
        None, description="Not OpenAI's (extra_body): see /generate.", examples=["p20", 0.5]
    )
    cascade: Cascade | None = Field(
        None, description="Not OpenAI's (extra_body), instead of quality: see /generate.", examples=[[2, 4, 8]]
    )
    allow_training: bool | None = Field(
        None, description="Not OpenAI's (extra_body): whether the prompt may train later students; see /generate."
    )


class ImageDatum(Strict):
    """One image."""

    b64_json: str | None = Field(None, description="The bytes of the image in base64.")
    url: str | None = Field(None, description="Where they are, with response_format url.")
    seed: int = Field(description="Not OpenAI's: sent to /generate, it gives the same bytes.")
    reward: dict[str, float] = Field(description="Not OpenAI's: standardised score by scorer; 0 is the teacher's mean.")
    reward_percentile: dict[str, float] = Field(
        default_factory=dict,
        description="Not OpenAI's: per cent of the student's own pictures at these steps that score lower, by scorer.",
    )
    steps: int | None = Field(None, description="Not OpenAI's: its network calls; with best_of or min_reward.")
    reported: dict[str, float] | None = Field(None, description="Not OpenAI's: as of /generate.")
    below_floor: bool | None = Field(None, description="Not OpenAI's: as of /generate.")
    candidates: list[Candidate] | None = Field(None, description="Not OpenAI's: as of /generate.")


class InputDetails(Strict):
    """What a prompt is made of."""

    text_tokens: int
    image_tokens: int


class Usage(Strict):
    """Tokens: those of the prompt, and those that the student's network computed of the images."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    total_tokens: int


class ImagesAnswer(Strict):
    """The images, in OpenAI's form."""

    created: int = Field(description="Unix time of acceptance, in seconds.")
    data: list[ImageDatum]
    background: Literal["opaque"] = "opaque"
    output_format: str
    quality: str = Field(description="low, medium or high: what the step count means for this student.")
    size: str
    usage: Usage
    floor: FloorInEffect | None = Field(None, description="Not OpenAI's: as of /generate.")
