"""What Prometheus sees of the quality of what is drawn: golden probes, drift tests, canaries.

All of it lies in the queue's server, so that every HTTP process shows the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from service.observe.gauges import SeenGauge
from service.quality.canary import Canary, Sums
from service.quality.drift import Probes, Stream, cause

NAMED = ["model", "version"]
STREAM = [*NAMED, "scorer", "steps", "size", "selected"]
COMPARED = ["model", "base", "candidate"]


class MakeGauge(Protocol):
    def __call__(self, name: str, documentation: str, labels: Sequence[str] = ()) -> SeenGauge: ...


class QualityMetrics:
    """Gauges that are set anew at every scrape; ``gauge`` makes one."""

    def __init__(self, gauge: MakeGauge) -> None:
        self._probes = gauge("probe_workers", "Workers with a student, by what its probe found.", [*NAMED, "outcome"])
        self._probe_at = gauge("probe_oldest_timestamp_seconds", "Time of the oldest worker's last probe.", NAMED)
        self._probe_shift = gauge("probe_score_shift", "Largest change of a probe's score, of any worker.", NAMED)
        self._mean = gauge("drift_mean_score", "Mean score of the newest 1,000 jobs.", STREAM)
        self._low = gauge("drift_low_share", "Share below the reference's 5th percentile.", STREAM)
        self._jobs = gauge("drift_jobs", "Jobs that the drift test has counted.", STREAM)
        self._evidence = gauge("drift_evidence", "Evidence of a drift; 1 is an alarm.", STREAM)
        self._alarm = gauge("drift_alarm", "Whether scores have drifted, by cause.", [*STREAM, "cause"])
        self._state = gauge("canary_state", "1 for the state of a model's last canary.", [*COMPARED, "state"])
        self._pairs = gauge("canary_pairs", "Pairs that both versions have drawn.", COMPARED)
        self._failed = gauge("canary_failed_pairs", "Pairs that failed with one version alone.", [*COMPARED, "side"])
        self._difference = gauge("canary_difference", "Mean score, candidate minus base.", [*COMPARED, "scorer"])
        self._width = gauge("canary_half_width", "Of that mean's confidence sequence.", [*COMPARED, "scorer"])

    def probes(self, workers: Iterable[Mapping[str, Mapping[str, Any]]]) -> None:
        """Note what each worker's golden probes have found: by ``id/version``, what it says of that student."""
        _clear(self._probes, self._probe_at, self._probe_shift)
        found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for models in workers:
            for name, about in models.items():
                id, _, version = name.partition("/")
                found[id, version].append(about.get("probe", {"outcome": "none"}))
        for names, probes in found.items():
            for outcome, count in Counter(each["outcome"] for each in probes).items():
                self._probes.set(count, *names, outcome)
            if times := [each["at_s"] for each in probes if "at_s" in each]:
                self._probe_at.set(min(times), *names)
            if shifts := [each["score_shift"] for each in probes if "score_shift" in each]:
                self._probe_shift.set(max(shifts), *names)

    def drift(self, streams: Sequence[Stream], probes: Probes) -> None:
        """Note what the drift tests know."""
        _clear(self._mean, self._low, self._jobs, self._evidence, self._alarm)
        for one in streams:
            labels = (one.model, one.version, one.scorer, str(one.steps), one.size, str(one.selected).lower())
            self._mean.set(one.mean, *labels)
            self._low.set(one.low_share, *labels)
            self._jobs.set(one.count, *labels)
            self._evidence.set(one.evidence, *labels)
            why = cause(one, probes, streams) if one.drifts else "none"
            self._alarm.set(one.drifts, *labels, why)

    def canaries(self, canaries: Iterable[tuple[Canary, Sums]]) -> None:
        """Note each model's last canary, and what its pairs have shown."""
        _clear(self._state, self._pairs, self._failed, self._difference, self._width)
        for canary, sums in canaries:
            names = (canary.model, canary.base, canary.candidate)
            self._state.set(1, *names, canary.state)
            self._pairs.set(sums.pairs, *names)
            self._failed.set(sums.base_failed, *names, "base")
            self._failed.set(sums.candidate_failed, *names, "candidate")
            for scorer, row in sums.rewards.items():
                self._difference.set(row.mean, *names, scorer)
                self._width.set(row.half_width(canary.plan.alpha / (len(sums.rewards) + 2)), *names, scorer)


def _clear(*gauges: SeenGauge) -> None:
    for gauge in gauges:
        gauge.clear()
