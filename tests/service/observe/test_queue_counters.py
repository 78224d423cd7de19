"""Each counter of the queue's server arrives at its own metric, in seconds where it is a time."""

from __future__ import annotations

from service.observe.queue_counters import QueueCounters
from service.quality.feedback import WORDS
from student.probe import Outcome


def values(counters: QueueCounters) -> dict[str, float]:
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in counters.collect()
        for sample in family.samples
    }


def test_everything_is_nought_before_anything_was_read() -> None:
    found = values(QueueCounters())
    assert set(found.values()) == {0}
    assert [name.partition(" ")[2] for name in found if " " in name] == [*Outcome, *WORDS], "each label from the first"


def test_each_counter_is_its_own_metric() -> None:
    counters = QueueCounters()
    counters.counters = {
        "finished": 1, "redelivered": 2, "fenced": 3, "dead": 4, "device_busy_ms": 5500, "device_starved_ms": 6250,
        "probe_same": 7, "probe_failed": 8, "feedback_chosen": 9, "feedback_rerolled": 10, "failed:sweep": 11,
    }  # fmt: skip
    found = {name: value for name, value in values(counters).items() if value}
    assert found == {
        "fewstep_jobs_finished_total": 1, "fewstep_jobs_redelivered_total": 2, "fewstep_jobs_fenced_total": 3,
        "fewstep_jobs_dead_total": 4, "fewstep_device_busy_seconds_total": 5.5,
        "fewstep_device_starved_seconds_total": 6.25, "fewstep_probe_runs_total same": 7,
        "fewstep_probe_runs_total failed": 8, "fewstep_feedback_images chosen": 9,
        "fewstep_feedback_images rerolled": 10, "fewstep_background_failures_total sweep": 11,
    }  # fmt: skip


def test_failures_are_those_that_were_reported_and_those_that_are_yet_to_be() -> None:
    counters = QueueCounters()
    for _ in range(5):
        counters.background.duty("sweep").failed(OSError())
    counters.background.duty("reap").failed(OSError())
    counters.background.reported({"sweep": 3})
    counters.counters = {"failed:sweep": 40}
    found = {name: value for name, value in values(counters).items() if value}
    assert found == {"fewstep_background_failures_total sweep": 42, "fewstep_background_failures_total reap": 1}
