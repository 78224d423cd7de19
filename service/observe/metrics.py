"""The Prometheus metrics. No label is ever a prompt, a seed or an id.

What a worker measures returns with the job's record, so that one scrape of the HTTP process covers everything.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from service.observe.gauges import SeenGauge, SeenGauges
from service.observe.quality import QualityMetrics
from service.observe.queue_counters import QueueCounters
from service.observe.shared import shared_folder
from service.queue.job import Record
from service.queue.states import State
from service.queue.status import Depth, WorkerState
from student.bundle import Student

# The first bound is below the time that a few-step student needs for one image.
SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60)
BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Scores are standardised on the teacher: 0 is its mean, 1 its standard deviation.
SCORES = (-4, -3, -2.5, -2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4)
# No sample where no worker has an NVIDIA GPU; the name ends with the unit.
GPU = {
    "busy_ratio": "GPU utilisation (0 to 1).",
    "memory_used_bytes": "GPU memory in use.",
    "memory_total_bytes": "GPU memory in total.",
    "power_watts": "Power draw of the GPU.",
    "temperature_celsius": "Temperature of the GPU.",
}
FIGURES = dict(zip(GPU, ("busy", "used_bytes", "total_bytes", "power_w", "temperature_c"), strict=True))


@dataclass(frozen=True)
class Memory:
    """The memory of the queue's server (``max_bytes`` 0: no limit) and the state of its append-only file."""

    used_bytes: int
    max_bytes: int
    appends: bool


