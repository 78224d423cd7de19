"""What the queue's verdict on a job is to its client: accepted, or refused with the time after which to come back."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from service.errors import ServiceError
from service.http.overload import IN_A_ROW, OverloadGuard
from service.http.submission import Submission
from service.observe.context import RequestInfo, current_request
from service.queue.job import Job, QueueOptions, Verdict
from tests.service.support import a_job

Word = Literal["ok", "known", "attached", "mismatch", "quota", "full", "key_full", "late", "left", "gone"]


class Around:
    """The parts of a process that a submission touches."""

    def __init__(self, word: Word, wait_s: float = 6.5) -> None:
        self.asked: list[tuple[Job, QueueOptions]] = []
        self.rejected: list[str] = []
        self.mirrored: list[Job] = []
        self.guard = OverloadGuard()

        async def enqueue(job: Job, options: QueueOptions) -> Verdict:
            self.asked.append((job, options))
            return Verdict(word, "the id", wait_s, 2_500, 10_000)

        self.services: Any = SimpleNamespace(
            tracing=SimpleNamespace(publish=lambda job: nullcontext("the span")),
            producer=SimpleNamespace(enqueue=enqueue),
            guard=self.guard,
            metrics=SimpleNamespace(rejected=self.rejected.append),
            mirror=SimpleNamespace(mirror=lambda job, choice: self.mirrored.append(job)),
            models=SimpleNamespace(choice=None),
            settings=SimpleNamespace(log_prompts=False),
        )

    def submit(self, job: Job) -> str:
        return asyncio.run(Submission(self.services, job, QueueOptions(9.0)).enqueue())


@pytest.mark.parametrize(
    ("word", "status", "code", "param", "again"),
    [
        ("full", 503, "queue_full", None, "7"),
        ("left", 503, "queue_full", None, "7"),
        ("key_full", 429, "too_many_waiting", None, "7"),
        ("quota", 429, "quota_exceeded", None, "7"),
        ("late", 504, "deadline_exceeded", "timeout_s", "7"),
        ("mismatch", 422, "idempotency_mismatch", "Idempotency-Key", None),
        ("gone", 404, "model_not_found", "model", None),
    ],
)
def test_each_refusal_has_its_status_and_says_when_to_come_back(
    word: Word, status: int, code: str, param: str | None, again: str | None
) -> None:
    around = Around(word)
    with pytest.raises(ServiceError) as refused:
        around.submit(a_job())
    error = refused.value
    assert (error.status, error.code, error.param, error.headers.get("Retry-After")) == (status, code, param, again)
    assert around.rejected == [word] and around.mirrored == []


def test_a_refusal_for_the_quota_says_what_it_costs_and_what_is_left() -> None:
    with pytest.raises(ServiceError, match=r"costs 0\.016 .* only 2\.5 are left of your quota of 10 "):
        Around("quota").submit(a_job())


@pytest.mark.parametrize(("word", "mirrored"), [("ok", True), ("known", False), ("attached", False)])
def test_what_is_accepted_has_its_id_and_only_a_new_job_is_mirrored(word: Word, mirrored: bool) -> None:
    """One that the queue knows already was mirrored when it came."""
    around, job, info = Around(word), a_job(), RequestInfo("r")
    token = current_request.set(info)
    try:
        assert around.submit(job) == "the id"
    finally:
        current_request.reset(token)
    assert around.rejected == [] and around.mirrored == ([job] if mirrored else [])
    [(asked, options)] = around.asked
    assert asked.traceparent == "the span" and options.timeout_s == 9.0
    assert info.job_id == "the id"
    assert (info.headers["X-RateLimit-Limit"], info.headers["X-RateLimit-Remaining"]) == ("10000", "2500")


@pytest.mark.parametrize("word", ["full", "key_full", "left", "late", "quota", "mismatch"])
def test_only_a_queue_that_is_full_closes_the_door_for_all(word: Word) -> None:
    around = Around(word, wait_s=30.0)
    for _ in range(IN_A_ROW):
        with pytest.raises(ServiceError):
            around.submit(a_job())
    refusal = around.guard.refusal()
    assert (refusal is not None) == (word == "full")
    assert refusal is None or refusal.headers["Retry-After"] == "30"
