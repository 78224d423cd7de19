"""What was drawn for each key: for bills, and for whoever asks where the time goes."""

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

Days = Annotated[int, Query(ge=1, le=MOST_DAYS, description="How many days, today among them.")]


class KeyUsage(Strict):
    """What was drawn for a key on one day."""

    day: str = Field(description="In UTC.", examples=["2026-11-29"])
    key: str = Field(description="The key's id; anonymous without keys.")
    jobs: int = Field(description="Jobs that ended with pictures.")
    images: int = Field(description="Images of these jobs.")
    megapixel_steps: float = Field(description="What the network computed: pixels times steps, in millions.")


class UsageList(Strict):
    """The newest day first."""

    data: list[KeyUsage]


@router.get("", responses=error_responses(403, 422, 503))
async def usage(services: WithServices, days: Days = 30) -> UsageList:
    """What was drawn for each key on each of the last days. It outlives the jobs, and is kept for 400 days."""
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
