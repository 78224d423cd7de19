"""A request for images, from its validation to its answer: validate → job → enqueue and wait → answer."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
import uuid
from typing import Any

from redis.exceptions import RedisError
from starlette.responses import Response
from starlette.types import Receive

from service.errors import DeadlineExceeded, GenerationFailed, InvalidRequest, QueueFull, ServiceError, Unavailable
from service.middleware import CLIENT_GONE
from service.queue.job import Job, Record, State
from service.results import ResultMissing
from service.schema import MEDIA_TYPES, SEED_LIMIT, GeneratedImage, GenerateRequest, GenerateResponse, Timings
from service.services import Services
from student.bundle import Student

DRAIN_S = 1.0

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def generate(
    services: Services, body: GenerateRequest, receive: Receive, request_id: str, started: float
) -> Response:
    """Answer a request; ``started`` is its arrival on the performance counter.

    Raises:
        ServiceError: every reason not to answer with images.
    """
    validate(services, body)
    job = new_job(services.student, body, request_id)
    with services.metrics.inflight.track_inprogress():
        try:
            record = await finished(services, job, receive)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
    _raise_unless_done(record)
    images = [await _read(services, image["file"]) for image in record.result["images"]]
    if body.response_format == "file":
        return _file(services.student, body, job, record, images[0])
    return _json(job, record, images, time.perf_counter() - started)


def validate(services: Services, body: GenerateRequest) -> None:
    """What the types of the fields cannot say."""
    if body.response_format == "file" and body.num_images_per_prompt > 1:
        raise InvalidRequest(
            "response_format file answers one image: num_images_per_prompt must be 1.", param="num_images_per_prompt"
        )
    limit, count = services.student.max_tokens, services.count_tokens(body.prompt)
    if count > limit:
        raise InvalidRequest(f"prompt has {count} tokens; the student reads {limit} at most.", param="prompt")


def new_job(student: Student, body: GenerateRequest, request_id: str) -> Job:
    """The job of a request, with every seed drawn."""
    first = secrets.randbelow(SEED_LIMIT) if body.seed is None else body.seed
    return Job(
        id=uuid.uuid4().hex,
        model=student.id,
        version=student.version,
        height=student.image.height,
        width=student.image.width,
        steps=max(student.steps),
        prompt=body.prompt,
        seeds=tuple((first + k) % SEED_LIMIT for k in range(body.num_images_per_prompt)),
        output_format=body.output_format,
        request_id=request_id,
    )


async def finished(services: Services, job: Job, receive: Receive) -> Record:
    """Enqueue the job and wait for its end; whatever ends the waiting before that cancels the job.

    Raises:
        ClientGone, QueueFull, Unavailable, DeadlineExceeded
    """
    outcome = asyncio.create_task(services.replies.result(job, lambda: _enqueue(services, job)))
    gone = asyncio.create_task(_client_gone(receive))
    stopped = asyncio.create_task(_stopped(services))
    tasks = {outcome, gone, stopped}
    try:
        await asyncio.wait(tasks, timeout=services.settings.request_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if outcome.done():
            return outcome.result()
        why: Exception = DeadlineExceeded(f"Not done within {services.settings.request_timeout_s:g} s.")
        if gone.done():
            why = ClientGone()
        elif stopped.done():
            why = Unavailable("The service is stopping.")
        outcome.cancel()
        await asyncio.wait({outcome})
        await _cancel(services, job)
        raise why
    except RedisError as error:
        raise Unavailable("The queue is out of reach.") from error
    finally:
        for task in tasks:
            task.cancel()


async def _enqueue(services: Services, job: Job) -> None:
    if await services.producer.enqueue(job) == "full":
        raise QueueFull("Too many requests are waiting.")


async def _cancel(services: Services, job: Job) -> None:
    try:
        await services.producer.cancel(job.id)
    except RedisError as error:
        log.warning("job %s could not be cancelled: %s", job.id, error)


async def _client_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection. (The body has been read before.)"""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stopped(services: Services) -> None:
    await services.stopping.wait()
    await asyncio.sleep(DRAIN_S)


def _raise_unless_done(record: Record) -> None:
    if record.state is State.DONE:
        return
    if record.state is State.EXPIRED:
        raise DeadlineExceeded("The deadline passed before a worker was free.")
    error = record.result.get("error", {"code": "generation_failed", "message": "The job was cancelled."})
    raise GenerationFailed(error["message"], code=error["code"])


async def _read(services: Services, reference: str) -> bytes:
    try:
        return await asyncio.to_thread(services.results.get, reference)
    except ResultMissing:
        raise ServiceError("The picture was drawn, but its file is gone.", code="result_missing") from None


def _json(job: Job, record: Record, images: list[bytes], total_s: float) -> Response:
    told = record.result
    answer = GenerateResponse(
        id=job.id,
        created=int(time.time()),
        model=job.model,
        model_version=job.version,
        runtime=told["runtime"],
        batch_size=told["batch_size"],
        data=[_image(image, data) for image, data in zip(told["images"], images, strict=True)],
        timings=Timings(**told["timings"], total_s=total_s),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def _image(image: dict[str, Any], data: bytes) -> GeneratedImage:
    told = {name: value for name, value in image.items() if name != "file"}
    return GeneratedImage(b64_json=base64.b64encode(data).decode("ascii"), **told)


def _file(student: Student, body: GenerateRequest, job: Job, record: Record, data: bytes) -> Response:
    image = record.result["images"][0]
    headers = {
        "X-Seed": str(image["seed"]),
        "X-Model-Version": job.version,
        "Content-Disposition": f'inline; filename="{job.id}.{body.output_format}"',
    }
    if (score := main_score(student, image["reward"])) is not None:
        headers["X-Reward-Score"] = f"{score:.6f}"
    return Response(data, media_type=MEDIA_TYPES[body.output_format], headers=headers)


def main_score(student: Student, reward: dict[str, float]) -> float | None:
    """The score of the scorer that the student was trained on, or of any other, or None without one."""
    trained = [name for name, scorer in student.scorers.items() if scorer.role == "trained" and name in reward]
    names = trained or sorted(reward)
    return reward[names[0]] if names else None
