"""What is said about models to clients, and what an operator asks for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from pydantic import Field
from redis.exceptions import RedisError

from service.catalogue.board import ModelState
from service.catalogue.choice import LATEST, Choice
from service.catalogue.folder import Name
from service.catalogue.overseer import Overseer, Version
from service.errors import Conflict, ModelRefused, NotFound, Unavailable
from service.queue.producer import Worker
from service.schema import Strict
from service.services import Services
from student.bundle import BundleError

LOOK_EVERY_S = 0.1
OWNER = "fewstep"
UNKNOWN = "There is no such model, or no such version of it."


class ServedVersion(Strict):
    """A version that requests can ask for."""

    version: str
    latest: bool = Field(description="Whether it is what requests without a version get.")
    steps: list[int] = Field(description="The values of num_inference_steps that it was trained for.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    max_prompt_tokens: int
    scorers: list[str] = Field(description="The scorers whose rewards its images may have.")
    runtime: str | None = Field(description="How it is run; null while no worker holds it.")
    shows_steps: bool = Field(description="Whether partial_images can be had.")
    workers: int = Field(description="How many workers hold it.")


class Model(Strict):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int = Field(description="For OpenAI's clients; fewstep does not know when a model was made: 0.")
    owned_by: str = OWNER
    latest: str = Field(description="The version that requests without one get.")
    versions: list[ServedVersion] = Field(description="The newest last.")


class ModelList(Strict):
    """All models that are served."""

    object: str = "list"
    data: list[Model]


class ModelVersion(Strict):
    """A version as the operator sees it."""

    model: str
    version: str
    state: str = Field(description="available, loading, serving, unloading, unloaded or refused.")
    reason: str = Field(description="Why it was refused.")
    latest: bool
    workers: int = Field(description="How many workers hold it.")


class AdminModels(Strict):
    """Every version in the directory."""

    data: list[ModelVersion]


async def listed(services: Services) -> list[Model]:
    """The models that are served.

    Raises:
        Unavailable: the queue is out of reach.
    """
    choice, workers = services.models.choice, await _workers(services)
    return [_model(choice, id, choice.versions(id), workers) for id in choice.ids]


async def retrieve(services: Services, name: str) -> Model:
    """One of them, by id or by ``id@version``.

    Raises:
        NotFound, Unavailable
    """
    id, _, version = name.partition("@")
    choice = services.models.choice
    served = choice.pick(id, version or LATEST)
    versions = [served.name.version] if version else choice.versions(id)
    return _model(choice, id, versions, await _workers(services))


async def overseer_of(services: Services) -> Overseer:
    """Whoever leads the models, with a fresh look at them.

    Raises:
        Conflict: the service serves one student and no other.
    """
    models = services.models
    if not isinstance(models, Overseer):
        raise Conflict("This service draws with the one student of FEWSTEP_MODEL; FEWSTEP_MODELS serves several.")
    await _look(models)
    return models


async def load(services: Services, name: Name, wait_s: float) -> Version:
    """Have a version loaded; ``serving`` or, after the wait, still ``loading``.

    Raises:
        NotFound, ModelRefused, Conflict, Unavailable
    """
    overseer = await overseer_of(services)
    if name not in overseer.folder.names():
        raise NotFound(UNKNOWN, "version", code="model_not_found")
    try:
        await asyncio.to_thread(overseer.folder.student, name)
    except BundleError as error:
        raise ModelRefused(f"{name} is refused: {error}.", "version") from error
    try:
        await overseer.load(name)
    except RedisError as error:
        raise Unavailable("The queue is out of reach.") from error
    found = await _settled(overseer, name, {ModelState.LOADING}, wait_s)
    if found.state == ModelState.REFUSED:
        raise ModelRefused(f"{name} is refused: {found.reason}.", "version")
    return found


async def promote(services: Services, name: Name) -> Version:
    """Make a served version the latest.

    Raises:
        NotFound, Conflict, Unavailable
    """
    overseer = await overseer_of(services)
    _known(overseer, name)
    try:
        if not await overseer.board.promote(name.id, name.version):
            raise Conflict(f"{name} is not served: load it first.", "version")
    except RedisError as error:
        raise Unavailable("The queue is out of reach.") from error
    await _look(overseer)
    return overseer.version(name)


async def unload(services: Services, name: Name, wait_s: float) -> Version:
    """Have a version dropped; ``unloaded`` or, after the wait, still ``unloading``.

    Raises:
        NotFound, Conflict, Unavailable
    """
    overseer = await overseer_of(services)
    _known(overseer, name)
    try:
        word = await overseer.board.unload(str(name))
    except RedisError as error:
        raise Unavailable("The queue is out of reach.") from error
    if word == "promoted":
        raise Conflict(f"{name} is the latest of its model: promote another version first.", "version")
    if word == "last":
        raise Conflict(f"{name} is the only one that is served: load another one first.", "version")
    if word == "missing" and overseer.version(name).state not in (ModelState.UNLOADING, ModelState.UNLOADED):
        raise Conflict(f"{name} is not served.", "version")
    return await _settled(overseer, name, {ModelState.SERVING, ModelState.UNLOADING}, wait_s)


def describe(version: Version) -> ModelVersion:
    """A version as the operator sees it."""
    return ModelVersion(
        model=version.name.id,
        version=version.name.version,
        state=version.state,
        reason=version.reason,
        latest=version.promoted,
        workers=len(version.workers),
    )


def _known(overseer: Overseer, name: Name) -> None:
    if name not in [version.name for version in overseer.versions()]:
        raise NotFound(UNKNOWN, "version", code="model_not_found")


async def _settled(overseer: Overseer, name: Name, moving: set[ModelState], wait_s: float) -> Version:
    """What a version has become, or is after ``wait_s``."""
    deadline = time.monotonic() + wait_s
    while True:
        await _look(overseer)
        version = overseer.version(name)
        if version.state not in moving or time.monotonic() >= deadline:
            return version
        await asyncio.sleep(LOOK_EVERY_S)


async def _look(overseer: Overseer) -> None:
    try:
        await overseer.look()
    except RedisError as error:
        raise Unavailable("The queue is out of reach.") from error


async def _workers(services: Services) -> Sequence[Worker]:
    try:
        return await services.producer.workers()
    except RedisError as error:
        raise Unavailable("The queue is out of reach.") from error


def _model(choice: Choice, id: str, versions: Sequence[str], workers: Sequence[Worker]) -> Model:
    latest = str(choice.latest(id))
    rows = [_version(choice, Name(id, each), latest, workers) for each in versions]
    return Model(id=id, created=0, latest=latest, versions=rows)


def _version(choice: Choice, name: Name, latest: str, workers: Sequence[Worker]) -> ServedVersion:
    student = choice.served[name].student
    holding = [worker.models[str(name)] for worker in workers if str(name) in worker.models]
    return ServedVersion(
        version=name.version,
        latest=name.version == latest,
        steps=sorted(student.steps),
        width=student.image.width,
        height=student.image.height,
        max_prompt_tokens=student.max_tokens,
        scorers=sorted(student.scorers),
        runtime=holding[0]["runtime"] if holding else None,
        shows_steps=any(held["shows_steps"] for held in holding),
        workers=len(holding),
    )
