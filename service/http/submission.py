"""Enqueueing a job, and translating the queue's refusals for the client."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

from service.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelGone,
    QueueFull,
    QuotaExceeded,
    ServiceError,
)
from service.http.preferences import KEY_HEADER
from service.http.services import Services
from service.observe.context import current_request
from service.observe.logs import prompt_facts
from service.queue.job import Job, QueueOptions, Verdict

MINUTE_S = 60

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submission:
    """A job and how it is to be queued; it can be enqueued again after the queue's server has lost it."""

    services: Services
    job: Job
    options: QueueOptions

    async def enqueue(self) -> str:
        """Put the job into the queue; returns the id of the job to wait for: a repeated request gets the first one's.

        Raises:
            ServiceError: the queue refuses it.
            RedisError: the queue's server is away.
        """
        with self.services.tracing.publish(self.job) as traceparent:
            verdict = await self.services.producer.enqueue(replace(self.job, traceparent=traceparent), self.options)
        _note(verdict)
        self._log(verdict)
        self.services.guard.record(verdict.word == "full", verdict.wait_s)
        if (refusal := _refusal(verdict, self.job)) is not None:
            self.services.metrics.rejected(verdict.word)
            raise refusal
        if verdict.word == "ok":
            self.services.mirror.mirror(self.job, self.services.models.choice)
        return verdict.id

    def _log(self, verdict: Verdict) -> None:
        job, settings = self.job, self.services.settings
        about = {"verdict": verdict.word, "images": len(job.seeds), "steps": job.steps}
        log.info("job requested", extra={**about, **prompt_facts(job.prompt, settings.log_prompts)})


def _note(verdict: Verdict) -> None:
    """Add the job's id and the rest of the caller's quota to the response."""
    if info := current_request.get():
        info.job_id = verdict.id
        info.headers |= rate_headers(verdict.quota, verdict.quota_left)


def rate_headers(quota: int, left: int) -> dict[str, str]:
    """The rate limit headers for a quota in thousands of pixel-steps; none without a quota.

    X-RateLimit-* is conventional; RateLimit and RateLimit-Policy are from draft-ietf-httpapi-ratelimit-headers-10.
    ``Reset`` and ``t`` are the seconds until the quota is full again: it refills steadily, completely in a minute.
    """
    if quota <= 0:
        return {}
    remaining, full_s = max(0, left), math.ceil((quota - left) * MINUTE_S / quota)
    return {
        "X-RateLimit-Limit": str(quota),
        "X-RateLimit-Remaining": str(remaining),
        "X-RateLimit-Reset": str(full_s),
        "RateLimit-Policy": f'"kilopixel-steps";q={quota};w={MINUTE_S}',
        "RateLimit": f'"kilopixel-steps";r={remaining};t={full_s}',
    }


def _refusal(verdict: Verdict, job: Job) -> ServiceError | None:
    again = verdict.wait_s
    if verdict.word == "gone":
        return ModelGone(f"Model {job.model} {job.version} is no longer served.", "model")
    if verdict.word == "full":
        return QueueFull(retry_after_s=again)
    if verdict.word == "key_full":
        message = "Too many of your requests are waiting: let some of them finish, or retry after Retry-After."
        return QuotaExceeded(message, code="too_many_waiting", retry_after_s=again)
    if verdict.word == "late":
        message = "The queue is too long for this deadline: timeout_s would pass before a worker is free."
        return DeadlineExceeded(message, "timeout_s", retry_after_s=again)
    if verdict.word == "left":
        message = (
            "The queue is longer than clients have recently been willing to wait. Retry after the time in Retry-After, "
            "set timeout_s to say how long you wait, or fetch the result later (Prefer: respond-async)."
        )
        return QueueFull(message, retry_after_s=again)
    if verdict.word == "quota":
        message = (
            f"This request costs {job.cost / 1000:g} megapixel-steps, but only {max(0, verdict.quota_left) / 1000:g} "
            f"are left of your quota of {verdict.quota / 1000:g} a minute."
        )
        return QuotaExceeded(message, retry_after_s=again)
    if verdict.word == "mismatch":
        message = f"This {KEY_HEADER} was already used for a different request: use a new one."
        return InvalidRequest(message, KEY_HEADER, code="idempotency_mismatch")
    return None
