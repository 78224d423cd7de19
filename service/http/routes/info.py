"""What this service runs, and with which settings."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from service.configuration import effective
from service.http.responses import error_responses
from service.http.routes.probes import promptly
from service.http.schema import Strict
from service.http.services import WithServices

router = APIRouter(tags=["operation"])


class WorkerInfo(Strict):
    """A live worker."""

    host: str = Field(description="The machine that it runs on.")
    runtime: str = Field(description="The runtime of its student (of the first one, if it has several).")
    models: dict[str, Any] = Field(description="The same for each student that it has loaded, by id/version.")
    max_batch: int = Field(description="The most images in one call of the runtime.")
    shows_steps: bool = Field(description="Whether previews are available.")
    state: str = Field(description="loading, ready, paused or draining.")
    load_s: float = Field(description="How long loading took, in seconds, warm-up included.")
    warm_up_s: float = Field(description="How much of that was the warm-up, in seconds.")


class Info(Strict):
    """What this service runs."""

    model: str | None = Field(description="The default model of a request; null if none is served.")
    model_version: str | None
    workers: list[WorkerInfo] = Field(description="The live ones.")
    config: dict[str, Any] | None = Field(
        description="Every setting and its value, without secrets; null for a key without the scope admin."
    )


@router.get("/info", responses=error_responses(503))
async def info(request: Request, services: WithServices) -> Info:
    """What this service runs: the student, the runtime of each worker, and the effective configuration."""
    workers = await promptly(services.producer.workers())
    names = list(WorkerInfo.model_fields)
    served = services.models.choice.default()
    return Info(
        model=served.name.id if served else None,
        model_version=served.name.version if served else None,
        workers=[WorkerInfo(**{name: getattr(worker, name) for name in names}) for worker in workers],
        config=effective(services.settings) if "admin" in request.state.scopes else None,
    )
