"""The routes for supervisors, load balancers and Prometheus."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout

from service.errors import Unavailable
from service.http.drift_log import probes_of
from service.http.responses import error_responses
from service.http.services import Services, WithServices
from service.models.folder import Name
from service.observe.metrics import Memory
from service.queue.status import Worker

ASK_S = 0.5

T = TypeVar("T")

router = APIRouter(tags=["operation"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive. It does not ask the queue: an outage there is no reason to restart this process."""
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses=error_responses(503))
async def readyz(request: Request, services: WithServices) -> dict[str, str | int | float]:
    """The queue answers, and a worker has loaded the model that this process serves."""
    if services.stopping.is_set():
        raise Unavailable("The service is stopping.")
    if (broken := services.background.broken) is not None:
        raise Unavailable(f"A background task of this process keeps failing: {broken}.")
    workers = await promptly(services.producer.workers())
    if not workers:
        raise Unavailable("No worker is alive.")
    served = services.models.choice.default()
    if served is None:
        raise Unavailable("No model is served yet.")
    holding = [worker for worker in workers if str(served.name) in worker.models]
    if not holding:
        raise Unavailable(f"No worker has loaded {served.name} yet.")
    if not any(worker.claims for worker in holding):
        raise Unavailable(f"Every worker that has loaded {served.name} is paused or draining.")
    return {
        "status": "ready",
        "model": served.name.id,
        "model_version": served.name.version,
        "runtime": holding[0].models[str(served.name)]["runtime"],
        "workers": len(holding),
        "load_s": holding[0].load_s,
        "warm_up_s": holding[0].warm_up_s,
    }


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, services: WithServices) -> Response:
    """Metrics in Prometheus' text format; without the queue's while it is out of reach."""
    services.metrics.references(served.student for served in services.models.choice.served.values())
    try:
        services.metrics.reached(await promptly(_measure(services)))
    except RedisError:
        services.metrics.reached(None)
    return Response(services.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def promptly(answer: Awaitable[T]) -> T:
    """The queue's answer, for somebody who does not wait for long.

    Raises:
        RedisError: the queue is out of reach, or has not answered within ``ASK_S``.
    """
    try:
        return await asyncio.wait_for(answer, ASK_S)
    except TimeoutError:
        raise RedisTimeout(f"no answer within {ASK_S:g} s") from None


async def _measure(services: Services) -> Memory:
    """Record the state of the queue; returns that of its server.

    Raises:
        RedisError: it is out of reach.
    """
    services.metrics.queue(await services.producer.depth())
    workers = await services.producer.workers()
    services.metrics.models(_held(workers), sum(bool(worker.models) for worker in workers))
    services.metrics.quality.probes(worker.models for worker in workers)
    services.metrics.states(worker.state for worker in workers)
    services.metrics.accelerators((worker.host, worker.gpus) for worker in workers)
    services.metrics.quality.drift(await services.drift.streams(), probes_of(workers))
    services.metrics.quality.canaries(await services.models.canaries())
    said = await services.producer.client.info()
    written = said.get("aof_last_write_status", "ok") == "ok"
    return Memory(int(said["used_memory"]), int(said.get("maxmemory", 0)), written)


def _held(workers: Sequence[Worker]) -> Counter[tuple[str, str]]:
    """How many workers have loaded each model and version."""
    names = [Name.of(name) for worker in workers for name in worker.models]
    return Counter((name.id, name.version) for name in names)
