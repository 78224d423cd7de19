"""Jobs: listing, reading and cancelling them, their events and their images."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response

from service.errors import Forbidden
from service.http.access import operator
from service.http.caller import base_url_of, key_of, owner_of
from service.http.events import NOTHING, EventStream, last_of
from service.http.feedback import FeedbackAnswer, FeedbackRequest, noted
from service.http.jobs import cancelled, find, image_of, page_of
from service.http.presentation import job_status
from service.http.ranges import PARTS, part_of
from service.http.responses import JobList, JobStatus, error_responses
from service.http.routes.images import EVENTS, PICTURES
from service.http.services import Services, WithServices
from service.queue.job import Record
from service.queue.states import State

router = APIRouter(prefix="/jobs", tags=["jobs"])
MOST_LISTED = 100

JobId = Annotated[str, Path(description="The job's id, from the response that accepted it.")]
Index = Annotated[int, Path(ge=0, description="Which image, from 0.")]
LastEvent = Annotated[
    int | None, Header(alias="Last-Event-ID", ge=0, description="The number of the last event received.")
]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED, description="The most to list.")]
Cursor = Annotated[str | None, Query(max_length=18, description="The value of next in the previous page.")]
Statuses = Annotated[list[State] | None, Query(description="Only jobs in one of these states.", examples=[["queued"]])]
Everybodys = Annotated[bool, Query(alias="all", description="The jobs of all keys; needs the scope admin.")]
Expires = Annotated[int | None, Query(ge=0, description="Of a signed link: the time at which it expires.")]
Signature = Annotated[str | None, Query(max_length=64, description="Of a signed link: its signature.")]
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The bytes of the image.", "content": PICTURES},
    **PARTS,
    **error_responses(403, 404, 409, 422, 503),
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "The events after Last-Event-ID, up to done or error (or scored).", "content": EVENTS},
    204: {"description": "Last-Event-ID was the last event: there are no more."},
    **error_responses(404, 422, 429, 503),
}


async def _find(request: Request, services: Services, id: str) -> Record:
    return await find(services, id, owner_of(request))


async def _status(request: Request, services: Services, record: Record) -> JobStatus:
    show_key = owner_of(request) is None
    return await job_status(services, record, base_url_of(request, services.settings), show_key)


@router.get("", responses=error_responses(403, 422, 503))
async def list_jobs(
    request: Request,
    services: WithServices,
    limit: Limit = 20,
    cursor: Cursor = None,
    status: Statuses = None,
    everybodys: Everybodys = False,
) -> JobList:
    """The caller's own jobs that are still kept, newest first; with the scope admin also those of all keys.

    Without keys, only this machine can list them: other machines can read the jobs whose ids they know.
    """
    if not request.state.keyed:
        await operator(request)
    owner = key_of(request)
    if everybodys and (owner := owner_of(request) or "") != "":
        raise Forbidden("Listing the jobs of all keys needs a key with the scope admin.")
    page = await page_of(services, owner or None, limit, cursor, lambda record: not status or record.state in status)
    jobs = [await _status(request, services, record) for record in page.records]
    return JobList(data=jobs, next=page.cursor or None)


@router.get("/{id}", responses=error_responses(404, 422, 503))
async def get_job(id: JobId, request: Request, services: WithServices) -> JobStatus:
    """A job as it is now: its position while it waits, its images once it is done, the reason if it failed."""
    return await _status(request, services, await _find(request, services, id))


@router.post("/{id}/cancel", responses=error_responses(404, 422, 503))
async def cancel_job(id: JobId, request: Request, services: WithServices) -> JobStatus:
    """Cancel a job. A job that has ended is unchanged, and a running one is cancelled after the current step (on a
    runtime without previews: at the end of its batch)."""
    record = await _find(request, services, id)
    return await _status(request, services, await cancelled(services, record))


@router.post("/{id}/feedback", responses=error_responses(400, 404, 408, 409, 413, 415, 422, 503))
async def give_feedback(id: JobId, body: FeedbackRequest, request: Request, services: WithServices) -> FeedbackAnswer:
    """Say of an image whether it is used. The last word counts; it trains only where the request allowed it."""
    return await noted(services, await find(services, id, key_of(request)), body)


@router.get("/{id}/events", response_class=Response, responses=STREAM)
async def get_events(id: JobId, request: Request, services: WithServices, last_event_id: LastEvent = None) -> Response:
    """A job's progress as server-sent events: queued (again whenever its position changes), started,
    image_generation.partial_image, image_generation.completed for each image, and done or error; where the scores come
    later than the images, scored after that.

    Event numbers are fixed: a client that reconnects with Last-Event-ID misses nothing and gets nothing twice.
    """
    record = await _find(request, services, id)
    after = NOTHING if last_event_id is None else last_event_id
    if after >= last_of(record):
        return Response(status_code=204)
    stream = await services.streams.open(key_of(request))
    return EventStream(services, record.id, stream, base_url_of(request, services.settings), after=after)


@router.get("/{id}/images/{k}", response_class=Response, responses=PICTURE)
async def get_image(
    id: JobId, k: Index, request: Request, services: WithServices, expires: Expires = None, signature: Signature = None
) -> Response:
    """The bytes of one image of a finished job, with X-Seed, X-Model-Version and X-Reward-Score headers.

    The links in responses (url) need no key: they are signed, and work until they expire.
    """
    if signature is None:
        return part_of(request, await image_of(services, await _find(request, services, id), k))
    await services.links.check(id, k, expires or 0, signature)
    return part_of(request, await image_of(services, await find(services, id, None), k))
