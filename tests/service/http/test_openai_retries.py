"""The official ``openai`` package with its retries on: what is repeated, left or cancelled is drawn no second time."""

from __future__ import annotations

import base64
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.service.support import Service, call, eventually, expected_pixels, pixels, running_service

PREFIX = "fewstep:{fake}:"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("retries") / "data", RETRY_GRACE_S="5") as service:
        yield service


def client(service: Service, timeout_s: float = 30.0) -> openai.OpenAI:
    """One that tries three times, as the package does by itself."""
    direct = httpx.Client(trust_env=False, timeout=timeout_s)
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=2, http_client=direct)


def jobs(service: Service, prompt: str) -> list[dict[str, Any]]:
    """Every job of this prompt, as it is now."""
    listed = call("GET", f"{service.url}/jobs", params={"limit": 100}).json()["data"]
    return [job for job in listed if job["prompt"] == prompt]


def attempts(service: Service, prompt: str) -> list[int]:
    """How often each job of this prompt was given to a worker."""
    names = [f"{PREFIX}j:{job['id']}" for job in jobs(service, prompt)]
    return [int(str(service.redis.hget(name, "attempts"))) for name in names]


def ended(service: Service, prompt: str) -> list[str]:
    """The ends of all jobs of this prompt, once all have ended."""

    def found() -> list[str]:
        states = [job["status"] for job in jobs(service, prompt)]
        return [] if {"queued", "running"} & set(states) else states

    return eventually(found, "all have ended")


def key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def test_a_retry_after_a_lost_connection_finds_the_job_by_its_key(service: Service) -> None:
    prompt = "fake:sleep=1.5 with a key"
    with client(service, timeout_s=1.0) as impatient:
        answer = impatient.images.generate(prompt=prompt, extra_body={"seed": 3}, extra_headers=key())
    assert answer.data and answer.data[0].b64_json
    assert np.array_equal(pixels(base64.b64decode(answer.data[0].b64_json)), expected_pixels(prompt, 3))
    assert ended(service, prompt) == ["done"] and attempts(service, prompt) == [1]


def test_what_nobody_waits_for_any_more_is_cancelled(service: Service) -> None:
    prompt = "fake:sleep=3 without a key"
    with client(service, timeout_s=0.5) as impatient, pytest.raises(openai.APITimeoutError):
        impatient.images.generate(prompt=prompt)
    assert ended(service, prompt) == ["cancelled"] * 3


def test_a_key_stands_for_one_request(service: Service) -> None:
    prompt, same = "a key for one", key()
    with client(service) as patient:
        answers = [patient.images.generate(prompt=prompt, extra_body={"seed": 1}, extra_headers=same) for _ in range(3)]
        with pytest.raises(openai.BadRequestError) as refused:
            patient.images.generate(prompt=f"{prompt}, changed", extra_body={"seed": 1}, extra_headers=same)
    assert len({str(answer.data) for answer in answers}) == 1 and attempts(service, prompt) == [1]
    assert refused.value.code == "idempotency_mismatch" and jobs(service, f"{prompt}, changed") == []


def test_the_same_request_at_once_is_drawn_once(service: Service) -> None:
    prompt, same, drawn = "fake:sleep=0.5 at once", key(), []

    def ask() -> None:
        with client(service) as patient:
            drawn.append(str(patient.images.generate(prompt=prompt, extra_headers=same).data))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == 5 and len(set(drawn)) == 1 and attempts(service, prompt) == [1]


def test_a_cancelled_job_is_not_asked_for_again(service: Service) -> None:
    prompt = "fake:sleep=3 cancelled"

    def cancel() -> None:
        [job] = eventually(lambda: [job for job in jobs(service, prompt) if job["status"] == "running"])
        call("POST", f"{service.url}/jobs/{job['id']}/cancel")

    operator = threading.Thread(target=cancel)
    operator.start()
    with client(service) as patient, pytest.raises(openai.ConflictError) as refused:
        patient.images.generate(prompt=prompt)
    operator.join()
    assert refused.value.code == "cancelled" and ended(service, prompt) == ["cancelled"]


def test_a_failed_job_is_not_asked_for_again(service: Service) -> None:
    with client(service) as patient, pytest.raises(openai.InternalServerError) as refused:
        patient.images.generate(prompt="fake:raise")
    assert refused.value.code == "generation_failed" and ended(service, "fake:raise") == ["failed"]


def test_a_stream_that_is_left_is_cancelled(service: Service) -> None:
    prompt = "fake:sleep=3 left"
    with client(service) as patient:
        stream = patient.images.generate(prompt=prompt, stream=True, partial_images=1)
        eventually(lambda: [job for job in jobs(service, prompt) if job["status"] == "running"])
        stream.close()
    assert ended(service, prompt) == ["cancelled"]
