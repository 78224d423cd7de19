"""A request for images, from validation to response: check → job → enqueue → wait, accept or stream."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError
from starlette.responses import Response
from starlette.types import Receive

from service.errors import DeadlineExceeded, InvalidRequest, ModelGone, Unavailable
from service.http.admission import check, new_job, priority_of, size_of
from service.http.caller import client_gone, job_url
from service.http.events import EventStream, Leave
from service.http.jobs import find
from service.http.middleware import CLIENT_GONE
from service.http.preferences import Preference, digest, idempotency
from service.http.presentation import failure, generated, image_file, job_status
from service.http.schema import GenerateRequest
from service.http.services import Services, ending
from service.http.submission import Submission
from service.http.tasks import end
from service.http.videos import check_length
from service.http.webhooks import webhook_of
from service.models.choice import Served
from service.models.folder import Name
from service.observe.context import ANONYMOUS, current_request
from service.queue.job import Job, QueueOptions, Record
from service.queue.states import State
from service.queue.status import WorkerState
from student.runtimes.sizes import SizeRange, own_size

CHANGES = 3  # how often the served version may change while one request is accepted

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client has disconnected."""


class StillWaiting(Exception):
    """The client's wait is over; it will fetch the job later."""


async def own_form(services: Services, record: Record, caller: Caller) -> Response:
    """The response of /generate for a finished job."""
    applied = {"Preference-Applied": caller.preference.applied} if caller.preference.applied else {}
    if record.job.response_format == "file":
        response = await image_file(services, record, 0)
        response.headers.update(applied)
        return response
    answer = await generated(services, record, caller.base_url)
    return Response(answer.model_dump_json(exclude_none=True), 200, applied, "application/json")


async def own_status(services: Services, record: Record, caller: Caller) -> Response:
    """202: a job that was accepted, as it is now, and where to ask for it."""
    status = await job_status(services, record, caller.base_url)
    headers = {"Location": job_url(services.settings, record.id), "Preference-Applied": caller.preference.applied}
    return Response(status.model_dump_json(), 202, headers, "application/json")


Render = Callable[[Services, Record, "Caller"], Awaitable[Response]]


@dataclass(frozen=True)
class Caller:
    """Who asks, and how the answer is wanted. ``idempotency_key`` is the header as it came, ``highest_priority`` what
    the caller may ask for.

    ``render``, ``accepted`` and ``stream`` put the answer into a form: our own, or another API's.
    """

    key: str
    base_url: str
    request_id: str
    preference: Preference
    idempotency_key: str | None
    highest_priority: int
    render: Render = own_form
    accepted: Render = own_status
    stream: type[EventStream] = EventStream


async def generate(services: Services, body: GenerateRequest, caller: Caller, receive: Receive) -> Response:
    """Answer a request.

    Raises:
        ServiceError: every reason not to answer with images, a job or a stream.
    """
    for _ in range(CHANGES):
        try:
            return await _generate(services, body, caller, receive)
        except ModelGone:  # another version has been served since this process last asked
            await services.models.refresh()
    return await _generate(services, body, caller, receive)


async def _generate(services: Services, body: GenerateRequest, caller: Caller, receive: Receive) -> Response:
    served = services.models.choice.pick(body.model, body.model_version)
    size_range = await _size_range(services, served, body)
    limits = services.settings
    check(
        served.student,
        body,
        served.count_tokens,
        limits.max_pixels,
        served.sizes,
        limits.score != "off",
        size_range,
        limits.max_video_pixels,
    )
    await check_length(services, served, body, size_of(served.student, body)[::-1])
    await _check_manner(services, served, body, caller.preference)
    submission = _submission(services, served, body, caller)
    if body.stream:
        async with services.streams.unless_refused(caller.key) as stream:
            id = await submission.enqueue()
        leaving = _leaving(submission, id)
        return caller.stream(services, id, stream, caller.base_url, submission=submission, leaving=leaving)
    if caller.preference.asynchronously and not caller.preference.wait_s:
        return await _accepted(services, await submission.enqueue(), caller)
    with services.metrics.inflight.track_inprogress():
        try:
            record = await _finished(submission, caller.preference.wait_s, receive)
        except StillWaiting as waiting:
            return await _accepted(services, str(waiting), caller)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
    return await _answer(services, record, caller)


async def _check_manner(services: Services, served: Served, body: GenerateRequest, preference: Preference) -> None:
    """Check that the wanted kind of response fits the request."""
    later = preference.asynchronously or preference.wait_s is not None
    if body.stream and later:
        raise InvalidRequest("stream and the Prefer header cannot be combined: send only one of them.", "stream")
    if body.partial_images and not (body.stream or later):
        message = "partial_images needs stream or the header Prefer: respond-async."
        raise InvalidRequest(message, "partial_images")
    if body.partial_images and not await shows_steps(services, served.name):
        message = "partial_images is not available: the runtime runs all steps in one call and has no previews."
        raise InvalidRequest(message, "partial_images")


async def _size_range(services: Services, served: Served, body: GenerateRequest) -> SizeRange | None:
    """The sizes that every worker with this student draws beside those that have names; asked for others alone."""
    width, height = size_of(served.student, body)
    if (height, width) in (own_size(served.student), *served.sizes):
        return None
    workers = await services.producer.workers()
    found = [worker.sides_px(str(served.name)) for worker in workers if str(served.name) in worker.models]
    sides = [one for one in found if one is not None]
    if not sides or len(sides) < len(found):
        return None
    return SizeRange(sides[0]["multiple_px"], sides[0]["most_px"])


