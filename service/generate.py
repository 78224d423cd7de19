"""A request for images, from its validation to its answer: check → job → enqueue and wait → answer."""

from __future__ import annotations

import asyncio
import logging
import time

from redis.exceptions import RedisError
from starlette.responses import Response
from starlette.types import Receive

from service.admission import check, new_job
from service.errors import DeadlineExceeded, GenerationFailed, QueueFull, Unavailable
from service.middleware import CLIENT_GONE
from service.presentation import generated, image_file
from service.queue.job import Job, Record, State
from service.schema import GenerateRequest
from service.services import Services

DRAIN_S = 1.0

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def generate(
    services: Services, body: GenerateRequest, receive: Receive, *, key: str, base_url: str, request_id: str,
    started: float,
) -> Response:  # fmt: skip
    """Answer a request; ``started`` is its arrival on the performance counter, ``key`` who asks.

    Raises:
        ServiceError: every reason not to answer with images.
    """
    check(services.student, body, services.count_tokens, services.settings.max_pixels)
    job = new_job(services.student, body, key, request_id)
    with services.metrics.inflight.track_inprogress():
        try:
            record = await finished(services, job, receive)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
    _raise_unless_done(record)
    if job.response_format == "file":
        return await image_file(services, record, 0)
    answer = await generated(services, record, base_url, time.perf_counter() - started)
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


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
