"""The body of a request. Everything is strict: no coercion, no unknown fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag

from service.queue.job import PRIORITIES

MAX_PROMPT_CHARS = 32_000  # as OpenAI's; a student's own limit is in tokens
MAX_IMAGES = 10
MAX_SIDE_PX = 16384
MAX_PREVIEWS = 3
MAX_BEST_OF = 16
MAX_CASCADE = 8
MAX_FRAMES = 1024
MAX_FPS = 60
MAX_TIMEOUT_S = 3600
MAX_METADATA = 16
SEED_LIMIT = 2**32
EXAMPLE: dict[str, JsonValue] = {"prompt": "a small red heart above a large blue star on a cream background", "seed": 7}


def _not_blank(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("must contain at least one word")
    return prompt


Prompt = Annotated[str, AfterValidator(_not_blank)]


def _one_or_many(seed: Any) -> str:
    return "many" if isinstance(seed, list) else "one"


Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Seeds = Annotated[
    Annotated[Seed, Tag("one")] | Annotated[list[Seed], Field(min_length=1, max_length=MAX_IMAGES), Tag("many")],
    Discriminator(_one_or_many),
]


def _score_or_percentile(floor: Any) -> str:
    return "percentile" if isinstance(floor, str) else "score"


Floor = Annotated[
    Annotated[float, Field(allow_inf_nan=False), Tag("score")]
    | Annotated[str, Field(pattern=r"^p[1-9][0-9]?$"), Tag("percentile")],
    Discriminator(_score_or_percentile),
]
Cascade = Annotated[list[Annotated[int, Field(ge=1, le=1000)]], Field(min_length=2, max_length=MAX_CASCADE)]
WebhookEvent = Literal["job.done", "job.failed", "job.cancelled", "job.expired"]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class Strict(BaseModel):
    """No coercion, no unknown fields, no changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class GenerateRequest(Strict):
    """The images to generate, and the form of the response."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    prompt: Prompt = Field(
        min_length=1, max_length=MAX_PROMPT_CHARS, description="A description of the image.", examples=["a red heart"]
    )
    negative_prompt: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARS,
        description="Not supported: a few-step student runs without the second network pass that would read it.",
    )
    num_inference_steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Network calls for each image: one of the step counts the student was trained for. Default: the "
        "student's own.",
        examples=[4],
    )
    guidance_scale: float | None = Field(
        None,
        description="Refused unless it is the value that was distilled into the student's weights.",
    )
    width: int | None = Field(
        None, ge=1, le=MAX_SIDE_PX, description="In pixels. Default: the student's own width.", examples=[64]
    )
    height: int | None = Field(
        None, ge=1, le=MAX_SIDE_PX, description="In pixels. Default: the student's own height.", examples=[64]
    )
    size: str | None = Field(
        None,
        pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$",
        description="Width and height as WIDTHxHEIGHT.",
        examples=["64x64"],
    )
    seed: Seeds | None = Field(
        None,
        description="The seed of the noise: the same prompt and seed give the same bytes. Image k of a request uses "
        "(seed + k) mod 2^32; a list gives each image its own. Default: random; the response reports it.",
        examples=[7, [7, 21, 42]],
    )
    num_images_per_prompt: int = Field(
        1, ge=1, le=MAX_IMAGES, description="Number of images. Default: as many as there are seeds."
    )
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Another name for num_images_per_prompt.", examples=[2])
    best_of: int = Field(
        1,
        ge=1,
        le=MAX_BEST_OF,
        description="Number of candidates per image; the one with the highest score is kept. Each counts towards "
        "cost and quota. The kept one's seed alone gives the same bytes again.",
        examples=[4],
    )
    rank_by: str | None = Field(
        None,
        max_length=64,
        description="The scorer that chooses among candidates. Unset: the one that the student was trained on.",
        examples=["trained"],
    )
    min_reward: Floor | None = Field(
        None,
        description="The floor of each image's score by the scorer that chooses: a standardised score, or p1 to p99, a "
        "percentile of the student's own images at the first step count. Images below it, and only they, are generated "
        "again: best_of times, then at the next step count of cascade. Under load the floor falls; the answer says "
        "how far.",
        examples=["p20", 0.5],
    )
    cascade: Cascade | None = Field(
        None,
        description="Step counts that the student was trained for, in increasing order: every image is generated with "
        "the first, and images below min_reward are generated again, with another seed, at the next.",
        examples=[[2, 4, 8]],
    )
    model: str | None = Field(None, max_length=128, description="The id of a served student. Unset: the only one.")
    model_version: str | None = Field(
        None, max_length=128, description="One of its versions, or latest (the default).", examples=["latest"]
    )
    num_frames: int | None = Field(
        None,
        ge=1,
        le=MAX_FRAMES,
        description="Of a student of videos: frames of each video, of which the autoencoder takes 1 plus a multiple "
        "(Wan: of 4). Unset: the student's own length. A compiled student generates the lengths it was compiled for.",
    )
    fps: int | None = Field(
        None,
        ge=1,
        le=MAX_FPS,
        description="Of a student of videos: frames a second at which they are played. Unset: the student's own.",
    )
    output_format: Literal["png", "jpeg", "webp", "mp4"] | None = Field(
        None,
        description="Format of the images: png (also if unset), jpeg or webp; of videos: mp4 (H.264; also if unset) or "
        "webp (animated). Each file says in its metadata (XMP) that a model generated it, and which.",
    )
    output_compression: int | None = Field(
        None,
        ge=0,
        le=100,
        description="Quality of jpeg, webp and mp4: 100 is best, and lossless for animated webp. Unset: 95, and for "
        "mp4 one that shows no difference. png has none.",
        examples=[80],
    )
    response_format: Literal["b64_json", "url", "file"] = Field(
        "b64_json",
        description="b64_json: JSON with the images in base64. url: JSON with links, which work without a key for as "
        "long as the service keeps results. file: the bytes of a single image.",
    )
    priority: int = Field(
        0,
        ge=min(PRIORITIES),
        le=max(PRIORITIES),
        description="A higher priority goes first, by a bounded amount of work, so that no job starves. Within a "
        "priority, keys take turns. A key may be limited to less; without a limit of its own, keys without the "
        "scope admin may ask for at most 0.",
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="Deadline in seconds. A request that would have to wait longer is refused at once with 504, and "
        "a job that has not started by then never will. Default: the service's own setting.",
        examples=[30],
    )
    stream: bool = Field(
        False,
        description="Answer with server-sent events: queued, started, progress (of videos), "
        "image_generation.partial_image, "
        "image_generation.completed for each image, done (or error).",
    )
    partial_images: int = Field(
        0,
        ge=0,
        le=MAX_PREVIEWS,
        description="At most how many previews of each unfinished image to send; only on a runtime with previews, "
        "with stream or Prefer: respond-async.",
    )
    allow_training: bool | None = Field(
        None,
        description="Whether the prompt may be kept to train later students, if its images score low. Unset: as the "
        "API key says, else no. Neither user nor metadata is kept with it.",
    )
    user: str | None = Field(None, max_length=128, description="Your own name for the end user; returned with the job.")
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        None, max_length=MAX_METADATA, description="Your own notes; returned with the job.", examples=[{"page": "12"}]
    )

    webhook_url: str | None = Field(
        None,
        max_length=2048,
        description="An https URL that receives a signed message when the job has ended, if the operator has enabled "
        "webhooks. It may arrive twice, with the same webhook-id.",
        examples=["https://example.com/hook"],
    )
    webhook_events: list[WebhookEvent] | None = Field(
        None, min_length=1, max_length=4, description="Which outcomes to send. Default: all.", examples=[["job.done"]]
    )

    @property
    def count(self) -> int:
        """The number of images requested, by whichever field gives it."""
        if "num_images_per_prompt" in self.model_fields_set:
            return self.num_images_per_prompt
        if "n" in self.model_fields_set:
            return self.n
        return len(self.seed) if isinstance(self.seed, list) else 1
