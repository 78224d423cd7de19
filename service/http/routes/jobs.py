"""What became of a job that was accepted before."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response

from service.http.caller import base_url_of, key_of
from service.http.events import END, NOTHING, EventStream
from service.http.jobs import cancelled, find, image_of, owned
from service.http.presentation import job_status
from service.http.responses import JobList, JobStatus, error_responses
from service.http.routes.images import EVENTS, PICTURES
from service.http.services import Services, WithServices
from service.queue.job import Record

router = APIRouter(prefix="/jobs", tags=["jobs"])
MOST_LISTED = 100

JobId = Annotated[str, Path(description="The job's id, as its answer told it.")]
Index = Annotated[int, Path(ge=0, description="Which image, from 0.")]
LastEvent = Annotated[
    int | None, Header(alias="Last-Event-ID", ge=0, description="The number of the last event that was seen.")
]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED, description="How many at most.")]
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The bytes of the image.", "content": PICTURES},
    **error_responses(404, 409, 422, 503),
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "The events after Last-Event-ID, up to done or error.", "content": EVENTS},
    204: {"description": "The last event was seen: there is nothing to reconnect for."},
    **error_responses(404, 422, 503),
}


async def _find(request: Request, services: Services, id: str) -> Record:
    return await find(services, id, key_of(request))


async def _status(request: Request, services: Services, record: Record) -> JobStatus:
    return await job_status(services, record, base_url_of(request, services.settings))


@router.get("", responses=error_responses(422, 503))
async def list_jobs(request: Request, services: WithServices, limit: Limit = 20) -> JobList:
    """The caller's own jobs that are still kept, newest first."""
    records = await owned(services, key_of(request), limit)
    return JobList(data=[await _status(request, services, record) for record in records])


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


@router.get("/{id}/events", response_class=Response, responses=STREAM)
async def get_events(id: JobId, request: Request, services: WithServices, last_event_id: LastEvent = None) -> Response:
    """A job's life as server-sent events: queued (again whenever its place changes), started,
    image_generation.partial_image, image_generation.completed for each image, and done or error.

    Numbers are fixed: whoever reconnects with Last-Event-ID misses nothing and is told nothing twice.
    """
    record = await _find(request, services, id)
    after = NOTHING if last_event_id is None else last_event_id
    if after >= END:
        return Response(status_code=204)
    return EventStream(services, record.id, base_url_of(request, services.settings), after=after)


@router.get("/{id}/images/{k}", response_class=Response, responses=PICTURE)
async def get_image(id: JobId, k: Index, request: Request, services: WithServices) -> Response:
    """The bytes of one image of a job that is done, with X-Seed, X-Model-Version and X-Reward-Score headers."""
    record = await _find(request, services, id)
    return await image_of(services, record, k)
