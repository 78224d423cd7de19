"""The models as clients and the operator see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from service.errors import Conflict
from service.http.quality import default_scorer
from service.http.schema import Strict
from service.http.services import Services
from service.http.videos import USUAL_FPS, lengths_of, widest
from service.models.choice import LATEST, Choice
from service.models.controller import ModelController, Version
from service.models.folder import Name
from service.queue.status import Worker
from student import within_prompt
from student.bundle import Student
from student.runtimes.sizes import own_size

OWNER = "fewstep"
PREDICTED = (2, 4, 8, 16)


class Gain(Strict):
    """What best_of is predicted to buy at one step count, over a single picture of the same prompt."""

    steps: int = Field(description="The step count.")
    best_of: int = Field(description="Candidates of an image; each costs what an image costs.")
    rank_by: str = Field(description="The scorer that chooses.")
    gain: dict[str, float] = Field(
        description="By scorer, the chosen image's expected standardised score above the mean of its prompt: on the "
        "scorer that chooses, and on the others as far as they agree with it within a prompt."
    )


class VideoLengths(Strict):
    """Numbers of frames that can be asked for: the shortest, or a multiple of ``step`` more, up to the longest."""

    shortest: int = Field(description="Frames; 1 where an image can be had, too.")
    longest: int = Field(description="As long as its workers have memory for, or were compiled for.")
    step: int = Field(description="Frames of each latent frame but the first.")
    compiled: list[int] | None = Field(
        None, description="Of a student that is served compiled: the lengths that it was compiled for, and no others."
    )


class ProbeReport(Strict):
    """What the workers' last golden probes have found."""

    outcomes: dict[str, int] = Field(
        description="How many workers found what: same; recorded (first probe on this kind of machine); pixels_changed "
        "(the engine generates otherwise); scores_changed; failed; waiting (not generated yet); none (the bundle has "
        "no probe)."
    )
    oldest_s: int | None = Field(description="Unix time of the oldest of them, in seconds; null before the first.")


class ServedVersion(Strict):
    """A version that requests can name."""

    version: str
    latest: bool = Field(description="Whether requests without a version get it.")
    steps: list[int] = Field(description="The values of num_inference_steps it was trained for.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    num_frames: int | None = Field(None, description="Of a student of videos: its own length.")
    fps: int | None = Field(None, description="Of a student of videos: frames a second, unless a request says so.")
    lengths: VideoLengths | None = Field(
        None, description="Of a student of videos: how long they may be at its own size; null while no worker holds it."
    )
    max_prompt_tokens: int
    scorers: list[str] = Field(description="The scorers whose rewards its images may have.")
    best_of: list[Gain] = Field(
        description="What best_of is predicted to buy, as measured when the bundle was made; empty where it was not."
    )
    runtime: str | None = Field(description="The runtime that runs it; null while no worker has loaded it.")
    shows_steps: bool = Field(description="Whether partial_images is available.")
    workers: int = Field(description="How many workers have loaded it.")
    probe: ProbeReport = Field(description="What the golden probe says of its engine.")


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
    workers: int = Field(description="How many workers have loaded it.")


class AdminModels(Strict):
    """Every version in the directory of models."""

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
    """The controller of the models, up to date.

    Raises:
        Conflict: the service serves one student and no other.
    """
    models = services.models
    if not isinstance(models, ModelController):
        raise Conflict("This service serves only the student of FEWSTEP_MODEL; FEWSTEP_MODELS serves several.")
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


def gains(student: Student) -> list[Gain]:
    """The predictions for a student's own size, for the scorer that chooses unless another is named."""
    if not student.within_prompt or not student.scorers:
        return []
    chooser, found = default_scorer(student), []
    for steps in sorted(student.steps):
        known = within_prompt.of(student, steps, own_size(student))
        for count in PREDICTED if known else ():
            assert known is not None
            predicted = {
                name: round(gain, 3)
                for name in sorted(student.scorers)
                if (gain := within_prompt.predicted_gain(known, chooser, name, count)) is not None
            }
            found.append(Gain(steps=steps, best_of=count, rank_by=chooser, gain=predicted))
    return found


def _model(choice: Choice, id: str, versions: Sequence[str], workers: Sequence[Worker]) -> Model:
    latest = str(choice.latest(id))
    rows = [_version(choice, Name(id, each), latest, workers) for each in versions]
    return Model(id=id, created=0, latest=latest, versions=rows)


def _lengths(name: Name, student: Student, workers: Sequence[Worker]) -> VideoLengths | None:
    """What its workers accept at its own size (``widest``)."""
    known = lengths_of(workers, str(name), own_size(student))
    if not known:
        return None
    most = widest(known)
    compiled = list(most.compiled) or None
    return VideoLengths(shortest=most.first, longest=most.most, step=most.step, compiled=compiled)


def _version(choice: Choice, name: Name, latest: str, workers: Sequence[Worker]) -> ServedVersion:
    student = choice.served[name].student
    holding = [worker.models[str(name)] for worker in workers if str(name) in worker.models]
    return ServedVersion(
        version=name.version,
        latest=name.version == latest,
        steps=sorted(student.steps),
        width=student.image.width,
        height=student.image.height,
        num_frames=student.image.frames,
        fps=None if student.image.frames is None else student.image.fps or USUAL_FPS,
        lengths=_lengths(name, student, workers),
        max_prompt_tokens=student.max_tokens,
        scorers=sorted(student.scorers),
        best_of=gains(student),
        runtime=holding[0]["runtime"] if holding else None,
        shows_steps=any(held["shows_steps"] for held in holding),
        workers=len(holding),
        probe=_probe(holding),
    )


def _probe(holding: Sequence[Mapping[str, Any]]) -> ProbeReport:
    found = [each.get("probe", {}) for each in holding]
    times = [each["at_s"] for each in found if "at_s" in each]
    outcomes = Counter(str(each.get("outcome", "none")) for each in found)
    return ProbeReport(outcomes=dict(outcomes), oldest_s=min(times, default=None))
