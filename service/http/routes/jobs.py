"""What became of a job that was accepted before."""

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

JobId = Annotated[str, Path(description="The job's id, from its answer.")]
Index = Annotated[int, Path(ge=0, description="Which image, from 0.")]
LastEvent = Annotated[
    int | None, Header(alias="Last-Event-ID", ge=0, description="The number of the last event that was seen.")
]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED, description="How many at most.")]
Cursor = Annotated[str | None, Query(max_length=18, description="The next of the page before.")]
Statuses = Annotated[list[State] | None, Query(description="Only jobs in one of these states.", examples=[["queued"]])]
Everybodys = Annotated[bool, Query(alias="all", description="Everybody's jobs, for a key with the scope admin.")]
Expires = Annotated[int | None, Query(ge=0, description="Of a link: the time at which it stops working.")]
Signature = Annotated[str | None, Query(max_length=64, description="Of a link: what makes it work without a key.")]
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The bytes of the image.", "content": PICTURES},
    **PARTS,
    **error_responses(403, 404, 409, 422, 503),
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "The events after Last-Event-ID, up to done or error (or scored).", "content": EVENTS},
    204: {"description": "The last event was seen: there is nothing to reconnect for."},
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
    """The caller's own jobs that are still kept, newest first; with the scope admin also everybody's.

    Without keys they are listed for this machine only: whoever else may draw here sees the jobs whose ids it knows.
    """
    if not request.state.keyed:
        await operator(request)
    owner = key_of(request)
    if everybodys and (owner := owner_of(request) or "") != "":
        raise Forbidden("Everybody's jobs are for keys with the scope admin.")
    page = await page_of(services, owner or None, limit, cursor, status or ())
    jobs = [await _status(request, services, record) for record in page.records]
    return JobList(data=jobs, next=page.cursor or None)


@router.get("/{id}", responses=error_responses(404, 422, 503))
async def get_job(id: JobId, request: Request, services: WithServices) -> JobStatus:
    """A job as it is now: its place while it waits, its images when it is done, the reason if it failed."""
    return await _status(request, services, await _find(request, services, id))


@router.post("/{id}/cancel", responses=error_responses(404, 422, 503))
async def cancel_job(id: JobId, request: Request, services: WithServices) -> JobStatus:
    """Cancel a job, as often as you like: what has ended stays as it is, and a running job is dropped at its next step
    boundary (on a runtime that shows no steps: at the end of its batch)."""
    record = await _find(request, services, id)
    return await _status(request, services, await cancelled(services, record))


@router.post("/{id}/feedback", responses=error_responses(400, 404, 408, 409, 413, 415, 422, 503))
async def give_feedback(id: JobId, body: FeedbackRequest, request: Request, services: WithServices) -> FeedbackAnswer:
    """Say of an image whether it is used. The last word counts; it trains only where the request allowed it."""
    return await noted(services, await find(services, id, key_of(request)), body)


@router.get("/{id}/events", response_class=Response, responses=STREAM)
async def get_events(id: JobId, request: Request, services: WithServices, last_event_id: LastEvent = None) -> Response:
    """A job's life as server-sent events: queued (again whenever its place changes), started,
    image_generation.partial_image, image_generation.completed for each image, and done or error; where the scores come
    later than the pictures, scored after that.

    Numbers are fixed: whoever reconnects with Last-Event-ID misses nothing and gets nothing twice.
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
    """The bytes of one image of a job that is done, with X-Seed, X-Model-Version and X-Reward-Score headers.

    The links in answers (url) need no key: they hold a signature, and work until they expire.
    """
    if signature is None:
        return part_of(request, await image_of(services, await _find(request, services, id), k))
    await services.links.check(id, k, expires or 0, signature)
    return part_of(request, await image_of(services, await find(services, id, None), k))
