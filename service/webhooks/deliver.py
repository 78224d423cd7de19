"""Delivers webhooks of ended jobs: at least once, signed, with retries, and only to allowed addresses."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx

from service.errors import ServiceError
from service.observe.metrics import Metrics
from service.queue.job import Record
from service.queue.producer import Producer
from service.settings import Settings
from service.webhooks.outbox import Delivery, Outbox
from service.webhooks.signature import headers
from service.webhooks.target import Target, TargetRefused, find_target, rules_of

AT_ONCE, AT_ONE_HOST = 64, 8
POSTPONE_S = 1.0  # until a host with its most requests under way is tried again
POLL_EVERY_S = 0.3
MAX_TRIES = 8  # with pauses that triple from 5 s to 10 min: for half an hour
GROWTH, LONGEST_PAUSE_S, JITTER = 3, 600.0, 0.2
SEND_S = 5.0
LEASE_S = 30.0  # more than one try can take

# A record as its owner would see it; the address is the one that the client called.
Describe = Callable[[Record, str], Awaitable[dict[str, Any]]]

log = logging.getLogger(__name__)


class Deliverer:
    """Sends the webhooks whose time has come."""

    def __init__(
        self, settings: Settings, producer: Producer, outbox: Outbox, metrics: Metrics, describe: Describe
    ) -> None:
        self._settings = settings
        self._producer = producer
        self._outbox = outbox
        self._metrics = metrics
        self._describe = describe
        self._tls: ssl.SSLContext | None = None
        self._hosts: Counter[str] = Counter()
        self.sending: set[asyncio.Task[None]] = set()

    async def deliver(self) -> None:
        """Start sending what is due, up to a limit; ``sending`` is what is under way.

        Each host has a limit of its own, so that a slow receiver does not delay the others.

        Raises:
            RedisError: the queue's server is away.
        """
        free = AT_ONCE - len(self.sending)
        due = await self._outbox.take(free, LEASE_S) if free else []
        records = await self._producer.records([each.id for each in due]) if due else {}
        for each in due:
            host = urlsplit(each.url).netloc
            if self._hosts[host] >= AT_ONE_HOST:
                await self._outbox.put_back(each.id, POSTPONE_S)
                continue
            self._hosts[host] += 1
            task = asyncio.create_task(self._one(each, records.get(each.id)))
            self.sending.add(task)
            task.add_done_callback(partial(self._done, host))

    def _done(self, host: str, task: asyncio.Task[None]) -> None:
        self.sending.discard(task)
        self._hosts[host] -= 1
        if not self._hosts[host]:
            del self._hosts[host]
        if not task.cancelled() and (error := task.exception()) is not None:  # it is due again after its lease
            log.warning("a webhook could not be settled: %s", error)

    async def _one(self, delivery: Delivery, record: Record | None) -> None:
        if record is None or not record.readable:
            self._metrics.webhook("lost")
            log.warning("webhook of job %s is dropped: its record is gone or unreadable", delivery.id)
            return await self._outbox.complete(delivery.id)
        if f"job.{record.state}" not in delivery.events:
            return await self._outbox.complete(delivery.id)
        outcome, wait_s = await self._try(delivery, record)
        if outcome == "failed" and delivery.attempt >= MAX_TRIES:
            outcome = "given_up"
        self._metrics.webhook(outcome)
        if outcome == "failed":
            return await self._outbox.postpone(delivery.id, max(wait_s, self._pause_s(delivery.attempt)))
        log.info("webhook of job %s: %s at attempt %d", delivery.id, outcome, delivery.attempt)
        await self._outbox.complete(delivery.id)

    async def _try(self, delivery: Delivery, record: Record) -> tuple[str, float]:
        """'delivered', 'refused', 'gone' or 'failed', and how long the receiver wants not to be asked again."""
        try:
            target = await find_target(delivery.url, rules_of(self._settings))
            body = await self._body(delivery, record)
            async with asyncio.timeout(SEND_S):
                answer = await self._send(target, record, body)
        except TargetRefused as error:
            log.warning("webhook of job %s is not sent: %s", delivery.id, error)
            return "refused", 0.0
        except (httpx.HTTPError, OSError, TimeoutError, ServiceError) as error:  # ssl errors are OSErrors
            log.info("webhook of job %s failed: %s", delivery.id, type(error).__name__)
            return "failed", 0.0
        if 200 <= answer.status_code < 300:
            return "delivered", 0.0
        if answer.status_code == 410:
            return "gone", 0.0
        log.info("webhook of job %s was answered %d", delivery.id, answer.status_code)
        return "failed", retry_after_s(answer.headers.get("retry-after", ""))

    async def _body(self, delivery: Delivery, record: Record) -> bytes:
        status = await self._describe(record, delivery.base_url)
        ended = datetime.fromtimestamp(record.finished_s or time.time(), UTC).isoformat()
        event = {"type": f"job.{record.state}", "timestamp": ended, "data": status}
        return json.dumps(event).encode()

    async def _send(self, target: Target, record: Record, body: bytes) -> httpx.Response:
        self._tls = self._tls or httpx.create_ssl_context()
        signed = headers(self._settings.webhook_key, f"{record.id}.{record.state}", int(time.time()), body)
        return await send(target, signed, body, self._tls)

    def _pause_s(self, attempt: int) -> float:
        pause: float = self._settings.webhook_retry_s * GROWTH ** (attempt - 1)
        return min(pause, LONGEST_PAUSE_S) * random.uniform(1 - JITTER, 1 + JITTER)


async def send(target: Target, signed: Mapping[str, str], body: bytes, tls: ssl.SSLContext) -> httpx.Response:
    """POST to the checked address; the certificate must be the host's. Only the head of the answer is read.

    Raises:
        httpx.HTTPError: no connection, or no answer.
    """
    fixed = {"Host": target.url.netloc, "Content-Type": "application/json", "User-Agent": "fewstep-webhooks", **signed}
    # Neither a proxy of the environment nor a redirect may choose another address.
    async with httpx.AsyncClient(verify=tls, trust_env=False, follow_redirects=False) as client:
        request = client.build_request(
            "POST", target.pinned_url, content=body, headers=fixed, extensions={"sni_hostname": target.host}
        )
        response = await client.send(request, stream=True)
        await response.aclose()
        return response


def retry_after_s(header: str) -> float:
    """The seconds of a Retry-After header, in either of its forms; 0 for one that cannot be read."""
    if header.isascii() and header.isdecimal():
        return min(float(header[:9]), LONGEST_PAUSE_S)
    try:
        wait_s = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
    return min(max(0.0, wait_s), LONGEST_PAUSE_S)
