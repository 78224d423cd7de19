"""What is said about models to clients and to the operator."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from service.errors import Conflict
from service.http.schema import Strict
from service.http.services import Services
from service.models.choice import LATEST, Choice
from service.models.controller import ModelController, Version
from service.models.folder import Name
from service.queue.status import Worker

OWNER = "fewstep"


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
        RedisError: the queue is out of reach.
    """
    choice, workers = services.models.choice, await services.producer.workers()
    return [_model(choice, id, choice.versions(id), workers) for id in choice.ids]


async def retrieve(services: Services, name: str) -> Model:
    """One of them, by id or by ``id@version``.

    Raises:
        NotFound, RedisError
    """
    id, _, version = name.partition("@")
    choice = services.models.choice
    served = choice.pick(id, version or LATEST)
    versions = [served.name.version] if version else choice.versions(id)
    return _model(choice, id, versions, await services.producer.workers())


async def controller_of(services: Services) -> ModelController:
    """Whoever leads the models, with brought up to date.

    Raises:
        Conflict: the service serves one student and no other.
    """
    models = services.models
    if not isinstance(models, ModelController):
        raise Conflict("This service serves the one student of FEWSTEP_MODEL; FEWSTEP_MODELS serves several.")
    await models.refresh()
    return models


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
