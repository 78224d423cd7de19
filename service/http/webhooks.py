"""The webhook of a request for images, and the task that delivers webhooks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from service.errors import InvalidRequest
from service.http.presentation import job_status
from service.http.schema import GenerateRequest
from service.http.services import Services
from service.http.tasks import end
from service.queue.job import Record
from service.settings import Settings
from service.webhooks.deliver import POLL_EVERY_S, Deliverer
from service.webhooks.outbox import Outbox
from service.webhooks.target import TargetRefused, check_url, rules_of

OUTCOMES = ("job.done", "job.failed", "job.cancelled", "job.expired")


def webhook_of(body: GenerateRequest, settings: Settings, base_url: str) -> str:
    """The webhook as the queue stores it; empty without one.

    Raises:
        InvalidRequest: webhooks are not enabled, or this URL is not allowed.
    """
    if body.webhook_url is None:
        if body.webhook_events is not None:
            raise InvalidRequest("webhook_events needs a webhook_url.", "webhook_events")
        return ""
    if settings.webhook_secret is None:
        raise InvalidRequest("webhook_url: webhooks are not enabled on this service.", "webhook_url")
    try:
        check_url(body.webhook_url, rules_of(settings))
    except TargetRefused as error:
        raise InvalidRequest(f"webhook_url: {error}.", "webhook_url") from None
    return json.dumps({"url": body.webhook_url, "events": body.webhook_events or OUTCOMES, "base_url": base_url})


@asynccontextmanager
async def webhooks(services: Services) -> AsyncIterator[None]:
    """Deliver webhooks for as long as the context lasts, if enabled. What is interrupted at the end is sent later."""
    if services.settings.webhook_secret is None:
        yield
        return

    async def describe(record: Record, base_url: str) -> dict[str, Any]:
        return (await job_status(services, record, base_url)).model_dump(mode="json")

    outbox = Outbox(services.producer.client, services.producer.queue)
    deliverer = Deliverer(services.settings, services.producer, outbox, services.metrics, describe)
    task = asyncio.create_task(services.background.forever("webhooks", deliverer.deliver, POLL_EVERY_S))
    try:
        yield
    finally:
        await end([task, *deliverer.sending])
