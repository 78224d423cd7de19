"""The served models (OpenAI's list, with more fields), and the operator's routes: load, promote, unload."""

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
    Query(ge=0, le=LONGEST_WAIT_S, description="Seconds to wait for the workers; then 202, and they continue."),
]


@public.get("", responses=error_responses(503))
async def list_models(request: Request, services: WithServices) -> ModelList:
    """The served models, each with its versions. (OpenAI's list, with more fields.)"""
    return ModelList(data=await listed(services))


@public.get("/{model}", responses=error_responses(404, 422, 503))
async def get_model(
    model: Annotated[str, Path(description="Its id, or id@version.", examples=["shapes", "shapes@1"])],
    request: Request,
    services: WithServices,
) -> Model:
    """One served model."""
    return await retrieve(services, model)


@admin.get("", responses=error_responses(403, 409, 503))
async def list_all(request: Request, services: WithServices) -> AdminModels:
    """Every version in the directory: whether it is served, why it was refused, how many workers have loaded it."""
    controller = await controller_of(services)
    return AdminModels(data=[describe(version) for version in controller.versions()])


@admin.post(
    "/{model}/{version}/load",
    responses={202: {"model": ModelVersion, "description": "The workers are still loading it."}, **REFUSALS},
)
async def load_version(
    model: Id, version: Version, request: Request, services: WithServices, response: Response, wait_s: Wait = 120.0
) -> ModelVersion:
    """Load and warm up a version on every worker. It is served once all of them have loaded it; until then, what is
    served stays the same.

    Its manifest, files and memory are checked first; if one of them is wrong, 422 says which.
    """
    found = await load(await controller_of(services), Name(model, version), wait_s)
    response.status_code = 200 if found.state == "serving" else 202
    return describe(found)


@admin.post("/{model}/{version}/promote", responses=REFUSALS)
async def promote_version(model: Id, version: Version, request: Request, services: WithServices) -> ModelVersion:
    """Make this served version the model's latest: the one that requests without a version get."""
    return describe(await promote(await controller_of(services), Name(model, version)))


@admin.post(
    "/{model}/{version}/unload",
    responses={202: {"model": ModelVersion, "description": "Accepted jobs are still running."}, **REFUSALS},
)
async def unload_version(
    model: Id, version: Version, request: Request, services: WithServices, response: Response, wait_s: Wait = 120.0
) -> ModelVersion:
    """Accept no new requests for a version, finish the accepted ones, then free its memory.

    The last served model cannot be unloaded, nor the promoted version of a model that has others.
    """
    found = await unload(await controller_of(services), Name(model, version), wait_s)
    response.status_code = 202 if found.state == "unloading" else 200
    return describe(found)
