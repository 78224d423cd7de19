"""Usage by API key: for billing, and to see who uses the service."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from service.http.access import operator
from service.http.responses import error_responses
from service.http.schema import Strict
from service.http.services import WithServices

MOST_DAYS = 366

router = APIRouter(prefix="/admin/usage", tags=["operation"], dependencies=[Depends(operator)])

Days = Annotated[int, Query(ge=1, le=MOST_DAYS, description="Number of days, including today.")]


class KeyUsage(Strict):
    """What a key used on one day."""

    day: str = Field(description="In UTC.", examples=["2026-11-29"])
    key: str = Field(description="The key's id; anonymous without keys.")
    jobs: int = Field(description="Jobs that ended with images.")
    images: int = Field(description="Images of these jobs.")
    megapixel_steps: float = Field(description="Compute used: pixels times steps, in millions.")


class UsageList(Strict):
    """The newest day first."""

    data: list[KeyUsage]


@router.get("", responses=error_responses(403, 422, 503))
async def usage(services: WithServices, days: Days = 30) -> UsageList:
    """Usage by key on each of the last days. It outlives the jobs, and is kept for 400 days."""
    found = await services.producer.usage(days)
    rows = [
        KeyUsage(
            day=datetime.fromtimestamp(each.day_s, UTC).date().isoformat(),
            key=each.key,
            jobs=each.jobs,
            images=each.images,
            megapixel_steps=each.work / 1000,
        )
        for each in found
    ]
    return UsageList(data=rows)