async def shows_steps(services: Services, name: Name) -> bool:
    """Whether a worker has previews of this student; True without workers, as one with previews may yet start."""
    workers = [each for each in await services.producer.workers() if each.state is not WorkerState.LOADING]
    return not workers or any(worker.shows(str(name)) for worker in workers)


def _submission(services: Services, served: Served, body: GenerateRequest, caller: Caller) -> Submission:
    settings, later = services.settings, caller.preference.asynchronously
    usual = settings.job_timeout_s if later or caller.preference.wait_s is not None else settings.request_timeout_s
    repeated = idempotency(caller.idempotency_key, caller.key)
    options = QueueOptions(
        timeout_s=body.timeout_s or usual,
        client="" if later else secrets.token_hex(8),
        watched=body.stream,
        idempotency=repeated,
        body=digest(body) if repeated else "",
        webhook=webhook_of(body, settings, caller.base_url),
        quota=_own_quota(),
        key_pending=0 if caller.key == ANONYMOUS else settings.key_pending,
        open_ended=not (later or body.timeout_s or repeated or body.stream) and caller.preference.wait_s is None,
    )
    return Submission(services, _job(served, body, caller), options)


def _job(served: Served, body: GenerateRequest, caller: Caller) -> Job:
    """The job, with what the caller's key allows and consents to."""
    info, priority = current_request.get(), priority_of(body, caller.highest_priority)
    may_train = bool(info and info.allow_training)
    return new_job(served.student, body, caller.key, caller.request_id, priority, may_train)


def _own_quota() -> int | None:
    """The quota of the caller's own key, or None."""
    info = current_request.get()
    return None if info is None or info.quota is None else max(1, round(info.quota * 1000))  # 0 would be no limit


async def _finished(submission: Submission, wait_s: int | None, receive: Receive) -> Record:
    """Enqueue the job and wait for its end.

    Raises:
        ClientGone, StillWaiting, ServiceError
    """
    replies, job = submission.services.replies, submission.job
    with replies.news(job.id) as news:
        id = await submission.enqueue()
        if id == job.id:
            ended = replies.ended(id, news, submission.enqueue)
            return await _attend(submission, id, ended, wait_s, receive)
    with replies.news(id) as news:
        ended = replies.ended(id, news, submission.enqueue, check_first=True)
        return await _attend(submission, id, ended, wait_s, receive)


async def _attend(
    submission: Submission, id: str, ended: Awaitable[Record], wait_s: int | None, receive: Receive
) -> Record:
    """Wait for a job's end; if the wait ends earlier, the queue is notified."""
    services, options = submission.services, submission.options
    outcome = asyncio.ensure_future(ended)
    gone = asyncio.create_task(client_gone(receive))
    stopped = asyncio.create_task(ending(services))
    tasks: set[asyncio.Future[Any]] = {outcome, gone, stopped}
    limit_s = options.timeout_s if wait_s is None else min(wait_s, options.timeout_s)
    try:
        await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if outcome.done():
            return outcome.result()
        if gone.done():
            await _leaving(submission, id)(False)
            raise ClientGone
        if stopped.done():
            await _leaving(submission, id)(True)
            where = job_url(services.settings, id)
            message = f"The service is stopping, and the job will continue: ask for {where} later."
            raise Unavailable(message, headers={"Location": where})
        if wait_s is not None and wait_s < options.timeout_s:
            await _notify(services.producer.detach(id, options.client))
            raise StillWaiting(id)
        if id == submission.job.id:
            if (
                await _notify(services.producer.cancel(id, "expired")) == State.DONE
            ):  # with what earlier rounds have drawn
                return (await services.producer.records([id]))[id]
        else:  # a job that this request was attached to has a deadline of its own
            await _leaving(submission, id)(False)
        raise DeadlineExceeded(f"The image was not ready within {options.timeout_s:g} s.")
    finally:
        await end(tasks)


def _leaving(submission: Submission, id: str) -> Leave:
    """What to do when the client that waits for a job disconnects; other clients' jobs are not affected."""
    services, options = submission.services, submission.options
    grace_s = services.settings.retry_grace_s if options.idempotency else 0.0

    async def leave(stopping: bool) -> None:
        """``stopping``: the service is stopping, and the client will ask again."""
        if options.client and stopping:
            await _notify(services.producer.detach(id, options.client))
        elif options.client:
            await _notify(services.producer.leave(id, options.client, grace_s))

    return leave


async def _notify(call: Awaitable[object]) -> object:
    """What the queue answers; None if it is away."""
    try:
        return await call
    except RedisError as error:
        log.warning("the queue could not be notified that the client has gone: %s", error)
        return None


async def _accepted(services: Services, id: str, caller: Caller) -> Response:
    """The job as it is now, in the caller's form."""
    return await caller.accepted(services, await find(services, id, caller.key), caller)


async def _answer(services: Services, record: Record, caller: Caller) -> Response:
    """200 for a job that is done.

    Raises:
        ServiceError: it ended otherwise.
    """
    if (error := failure(record)) is not None:
        raise error
    return await caller.render(services, record, caller)
