"""The operator's routes for dead letters: list them, retry one, drop one."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import Field

from service.errors import Conflict, ModelGone, NotFound, QueueFull
from service.http.access import operator
from service.http.responses import error_responses
from service.http.schema import Strict
from service.http.services import WithServices
from service.observe.logs import prompt_facts
from service.queue.dead_letters import DeadLetter, DeadLetterQueue
from service.queue.job import Job, Verdict

MOST_LISTED = 1000

router = APIRouter(prefix="/admin/dlq", tags=["operation"], dependencies=[Depends(operator)])

JobId = Annotated[str, Path(description="The id of the job that was given up.")]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED, description="The most to list.")]


class DeadLetterInfo(Strict):
    """A job that was given up because its workers died."""

    id: str = Field(description="The job's id.")
    model: str | None = Field(description="Null if another version of the service wrote the job.")
    model_version: str | None
    key: str = Field(description="The id of the API key it belonged to.")
    attempts: int = Field(description="How many workers died.")
    worker: str = Field(description="The last worker that died.")
    created: int = Field(description="Unix time of acceptance, in seconds.")
    died: int = Field(description="Unix time at which it was given up, in seconds.")
    steps: int | None = Field(description="The step count of each image.")
    images: int | None = Field(description="The number of images requested.")
    prompt: str | None = Field(description="Null unless FEWSTEP_LOG_PROMPTS is set.")
    prompt_chars: int | None = Field(description="The length of the prompt.")
    prompt_sha256: str | None = Field(description="The beginning of its hash.")


class DeadLetterList(Strict):
    """Dead letters, newest first."""

    data: list[DeadLetterInfo]


class Retried(Strict):
    """A dead letter that is retried."""

    id: str = Field(description="The job that was given up; it stays failed.")
    retried_as: str = Field(description="The job that was queued in its place, for the same owner.")


class Dropped(Strict):
    """A dead letter that was dropped."""

    id: str
    dropped: bool = Field(description="Always true.")


@router.get("", responses=error_responses(403, 422, 503))
async def list_letters(request: Request, services: WithServices, limit: Limit = 100) -> DeadLetterList:
    """Jobs that were given up in the last week because one worker after another died while running them."""
    found = await DeadLetterQueue(services.producer).newest(limit)
    return DeadLetterList(data=[_described(letter, services.settings.log_prompts) for letter in found])


@router.post("/{id}/retry", responses=error_responses(403, 404, 409, 422, 503))
async def retry_letter(id: JobId, request: Request, services: WithServices) -> Retried:
    """Queue it again, alone in its batch, as a new job of the same owner; it does not count against the quota."""
    queue = DeadLetterQueue(services.producer)
    letter = await queue.find(id)
    if letter is None:
        raise _unknown()
    if not letter.record.readable:
        raise Conflict("This job was written by another version of the service: it can only be dropped.")
    verdict = await queue.retry(letter, services.settings.job_timeout_s)
    _check(verdict)
    return Retried(id=id, retried_as=verdict.id)


@router.post("/{id}/drop", responses=error_responses(403, 404, 422, 503))
async def drop_letter(id: JobId, request: Request, services: WithServices) -> Dropped:
    """Drop it. The job itself stays failed."""
    if not await DeadLetterQueue(services.producer).drop(id):
        raise _unknown()
    return Dropped(id=id, dropped=True)


def _check(verdict: Verdict) -> None:
    if verdict.word == "gone":
        raise ModelGone("The model of this job is no longer served.", "model")
    if verdict.word not in ("ok", "known", "attached"):
        raise QueueFull(retry_after_s=verdict.wait_s)


def _described(letter: DeadLetter, show_prompts: bool) -> DeadLetterInfo:
    record = letter.record
    job: Job | None = record.job if record.readable else None
    facts = prompt_facts(job.prompt, show_prompts) if job else {}
    return DeadLetterInfo(
        id=record.id,
        model=job.model if job else None,
        model_version=job.version if job else None,
        key=record.key,
        attempts=letter.attempts,
        worker=letter.worker,
        created=int(record.created_s),
        died=int(letter.died_s),
        steps=job.steps if job else None,
        images=len(job.seeds) if job else None,
        prompt=job.prompt if job and show_prompts else None,
        prompt_chars=facts.get("prompt_chars"),
        prompt_sha256=facts.get("prompt_sha256"),
    )


def _unknown() -> NotFound:
    return NotFound("There is no such dead letter.")
