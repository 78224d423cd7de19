"""What a request for images says about its webhook."""

from __future__ import annotations

import json

from service.errors import InvalidRequest
from service.schema import GenerateRequest
from service.settings import Settings
from service.webhooks.target import Rules, TargetRefused, check_url

EVENTS = ("job.done", "job.failed", "job.cancelled", "job.expired")


def webhook_of(body: GenerateRequest, settings: Settings, base_url: str) -> str:
    """The webhook as the queue keeps it; empty without one.

    Raises:
        InvalidRequest: there are none here, or none may go to this address.
    """
    if body.webhook_url is None:
        if body.webhook_events is not None:
            raise InvalidRequest("webhook_events needs a webhook_url.", "webhook_events")
        return ""
    if settings.webhook_secret is None:
        raise InvalidRequest("webhook_url: this service sends no webhooks.", "webhook_url")
    try:
        check_url(body.webhook_url, rules_of(settings))
    except TargetRefused as error:
        raise InvalidRequest(f"webhook_url: {error}.", "webhook_url") from None
    return json.dumps({"url": body.webhook_url, "events": body.webhook_events or EVENTS, "base_url": base_url})


def rules_of(settings: Settings) -> Rules:
    """Where webhooks may go here."""
    return Rules(settings.webhook_networks, settings.webhook_http)
