"""Whether what is drawn is still as good as it was: for the operator."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from pydantic import Field

from service.http.access import operator
from service.http.drift_log import probes_of
from service.http.responses import error_responses
from service.http.schema import Strict
from service.http.services import WithServices
from service.quality.drift import cause

router = APIRouter(prefix="/admin/drift", tags=["operation"], dependencies=[Depends(operator)])


class DriftStream(Strict):
    """The scores of one model, version, step count, size and scorer, held against the student's reference."""

    model: str
    version: str
    steps: int = Field(description="The step count.")
    size: str = Field(description="Width and height in pixels.", examples=["64x64"])
    scorer: str = Field(description="The scorer's name.")
    selected: bool = Field(description="Images that were chosen by a score: counted, and not tested.")
    jobs: int = Field(description="How many jobs were counted.")
    mean: float = Field(description="Mean score of the newest thousand.")
    low_share: float = Field(description="Share of these below the reference's 5th percentile: 0.05 without a drift.")
    evidence: float = Field(description="Of a drift, in units of the threshold: an alarm from 1.")
    direction: str = Field(description="Where it drifts: lower, higher or more low ones; empty while nothing is known.")
    cause: str | None = Field(description="Of an alarm: engine, scorer, model, prompts or unknown.")


class DriftReport(Strict):
    """Every stream of the last week."""

    data: list[DriftStream]


@router.get("", responses=error_responses(403, 503))
async def drift(services: WithServices) -> DriftReport:
    """Whether scores have drifted, and whose fault it is: the engine's, a scorer's, the model's or the prompts'."""
    streams = await services.drift.streams()
    probes = probes_of(await services.producer.workers())
    rows = [
        DriftStream(
            model=one.model,
            version=one.version,
            steps=one.steps,
            size=one.size,
            scorer=one.scorer,
            selected=one.selected,
            jobs=one.count,
            mean=one.mean,
            low_share=one.low_share,
            evidence=one.evidence,
            direction=one.direction,
            cause=cause(one, probes, streams) if one.drifts else None,
        )
        for one in streams
    ]
    return DriftReport(data=rows)
