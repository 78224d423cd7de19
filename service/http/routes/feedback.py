"""The prompts that were kept to train later students: for the operator."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from service.http.access import operator
from service.http.responses import error_responses
from service.http.schema import Strict
from service.http.services import WithServices

router = APIRouter(prefix="/admin/feedback", tags=["operation"], dependencies=[Depends(operator)])

Key = Annotated[str | None, Query(max_length=64, description="The id of a key; unset: all of them.")]
Erased = Annotated[str, Query(max_length=64, description="The id of a key, or all.", examples=["all"])]


class KeptPrompt(Strict):
    """A prompt whose images ranked low, or were not liked, with consent; nothing of who asked."""

    prompt: str
    percentile: float = Field(description="The lowest rank of its images among the student's own, from 0 to 100.")
    count: int = Field(description="How many jobs asked for it.")
    chosen: int = Field(0, description="How many of its images were chosen.")
    rejected: int = Field(0, description="How many were rejected.")
    rerolled: int = Field(0, description="How many were generated again with another seed.")
    model: str = Field(description="What generated the lowest.")
    version: str
    steps: int = Field(description="Its step count.")


class KeptPrompts(Strict):
    """The lowest first."""

    data: list[KeptPrompt]


class Erasure(Strict):
    """What was erased."""

    object: Literal["erasure"] = "erasure"
    prompts: int = Field(description="How many prompts were kept of it.")


@router.get("", responses=error_responses(403, 422, 503))
async def prompts(services: WithServices, key: Key = None) -> KeptPrompts:
    """The prompts that may train, each once: what ``training.run --set data.prompts=`` reads as JSON lines."""
    return KeptPrompts(data=[KeptPrompt(**entry) for entry in await services.feedback.prompts(key)])


@router.post("/erase", responses=error_responses(403, 422, 503))
async def erase(services: WithServices, key: Erased) -> Erasure:
    """Erase what was kept of a key, with what its clients said of images; its earlier requests leave none any more."""
    return Erasure(prompts=await services.feedback.erase(None if key == "all" else key))
