"""What serves here, and with which settings."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from redis.exceptions import RedisError

from service.configuration import effective
from service.errors import Unavailable
from service.http.responses import error_responses
from service.http.routes.probes import ASK_S
from service.http.schema import Strict
from service.http.services import WithServices

router = APIRouter(tags=["operation"])


class WorkerInfo(Strict):
    """A live worker."""

    host: str = Field(description="The machine that it runs on.")
    runtime: str = Field(description="How it runs the student (the first one, if it holds several).")
    models: dict[str, Any] = Field(description="The same for each student that it holds, by id/version.")
    max_batch: int = Field(description="Images in one call of the runtime.")
    shows_steps: bool = Field(description="Whether previews can be had.")
    state: str = Field(description="loading, ready, paused or draining.")
    load_s: float = Field(description="How long loading took, in seconds, warm-up included.")
    warm_up_s: float = Field(description="How long the warm-up of it took, in seconds.")


class Info(Strict):
    """What serves here."""

    model: str | None = Field(description="The model of a request that names none; null where none is served.")
    model_version: str | None
    workers: list[WorkerInfo] = Field(description="The live ones.")
    config: dict[str, Any] | None = Field(
        description="Every setting and its value, without secrets; null for a key without the scope admin."
    )


@router.get("/info", responses=error_responses(503))
async def info(request: Request, services: WithServices) -> Info:
    """What serves here: the student, the runtime of each worker, and the effective configuration."""
    try:
        workers = await asyncio.wait_for(services.producer.workers(), ASK_S)
    except (RedisError, TimeoutError):
        raise Unavailable("The queue cannot be reached.") from None
    names = list(WorkerInfo.model_fields)
    served = services.models.choice.default()
    return Info(
        model=served.name.id if served else None,
        model_version=served.name.version if served else None,
        workers=[WorkerInfo(**{name: getattr(worker, name) for name in names}) for worker in workers],
        config=effective(services.settings) if "admin" in request.state.scopes else None,
    )
