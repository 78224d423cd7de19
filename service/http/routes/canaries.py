"""Canaries: a version that is compared with the latest one of its model, pair by pair, until it is certain enough."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field

from service.http.access import operator
from service.http.models import controller_of
from service.http.responses import error_responses
from service.http.routes.models import REFUSALS, Id, Version, Wait
from service.http.schema import Strict
from service.http.services import WithServices
from service.models.admin import start_canary, stop_canary
from service.models.folder import Name
from service.quality.canary import Canary, Plan, Sum, Sums

USUAL = Plan()

router = APIRouter(prefix="/admin/canaries", tags=["operation"], dependencies=[Depends(operator)])

Share = Annotated[
    float, Query(gt=0, le=1, description="Share of the latest version's requests that both versions generate again.")
]
Margin = Annotated[
    float,
    Query(gt=0, le=10, description="How much lower a scorer's mean may be, in standard deviations of the teacher."),
]
Failures = Annotated[float, Query(gt=0, lt=1, description="Share of the pairs that may fail with the candidate alone.")]
Slowdown = Annotated[float, Query(gt=1, le=100, description="How many times as long a call may take.")]


class Difference(Strict):
    """Candidate minus base, over the pairs."""

    mean: float = Field(description="Of the differences.")
    half_width: float | None = Field(description="Of its confidence sequence; null while there are too few pairs.")
    pairs: int = Field(description="How many pairs it is of.")


class CanaryReport(Strict):
    """A canary, running or the last one of its model."""

    model: str
    base: str = Field(description="The version that was the latest when it began.")
    candidate: str = Field(description="The version that is compared with it.")
    state: str = Field(description="running, promoted, rolled_back or stopped.")
    reason: str = Field(description="Why it ended.")
    share: float = Field(description="Share of the base's requests that both versions generate again.")
    started: float = Field(description="Unix time in seconds.")
    ended: float | None = Field(description="Unix time in seconds; null while it runs.")
    pairs: int = Field(description="Pairs that both versions have generated.")
    base_failed: int = Field(description="Pairs that failed with the base alone.")
    candidate_failed: int = Field(description="Pairs that failed with the candidate alone.")
    rewards: dict[str, Difference] = Field(description="By scorer.")
    slowdown: Difference = Field(
        description="The logarithm of the ratio of the calls' times, in batches of equal size."
    )


class CanaryList(Strict):
    """One for each model that ever had one."""

    data: list[CanaryReport]


@router.get("", responses=error_responses(403, 409, 503))
async def list_canaries(request: Request, services: WithServices) -> CanaryList:
    """Every model's canary, running or ended, with what its pairs have shown."""
    controller = await controller_of(services)
    return CanaryList(data=[_report(*found) for found in await controller.canaries()])


@router.post("/{model}/{version}/start", responses=REFUSALS)
async def start(
    model: Id, version: Version, request: Request, services: WithServices, share: Share = 0.05,
    margin: Margin = USUAL.margin, failures: Failures = USUAL.failures, slowdown: Slowdown = USUAL.slowdown,
    wait_s: Wait = 120.0,
) -> CanaryReport:  # fmt: skip
    """Compare a version with the latest one: promoted when it is certainly no worse by more than the margins, rolled
    back when it is certainly worse. Nobody is sent a picture of it before; nothing is unloaded after."""
    plan = Plan(margin, failures, slowdown)
    canary = await start_canary(await controller_of(services), Name(model, version), share, plan, wait_s)
    return _report(canary, Sums())


@router.post("/{model}/{version}/stop", responses=REFUSALS)
async def stop(model: Id, version: Version, request: Request, services: WithServices) -> CanaryReport:
    """Stop comparing; the latest version stays the latest. One that has ended stays as it is."""
    controller = await controller_of(services)
    canary = await stop_canary(controller, Name(model, version))
    return _report(canary, await controller.registry.sums(canary))


def _report(canary: Canary, sums: Sums) -> CanaryReport:
    alpha = canary.plan.alpha / (len(sums.rewards) + 2)
    return CanaryReport(
        model=canary.model,
        base=canary.base,
        candidate=canary.candidate,
        state=canary.state,
        reason=canary.reason,
        share=canary.share,
        started=canary.started_s,
        ended=canary.ended_s,
        pairs=sums.pairs,
        base_failed=sums.base_failed,
        candidate_failed=sums.candidate_failed,
        rewards={name: _difference(row, alpha) for name, row in sums.rewards.items()},
        slowdown=_difference(sums.slowdown, alpha),
    )


def _difference(row: Sum, alpha: float) -> Difference:
    width = row.half_width(alpha)
    return Difference(mean=row.mean, half_width=width if width < float("inf") else None, pairs=row.count)
