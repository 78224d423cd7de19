"""POST /generate."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service.generate import generate
from service.schema import GenerateRequest, GenerateResponse, error_responses
from service.services import Services

router = APIRouter(tags=["images"])

PICTURE = {"schema": {"type": "string", "format": "binary"}}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images; with response_format file, the bytes of the one image.",
        "content": {"image/png": PICTURE, "image/jpeg": PICTURE, "image/webp": PICTURE},
    },
    **error_responses(400, 413, 422, 500, 503, 504),
}


@router.post("/generate", response_model=GenerateResponse, responses=ANSWERS)
async def post_generate(body: GenerateRequest, request: Request) -> Response:
    """Draw images of a prompt, and wait for them."""
    services: Services = request.app.state.services
    state = request.state
    return await generate(services, body, request.receive, state.request_id, state.started)
