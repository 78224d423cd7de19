"""From a job's record to the response: JSON, or the bytes of an image."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel
from starlette.responses import Response

from service.errors import Cancelled, DeadlineExceeded, GenerationFailed, ServiceError, StoreUnavailable, error_detail
from service.http.responses import (
    Candidate,
    ErrorDetail,
    Floor,
    GeneratedImage,
    GenerateResponse,
    JobStatus,
    QueuePosition,
    Scoring,
    Timings,
)
from service.http.services import Services
from service.models.folder import Name
from service.queue.job import Job, Record
from service.queue.states import State
from service.results.formats import MEDIA_TYPES
from service.results.store import ResultMissing, ResultStore
from student.bundle import Student

log = logging.getLogger(__name__)


async def generated(services: Services, record: Record, base_url: str) -> GenerateResponse:
    """The response for a finished job: images in base64, or their URLs below ``base_url``.

    Raises:
        ServiceError: an image has been deleted meanwhile.
    """
    job, result = record.job, record.result
    inline = job.response_format != "url"
    return GenerateResponse(
        id=record.id,
        created=int(record.created_s),
        model=job.model,
        model_version=job.version,
        runtime=result["runtime"],
        batch_size=result["batch_size"],
        data=[await _image(services, record, k, base_url, inline) for k in range(len(result["images"]))],
        timings=timings(record),
        scoring=scoring_of(record),
        **chosen(record),
    )


def chosen(record: Record) -> dict[str, Any]:
    """How the pictures were chosen, where they were."""
    floor = record.result.get("floor")
    return {
        "rank_by": record.job.rank_by or None,
        "floor": Floor(**_known(Floor, floor)) if floor else None,
        "ended_by": record.short or None,
    }


def drawn_images(record: Record) -> int:
    """How many pictures were drawn for a job that is done, candidates among them."""
    return sum(len(image.get("candidates", ())) or 1 for image in record.result["images"])


async def job_status(services: Services, record: Record, base_url: str, show_key: bool = False) -> JobStatus:
    """The state of a job at any time, with the position of a waiting one. ``show_key``: with its owner's key.

    Raises:
        RedisError: the queue is out of reach.
    """
    job, result, done = record.job, record.result, record.state is State.DONE
    error = failure(record) if record.terminal else None
    return JobStatus(
        id=record.id,
        status=record.state.value,
        created=int(record.created_s),
        started=record.claimed_s,
        finished=record.finished_s,
        expires_at=services.links.expires(record) if record.terminal else None,
        key=record.key if show_key else None,
        model=job.model,
        model_version=job.version,
        prompt=job.prompt,
        seeds=list(job.seeds),
        user=job.user,
        metadata=dict(job.metadata),
        priority=job.priority,
        cancelling=record.giving_up,
        progress=progress_of(record),
        queue=await position_of(services, record),
        data=[await _linked(services, record, k, base_url) for k in range(len(job.seeds))] if done else [],
        runtime=result.get("runtime") if done else None,
        batch_size=result.get("batch_size") if done else None,
        timings=timings(record) if done else None,
        scoring=scoring_of(record),
        **chosen(record),
        error=ErrorDetail(**error_detail(error)) if error else None,
    )


def scoring_of(record: Record) -> Scoring | None:
    """Where the scores are that come later than the pictures; None if none do."""
    known: tuple[Scoring, ...] = get_args(Scoring)
    return next((word for word in known if word == record.scoring), None)


def progress_of(record: Record) -> int | None:
    """Per cent of a video's network calls that are done; None for pictures."""
    if not record.job.frames:
        return None
    if record.state is State.DONE:
        return 100
    return record.steps_done * 100 // record.job.steps if record.state is State.RUNNING else 0


async def position_of(services: Services, record: Record) -> QueuePosition | None:
    """A waiting job's position in the queue; None if it is not waiting.

    Raises:
        RedisError: the queue is out of reach.
    """
    if record.state is not State.QUEUED:
        return None
    found = await services.producer.position(record.id)
    return QueuePosition(position=found.position, predicted_wait_s=found.wait_s) if found else None


