"""/v1/videos: for clients of OpenAI's API. (Our own are /generate and /jobs, for videos as for pictures.)"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response

from service.errors import InvalidRequest, NotFound, ServiceError
from service.http.access import operator
from service.http.caller import base_url_of, key_of, owner_of
from service.http.generate import Caller, generate
from service.http.jobs import cursor_of, erased, find, image_of, page_of
from service.http.openai.videos import (
    FORM,
    Video,
    VideoDeleted,
    VideoList,
    VideosRequest,
    job_id,
    pick_video,
    read_body,
    translated_video,
    video_answer,
    video_of,
)
from service.http.preferences import Preference
from service.http.ranges import PARTS, part_of
from service.http.responses import error_responses
from service.http.routes.images import IdempotencyKey
from service.http.routes.jobs import Limit
from service.http.services import Services, WithServices
from service.queue.job import Record

router = APIRouter(prefix="/v1/videos", tags=["videos"])

VideoId = Annotated[str, Path(description="The video's id, from its answer.", examples=["video_0123456789abcdef"])]
Variant = Annotated[
    Literal["video", "thumbnail", "spritesheet"], Query(description="video; there are no others, and they are refused.")
]
After = Annotated[str | None, Query(description="The id of the last video of the previous page.")]
Order = Annotated[Literal["asc", "desc"], Query(description="By the time of creation: asc is oldest first.")]
SCHEMA = VideosRequest.model_json_schema()
BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {kind: {"schema": SCHEMA} for kind in ("application/json", FORM)}}
}
FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}},
    **PARTS,
    **error_responses(400, 404, 409, 422, 503),
}


@router.post(
    "",
    response_model=Video,
    openapi_extra=BODY,
    responses=error_responses(400, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504),
)
async def post_video(request: Request, services: WithServices, idempotency_key: IdempotencyKey = None) -> Response:
    """Draw a video as OpenAI's API does: it is accepted at once, and asked for by its id until it is completed."""
    body = await read_body(request)
    served = pick_video(services.models.choice, body)
    caller = Caller(
        key=key_of(request),
        base_url=base_url_of(request, services.settings),
        request_id=request.state.request_id,
        preference=Preference(asynchronously=True),
        idempotency_key=idempotency_key,
        highest_priority=request.state.highest_priority,
        accepted=video_answer,
    )
    try:
        return await generate(services, translated_video(body, served), caller, request.receive)
    except ServiceError as error:
        error.param = "seconds" if error.param == "num_frames" else error.param
        raise


@router.get("", responses=error_responses(400, 403, 404, 422, 503))
async def list_videos(
    request: Request, services: WithServices, limit: Limit = 20, after: After = None, order: Order = "desc"
) -> VideoList:
    """The caller's own videos that are still kept, as OpenAI's API lists them.

    Without keys, only this machine can list them: other machines can read the videos whose ids they know.
    """
    if not request.state.keyed:
        await operator(request)
    cursor = cursor_of(await _find(request, services, after)) if after is not None else None
    page = await page_of(services, key_of(request), limit, cursor, _is_video, oldest_first=order == "asc")
    videos = [video_of(services, record) for record in page.records]
    first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
    return VideoList(data=videos, first_id=first, last_id=last, has_more=page.cursor != "")


@router.get("/{id}", responses=error_responses(404, 422, 503))
async def get_video(id: VideoId, request: Request, services: WithServices) -> Video:
    """A video as it is now."""
    return video_of(services, await _find(request, services, id))


@router.delete("/{id}", responses=error_responses(404, 409, 422, 503))
async def delete_video(id: VideoId, request: Request, services: WithServices) -> VideoDeleted:
    """Delete a video that has ended, before it expires: its file and its job."""
    await erased(services, await _find(request, services, id))
    return VideoDeleted(id=id)


@router.get("/{id}/content", response_class=Response, responses=FILE)
async def get_content(id: VideoId, request: Request, services: WithServices, variant: Variant = "video") -> Response:
    """The file of a video that is completed."""
    if variant != "video":
        raise InvalidRequest(f"variant {variant} is not kept: the video itself is.", "variant")
    return part_of(request, await image_of(services, await _find(request, services, id), 0))


@router.post("/{id}/{action}", include_in_schema=False)
async def refuse_action(id: str, action: str) -> Response:
    """What else OpenAI's clients may ask for."""
    raise InvalidRequest(f"{action[:40]} is not supported: a student generates from text alone, not from a video.")


async def _find(request: Request, services: Services, id: str) -> Record:
    record = await find(services, job_id(id), owner_of(request))
    if not _is_video(record):
        raise NotFound("There is no such video: this is a job of images.")
    return record


def _is_video(record: Record) -> bool:
    return record.readable and bool(record.job.frames)
