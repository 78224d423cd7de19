"""Which models are served (OpenAI's form, with more about each), and the operator's part: load, promote, unload."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from service.http.access import operator
from service.http.models import AdminModels, Model, ModelList, ModelVersion, controller_of, describe, listed, retrieve
from service.http.responses import error_responses
from service.http.services import WithServices
from service.models.admin import load, promote, unload
from service.models.folder import Name

LONGEST_WAIT_S = 600.0
REFUSALS = error_responses(403, 404, 409, 422, 503)

public = APIRouter(prefix="/v1/models", tags=["models"])
admin = APIRouter(prefix="/admin/models", tags=["operation"], dependencies=[Depends(operator)])

Id = Annotated[str, Path(description="The model's id: its folder in FEWSTEP_MODELS.", examples=["shapes"])]
Version = Annotated[str, Path(description="The version: its folder in the model's.", examples=["1"])]
Wait = Annotated[
    float,
    Query(ge=0, le=LONGEST_WAIT_S, description="Seconds to wait for the workers; then 202, and they go on."),
]


@public.get("", responses=error_responses(503))
async def list_models(request: Request, services: WithServices) -> ModelList:
    """The models that are served, each with its versions. (OpenAI's list, with more fields.)"""
    return ModelList(data=await listed(services))


@public.get("/{model}", responses=error_responses(404, 422, 503))
async def get_model(
    model: Annotated[str, Path(description="Its id, or id@version.", examples=["shapes", "shapes@1"])],
    request: Request,
    services: WithServices,
) -> Model:
    """One model that is served."""
    return await retrieve(services, model)


@admin.get("", responses=error_responses(403, 409, 503))
async def list_all(request: Request, services: WithServices) -> AdminModels:
    """Every version in the directory: whether it is served, why it was refused, how many workers hold it."""
    controller = await controller_of(services)
    return AdminModels(data=[describe(version) for version in controller.versions()])


@admin.post(
    "/{model}/{version}/load",
    responses={202: {"model": ModelVersion, "description": "The workers still load it."}, **REFUSALS},
)
async def load_version(
    model: Id, version: Version, request: Request, services: WithServices, response: Response, wait_s: Wait = 120.0
) -> ModelVersion:
    """Load and warm a version on every worker. It is served once all of them hold it; what is served meanwhile stays.

    Its manifest, its files and its memory are checked first; if anything is against it, 422 says what.
    """
    found = await load(await controller_of(services), Name(model, version), wait_s)
    response.status_code = 200 if found.state == "serving" else 202
    return describe(found)


@admin.post("/{model}/{version}/promote", responses=REFUSALS)
async def promote_version(model: Id, version: Version, request: Request, services: WithServices) -> ModelVersion:
    """From now on this served version is the model's latest: the one that requests without a version get."""
    return describe(await promote(await controller_of(services), Name(model, version)))


@admin.post(
    "/{model}/{version}/unload",
    responses={202: {"model": ModelVersion, "description": "What was accepted is still being drawn."}, **REFUSALS},
)
async def unload_version(
    model: Id, version: Version, request: Request, services: WithServices, response: Response, wait_s: Wait = 120.0
) -> ModelVersion:
    """Take no new request for a version, draw what was accepted, then drop it from memory.

    Neither the last model nor the promoted version of one that has others can be unloaded.
    """
    found = await unload(await controller_of(services), Name(model, version), wait_s)
    response.status_code = 202 if found.state == "unloading" else 200
    return describe(found)