def as_drawn(images: Sequence[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """The pictures whose scores tell of the student and not of a choice: of several candidates all of the first round.

    Those of later rounds are of images whose first ones were bad.
    """
    for image in images:
        yield from [one for one in image.get("candidates", ()) if one.get("round") == 1] or [image]


class Metrics:
    """All metrics of one HTTP process, in a registry of its own."""

    def __init__(self, model: str, version: str, build: dict[str, str]) -> None:
        self.registry = CollectorRegistry()
        self._seen = SeenGauges()
        self._names = (model, version)
        named, drawn = ["model", "version"], ["model", "version", "runtime"]
        self._requests = self._counter("requests", "Requests by route and status.", ["route", "method", "code"])
        self._images = self._counter("images", "Images generated.", named)
        self._failures = self._counter("failed_jobs", "Jobs that ended without images, by reason.", ["reason"])
        self._rejected = self._counter("rejected_requests", "Requests that the queue refused, by reason.", ["reason"])
        self._webhooks = self._counter("webhooks", "Attempts to send a webhook, by outcome.", ["outcome"])
        self._duration = self._histogram("request_duration_seconds", "From request to response.", ["route"], SECONDS)
        self._queue_wait = self._histogram("queue_wait_seconds", "From acceptance until claimed.", named, SECONDS)
        self._job = self._histogram("job_duration_seconds", "From acceptance to the images.", named, SECONDS)
        self._inference = self._histogram("inference_duration_seconds", "One call of the runtime.", drawn, SECONDS)
        self._batch = self._histogram("batch_size", "Images in one call of the runtime.", drawn, BATCH)
        staged, scored = [*named, "stage"], [*named, "scorer"]
        self._stage = self._histogram("stage_duration_seconds", "Time of each stage of a job.", staged, SECONDS)
        self._reward = self._histogram("reward_score", "Standardised scores.", scored, SCORES)
        # The library has no sum of values that may be negative, and a mean over time needs one.
        self._above = self._counter("reward_above", "Sum of the scores above 0.", scored)
        self._beneath = self._counter("reward_below", "Sum of the scores below 0, without their sign.", scored)
        gained = "Score of the kept candidate above the mean of all that were drawn for its image."
        self._gain = self._histogram("best_of_gain", gained, [*scored, "role"], SCORES)
        self._candidates = self._counter("candidates", "Pictures drawn for images that were chosen among them.", named)
        self._below = self._counter("images_below_floor", "Images that have not reached their min_reward.", named)
        self._unscored = self._counter("reward_errors", "Pictures that a scorer failed on.", scored)
        self._mean = self._gauge("reward_reference_mean", "Mean score of the bundle's own reference.", scored)
        self._std = self._gauge("reward_reference_std", "Standard deviation of the same.", scored)
        self._late = self._counter("late_scores", "Jobs whose scores come after the pictures, by end.", [*named, "end"])
        self._splits = self._counter("oom_splits", "Calls that were halved for want of memory.", drawn)
        self.inflight = self._under_way("inflight_requests", "Requests for images that wait for an answer.")
        self._waiting = self._gauge("queue_depth", "Jobs that wait for a worker.")
        self._running = self._gauge("running_jobs", "Jobs that a worker holds.")
        self._oldest = self._gauge("queue_oldest_age_seconds", "Age of the oldest waiting job.")
        self._workers = self._gauge("workers", "Workers that have given a sign of life lately.")
        self._ready = self._gauge("ready_workers", "Those of them that hold a student.")
        self._states = self._gauge("worker_states", "Workers by what they do.", ["state"])
        self._up = self._gauge("queue_up", "Whether the queue's server answered this scrape (1) or not (0).")
        self._memory = self._gauge("redis_memory_used_bytes", "Memory of the queue's server.")
        self._max_memory = self._gauge("redis_memory_max_bytes", "Its bound; 0: none.")
        self._appends = self._gauge("redis_append_ok", "Whether its last write to the append-only file succeeded.")
        self._models = self._gauge("model_workers", "Workers that hold a student.", named)
        self.quality = QualityMetrics(self._gauge)
        self._gpus = {name: self._gauge(f"gpu_{name}", text, ["host", "gpu"]) for name, text in GPU.items()}
        self._queue = QueueCounters()
        self.background = self._queue.background
        self.registry.register(self._queue)
        self.registry.register(self._seen)
        info = {"model": model, "version": version, **build}
        self._gauge("build_info", "Always 1; the labels hold the values.", list(info)).set(1, *info.values())

    def _counter(self, name: str, documentation: str, labels: list[str]) -> Counter:
        return Counter(f"fewstep_{name}", documentation, labels, registry=self.registry)

    def _under_way(self, name: str, documentation: str) -> Gauge:
        return Gauge(f"fewstep_{name}", documentation, registry=self.registry, multiprocess_mode="livesum")

    def _gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> SeenGauge:
        return self._seen.add(f"fewstep_{name}", documentation, labels)

    def _histogram(self, name: str, documentation: str, labels: list[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(f"fewstep_{name}", documentation, labels, buckets=buckets, registry=self.registry)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, method, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a request that the queue refused."""
        self._rejected.labels(reason).inc()

    def webhook(self, outcome: str) -> None:
        """Count an attempt to send a webhook."""
        self._webhooks.labels(outcome).inc()

    def record(self, record: Record) -> None:
        """Count what a worker measured for a job that has ended; call it once for each."""
        job = record.job if record.readable else None
        names = (job.model, job.version) if job else self._names
        result = record.result
        runtime = result.get("runtime", "")
        for call in result.get("calls", []):
            self._batch.labels(*names, runtime).observe(call["images"])
            self._inference.labels(*names, runtime).observe(call["inference_s"])
            self._splits.labels(*names, runtime).inc(call.get("splits", 0))
        if job and job.pair:
            return  # drawn a second time, and for nobody
        if record.state is not State.DONE:
            self._failures.labels(result["error"]["code"] if "error" in result else record.state.value).inc()
            return
        self._queue_wait.labels(*names).observe(result["timings"]["queue_s"])
        for stage, seconds in result["timings"].items():
            if stage != "score_s" or not record.scoring:
                self._stage.labels(*names, stage.removesuffix("_s")).observe(seconds)
        self._job.labels(*names).observe((record.finished_s or record.created_s) - record.created_s)
        self._images.labels(*names).inc(len(result["images"]))
        self._record_choice(names, result["images"], job.rank_by if job else "")
        if record.scoring == "skipped":
            self._late.labels(*names, record.scoring).inc()
        elif not record.scoring:
            self._rewards(names, result["images"])

    def scores(self, record: Record) -> None:
        """Count scores that have come later than their pictures, or were lost; call it once for each job."""
        job = record.job if record.readable else None
        names = (job.model, job.version) if job else self._names
        self._late.labels(*names, record.scoring).inc()
        if record.scoring == "done":
            self._stage.labels(*names, "score").observe(record.result["timings"]["score_s"])
            self._rewards(names, record.result["images"])

    def _rewards(self, names: tuple[str, str], images: Sequence[Mapping[str, Any]]) -> None:
        for image in as_drawn(images):
            for scorer, score in image["reward"].items():
                self._reward.labels(*names, scorer).observe(score)
                self._above.labels(*names, scorer).inc(max(score, 0.0))
                self._beneath.labels(*names, scorer).inc(max(-score, 0.0))
            for scorer in image.get("reward_failed", ()):
                self._unscored.labels(*names, scorer).inc()

    def _record_choice(self, names: tuple[str, str], images: Sequence[Mapping[str, Any]], rank_by: str) -> None:
        """Count what was drawn for pictures that were chosen, and what that has gained."""
        for image in images:
            self._below.labels(*names).inc(bool(image.get("below_floor")))
            candidates = image.get("candidates", ())
            self._candidates.labels(*names).inc(len(candidates))
            for scorer, score in image["reward"].items() if candidates else ():
                scores = [one["reward"][scorer] for one in candidates if scorer in one["reward"]]
                role = "choosing" if scorer == rank_by else "reporting"
                if scores:
                    self._gain.labels(*names, scorer, role).observe(score - sum(scores) / len(scores))

    def queue(self, depth: Depth) -> None:
        """Record how full the queue is."""
        self._waiting.set(depth.waiting)
        self._running.set(depth.running)
        self._oldest.set(depth.oldest_s)
        self._workers.set(depth.workers)
        self._queue.counters = depth.counters

    def reached(self, memory: Memory | None) -> None:
        """Record the state of the queue's server; None: it is out of reach."""
        self._up.set(memory is not None)
        if memory is not None:
            self._memory.set(memory.used_bytes)
            self._max_memory.set(memory.max_bytes)
            self._appends.set(memory.appends)

    def references(self, students: Iterable[Student]) -> None:
        """Record the reference scores of each served student, which drift is measured against."""
        self._mean.clear()
        self._std.clear()
        for student in students:
            for scorer, reference in student.reward_reference.items():
                self._mean.set(reference.mean, student.id, student.version, scorer)
                self._std.set(reference.std, student.id, student.version, scorer)

    def models(self, workers: Mapping[tuple[str, str], int], ready: int) -> None:
        """Record how many workers have loaded each (model, version), and how many have loaded any."""
        self._ready.set(ready)
        self._models.clear()
        for names, count in workers.items():
            self._models.set(count, *names)

    def states(self, of_workers: Iterable[WorkerState]) -> None:
        """Note how many workers are in each state."""
        counts = collections.Counter(of_workers)
        for state in WorkerState:
            self._states.set(counts[state], state.value)

    def accelerators(self, seen: Iterable[tuple[str, Mapping[str, Mapping[str, float]]]]) -> None:
        """Record the state of each worker's GPUs: its host, and what ``Accelerators.measure`` returned there."""
        for gauge in self._gpus.values():
            gauge.clear()
        for host, gpus in seen:
            for gpu, figures in gpus.items():
                for name, gauge in self._gpus.items():
                    gauge.set(figures[FIGURES[name]], host, gpu)

    def text(self) -> bytes:
        """Everything in Prometheus' text format, of all processes that share their counts with this one."""
        folder = shared_folder()
        if folder is None:
            return generate_latest(self.registry)
        whole = CollectorRegistry()
        MultiProcessCollector(whole, str(folder))  # type: ignore[no-untyped-call]
        for seen in (self._queue, self._seen):
            whole.register(seen)
        return generate_latest(whole)
