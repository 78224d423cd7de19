"""The counters that all processes keep together on the queue's server, as metrics."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from service.observe.background import Background
from service.quality.feedback import WORDS
from service.queue.status import FAILED
from student.probe import Outcome

COUNTERS = {
    "finished": "Jobs that have ended, in any state.",
    "redelivered": "Jobs that were requeued after their worker was lost.",
    "fenced": "Results that were refused because the worker's lease had expired.",
    "dead": "Jobs that were given up after too many lost workers.",
}
# What workers report of their devices, in milliseconds.
DEVICE = {
    "busy": "Seconds that workers' devices were busy.",
    "starved": "Seconds that workers' devices were idle while a job was waiting.",
}
PROBES = "probe_"  # before what a golden probe found, among the queue's counters


class QueueCounters(Collector):
    """The counters that the queue's server keeps, as of the last reading."""

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}
        self.background = Background()

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        for name, documentation in COUNTERS.items():
            family = CounterMetricFamily(f"fewstep_jobs_{name}", documentation)
            family.add_metric([], self.counters.get(name, 0))
            yield family
        for name, documentation in DEVICE.items():
            family = CounterMetricFamily(f"fewstep_device_{name}_seconds", documentation)
            family.add_metric([], self.counters.get(f"device_{name}_ms", 0) / 1000)
            yield family
        yield self._probes()
        yield self._feedback()
        yield self._failures()

    def _probes(self) -> CounterMetricFamily:
        family = CounterMetricFamily("fewstep_probe_runs", "Golden probes, by what they found.", labels=["outcome"])
        for outcome in Outcome:
            family.add_metric([outcome], self.counters.get(f"{PROBES}{outcome}", 0))
        return family

    def _feedback(self) -> GaugeMetricFamily:
        text = "Images by their latest feedback from clients."
        family = GaugeMetricFamily("fewstep_feedback_images", text, labels=["feedback"])
        for word in WORDS:
            family.add_metric([word], self.counters.get(f"feedback_{word}", 0))
        return family

    def _failures(self) -> CounterMetricFamily:
        """Those that all processes have reported to the queue, and those that this one has yet to report."""
        reported = {name.removeprefix(FAILED): n for name, n in self.counters.items() if name.startswith(FAILED)}
        counts = collections.Counter(reported) + collections.Counter(self.background.unreported)
        text = "Failures of background tasks; each is retried."
        family = CounterMetricFamily("fewstep_background_failures", text, labels=["task"])
        for task, count in counts.items():
            family.add_metric([task], count)
        return family
