"""The bodies of OpenAI's image API, as its clients write and read them.

All of its fields are known. One that asks for what a few-step student cannot do is refused with the reason, never
ignored; so is an unknown field.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from service.http.responses import LATE_SCORES, Candidate, Scoring
from service.http.responses import Floor as FloorInEffect
from service.http.schema import (
    EXAMPLE,
    MAX_BEST_OF,
    MAX_IMAGES,
    MAX_PREVIEWS,
    MAX_PROMPT_CHARS,
    Cascade,
    Floor,
    Prompt,
    Seeds,
    Strict,
)

Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]


class ImagesRequest(Strict):
    """A request for images, in OpenAI's form."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": EXAMPLE["prompt"], "n": 1, "size": "auto"}]})

    prompt: Prompt = Field(
        min_length=1, max_length=MAX_PROMPT_CHARS, description="A description of the image.", examples=["a red heart"]
    )
    model: str | None = Field(
        None, max_length=128, description="The id of a served student, or id@version. Default: the only one."
    )
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="Number of images. Default: 1.")
    size: str | None = Field(
        None,
        pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$",
        description="auto, or WIDTHxHEIGHT: one of the sizes that the student serves.",
        examples=["auto", "64x64"],
    )
    quality: Quality | None = Field(
        None,
        description="Selects a step count the student was trained for: low the fewest, medium one in the middle, "
        "anything else the most.",
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="b64_json (the default): the images in base64. url: their URLs."
    )
    output_format: Literal["png", "jpeg", "webp", "gif", "svg"] | None = Field(
        None, description="png (the default), jpeg or webp. gif and svg are refused."
    )
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp. Default: 95.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None,
        ge=0,
        le=MAX_PREVIEWS,
        description="With stream: at most how many previews to send. A runtime without previews sends none.",
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="Images are opaque: transparent is refused."
    )
    moderation: Literal["auto", "low"] | None = Field(None, description="Has no effect: there is no filter.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Refused: describe it in the prompt.")
    complexity: Literal["low", "medium", "high"] | None = Field(
        None, description="Refused: it has no effect on a student."
    )
    frame_count: int | None = Field(None, description="Refused: for gif only.")
    frame_duration_ms: int | None = Field(None, description="Refused: for gif only.")
    user: str | None = Field(None, max_length=128, description="Your own name for the end user; kept with the job.")
    safety_identifier: str | None = Field(None, max_length=128, description="The same; it takes precedence over user.")
    seed: Seeds | None = Field(
        None, description="Not OpenAI's (extra_body): see /generate. Default: random.", examples=[7]
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
    url: str | None = Field(None, description="The URL of the image, with response_format url.")
    seed: int = Field(description="Not OpenAI's: sent to /generate, it gives the same bytes.")
    reward: dict[str, float] = Field(description="Not OpenAI's: standardised score by scorer; 0 is the teacher's mean.")
    reward_percentile: dict[str, float] = Field(
        default_factory=dict,
        description="Not OpenAI's: percentage of the student's own images at these steps that score lower, by scorer.",
    )
    reward_failed: list[str] | None = Field(None, description="Not OpenAI's: as in /generate.")
    steps: int | None = Field(None, description="Not OpenAI's: its network calls; with best_of or min_reward.")
    reported: dict[str, float] | None = Field(None, description="Not OpenAI's: as in /generate.")
    below_floor: bool | None = Field(None, description="Not OpenAI's: as in /generate.")
    candidates: list[Candidate] | None = Field(None, description="Not OpenAI's: as in /generate.")


class InputDetails(Strict):
    """The kinds of tokens of a prompt."""

    text_tokens: int
    image_tokens: int


class Usage(Strict):
    """Tokens: those of the prompt, and the latent tokens of the images."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    total_tokens: int


class ImagesAnswer(Strict):
    """The images, in OpenAI's form."""

    id: str = Field(description="Not OpenAI's: the job's id (see /jobs).")
    created: int = Field(description="Unix time of acceptance, in seconds.")
    data: list[ImageDatum]
    background: Literal["opaque"] = "opaque"
    output_format: str
    quality: str = Field(description="low, medium or high: the rank of the step count among the student's own.")
    size: str
    usage: Usage
    floor: FloorInEffect | None = Field(None, description="Not OpenAI's: as in /generate.")
    scoring: Scoring | None = Field(None, description=f"Not OpenAI's. {LATE_SCORES}")
