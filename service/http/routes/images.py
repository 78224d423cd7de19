"""POST /generate."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from service.http.caller import base_url_of, key_of
from service.http.generate import Caller, generate
from service.http.preferences import KEY_HEADER, read_preference
from service.http.responses import GenerateResponse, JobStatus, error_responses
from service.http.schema import GenerateRequest
from service.http.services import WithServices
from service.results.formats import MEDIA_TYPES

router = APIRouter(tags=["images"])


def _whole_number(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "integer"}}


PICTURES = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}
EVENT_NAMES = [
    "queued",
    "started",
    "progress",
    "image_generation.partial_image",
    "image_generation.completed",
    "done",
    "error",
]
EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "One event.",
            "properties": {
                "event": {"type": "string", "enum": EVENT_NAMES, "description": "The same as type in data."},
                "id": {"type": "string", "description": "Its number, for Last-Event-ID."},
                "data": {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "description": "The event's content, with its type.",
                },
            },
            "required": ["event", "data"],
        }
    }
}
RATE = {
    "X-RateLimit-Limit": _whole_number("The key's quota in thousands of pixel-steps a minute; absent without a quota."),
    "X-RateLimit-Remaining": _whole_number("How much of the quota is left."),
    "X-RateLimit-Reset": _whole_number("Seconds until the whole quota is available again."),
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images; with response_format file, the bytes of the one image; with stream, events.",
        "content": {**PICTURES, **EVENTS},
        "headers": RATE,
    },
    202: {
        "model": JobStatus,
        "description": "Accepted: with Prefer: respond-async, or after wait=N has passed. Location is the job's URL.",
        "headers": {
            "Location": {"schema": {"type": "string"}},
            "Preference-Applied": {"schema": {"type": "string"}},
            **RATE,
        },
    },
    **error_responses(400, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504),
}
Prefer = Annotated[
    list[str] | None,
    Header(
        description="respond-async: answer 202 at once. wait=N: answer 202 if it is not done after N seconds.",
        examples=["respond-async", "wait=10"],
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias=KEY_HEADER,
        description="A unique value of your own for this request. Sent again with the same body, it returns the same "
        "job, which outlives a lost connection for a while; with another body, 422.",
    ),
]


@router.post("/generate", response_model=GenerateResponse, responses=ANSWERS)
async def post_generate(
    body: GenerateRequest,
    request: Request,
    services: WithServices,
    prefer: Prefer = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Generate images from a prompt: wait for them, fetch them later, or stream their progress.

    If a waiting client disconnects, its job is cancelled (with an Idempotency-Key only after a while, so that a retry
    finds it); with Prefer: respond-async it may disconnect.
    """
    caller = Caller(
        key=key_of(request),
        base_url=base_url_of(request, services.settings),
        request_id=request.state.request_id,
        preference=read_preference(",".join(prefer or [])),
        idempotency_key=idempotency_key,
        highest_priority=request.state.highest_priority,
    )
    return await generate(services, body, caller, request.receive)
