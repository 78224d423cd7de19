"""What a request for a video may ask for: its frames, how fast they are played, and how long it may be."""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import InvalidRequest, TooLarge
from service.http.schema import GenerateRequest
from service.http.services import Services
from service.models.choice import Served
from service.queue.status import Worker
from service.results.formats import PICTURES, VIDEOS
from student.bundle import Student
from student.runtimes.lengths import Lengths, compiled_lengths, frame_step, read_lengths
from student.runtimes.sizes import Size, own_size, size_name

USUAL_FPS = 16  # of a student that does not say what it was trained at
ONLY_VIDEOS = ("num_frames", "fps")


def frames_of(student: Student, body: GenerateRequest) -> int:
    """How many frames each video has; 0 for pictures."""
    return (body.num_frames or student.image.frames) if student.image.frames is not None else 0


def fps_of(student: Student, body: GenerateRequest) -> int:
    """Frames that are shown in a second; 0 for pictures."""
    return (body.fps or student.image.fps or USUAL_FPS) if student.image.frames is not None else 0


def format_of(student: Student, body: GenerateRequest) -> str:
    """The format of the files."""
    return body.output_format or (VIDEOS if student.image.frames is not None else PICTURES)[0]


def check_kind(student: Student, body: GenerateRequest) -> None:
    """Return if the request asks for what the student draws: pictures, or videos.

    Raises:
        InvalidRequest: it asks for the other, or for a format that cannot hold it.
    """
    if student.image.frames is None:
        for name in ONLY_VIDEOS:
            if getattr(body, name) is not None:
                raise InvalidRequest(f"{name} is for videos, and {student.id} generates images. Leave it out.", name)
        if body.output_format not in (None, *PICTURES):
            raise InvalidRequest(
                f"output_format {body.output_format} is for videos, and {student.id} generates images: "
                f"use {_listed(PICTURES)}.",
                "output_format",
            )
    elif format_of(student, body) not in VIDEOS and frames_of(student, body) > 1:
        raise InvalidRequest(
            f"output_format {body.output_format} holds a single image, and {student.id} generates videos: "
            f"use {_listed(VIDEOS)}, or num_frames 1.",
            "output_format",
        )


def check_volume(student: Student, body: GenerateRequest, size: Size, drawn: int, most: int) -> None:
    """Return if the ``drawn`` videos of a request have together at most so many pixels.

    Raises:
        TooLarge: they have more, and how long they may be.
    """
    height, width = size
    frames, area = frames_of(student, body), height * width * drawn
    if frames * area <= most:
        return
    step = frame_step(student) or 1
    longest = 1 + (most // area - 1) // step * step
    hint = f"the longest that fits has {_frames(longest)}" if longest > 0 else "no length fits at this size"
    raise TooLarge(
        f"{drawn} x {size_name(size)} x {frames} frames are {frames * area} pixels; one request may ask for "
        f"{most}: {hint}.",
        "num_frames" if body.num_frames is not None or longest > 0 else None,
    )


async def check_length(services: Services, served: Served, body: GenerateRequest, size: Size) -> None:
    """Return if a worker draws videos of this length, or none is there to tell: one may yet come.

    Raises:
        InvalidRequest, TooLarge: none does, and what they draw.
        RedisError: the queue is out of reach.
    """
    frames, own = frames_of(served.student, body), served.student.image.frames
    if frames == 0 or (frames == own and size == own_size(served.student)):
        return
    known = lengths_of(await services.producer.workers(), str(served.name), size)
    if not known:
        step = frame_step(served.student)
        known = [Lengths(1, max(frames, 1), step)] if step else []
    if known and not any(frames in lengths for lengths in known):
        raise refusal(served.student.id, frames, size, widest(known))


def lengths_of(workers: Sequence[Worker], model: str, size: Size) -> list[Lengths]:
    """What each worker that holds a model says of this size."""
    said = [worker.models.get(model, {}).get("lengths", {}).get(size_name(size)) for worker in workers]
    return [lengths for one in said if (lengths := read_lengths(one)) is not None]


def widest(known: Sequence[Lengths]) -> Lengths:
    """What is said of several workers: all compiled lengths or, where one is not compiled, its longest."""
    free = [lengths for lengths in known if not lengths.compiled]
    if not free:
        return compiled_lengths(count for lengths in known for count in lengths.compiled)
    return max(free, key=lambda lengths: lengths.most)


def refusal(id: str, frames: int, size: Size, lengths: Lengths) -> InvalidRequest | TooLarge:
    """Why a length cannot be had, and which can."""
    if lengths.compiled:
        counts = [str(count) for count in lengths.compiled[:-1]] + [_frames(lengths.most)]
        message = f"num_frames is {frames}: {id} is served compiled, for videos of {_listed(counts)} and no others."
        return InvalidRequest(message, "num_frames")
    if frames > lengths.most:
        message = (
            f"num_frames is {frames}: the longest video of {size_name(size)} that fits into the memory here has "
            f"{_frames(lengths.most)}."
        )
        return TooLarge(message, "num_frames")
    near = [count for count in (frames - (frames - lengths.first) % lengths.step,) if count in lengths]
    near += [near[0] + lengths.step] if near and near[0] + lengths.step in lengths else []
    message = (
        f"num_frames is {frames}: {id} generates {_frames(lengths.first)} or a multiple of {lengths.step} more; "
        f"the nearest: {_listed([str(count) for count in near])}."
    )
    return InvalidRequest(message, "num_frames")


def _frames(count: int) -> str:
    return f"{count} frame{'s' if count != 1 else ''}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
