"""POST /generate."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service.answers import GenerateResponse, error_responses
from service.caller import base_url_of, key_of
from service.generate import generate
from service.schema import MEDIA_TYPES, GenerateRequest
from service.services import Services

router = APIRouter(tags=["images"])

PICTURES = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images; with response_format file, the bytes of the one image.",
        "content": {**PICTURES},
    },
    **error_responses(400, 404, 413, 422, 500, 503, 504),
}


@router.post("/generate", response_model=GenerateResponse, responses=ANSWERS)
async def post_generate(body: GenerateRequest, request: Request) -> Response:
    """Draw images of a prompt, and wait for them."""
    services: Services = request.app.state.services
    return await generate(
        services,
        body,
        request.receive,
        key=key_of(request),
        base_url=base_url_of(request, services.settings),
        request_id=request.state.request_id,
        started=request.state.started,
    )
