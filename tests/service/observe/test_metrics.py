"""What Prometheus sees after known traffic: exact counts, bounded labels, no words of the users."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.observe.accelerators import Accelerators
from service.observe.metrics import GPU, Memory, Metrics
from service.observe.queue_counters import COUNTERS
from service.queue.consumer import Consumer
from service.queue.job import Record
from service.queue.states import State
from service.queue.status import Depth
from student.bundle import RewardReference
from student.runtimes.fake import FakeRuntime, fake_student
from tests.service.support import a_job, eventually, post, running_service

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
NAMED = {"model": "fake", "version": "1"}
DRAWN = {**NAMED, "runtime": "fake"}


def read(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[(f"fewstep_{name}", frozenset(labels.items()))]


def done(**changes: Any) -> Record:
    image = {"reward": {"trained": -0.3, "heldout": 2.2}}
    result = {
        "runtime": "fake",
        "calls": [{"images": 3, "inference_s": 0.02}],
        "timings": {"queue_s": 0.2, "inference_s": 0.02, "score_s": 0.0, "encode_s": 0.0},
        "images": [image, image],
        **changes,
    }
    return Record("id", State.DONE, result)


def test_one_scrape_shows_what_was_asked_and_what_was_measured(tmp_path: Path) -> None:
    with running_service(tmp_path / "data") as live:
        for seed in (1, 2):
            assert post(live.url, prompt="kingfisher heart", seed=seed, num_images_per_prompt=3).status_code == 200
        assert post(live.url, prompt="kingfisher", seed=-1).status_code == 422
        assert post(live.url, prompt="kingfisher fake:raise").status_code == 500
        httpx.get(f"{live.url}/kingfisher", trust_env=False)

        def settled() -> Samples:
            response = httpx.get(f"{live.url}/metrics", trust_env=False)
            assert response.headers["Content-Type"].startswith("text/plain; version=")
            assert "kingfisher" not in response.text
            samples = read(response.text)
            return samples if value(samples, "jobs_finished_total") == 3 else {}

        samples = eventually(settled, "three jobs are counted")
    posts = {"route": "/generate", "method": "POST"}
    assert value(samples, "requests_total", **posts, code="200") == 2
    assert value(samples, "requests_total", **posts, code="422") == 1
    assert value(samples, "requests_total", **posts, code="500") == 1
    assert value(samples, "requests_total", route="other", method="GET", code="404") == 1
    assert value(samples, "request_duration_seconds_count", route="/generate") == 4
    assert value(samples, "images_total", **NAMED) == 6
    assert value(samples, "failed_jobs_total", reason="generation_failed") == 1
    assert value(samples, "queue_wait_seconds_count", **NAMED) == 2
    assert (
        value(samples, "batch_size_count", **DRAWN) == value(samples, "inference_duration_seconds_count", **DRAWN) == 2
    )
    assert value(samples, "batch_size_sum", **DRAWN) == 6
    runtime = FakeRuntime()
    drawn = runtime.draw(["kingfisher heart"] * 6, [1, 2, 3, 2, 3, 4], 4)
    for scorer, score_B in runtime.score(drawn, ["kingfisher heart"] * 6).items():
        assert value(samples, "reward_score_count", **NAMED, scorer=scorer) == 6
        for bound in (-0.25, 0.0, 0.25):
            below = value(samples, "reward_score_bucket", **NAMED, scorer=scorer, le=str(bound))
            assert below == (score_B <= bound).sum()
    assert value(samples, "workers") == value(samples, "ready_workers") == value(samples, "queue_up") == 1
    assert value(samples, "redis_memory_used_bytes") > 100_000 and value(samples, "redis_append_ok") == 1
    assert value(samples, "queue_depth") == value(samples, "running_jobs") == 0
    assert value(samples, "inflight_requests") == 0
    assert [labels for name, labels in samples if name == "fewstep_build_info"]


def test_gpus_are_shown_as_long_as_a_worker_tells_of_them(tmp_path: Path) -> None:
    """Through the queue: what a worker said with its sign of life is what the HTTP process shows."""
    report = {"busy": 0.75, "used_bytes": 3e9, "total_bytes": 8e9, "power_w": 250.5, "temperature_c": 61.0}
    info = {"runtime": "r", "host": "far", "max_batch": 8, "gpus": {"GPU-1": report}}
    with running_service(tmp_path / "data") as live:
        page = httpx.get(f"{live.url}/metrics", trust_env=False).text
        assert "# TYPE fewstep_gpu_busy_ratio gauge" in page and "fewstep_gpu_busy_ratio{" not in page
        with live.redis as client:
            worker = Consumer(client, "fake", "far", lease_s=30.0, max_attempts=3)
            worker.beat(info, [])
            samples = read(httpx.get(f"{live.url}/metrics", trust_env=False).text)
            worker.release([])
        gone = read(httpx.get(f"{live.url}/metrics", trust_env=False).text)
    shown = {name: value(samples, f"gpu_{name}", host="far", gpu="GPU-1") for name in GPU}
    assert shown == dict(zip(GPU, (0.75, 3e9, 8e9, 250.5, 61.0), strict=True))
    assert not [name for name, _ in gone if name.startswith("fewstep_gpu_")]


def test_without_a_driver_no_gpu_is_told_of() -> None:
    assert Accelerators().measure() == {} or Path("/dev/nvidiactl").exists()


def test_scores_fall_into_signed_buckets() -> None:
    metrics = Metrics("m", "1", {})
    metrics.record(done())
    samples = read(metrics.text().decode())
    named = {"model": "m", "version": "1"}
    assert value(samples, "reward_score_bucket", **named, scorer="trained", le="-0.5") == 0
    assert value(samples, "reward_score_bucket", **named, scorer="trained", le="-0.25") == 2
    assert value(samples, "reward_score_bucket", **named, scorer="heldout", le="2.0") == 0
    assert value(samples, "reward_score_bucket", **named, scorer="heldout", le="2.5") == 2
    assert (
        value(samples, "batch_size_sum", **named, runtime="fake") == 3 and value(samples, "images_total", **named) == 2
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Record("id", State.FAILED, {"error": {"code": "worker_lost", "message": "m"}}), "worker_lost"),
        (Record("id", State.EXPIRED, {}), "expired"),
        (Record("id", State.CANCELLED, {}), "cancelled"),
    ],
)
def test_jobs_without_a_picture_are_counted_by_reason(record: Record, reason: str) -> None:
    metrics = Metrics("m", "1", {})
    metrics.record(record)
    samples = read(metrics.text().decode())
    assert value(samples, "failed_jobs_total", reason=reason) == 1
    assert ("fewstep_images_total", frozenset({("model", "m"), ("version", "1")})) not in samples


def test_the_queue_is_shown_as_it_was_last_seen() -> None:
    metrics = Metrics("m", "1", {})
    metrics.queue(Depth(waiting=3, running=2, oldest_s=1.5, workers=4, counters={"finished": 9, "redelivered": 1}))
    samples = read(metrics.text().decode())
    gauges = ("queue_depth", "running_jobs", "queue_oldest_age_seconds", "workers")
    assert [value(samples, name) for name in gauges] == [3, 2, 1.5, 4]
    assert {name: value(samples, f"jobs_{name}_total") for name in COUNTERS} == {
        "finished": 9, "redelivered": 1, "fenced": 0, "dead": 0,
    }  # fmt: skip


def test_a_mean_can_be_had_from_the_sums_above_and_below() -> None:
    """The library shows no sum of a histogram with buckets below 0, and a counter must not fall."""
    metrics = Metrics("m", "1", {})
    metrics.record(done(images=[{"reward": {"s": score}} for score in (1.5, -0.5, -2.0, 0.0)]))
    samples, named = read(metrics.text().decode()), {"model": "m", "version": "1", "scorer": "s"}
    assert value(samples, "reward_above_total", **named) == 1.5 and value(samples, "reward_below_total", **named) == 2.5
    assert value(samples, "reward_score_count", **named) == 4


def test_stages_are_those_that_the_worker_measured() -> None:
    metrics = Metrics("m", "1", {})
    metrics.record(done())
    samples = read(metrics.text().decode())
    found = {stage: value(samples, "stage_duration_seconds_sum", model="m", version="1", stage=stage)
             for stage in ("queue", "inference", "score", "encode")}  # fmt: skip
    assert found == {"queue": 0.2, "inference": 0.02, "score": 0, "encode": 0}


def test_what_drift_is_measured_against_comes_and_goes_with_the_student() -> None:
    metrics = Metrics("m", "1", {})
    student = replace(fake_student(), reward_reference={"trained": RewardReference(0.4, 0.5, {})})
    metrics.references([student])
    named = {**NAMED, "scorer": "trained"}
    samples = read(metrics.text().decode())
    assert value(samples, "reward_reference_mean", **named) == 0.4
    assert value(samples, "reward_reference_std", **named) == 0.5
    metrics.references([])
    assert "reward_reference_mean{" not in metrics.text().decode()


def test_a_server_out_of_reach_is_told_and_its_last_figures_stay() -> None:
    metrics = Metrics("m", "1", {})
    metrics.reached(Memory(used_bytes=9, max_bytes=10, appends=False))
    metrics.models({("m", "1"): 2}, ready=2)
    before = read(metrics.text().decode())
    metrics.reached(None)
    after = read(metrics.text().decode())
    assert (value(before, "queue_up"), value(after, "queue_up")) == (1, 0)
    for samples in (before, after):
        assert value(samples, "redis_memory_used_bytes") == 9 and value(samples, "redis_memory_max_bytes") == 10
        assert value(samples, "redis_append_ok") == 0 and value(samples, "ready_workers") == 2


def test_what_was_chosen_is_counted_apart_from_what_the_student_draws() -> None:
    """Four candidates, two of them of a second round: the student's own scores are those of the first."""
    scores = ((0.0, 0.5, 1), (1.0, 0.7, 1), (2.0, 0.3, 2), (-1.0, 0.1, 2))
    candidates = [{"reward": {"t": t, "h": h}, "round": round} for t, h, round in scores]
    image = {"reward": {"t": 2.0, "h": 0.3}, "candidates": candidates, "below_floor": True}
    metrics = Metrics("m", "1", {})
    payload = a_job(model="m", rank_by="t", candidates=4).to_payload()
    metrics.record(replace(done(images=[image, {"reward": {"t": 5.0}}]), payload=payload))
    samples, named = read(metrics.text().decode()), {"model": "m", "version": "1"}
    assert value(samples, "reward_score_count", **named, scorer="t") == 3
    assert value(samples, "reward_above_total", **named, scorer="t") == 0.0 + 1.0 + 5.0
    assert value(samples, "candidates_total", **named) == 4 and value(samples, "images_total", **named) == 2
    assert value(samples, "images_below_floor_total", **named) == 1
    for scorer, role, upper in (("t", "choosing", "1.5"), ("h", "reporting", "0.0")):
        bucket = {**named, "scorer": scorer, "role": role, "le": upper}
        assert value(samples, "best_of_gain_bucket", **bucket) == 1
    assert value(samples, "best_of_gain_bucket", **named, scorer="t", role="choosing", le="1.0") == 0
    assert value(samples, "best_of_gain_bucket", **named, scorer="h", role="reporting", le="-0.25") == 0
