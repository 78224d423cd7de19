"""What became of a job: its images."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from service.answers import error_responses
from service.caller import key_of
from service.jobs import find, image_of
from service.routes.images import PICTURES
from service.services import Services

router = APIRouter(tags=["jobs"])

JobId = Annotated[str, Path(description="The job's id, as its answer told it.")]
Index = Annotated[int, Path(ge=0, description="Which image, from 0.")]
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The bytes of the image.", "content": PICTURES},
    **error_responses(404, 409, 422, 503),
}


@router.get("/jobs/{id}/images/{k}", response_class=Response, responses=PICTURE)
async def get_image(id: JobId, k: Index, request: Request) -> Response:
    """The bytes of one image of a job that is done, with X-Seed, X-Model-Version and X-Reward-Score headers."""
    services: Services = request.app.state.services
    return await image_of(services, await find(services, id, key_of(request)), k)
