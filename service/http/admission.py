"""From a request to a job: the checks that field types cannot express. Pure, except for random seeds."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from service.errors import Forbidden, InvalidRequest, TooLarge
from service.http.quality import candidates_of, check_quality, first_steps, job_fields
from service.http.schema import SEED_LIMIT, GenerateRequest
from service.http.videos import check_kind, check_volume, format_of, fps_of, frames_of
from service.queue.job import Job
from student.bundle import Student
from student.runtimes.sizes import Size, SizeRange, own_size, refusal


def check(
    student: Student, body: GenerateRequest, count_tokens: Callable[[str], int], max_pixels: int,
    sizes: Sequence[Size] = (), scored: bool = True, size_range: SizeRange | None = None,
    max_video_pixels: int = 2**28,
) -> None:  # fmt: skip
    """Return if the student can draw this; ``sizes`` are those that it was compiled for beside its own, ``scored`` says
    whether the service computes scores.

    ``size_range`` are the other ones, where its runtime is not compiled for any.

    Raises:
        InvalidRequest, TooLarge: it cannot, and why; ``param`` names the field.
    """
    check_kind(student, body)
    _check_fields_together(student, body)
    most = max_pixels if student.image.frames is None else max_video_pixels
    _check_size(student, body, most, (own_size(student), *sizes), size_range)
    _check_student(student, body)
    check_quality(student, body, scored, size_of(student, body)[::-1])
    tokens = count_tokens(body.prompt)
    if tokens > student.max_tokens:
        raise InvalidRequest(f"prompt has {tokens} tokens: the student reads at most {student.max_tokens}.", "prompt")


def priority_of(body: GenerateRequest, highest: int) -> int:
    """The priority of a request whose caller may ask for ``highest``; one that names none gets what it may, up to 0.

    Raises:
        Forbidden: it asks for more.
    """
    if "priority" not in body.model_fields_set:
        return min(body.priority, highest)
    if body.priority > highest:
        message = f"priority is {body.priority}: you may ask for {highest} at most."
        raise Forbidden(message, "priority", code="priority_too_high")
    return body.priority


def new_job(
    student: Student, body: GenerateRequest, key: str, request_id: str, priority: int = 0, may_train: bool = False
) -> Job:
    """The job of a request that was checked, with every seed drawn; its id cannot be guessed.

    ``may_train``: what the key says, if the request does not.
    """
    width, height = size_of(student, body)
    seeds = _seeds(body)
    return Job(
        id=secrets.token_hex(16),
        key=key,
        model=student.id,
        version=student.version,
        height=height,
        width=width,
        steps=first_steps(student, body),
        prompt=body.prompt,
        seeds=seeds,
        output_format=format_of(student, body),
        quality=body.output_compression,
        response_format=body.response_format,
        previews=body.partial_images,
        priority=priority,
        user=body.user,
        may_train=may_train if body.allow_training is None else body.allow_training,
        metadata=dict(body.metadata or {}),
        frames=frames_of(student, body),
        fps=fps_of(student, body),
        request_id=request_id,
        **job_fields(student, body, seeds),
    )


def size_of(student: Student, body: GenerateRequest) -> tuple[int, int]:
    """(width, height) of each image in pixels."""
    if body.size is not None:
        width, _, height = body.size.partition("x")
        return int(width), int(height)
    return body.width or student.image.width, body.height or student.image.height


def _seeds(body: GenerateRequest) -> tuple[int, ...]:
    if isinstance(body.seed, list):
        return tuple(body.seed)
    first = secrets.randbelow(SEED_LIMIT) if body.seed is None else body.seed
    return tuple((first + k) % SEED_LIMIT for k in range(body.count))


def _check_fields_together(student: Student, body: GenerateRequest) -> None:
    given = body.model_fields_set
    if {"n", "num_images_per_prompt"} <= given:
        raise InvalidRequest("n is another name for num_images_per_prompt: send only one of them.", "n")
    if body.size is not None and not (body.width is None and body.height is None):
        raise InvalidRequest("size sets both width and height: send either size or width and height.", "size")
    if isinstance(body.seed, list) and len(body.seed) != body.count:
        raise InvalidRequest(f"seed has {len(body.seed)} entries for {body.count} images: send one each.", "seed")
    if body.response_format == "file" and body.count > 1:
        field = _count_field(body)
        raise InvalidRequest(f"response_format file returns one image: {field} must be 1.", field)
    if body.response_format == "file" and body.stream:
        raise InvalidRequest("response_format file and stream cannot be combined: choose one.", "response_format")
    if format_of(student, body) == "png" and body.output_compression is not None:
        raise InvalidRequest("output_compression is for jpeg and webp: png is lossless.", "output_compression")


def _check_size(
    student: Student, body: GenerateRequest, max_pixels: int, sizes: Sequence[Size], size_range: SizeRange | None
) -> None:
    width, height = size_of(student, body)
    sides = [name for name in ("size", "width", "height") if getattr(body, name) is not None]
    drawn = body.count * candidates_of(body)
    if student.image.frames is not None:
        check_volume(student, body, (height, width), drawn, max_pixels)
    elif width * height * drawn > max_pixels:
        raise TooLarge(
            f"{drawn} x {width}x{height} are {width * height * drawn} pixels; one request may ask for {max_pixels}.",
            sides[0] if sides else _count_field(body),
        )
    if (height, width) not in sizes and (size_range is None or (height, width) not in size_range):
        wrong = sides[0] if width != student.image.width else sides[-1]
        if size_range is not None:
            raise InvalidRequest(f"{wrong} is {width}x{height}: {student.id} generates {size_range}.", wrong)
        raise InvalidRequest(f"{wrong}: {refusal(student.id, dict.fromkeys(sizes))}", wrong)


def _check_student(student: Student, body: GenerateRequest) -> None:
    if body.num_inference_steps not in (None, *student.steps):
        trained = ", ".join(map(str, sorted(student.steps)))
        raise InvalidRequest(
            f"num_inference_steps is {body.num_inference_steps}: {student.id} was trained for {trained}.",
            "num_inference_steps",
        )
    baked = student.baked.get("guidance_scale")
    if body.guidance_scale is not None and body.guidance_scale != baked:
        fixed = f"at {baked:g}" if baked is not None else "by training"
        raise InvalidRequest(
            f"guidance_scale cannot be chosen: the guidance of {student.id} is fixed {fixed}. Leave it out.",
            "guidance_scale",
        )
    if body.negative_prompt is not None:
        raise InvalidRequest(
            f"negative_prompt has no effect on {student.id}, which runs without the network pass that would read "
            "it. Leave it out.",
            "negative_prompt",
        )


def _count_field(body: GenerateRequest) -> str:
    given = [name for name in ("num_images_per_prompt", "n") if name in body.model_fields_set]
    return given[0] if given else "seed"
