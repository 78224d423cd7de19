"""The bodies of OpenAI's video API (Sora's), and their translation: what its clients send and read."""

from __future__ import annotations

from email import message_from_bytes
from email.message import Message
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from service.errors import InvalidRequest, error_detail
from service.http.generate import Caller
from service.http.presentation import failure, progress_of
from service.http.schema import MAX_FPS, MAX_FRAMES, MAX_PROMPT_CHARS, SEED_LIMIT, GenerateRequest, Prompt, Strict
from service.http.services import Services
from service.http.videos import fps_of
from service.models.choice import Choice, Served
from service.queue.job import Record
from service.queue.states import State
from student.bundle import Student
from student.runtimes.lengths import frame_step

PREFIX = "video_"
FORM = "multipart/form-data"
STATUS = {State.QUEUED: "queued", State.RUNNING: "in_progress", State.DONE: "completed"}  # else failed
PASSED = ("size", "seed", "fps", "num_inference_steps")
REFERENCES = "input_reference is not supported: a student generates from text alone."


class VideosRequest(BaseModel):
    """What to draw, in OpenAI's words. A form's values are text, and so numbers may be, too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Prompt = Field(
        min_length=1,
        max_length=MAX_PROMPT_CHARS,
        description="What to generate, in words.",
        examples=["waves at sunset"],
    )
    model: str | None = Field(
        None, max_length=128, description="The id of a served student, or id@version. Default: the only one."
    )
    seconds: float | None = Field(
        None,
        gt=0,
        le=MAX_FRAMES,
        description="How long: as many whole latent frames as fit, and the first. Unset: the student's own length.",
        examples=["4"],
    )
    size: str | None = Field(
        None, pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$", description="WIDTHxHEIGHT. Unset: the student's own."
    )
    input_reference: Any = Field(None, description="Refused: a student generates from text alone.")
    seed: int | None = Field(None, ge=0, lt=SEED_LIMIT, description="Not OpenAI's (extra_body): see /generate.")
    fps: int | None = Field(None, ge=1, le=MAX_FPS, description="Not OpenAI's (extra_body): frames a second.")
    num_inference_steps: int | None = Field(
        None, ge=1, le=1000, description="Not OpenAI's (extra_body): a trained step count. Unset: the usual one."
    )


class VideoError(Strict):
    """Why a video could not be drawn."""

    code: str = Field(description="An identifier for programs.")
    message: str = Field(description="One sentence.")


class Video(Strict):
    """A video on its way, or done: then /v1/videos/{id}/content has the file."""

    id: str = Field(description="video_ and the job's id.")
    object: Literal["video"] = "video"
    status: str = Field(description="queued, in_progress, completed or failed.")
    progress: int = Field(description="Per cent of the network calls that are done.")
    created_at: int = Field(description="Unix time of acceptance, in seconds.")
    completed_at: int | None = Field(description="Unix time of its end, in seconds.")
    expires_at: int | None = Field(description="When it has ended: Unix time until which it is kept.")
    model: str
    prompt: str
    seconds: str = Field(description="How long it plays.")
    size: str
    error: VideoError | None
    remixed_from_video_id: str | None = Field(default=None, description="Always null.")


class VideoList(Strict):
    """Videos in order of creation."""

    object: Literal["list"] = "list"
    data: list[Video] = Field(description="The videos of this page.")
    first_id: str | None = Field(description="The id of the first; null if there is none.")
    last_id: str | None = Field(description="The id of the last: the value of after for the next page.")
    has_more: bool = Field(description="Whether there is a next page.")


class VideoDeleted(Strict):
    """A video that was deleted, with its file."""

    id: str = Field(description="The id of the video that was deleted.")
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = Field(default=True, description="Always true.")


async def read_body(request: Request) -> VideosRequest:
    """A request as JSON, or as the form that OpenAI's own client sends.

    Raises:
        RequestValidationError: a field is missing, unknown or wrong.
    """
    body = await request.body()
    kind = request.headers.get("content-type", "")
    try:
        if kind.partition(";")[0].strip().lower() == FORM:
            return VideosRequest.model_validate_strings(form_fields(kind, body))
        return VideosRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


def form_fields(kind: str, body: bytes) -> dict[str, str]:
    """The fields of a form by name; of a file its name.

    Raises:
        InvalidRequest: it is not a multipart form.
    """
    whole = message_from_bytes(b"Content-Type: " + kind.encode("latin-1") + b"\r\n\r\n" + body)
    if not whole.is_multipart():
        raise InvalidRequest("The body is not a multipart form: its Content-Type must name the boundary.")
    found: dict[str, str] = {}
    for part in [part for part in whole.walk() if part is not whole]:
        name = part.get_param("name", header="content-disposition")
        if not isinstance(name, str) or name in found:
            raise InvalidRequest("Each part of the form needs a name of its own.")
        found[name] = part.get_filename() or _text(part)
    return found


def _text(part: Message) -> str:
    payload = part.get_payload(decode=True)
    try:
        return payload.decode("utf-8") if isinstance(payload, bytes) else ""
    except UnicodeDecodeError:
        raise InvalidRequest("The fields of a form must be UTF-8 text.") from None


def pick_video(choice: Choice, body: VideosRequest) -> Served:
    """The student that the request names.

    Raises:
        NotFound, InvalidRequest: there is none, or it draws pictures.
    """
    id, _, version = (body.model or "").partition("@")
    served = choice.pick(id or None, version or None)
    if served.student.image.frames is None:
        raise InvalidRequest(f"{served.student.id} generates images: ask for them at /v1/images/generations.", "model")
    return served


def translated_video(body: VideosRequest, served: Served) -> GenerateRequest:
    """The request in our own form.

    Raises:
        InvalidRequest: it asks for something that no student can do.
    """
    if body.input_reference is not None:
        raise InvalidRequest(REFERENCES, "input_reference")
    fields = {name: value for name in PASSED if (value := getattr(body, name)) is not None}
    asked = GenerateRequest(
        prompt=body.prompt, model=served.student.id, model_version=served.student.version, **fields
    )  # fmt: skip
    if body.seconds is None:
        return asked
    frames = frames_in(served.student, body.seconds, fps_of(served.student, asked))
    if frames > MAX_FRAMES:
        raise InvalidRequest(
            f"seconds is {body.seconds:g}: that is {frames} frames, of {MAX_FRAMES} at most.", "seconds"
        )
    return asked.model_copy(update={"num_frames": frames})


def frames_in(student: Student, seconds: float, fps: int) -> int:
    """The first frame, and those of as many whole latent frames as play in that time."""
    fitting = int(round(seconds * fps, 6))  # 2.32 s at 50 a second are 116, and in floating point a little less
    step = frame_step(student)
    return 1 + fitting // step * step if step else max(1, fitting)


async def video_answer(services: Services, record: Record, caller: Caller) -> Response:
    """A job at any time of its life, in OpenAI's form of a video."""
    return Response(video_of(services, record).model_dump_json(), media_type="application/json")


def video_of(services: Services, record: Record) -> Video:
    """The same, as an object."""
    job, error = record.job, failure(record) if record.terminal else None
    detail = error_detail(error) if error else None
    return Video(
        id=PREFIX + record.id,
        status=STATUS.get(record.state, "failed"),
        progress=progress_of(record) or 0,
        created_at=int(record.created_s),
        completed_at=int(record.finished_s) if record.finished_s and record.state is State.DONE else None,
        expires_at=services.links.expires(record) if record.terminal else None,
        model=job.model,
        prompt=job.prompt,
        seconds=f"{job.frames / (job.fps or 1):.4g}",
        size=f"{job.width}x{job.height}",
        error=VideoError(code=detail["code"], message=detail["message"]) if detail else None,
    )


def job_id(video_id: str) -> str:
    """The job of a video's id."""
    return video_id.removeprefix(PREFIX)
