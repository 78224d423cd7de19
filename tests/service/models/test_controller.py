"""When a model may serve, and when it has been unloaded: with several workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.models.controller import ModelController
from service.models.folder import Folder
from service.models.registry import Entry, ModelRegistry, ModelState, ModelStates
from service.queue.producer import Producer
from service.queue.status import WorkerState
from service.settings import Settings

NAME = "cats/1"


def worker(
    *models: str, refused: str = "", state: WorkerState = WorkerState.READY, attempt: str = "try"
) -> Any:  # fmt: skip
    refusals = {NAME: {"attempt": attempt, "reason": refused}} if refused else {}
    return SimpleNamespace(models=models, refused=refusals, state=state)


def moves(runner: asyncio.Runner, state: ModelState, workers: Sequence[Any]) -> list[ModelState]:
    """What the controller makes of a model in this state when these workers report."""
    made: list[ModelState] = []

    async def read() -> ModelStates:
        return ModelStates({NAME: Entry(state, "try")})

    async def transition(name: str, before: Sequence[str], after: Entry) -> bool:
        made.append(after.state)
        return False

    async def nothing(*_: object) -> None:
        pass

    async def all_workers() -> Sequence[Any]:
        return workers

    registry = SimpleNamespace(read=read, transition=transition, init=nothing, promote_first=nothing)
    folder = SimpleNamespace(newest=list, names=list)
    producer = SimpleNamespace(workers=all_workers)
    controller = ModelController(
        Settings(runtime="fake"), cast(Folder, folder), cast(ModelRegistry, registry), cast(Producer, producer)
    )
    runner.run(controller.refresh())
    return made


@pytest.mark.parametrize(
    ("state", "workers", "after"),
    [
        (ModelState.LOADING, [worker(), worker()], []),
        (ModelState.LOADING, [worker(NAME), worker()], []),
        (ModelState.LOADING, [worker(NAME), worker(NAME)], [ModelState.SERVING]),
        (ModelState.LOADING, [worker(NAME), worker(refused="No room.")], [ModelState.REFUSED]),
        (ModelState.LOADING, [worker(NAME), worker(refused="No room.", attempt="the one before")], []),
        (ModelState.LOADING, [worker(NAME), worker(state=WorkerState.PAUSED)], []),
        (ModelState.LOADING, [worker(NAME), worker(state=WorkerState.LOADING)], [ModelState.SERVING]),
        (ModelState.LOADING, [worker(refused="No room.", state=WorkerState.LOADING)], [ModelState.REFUSED]),
        (ModelState.LOADING, [], []),
        (ModelState.UNLOADING, [worker(NAME), worker()], []),
        (ModelState.UNLOADING, [worker(), worker()], [ModelState.UNLOADED]),
        (ModelState.UNLOADING, [], []),
    ],
)
def test_a_model_moves_on_when_every_worker_has(
    runner: asyncio.Runner, state: ModelState, workers: list[Any], after: list[ModelState]
) -> None:
    assert moves(runner, state, workers) == after
