"""What a client says of an image: which one it has chosen, which it rejects, which it has drawn again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from service.errors import Conflict, NotFound
from service.http.schema import MAX_IMAGES, Strict
from service.http.services import Services
from service.models.folder import Name
from service.quality.feedback import Word, entry_of, prompt_digest
from service.queue.job import Job, Record
from service.queue.states import State

UNRANKED = 50.0  # the percentile of a prompt whose images have none


class FeedbackRequest(Strict):
    """One word about one image."""

    feedback: Word = Field(
        description="chosen: it is used. rejected: it is not. rerolled: it was generated again with another seed."
    )
    image: int = Field(0, ge=0, lt=MAX_IMAGES, description="Which image of the job, from 0.")


class FeedbackAnswer(Strict):
    """What is noted now."""

    id: str = Field(description="The job's id.")
    image: int = Field(description="Which image of the job, from 0.")
    feedback: Word = Field(description="What is noted of it.")
    trains: bool = Field(description="Whether the prompt may train, so that it counts for later students.")


async def noted(services: Services, record: Record, body: FeedbackRequest) -> FeedbackAnswer:
    """Note a client's feedback; the last one on an image counts.

    Raises:
        Conflict: the job has no images, or none yet.
        NotFound: it has no such image.
        RedisError
    """
    if record.state is not State.DONE:
        raise Conflict(f"The job is {record.state}: there is no image to give feedback on.")
    images = record.result["images"]
    if body.image >= len(images):
        raise NotFound(f"The job has {len(images)} images, counted from 0.")
    job = record.job
    ranks = _ranks(services, job, images[body.image])
    digest = prompt_digest(job.prompt) if job.may_train else ""
    entry = entry_of(job, min(ranks, default=UNRANKED))
    word = await services.feedback.note(record.id, body.image, body.feedback, digest, entry)
    if word == "missing":
        raise NotFound("There is no such job, or it is no longer kept.")
    return FeedbackAnswer(id=record.id, image=body.image, feedback=body.feedback, trains=job.may_train)


def _ranks(services: Services, job: Job, image: Mapping[str, Any]) -> list[float]:
    """Where an image ranks by the scorers that may be trained on: a held-out one has no say."""
    served = services.models.choice.served.get(Name(job.model, job.version))
    scorers = served.student.scorers if served else {}
    found: Mapping[str, float] = image.get("reward_percentile") or {}
    return [rank for name, rank in found.items() if name in scorers and scorers[name].role == "trained"]
