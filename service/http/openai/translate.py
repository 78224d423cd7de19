"""Translation of OpenAI's requests into our own, and of finished jobs into OpenAI's form."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from service.errors import InvalidRequest, ServiceError
from service.http.generate import Caller
from service.http.openai.schema import ImageDatum, ImagesAnswer, ImagesRequest, InputDetails, Usage
from service.http.presentation import chosen, drawn_images, in_base64, public_fields, scoring_of, student_of
from service.http.schema import GenerateRequest
from service.http.services import Services
from service.models.choice import Choice, Served
from service.models.folder import Name
from service.queue.job import Job, Record
from student.bundle import Student

REFUSED = {
    "style": "style is not supported: describe it in the prompt.",
    "complexity": "complexity is not supported: a student has no planning step.",
    "frame_count": "frame_count is for gif, which is not supported.",
    "frame_duration_ms": "frame_duration_ms is for gif, which is not supported.",
}
CHOICE = ("best_of", "rank_by", "min_reward", "cascade")
SAME = (
    "prompt", "output_format", "output_compression", "response_format", "stream", "partial_images", "seed",
    "allow_training", *CHOICE,
)  # fmt: skip


def pick(choice: Choice, body: ImagesRequest) -> Served:
    """The student that the request names.

    Raises:
        NotFound, InvalidRequest: there is none, or it draws videos.
    """
    id, version = _model(body)
    served = choice.pick(id, version)
    if served.student.image.frames is not None:
        raise InvalidRequest(f"{served.student.id} generates videos: ask for them at /v1/videos.", "model")
    return served


def translated(body: ImagesRequest, served: Served, shows_steps: bool) -> GenerateRequest:
    """The request in our own form.

    Raises:
        InvalidRequest: it asks for something that no student can do.
    """
    for name, why in REFUSED.items():
        if getattr(body, name) is not None:
            raise InvalidRequest(why, name)
    if body.background == "transparent":
        raise InvalidRequest("background cannot be transparent: students generate opaque images.", "background")
    if body.output_format in ("gif", "svg"):
        raise InvalidRequest(
            f"output_format {body.output_format} is not supported: use png, jpeg or webp.", "output_format"
        )
    if body.partial_images and not body.stream:
        raise InvalidRequest("partial_images needs stream.", "partial_images")
    fields: dict[str, Any] = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    if not shows_steps:
        fields.pop("partial_images", None)  # OpenAI promises "at most"
    if body.n is not None:
        fields["n"] = body.n
    if body.size not in (None, "auto"):
        fields["size"] = body.size
    id, version = _model(body)
    user = body.safety_identifier or body.user
    return GenerateRequest(
        model=id, model_version=version, user=user, num_inference_steps=_steps(served.student, body), **fields
    )


def _model(body: ImagesRequest) -> tuple[str | None, str | None]:
    id, _, version = (body.model or "").partition("@")
    return id or None, version or None


def _steps(student: Student, body: ImagesRequest) -> int | None:
    if body.cascade is not None:  # says the step counts
        if body.quality not in (None, "auto"):
            raise InvalidRequest("cascade sets the step counts: send either quality or cascade.", "quality")
        return body.num_inference_steps
    if body.num_inference_steps is not None and body.quality not in (None, "auto"):
        raise InvalidRequest("quality sets the step count: send either quality or num_inference_steps.", "quality")
    if body.num_inference_steps is not None:
        return body.num_inference_steps
    counts = sorted(student.steps)
    if body.quality == "low":
        return counts[0]
    return counts[(len(counts) - 1) // 2] if body.quality == "medium" else counts[-1]


def quality_of(steps: int, student: Student | None) -> str:
    """The quality that a step count stands for; a student's only one is 'high'."""
    counts = sorted(student.steps) if student else [steps]
    return "high" if steps == counts[-1] else "low" if steps == counts[0] else "medium"


async def answer(services: Services, record: Record, caller: Caller) -> Response:
    """A job that is done, in OpenAI's form.

    Raises:
        ServiceError: an image has been deleted meanwhile.
    """
    job = record.job
    body = ImagesAnswer(
        id=record.id,
        created=int(record.created_s),
        data=[await _datum(services, record, k, caller.base_url) for k in range(len(record.result["images"]))],
        usage=usage(services, job, drawn_images(record)),
        floor=chosen(record)["floor"],
        scoring=scoring_of(record),
        **described(services, job),
    )
    applied = {"Preference-Applied": caller.preference.applied} if caller.preference.applied else {}
    return Response(body.model_dump_json(exclude_none=True), 200, applied, "application/json")


def described(services: Services, job: Job) -> dict[str, Any]:
    """The fields that OpenAI's responses give for all images."""
    student = student_of(services, job)
    size = f"{job.width}x{job.height}"
    return {"background": "opaque", "output_format": job.output_format, "quality": quality_of(job.steps, student),
            "size": size}  # fmt: skip


def usage(services: Services, job: Job, images: int) -> Usage:
    """The tokens of a prompt and of this many images; each latent patch is a token of the network."""
    served = services.models.choice.served.get(Name(job.model, job.version))
    text = served.count_tokens(job.prompt) if served else 0
    drawn = images * _patches(served.student) if served else 0
    details = InputDetails(text_tokens=text, image_tokens=0)
    return Usage(input_tokens=text, input_tokens_details=details, output_tokens=drawn, total_tokens=text + drawn)


def _patches(student: Student) -> int:
    latents = student.latents
    return latents.height * latents.width // latents.packing**2


async def _datum(services: Services, record: Record, index: int, base_url: str) -> ImageDatum:
    image = record.result["images"][index]
    fields = public_fields(ImageDatum, image)
    if record.job.response_format == "url":
        link = await services.links.to_image(base_url, record, index)
        return ImageDatum(url=link.url, **fields)
    return ImageDatum(b64_json=await in_base64(services, image["file"], image["sha256"]), **fields)


def as_openai(error: ServiceError) -> int:
    """The status that OpenAI's API uses for an error: its clients expect 400 for a wrong field."""
    return 400 if error.status == 422 else error.status
