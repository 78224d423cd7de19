"""What Prometheus sees. Never a prompt, a seed or an id as a label.

What a worker measures comes back with the job's record, so that one scrape of the API process shows everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from service.queue.job import Record, State
from service.queue.producer import Depth

# The first is below what a few-step student needs for one image.
SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60)
BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Scores are standardised on the teacher: 0 is its mean, 1 its standard deviation.
SCORES = (-4, -3, -2.5, -2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4)
COUNTERS = {
    "finished": "Jobs that have reached an end.",
    "redelivered": "Jobs that were lost with a worker and given to another.",
    "fenced": "Results that came from a worker which had been taken for dead.",
    "dead": "Jobs that were given up after too many lost workers.",
}


class QueueCounters(Collector):
    """The counters that the queue's server keeps, as of the last look at it."""

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}

    def collect(self) -> Iterable[CounterMetricFamily]:
        for name, documentation in COUNTERS.items():
            family = CounterMetricFamily(f"fewstep_jobs_{name}", documentation)
            family.add_metric([], self.counters.get(name, 0))
            yield family


class Metrics:
    """All metrics of one API process, in a registry of its own."""

    def __init__(self, model: str, version: str, build: dict[str, str]) -> None:
        self.registry = CollectorRegistry()
        self._names = (model, version)
        named, drawn = ["model", "version"], ["model", "version", "runtime"]
        self._requests = self._counter("requests", "Answered requests.", ["route", "method", "code"])
        self._images = self._counter("images", "Images drawn.", named)
        self._failures = self._counter("failed_jobs", "Jobs without a picture, by reason.", ["reason"])
        self._rejected = self._counter("rejected_requests", "Requests that the queue refused, by reason.", ["reason"])
        self._webhooks = self._counter("webhooks", "Tries to send a webhook, by outcome.", ["outcome"])
        self._duration = self._histogram("request_duration_seconds", "From request to answer.", ["route"], SECONDS)
        self._queue_wait = self._histogram("queue_wait_seconds", "From acceptance to a worker.", named, SECONDS)
        self._job = self._histogram("job_duration_seconds", "From acceptance to the pictures.", named, SECONDS)
        self._inference = self._histogram("inference_duration_seconds", "One call of the runtime.", drawn, SECONDS)
        self._batch = self._histogram("batch_size", "Images in one call of the runtime.", drawn, BATCH)
        self._splits = self._counter("oom_splits", "Calls that were halved for want of memory.", drawn)
        self._reward = self._histogram("reward_score", "Standardised scores.", [*named, "scorer"], SCORES)
        self.inflight = self._gauge("inflight_requests", "Requests for images that wait for an answer.")
        self._waiting = self._gauge("queue_depth", "Jobs that wait for a worker.")
        self._running = self._gauge("running_jobs", "Jobs that a worker holds.")
        self._oldest = self._gauge("queue_oldest_age_seconds", "Age of the oldest waiting job.")
        self._workers = self._gauge("workers", "Workers that have given a sign of life lately.")
        self._models = self._gauge("model_workers", "Workers that hold a student.", named)
        self._queue = QueueCounters()
        self.registry.register(self._queue)
        info = {"model": model, "version": version, **build}
        self._gauge("build_info", "Always 1; the labels tell.", list(info)).labels(**info).set(1)

    def _counter(self, name: str, documentation: str, labels: list[str]) -> Counter:
        return Counter(f"fewstep_{name}", documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"fewstep_{name}", documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, labels: list[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(f"fewstep_{name}", documentation, labels, buckets=buckets, registry=self.registry)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(route, method, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a request that the queue refused."""
        self._rejected.labels(reason).inc()

    def webhook(self, outcome: str) -> None:
        """Count a try to send a webhook."""
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
        if record.state is not State.DONE:
            self._failures.labels(result["error"]["code"] if "error" in result else record.state.value).inc()
            return
        self._queue_wait.labels(*names).observe(result["timings"]["queue_s"])
        self._job.labels(*names).observe((record.finished_s or record.created_s) - record.created_s)
        self._images.labels(*names).inc(len(result["images"]))
        for image in result["images"]:
            for scorer, score in image["reward"].items():
                self._reward.labels(*names, scorer).observe(score)

    def queue(self, depth: Depth) -> None:
        """Note how full the queue is."""
        self._waiting.set(depth.waiting)
        self._running.set(depth.running)
        self._oldest.set(depth.oldest_s)
        self._workers.set(depth.workers)
        self._queue.counters = depth.counters

    def models(self, workers: Mapping[tuple[str, str], int]) -> None:
        """Note how many workers hold each (model, version)."""
        self._models.clear()
        for names, count in workers.items():
            self._models.labels(*names).set(count)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
