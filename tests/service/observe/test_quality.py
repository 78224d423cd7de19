"""What Prometheus sees of probes, drifts and canaries: every gauge with its labels, and nothing of what is over."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace

import pytest

from service.http.drift_log import DriftLog, probes_of
from service.observe.gauges import SeenGauge, SeenGauges
from service.observe.quality import QualityMetrics
from service.quality.canary import Canary, Plan, Sum, Sums, read_sums
from service.quality.drift import Probes, Stream
from service.queue.connection import connect_async
from service.queue.status import Worker
from student.probe import Outcome
from tests.service.support import Queue

DAY_S = 86_400


def shown(gauges: SeenGauges) -> dict[str, float]:
    return {
        f"{sample.name} {' '.join(f'{name}={value}' for name, value in sorted(sample.labels.items()))}".strip(): (
            sample.value
        )
        for family in gauges.collect()
        for sample in family.samples
    }


@pytest.fixture
def gauges() -> SeenGauges:
    return SeenGauges()


@pytest.fixture
def metrics(gauges: SeenGauges) -> QualityMetrics:
    return QualityMetrics(gauges.add)


def test_a_gauge_without_labels_is_0_until_it_is_set_and_one_with_labels_is_not_there() -> None:
    plain, labelled = SeenGauge("a", "d", ()), SeenGauge("b", "d", ("x", "y"))
    assert [sample.value for sample in plain.collect().samples] == [0.0] and labelled.collect().samples == []
    plain.set(2)
    labelled.set(3, "1", "2")
    assert [(s.labels, s.value) for s in labelled.collect().samples] == [({"x": "1", "y": "2"}, 3.0)]
    labelled.clear()
    assert labelled.collect().samples == [] and plain.collect().samples[0].value == 2.0


def test_probes_are_counted_by_outcome_with_the_oldest_and_the_largest_change(
    gauges: SeenGauges, metrics: QualityMetrics
) -> None:
    same, shifted = {"outcome": "same", "at_s": 50.0, "score_shift": 0.01}, {"outcome": "scores_changed", "at_s": 40.0,
                                                                           "score_shift": 0.5}  # fmt: skip
    metrics.probes([{"m/1": {"probe": same}}, {"m/1": {"probe": shifted}, "n/2": {}}, {"m/1": {"probe": same}}])
    assert shown(gauges) == {
        "probe_workers model=m outcome=same version=1": 2.0,
        "probe_workers model=m outcome=scores_changed version=1": 1.0,
        "probe_workers model=n outcome=none version=2": 1.0, "probe_oldest_timestamp_seconds model=m version=1": 40.0,
        "probe_score_shift model=m version=1": 0.5,
    }  # fmt: skip
    metrics.probes([])
    assert shown(gauges) == {}


STREAM = Stream("m", "1", 4, "64x64", "trained", False, 1200, -0.5, 0.25, 1.5, "lower")


def test_a_drift_is_shown_with_its_cause_and_a_quiet_stream_with_none(
    gauges: SeenGauges, metrics: QualityMetrics
) -> None:
    quiet = replace(STREAM, scorer="heldout", selected=True, evidence=0.5)
    metrics.drift([STREAM, quiet], Probes({"m/1": frozenset({Outcome.PIXELS_CHANGED})}))
    of = "model=m scorer=trained selected=false size=64x64 steps=4 version=1"
    other = "model=m scorer=heldout selected=true size=64x64 steps=4 version=1"
    assert shown(gauges) == {
        f"drift_mean_score {of}": -0.5, f"drift_low_share {of}": 0.25, f"drift_jobs {of}": 1200.0,
        f"drift_evidence {of}": 1.5, f"drift_alarm cause=engine {of}": 1.0, f"drift_mean_score {other}": -0.5,
        f"drift_low_share {other}": 0.25, f"drift_jobs {other}": 1200.0, f"drift_evidence {other}": 0.5,
        f"drift_alarm cause=none {other}": 0.0,
    }  # fmt: skip
    metrics.drift([], Probes())
    assert shown(gauges) == {}


def test_a_canary_is_shown_with_its_sums_and_the_width_of_what_is_known(
    gauges: SeenGauges, metrics: QualityMetrics
) -> None:
    row = {"pairs": "100", "base_failed": "2", "candidate_failed": "3", "reward:trained|n": "95",
           "reward:trained|s": "-19.0", "reward:trained|q": "23.8"}  # fmt: skip
    sums, plan = read_sums(row), Plan(alpha=0.09)
    metrics.canaries([(Canary("m", "1", "2", "e", 0.1, plan, "rolled_back"), sums)])
    of = "base=1 candidate=2 model=m"
    found = shown(gauges)
    width = found.pop(f"canary_half_width {of} scorer=trained")
    assert found == {
        f"canary_state {of} state=rolled_back": 1.0, f"canary_pairs {of}": 100.0,
        f"canary_failed_pairs {of} side=base": 2.0, f"canary_failed_pairs {of} side=candidate": 3.0,
        f"canary_difference {of} scorer=trained": -0.2,
    }  # fmt: skip
    assert width == pytest.approx(sums.rewards["trained"].half_width(0.03)), (
        "one of three figures may be wrong by alpha"
    )
    assert 0 < width < math.inf and isinstance(sums, Sums) and isinstance(sums.rewards["trained"], Sum)
    metrics.canaries([])
    assert shown(gauges) == {}


def test_streams_of_the_last_week_are_read_and_older_ones_are_not(queue: Queue) -> None:
    now_us = queue.client.time()[0] * 1_000_000
    for key, age_s in (("m/1|4|64x64|trained|raw", 6.9 * DAY_S), ("m/2|4|64x64|trained|selected", 7.1 * DAY_S)):
        state = {"n": 3, "mean": 0.5, "low": 0.25, "at_us": str(int(now_us - age_s * 1e6))}
        queue.client.hset(f"{queue.prefix}dr", key, json.dumps(state))

    async def streams() -> list[Stream]:
        client = connect_async(queue.url)
        try:
            return await DriftLog(client, queue.model).streams()
        finally:
            await client.aclose()

    assert asyncio.run(streams()) == [Stream("m", "1", 4, "64x64", "trained", False, 3, 0.5, 0.25)]


def test_what_workers_say_of_their_probes_is_put_together_by_student() -> None:
    def worker(**models: dict[str, str]) -> Worker:
        return Worker(
            "w", "r", "h", 8, False, {f"{id}/1": {"probe": probe} if probe else {} for id, probe in models.items()}
        )

    found = probes_of([worker(m={"outcome": "same"}, n={}), worker(m={"outcome": "failed"})])
    assert found == Probes({"m/1": frozenset({"same", "failed"}), "n/1": frozenset({"none"})})
    assert found.of(STREAM) == {"same", "failed"} and found.of(replace(STREAM, model="o")) == frozenset()
