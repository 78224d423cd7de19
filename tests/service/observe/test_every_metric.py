"""Every metric once: its name, its labels and its value after known calls. Dashboards and alerts go by these names."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from service.observe.metrics import Memory, Metrics
from service.queue.job import Record
from service.queue.states import State
from service.queue.status import Depth, WorkerState
from student.bundle import RewardReference
from student.runtimes.fake import fake_student
from tests.service.support import a_job

DRAWN = 'model="n",version="2"'
EXPECTED = """
requests_total{code="503",method="POST",route="/generate"} 1
request_duration_seconds_count{route="/generate"} 1
request_duration_seconds_sum{route="/generate"} 0.25
rejected_requests_total{reason="full"} 1
webhooks_total{outcome="delivered"} 1
failed_jobs_total{reason="expired"} 1
failed_jobs_total{reason="no_code"} 1
images_total{model="n",version="2"} 2
batch_size_count{model="n",runtime="r",version="2"} 1
batch_size_sum{model="n",runtime="r",version="2"} 3
inference_duration_seconds_count{model="n",runtime="r",version="2"} 1
inference_duration_seconds_sum{model="n",runtime="r",version="2"} 0.5
oom_splits_total{model="n",runtime="r",version="2"} 2
queue_wait_seconds_count{model="n",version="2"} 1
queue_wait_seconds_sum{model="n",version="2"} 1
job_duration_seconds_count{model="n",version="2"} 1
job_duration_seconds_sum{model="n",version="2"} 4
stage_duration_seconds_count{model="n",stage="queue",version="2"} 1
stage_duration_seconds_sum{model="n",stage="queue",version="2"} 1
stage_duration_seconds_count{model="n",stage="inference",version="2"} 1
stage_duration_seconds_sum{model="n",stage="inference",version="2"} 0.5
stage_duration_seconds_count{model="n",stage="score",version="2"} 2
stage_duration_seconds_sum{model="n",stage="score",version="2"} 0.25
stage_duration_seconds_count{model="n",stage="encode",version="2"} 1
stage_duration_seconds_sum{model="n",stage="encode",version="2"} 0.0625
late_scores_total{end="done",model="n",version="2"} 1
late_scores_total{end="lost",model="n",version="2"} 1
reward_score_count{model="n",scorer="t",version="2"} 4
reward_score_count{model="n",scorer="h",version="2"} 2
reward_above_total{model="n",scorer="t",version="2"} 6
reward_above_total{model="n",scorer="h",version="2"} 0
reward_below_total{model="n",scorer="t",version="2"} 0
reward_below_total{model="n",scorer="h",version="2"} 1
reward_errors_total{model="n",scorer="x",version="2"} 2
candidates_total{model="n",version="2"} 2
images_below_floor_total{model="n",version="2"} 1
best_of_gain_count{model="n",role="choosing",scorer="t",version="2"} 1
best_of_gain_count{model="n",role="reporting",scorer="h",version="2"} 1
reward_reference_mean{model="fake",scorer="trained",version="1"} 0.4
reward_reference_std{model="fake",scorer="trained",version="1"} 0.5
inflight_requests 0
queue_depth 3
running_jobs 2
queue_oldest_age_seconds 1.5
workers 4
ready_workers 1
worker_states{state="loading"} 0
worker_states{state="ready"} 2
worker_states{state="paused"} 1
worker_states{state="draining"} 0
queue_up 1
redis_memory_used_bytes 9
redis_memory_max_bytes 10
redis_append_ok 1
model_workers{model="m",version="1"} 2
gpu_busy_ratio{gpu="G",host="h"} 0.5
gpu_memory_used_bytes{gpu="G",host="h"} 1
gpu_memory_total_bytes{gpu="G",host="h"} 2
gpu_power_watts{gpu="G",host="h"} 3
gpu_temperature_celsius{gpu="G",host="h"} 4
jobs_finished_total 9
jobs_redelivered_total 1
jobs_fenced_total 7
jobs_dead_total 8
device_busy_seconds_total 1.5
device_starved_seconds_total 0.25
probe_runs_total{outcome="same"} 2
probe_runs_total{outcome="recorded"} 0
probe_runs_total{outcome="pixels_changed"} 0
probe_runs_total{outcome="scores_changed"} 3
probe_runs_total{outcome="failed"} 0
feedback_images{feedback="chosen"} 5
feedback_images{feedback="rejected"} 0
feedback_images{feedback="rerolled"} 4
background_failures_total{task="sweep"} 6
build_info{model="m",python="3",version="1"} 1
"""
SECONDS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60]
IMAGES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
SCORES = [-4, -3, -2.5, -2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4]


def everything() -> Metrics:
    metrics = Metrics("m", "1", {"python": "3"})
    metrics.request("/generate", "POST", 503, 0.25)
    metrics.rejected("full")
    metrics.webhook("delivered")
    payload = a_job(model="n", version="2", rank_by="t", candidates=2).to_payload()
    candidates = [{"reward": {"t": 2.0, "h": -0.5}, "round": 1}, {"reward": {"t": 1.0}, "round": 1}]
    chosen = {"reward": {"t": 2.0, "h": -0.5}, "candidates": candidates, "below_floor": True}
    timings = {"queue_s": 1.0, "inference_s": 0.5, "score_s": 0.125, "encode_s": 0.0625}
    result = {
        "runtime": "r", "calls": [{"images": 3, "inference_s": 0.5, "splits": 2}], "timings": timings,
        "images": [chosen, {"reward": {}, "reward_failed": ["x"]}],
    }  # fmt: skip
    done = Record("i", State.DONE, result, payload=payload, created_s=10.0, finished_s=14.0)
    metrics.record(done)
    metrics.record(Record("i", State.EXPIRED, {}))
    metrics.record(Record("i", State.FAILED, {"error": {"code": "no_code"}}))
    metrics.scores(replace(done, scoring="done"))
    metrics.scores(replace(done, scoring="lost"))
    counters = {
        "finished": 9, "redelivered": 1, "fenced": 7, "dead": 8, "device_busy_ms": 1500, "device_starved_ms": 250,
        "probe_same": 2, "probe_scores_changed": 3, "feedback_chosen": 5, "feedback_rerolled": 4, "failed:sweep": 6,
    }  # fmt: skip
    metrics.queue(Depth(3, 2, 1.5, 4, counters))
    metrics.reached(Memory(9, 10, True))
    metrics.references([replace(fake_student(), reward_reference={"trained": RewardReference(0.4, 0.5, {})})])
    metrics.models({("m", "1"): 2}, 1)
    metrics.states([WorkerState.READY, WorkerState.READY, WorkerState.PAUSED])
    gpu = {"busy": 0.5, "used_bytes": 1, "total_bytes": 2, "power_w": 3, "temperature_c": 4}
    metrics.accelerators([("h", {"G": gpu})])
    return metrics


def test_every_metric_has_its_name_its_labels_and_its_value() -> None:
    found = set()
    for family in text_string_to_metric_families(everything().text().decode()):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                labels = ",".join(f'{name}="{text}"' for name, text in sorted(sample.labels.items()))
                name = sample.name.removeprefix("fewstep_") + (f"{{{labels}}}" if labels else "")
                found.add(f"{name} {sample.value:g}")
    assert found == set(EXPECTED.strip().splitlines())


def test_what_is_not_there_any_more_is_not_shown_any_more() -> None:
    metrics = everything()
    metrics.models({("m", "2"): 1}, 1)
    metrics.references([])
    metrics.accelerators([])
    shown = metrics.text().decode()
    assert 'fewstep_model_workers{model="m",version="2"} 1.0' in shown
    for gone in ('fewstep_model_workers{model="m",version="1"}', "fewstep_reward_reference_mean{", 'gpu="G"'):
        assert gone not in shown and gone in everything().text().decode(), gone


def test_buckets_are_where_dashboards_expect_them() -> None:
    buckets: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(everything().text().decode()):
        edges = {float(sample.labels["le"]) for sample in family.samples if sample.name.endswith("_bucket")}
        if edges:
            buckets[family.name.removeprefix("fewstep_")] = sorted(edges - {float("inf")})
    assert buckets == {
        **{f"{name}_seconds": SECONDS for name in (
            "request_duration", "queue_wait", "job_duration", "inference_duration", "stage_duration",
        )},
        "batch_size": IMAGES, "reward_score": SCORES, "best_of_gain": SCORES,
    }  # fmt: skip


def test_a_canarys_half_counts_its_calls_and_is_nobodys_image() -> None:
    metrics = Metrics("m", "1", {})
    payload = a_job(model="n", version="2", pair="n|e|p|base").to_payload()
    result = {"runtime": "r", "calls": [{"images": 1, "inference_s": 0.5}], "timings": {}, "images": [{"reward": {}}]}
    metrics.record(Record("i", State.DONE, result, payload=payload))
    metrics.record(Record("j", State.FAILED, {"error": {"code": "generation_failed"}}, payload=payload))
    text = metrics.text().decode()
    assert 'fewstep_batch_size_count{model="n",runtime="r",version="2"} 1.0' in text
    assert "fewstep_images_total{" not in text and "fewstep_failed_jobs_total{" not in text


def test_scores_that_are_to_come_are_not_counted_twice() -> None:
    """Nor is the time of a scoring that has not been."""
    metrics = Metrics("n", "2", {})
    result = {"timings": {"queue_s": 1.0, "score_s": 0.0}, "images": [{"reward": {"t": 1.0}}]}
    for scoring in ("pending", "skipped"):
        metrics.record(Record("i", State.DONE, result, scoring=scoring))
    text = metrics.text().decode()
    assert "fewstep_reward_score_count{" not in text and 'stage="score"' not in text
    assert f'fewstep_late_scores_total{{end="skipped",{DRAWN}}} 1.0' in text and 'end="pending"' not in text
    assert f"fewstep_images_total{{{DRAWN}}} 2.0" in text
