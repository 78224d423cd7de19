"""POST /v1/images/generations: for clients of OpenAI's API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service.http.caller import base_url_of, key_of
from service.http.generate import Caller, generate, shows_steps
from service.http.openai.events import OpenAIStream
from service.http.openai.schema import ImagesAnswer, ImagesRequest
from service.http.openai.translate import answer, pick, translated
from service.http.preferences import Preference
from service.http.responses import error_responses
from service.http.routes.images import EVENTS, IdempotencyKey
from service.http.services import WithServices

router = APIRouter(prefix="/v1/images", tags=["images"])

ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The images; with stream, events.", "content": EVENTS},
    **error_responses(400, 404, 408, 409, 413, 415, 429, 500, 503, 504),
}


@router.post("/generations", response_model=ImagesAnswer, responses=ANSWERS)
async def post_images(
    body: ImagesRequest, request: Request, services: WithServices, idempotency_key: IdempotencyKey = None
) -> Response:
    """Generate images as OpenAI's API does, for its clients: a wrong field gets a 400, as it does there.

    With stream: image_generation.partial_image, image_generation.completed, or error.
    """
    served = pick(services.models.choice, body)
    shown = bool(body.partial_images) and await shows_steps(services, served.name)
    caller = Caller(
        key=key_of(request),
        base_url=base_url_of(request, services.settings),
        request_id=request.state.request_id,
        preference=Preference(),
        idempotency_key=idempotency_key,
        highest_priority=request.state.highest_priority,
        render=answer,
        stream=OpenAIStream,
    )
    return await generate(services, translated(body, served, shown), caller, request.receive)
