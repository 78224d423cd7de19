"""The operator's part in the workers: which there are, and having one pause, go on, or end what it holds and go."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Path
from pydantic import Field

from service.errors import Conflict, NotFound
from service.http.access import operator
from service.http.responses import error_responses
from service.http.schema import Strict
from service.http.services import Services, WithServices
from service.queue.status import Worker, WorkerState

REFUSALS = error_responses(403, 404, 409, 422, 503)

router = APIRouter(prefix="/admin/workers", tags=["operation"], dependencies=[Depends(operator)])

Id = Annotated[str, Path(max_length=200, description="The worker's id, from the list of workers.")]


class WorkerRow(Strict):
    """A live worker."""

    id: str
    host: str = Field(description="The machine that it runs on.")
    state: str = Field(
        description="loading, ready, paused (it takes no work) or draining (it ends with what it holds)."
    )
    models: list[str] = Field(description="What it has loaded, as model/version.")
    runtime: str = Field(description="How it runs the first of them.")
    jobs: int = Field(description="How many jobs it held when it last gave a sign of life.")


class WorkerList(Strict):
    """The workers that have given a sign of life lately."""

    data: list[WorkerRow]


@router.get("", responses=error_responses(403, 503))
async def list_workers(services: WithServices) -> WorkerList:
    """Every live worker: what it has loaded, what it does, how many jobs it holds."""
    workers = await services.producer.workers()
    return WorkerList(data=[_row(worker) for worker in sorted(workers, key=lambda worker: (worker.host, worker.id))])


@router.post("/{id}/pause", responses=REFUSALS)
async def pause_worker(id: Id, services: WithServices) -> WorkerRow:
    """From now on the worker claims nothing; what it holds it still draws. Its process, and what is loaded, stay."""
    return await _ordered(services, id, WorkerState.PAUSED)


@router.post("/{id}/resume", responses=REFUSALS)
async def resume_worker(id: Id, services: WithServices) -> WorkerRow:
    """Let a paused worker claim again."""
    return await _ordered(services, id, WorkerState.READY)


@router.post("/{id}/drain", responses=REFUSALS)
async def drain_worker(id: Id, services: WithServices) -> WorkerRow:
    """From now on the worker claims nothing; when it has drawn what it holds its process ends, and serve starts none in
    its place."""
    return await _ordered(services, id, WorkerState.DRAINING)


async def _ordered(services: Services, id: str, wanted: WorkerState) -> WorkerRow:
    word = await services.producer.order(id, wanted)
    found = [worker for worker in await services.producer.workers() if worker.id == id]
    if word == "missing" or not found:
        raise NotFound("There is no such worker, or it has given no sign of life lately.")
    if word != wanted:
        raise Conflict("The worker is draining: it ends when it has generated what it holds.")
    resumed = wanted is WorkerState.READY and found[0].state is WorkerState.PAUSED  # it says so until its next beat
    return _row(replace(found[0], state=WorkerState.READY) if resumed else found[0])


def _row(worker: Worker) -> WorkerRow:
    return WorkerRow(
        id=worker.id,
        host=worker.host,
        state=worker.state,
        models=sorted(worker.models),
        runtime=worker.runtime,
        jobs=worker.jobs,
    )