def timings(record: Record) -> Timings:
    """How long each stage of a finished job took."""
    total_s = (record.finished_s or record.created_s) - record.created_s
    return Timings(**_known(Timings, record.result["timings"]), total_s=total_s)


def failure(record: Record) -> ServiceError | None:
    """The error that a job ended with, or None if it is done."""
    if record.state is State.DONE:
        return None
    if record.state is State.EXPIRED:
        return DeadlineExceeded("The deadline passed before the image was ready.")
    if record.state is State.CANCELLED:
        return Cancelled("The job was cancelled.")
    error = record.result.get("error", {"code": "generation_failed", "message": "The image could not be generated."})
    return GenerationFailed(error["message"], code=error["code"])


async def image_file(services: Services, record: Record, index: int) -> Response:
    """The bytes of image ``index`` of a finished job, with its seed, model and reward in headers.

    Raises:
        ServiceError: it has been deleted meanwhile.
    """
    image, job = record.result["images"][index], record.job
    data = await read_image(services, image["file"], image["sha256"])
    headers = {
        "X-Seed": str(image["seed"]),
        "X-Model-Version": job.version,
        "Content-Disposition": f'inline; filename="{record.id}-{index}.{job.output_format}"',
        "ETag": f'"{image["sha256"]}"',
        "X-Content-Type-Options": "nosniff",
    }
    if image.get("below_floor"):
        headers["X-Below-Floor"] = "true"
    if (score := main_score(student_of(services, job), image["reward"])) is not None:
        headers["X-Reward-Score"] = f"{score:.6f}"
    return Response(data, media_type=MEDIA_TYPES[job.output_format], headers=headers)


async def read_image(services: Services, reference: str, sha256: str = "") -> bytes:
    """The stored bytes.

    Raises:
        ServiceError: they have been deleted.
    """
    try:
        return await asyncio.to_thread(_read_whole, services.results, reference, sha256)
    except ResultMissing:
        raise ServiceError("The image was generated, but its file no longer exists.", code="result_missing") from None
    except OSError as error:
        raise StoreUnavailable from error


def _read_whole(results: ResultStore, reference: str, sha256: str) -> bytes:
    """The bytes of an image, checked against the hash of what the worker stored.

    Raises:
        ResultMissing: they differ, or are gone.
    """
    data = results.get(reference)
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        log.error("the stored image %s was altered: %d bytes with another hash", reference, len(data))
        raise ResultMissing(reference)
    return data


async def in_base64(services: Services, reference: str, sha256: str = "") -> str:
    """The stored bytes as text."""
    return base64.b64encode(await read_image(services, reference, sha256)).decode("ascii")


def main_score(student: Student | None, reward: dict[str, float]) -> float | None:
    """The score of the scorer that the student was trained on, else of any other; None without scores."""
    scorers = student.scorers if student else {}
    trained = [name for name, scorer in scorers.items() if scorer.role == "trained" and name in reward]
    names = trained or sorted(reward)
    return reward[names[0]] if names else None


def student_of(services: Services, job: Job) -> Student | None:
    """The student of a job; None if it is no longer served."""
    served = services.models.choice.served.get(Name(job.model, job.version))
    return served.student if served else None


async def _image(services: Services, record: Record, index: int, base_url: str, inline: bool) -> GeneratedImage:
    if not inline:
        return await _linked(services, record, index, base_url)
    image = record.result["images"][index]
    return GeneratedImage(
        b64_json=await in_base64(services, image["file"], image["sha256"]), **public_fields(GeneratedImage, image)
    )


async def _linked(services: Services, record: Record, index: int, base_url: str) -> GeneratedImage:
    link = await services.links.to_image(base_url, record, index)
    fields = public_fields(GeneratedImage, record.result["images"][index])
    return GeneratedImage(url=link.url, expires_at=link.expires, **fields)


def public_fields(form: type[BaseModel], image: Mapping[str, Any]) -> dict[str, Any]:
    """What a client learns of a picture, as far as a form knows of it."""
    public = _known(form, image)
    if "candidates" in public:
        public["candidates"] = [Candidate(**_known(Candidate, one)) for one in public["candidates"]]
    return public


def _known(form: type[BaseModel], said: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this release knows; a worker of a later one may send more."""
    return {name: value for name, value in said.items() if name in form.model_fields}
